"""TRL's side: its `DPOTrainer`, untouched, its steps held and timed by a callback.

On the processor or, switched to `mps`, on a Mac's GPU.

Its data set is replaced by token ids, as its own tokenising would leave them, in the job's order. Its optimizer, its
loss (with its own fused head) and its reference (the adapter switched off, computed in every step) are its defaults.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.sides.protocol import Channel, Job, peak_rss, serve


def run(job: Job, channel: Channel) -> None:
    """Set the trainer up, then its own loop."""
    import torch

    if "mps" in job.switches and not torch.backends.mps.is_available():
        raise RuntimeError("trl:mps needs PyTorch with MPS, on a Mac")
    torch.set_num_threads(job.threads)
    trainer = _trainer(job, _callback(channel))
    _copy_adapter(trainer.model, job.adapter)
    pairs = job.read_pairs()
    rows = [{f"{name}_ids": ids for name, ids in pairs[i].items()} for batch in job.batches for i in batch]
    from datasets import Dataset

    trainer.train_dataset = Dataset.from_list(rows)
    own_step = trainer.training_step

    def training_step(*args: Any, **options: Any) -> Any:
        """TRL's own, its loss kept."""
        loss = own_step(*args, **options)
        trainer.last_loss = float(loss)
        return loss

    trainer.training_step = training_step
    channel.loaded(["trl", "torch", "transformers", "peft"], [f"{torch.get_num_threads()} threads"])
    trainer.train()


def _callback(channel: Channel) -> Any:
    from transformers import TrainerCallback

    class Held(TrainerCallback):
        """Waits before each step and answers after it."""

        trainer: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Its word that a batch is ready and nothing is computed yet."""
            channel.go()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            """Its word that the weights are updated."""
            channel.done(self.trainer.last_loss, peak_rss())

    return Held()


def _trainer(job: Job, held: Any) -> Any:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    arguments = DPOConfig(
        output_dir=job.folder,
        per_device_train_batch_size=job.batch_size,
        train_sampling_strategy="sequential",
        max_steps=len(job.batches) + 1,  # more than will be asked for
        learning_rate=job.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        weight_decay=0.0,
        max_grad_norm=0.0,
        beta=job.beta,
        max_length=None,
        bf16=False,
        gradient_checkpointing="checkpoint" in job.switches,
        use_cpu="mps" not in job.switches,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32),
        args=arguments,
        # It wants text to tokenise; the ids that are measured replace it.
        train_dataset=Dataset.from_list([{"prompt": "a", "chosen": " b", "rejected": " c"}]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=LoraConfig(
            r=job.rank, lora_alpha=job.scale * job.rank, target_modules=[k.rsplit(".", 1)[-1] for k in job.keys]
        ),
        callbacks=[held],
    )
    held.trainer = trainer
    return trainer


def _copy_adapter(model: Any, file: str) -> None:
    """Our matrices into PEFT's, which keeps them transposed; every trainable one must be met."""
    import torch
    from safetensors.torch import load_file

    kinds = {"lora_a": "lora_A.default.weight", "lora_b": "lora_B.default.weight"}
    arrays = load_file(file)
    with torch.no_grad():
        for name, array in arrays.items():
            path, kind = name.rsplit(".", 1)
            model.get_parameter(f"base_model.model.{path}.{kinds[kind]}").copy_(array.T)
    count = sum(parameter.requires_grad for parameter in model.parameters())
    if count != len(arrays):
        raise RuntimeError(f"the model trains {count} matrices, the adapter has {len(arrays)}")


if __name__ == "__main__":
    serve(run)
