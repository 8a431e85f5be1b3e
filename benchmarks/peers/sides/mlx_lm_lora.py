"""mlx-lm-lora's side: its `train_dpo`, untouched, driven through the data set it is given.

It builds its batches anew at every iteration, and first asks the data set for its length: that question waits for the
next step command. Its report comes after everything of a step is evaluated, and stops the clock.

Off Metal it cannot start: it wires memory by a figure that only Metal gives. Those two calls are answered here.
"""

from __future__ import annotations

import ctypes
from typing import Any

from benchmarks.peers.sides.protocol import Channel, Job, placed, serve

NEVER = 10**9


class Turns:
    """The pairs of one step at a time, as its data sets look. Its length is the question that waits for a command."""

    def __init__(self, job: Job, channel: Channel):
        self._channel, self._batches = channel, job.batches
        self._pairs = [_row(pair) for pair in job.read_pairs()]
        self._next, self._asked = 0, False
        self.args: Any = None

    def __len__(self) -> int:
        if not self._asked:
            self._channel.go()
            self._asked = True
        return len(self._batches[self._next])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._pairs[self._batches[self._next][index]]

    def on_train_loss_report(self, report: dict[str, Any]) -> None:
        """Its callback after a step."""
        import mlx.core as mx

        self._next, self._asked = self._next + 1, False
        if self._next < len(self._batches):
            # A data set smaller than its batch size would make it wait for ever.
            self.args.batch_size = len(self._batches[self._next])
        self._channel.done(report["train_loss"], mx.get_peak_memory())

    def on_val_loss_report(self, report: dict[str, Any]) -> None:
        """It validates nothing here."""


def _row(pair: dict[str, list[int]]) -> dict[str, Any]:
    shared = len(pair["prompt"])
    rows = {name: pair["prompt"] + pair[name] for name in ("chosen", "rejected")}
    return rows | {"chosen_prompt_length": shared, "rejected_prompt_length": shared}


def run(job: Job, channel: Channel) -> None:
    """Load policy and reference as its command line does, then its own loop."""
    if job.blas:
        ctypes.CDLL(job.blas, mode=ctypes.RTLD_GLOBAL)  # before mlx.core, or it has no effect
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm import load
    from mlx_lm_lora.trainer.dpo_trainer import DPOTrainingArgs, train_dpo

    notes = _make_startable(mx)
    model, reference = _with_adapter(load(job.model)[0], job), load(job.model)[0].freeze()
    turns = Turns(job, channel)
    turns.args = DPOTrainingArgs(
        batch_size=len(job.batches[0]),
        iters=len(job.batches) + 1,
        steps_per_report=1,
        steps_per_save=NEVER,
        max_seq_length=NEVER,
        grad_checkpoint="checkpoint" in job.switches,
        beta=job.beta,
    )
    optimizer = optim.AdamW(job.lr, weight_decay=0.0, bias_correction=True)
    block, call = type(model.layers[0]), type(model.layers[0]).__call__
    mx.eval(model.parameters(), reference.parameters())
    mx.reset_peak_memory()
    channel.loaded(["mlx-lm-lora", "mlx", "mlx-lm"], notes)
    try:
        train_dpo(model, reference, optimizer, turns, args=turns.args, training_callback=turns)
    finally:
        block.__call__ = call  # its checkpointing replaces this on the class, once more for each run


def _with_adapter(model: Any, job: Job) -> Any:
    import mlx.core as mx
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    settings = {"rank": job.rank, "scale": job.scale, "dropout": 0.0, "keys": set(job.keys)}
    linear_to_lora_layers(model, len(model.layers), settings)
    model.load_weights(placed(mx.load(job.adapter), model), strict=False)
    return model


def _make_startable(mx: Any) -> list[str]:
    """Answer what only Metal answers, and switch compiling off where it fails. Returns what was done."""
    notes = []
    if not mx.metal.is_available():
        told = dict(mx.device_info()) | {"max_recommended_working_set_size": 0}
        mx.device_info = lambda: told
        mx.set_wired_limit = lambda limit: 0
        notes.append("wired memory limit skipped: no Metal")
    try:
        mx.eval(mx.compile(lambda x: mx.exp(x) * 2 + 1)(mx.ones(3)))
    except RuntimeError as error:
        mx.disable_compile()
        notes.append(f"not compiled: {str(error).splitlines()[0]}")
    return notes


if __name__ == "__main__":
    serve(run)
