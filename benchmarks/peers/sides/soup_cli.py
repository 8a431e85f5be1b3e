"""soup-cli's side: the loop of its `MLXDPOTrainerWrapper`, untouched, driven through the methods it is built of.

It tokenises, plans its batches, lays each of them out and reports after each update by methods of its own. The first
two give the job's pairs and steps here, the third waits for the next step command, the last stops the clock.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

from benchmarks.peers.sides.protocol import Channel, Job, placed, serve

NO_CLIPPING = 1e9  # it has no way to switch clipping off


def run(job: Job, channel: Channel) -> None:
    """Load the model as its command line does, then its own loop."""
    if job.blas:
        ctypes.CDLL(job.blas, mode=ctypes.RTLD_GLOBAL)  # before mlx.core, or it has no effect
    import mlx.core as mx
    from soup_cli.trainer import mlx_optim

    trainer = _driven(job, channel)
    own = mlx_optim.build_optimizer

    def corrected(plan: Any) -> Any:
        """Its optimizer, with the bias correction that the others have."""
        optimizer = own(plan)
        optimizer.bias_correction = True
        return optimizer

    trainer.setup({"train": [], "val": []})
    block, call = type(trainer.model.layers[0]), type(trainer.model.layers[0]).__call__
    mx.eval(trainer.model.parameters())
    mlx_optim.build_optimizer = corrected
    try:
        trainer.train()
    finally:
        mlx_optim.build_optimizer = own
        block.__call__ = call  # its checkpointing replaces this on the class, once more for each run


def _settings(job: Job) -> Any:
    from soup_cli.config.schema import SoupConfig

    adapters = {"r": job.rank, "alpha": round(job.scale * job.rank), "dropout": 0.0, "target_modules": list(job.keys)}
    return SoupConfig.model_validate(
        {
            "base": job.model,
            "task": "dpo",
            "backend": "mlx",
            "data": {"train": job.pairs},
            "output": job.folder,
            "training": {
                "epochs": 1,
                "lr": job.lr,
                "batch_size": job.batch_size,
                "gradient_accumulation_steps": 1,
                "gradient_checkpointing": "checkpoint" in job.switches,
                "dpo_beta": job.beta,
                "lora": adapters,
                "quantization": "none",
                "scheduler": "constant",
                "warmup_ratio": 0.0,
                "weight_decay": 0.0,
                "max_grad_norm": NO_CLIPPING,
                "logging_steps": 1,
            },
        }
    )


def _driven(job: Job, channel: Channel) -> Any:
    import mlx.core as mx
    from soup_cli.trainer.mlx_dpo import MLXDPOTrainerWrapper, PreferenceExample

    pairs = job.read_pairs()
    seen = sorted({i for batch in job.batches for i in batch})
    place = {pair: number for number, pair in enumerate(seen)}

    class Driven(MLXDPOTrainerWrapper):
        """Its trainer over the job's pairs, a step for each command."""

        def _check_train_split_size(self, dataset: Any) -> None:
            """The rows come later."""

        def _examples(self, rows: list, split: str = "train") -> tuple[list, int]:
            examples = [PreferenceExample(**{f"{name}_ids": ids for name, ids in pairs[i].items()}) for i in seen]
            return (examples, 0) if split == "train" else ([], 0)

        def _plan_batches(self, *_: Any) -> list:
            steps = [[place[i] for i in batch] for batch in job.batches]
            return [*steps, steps[-1]]  # more than will be asked for

        def _apply_lora(self, model: Any) -> None:
            super()._apply_lora(model)
            model.load_weights(placed(mx.load(job.adapter), model), strict=False)

        def _prepare_objective(self, *arguments: Any) -> None:
            started = time.perf_counter()
            super()._prepare_objective(*arguments)
            seconds = time.perf_counter() - started
            mx.reset_peak_memory()
            channel.loaded(["soup-cli", "mlx", "mlx-lm"], [], seconds)

        def _batch_arrays(self, examples: list) -> tuple:
            channel.go()
            return super()._batch_arrays(examples)

        def _report(self, *_: Any, **said: Any) -> None:
            channel.done(said["loss"], mx.get_peak_memory())

    return Driven(_settings(job))


if __name__ == "__main__":
    serve(run)
