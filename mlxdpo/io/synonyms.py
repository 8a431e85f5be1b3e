"""What settings are called elsewhere: the names that TRL, PEFT, Axolotl, LLaMA-Factory and mlx-lm use for ours.

One table serves the recipes that `mlxdpo import-recipe` reads and the message about an unknown setting.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection

THEIR_NAMES = {
    "out": "output_dir out_dir output output_path save_dir save_path adapter_path run_dir",
    "stage": "train_mode trainer training_type task",
    "model.path": "base_model model_name_or_path model_name model_id model_path pretrained_model_name_or_path",
    "model.revision": "model_revision revision_of_model",
    "model.dtype": "torch_dtype dtype precision bf16 fp16",
    "model.quantize": "load_in_4bit load_in_8bit quantization quantization_bit bits",
    "model.adapter": "resume_adapter_file lora_model_dir adapter_name_or_path adapter",
    "reference.model": "ref_model reference_model reference_model_path ref_model_path",
    "reference.adapter": "ref_model_adapters ref_adapter",
    "reference.sync_every": "ref_model_sync_steps",
    "reference.sync_alpha": "ref_model_mixup_alpha sync_mix",
    "data.path": "dataset dataset_name datasets dataset_path data_path train_file train_data train_dataset file",
    "data.split": "dataset_train_split train_split dataset_split",
    "data.eval": "dataset_test_split eval_dataset test_datasets validation_file valid_data eval_data eval_file",
    "data.eval_fraction": "val_set_size val_size test_size eval_split validation_split eval_ratio",
    "data.max_length": "max_seq_length max_seq_len sequence_len cutoff_len max_len max_prompt_length context_length",
    "data.format": "dataset_format data_format dataset_type",
    "data.columns": "column_mapping columns_mapping field_messages",
    "data.template": "chat_template",
    "loss.name": "loss_type pref_loss dpo_cpo_loss_type dpo_loss_type rl objective loss dpo_loss loss_fn",
    "loss.weights": "loss_weights",
    "loss.beta": "dpo_beta pref_beta rl_beta kl_coef",
    "loss.label_smoothing": "dpo_label_smoothing",
    "loss.gamma": "gamma simpo_gamma simpo_gamma_beta_ratio target_reward_margin",
    "loss.desirable_weight": "kto_desirable_weight kto_chosen_weight",
    "loss.undesirable_weight": "kto_undesirable_weight kto_rejected_weight",
    "loss.f_divergence": "f_divergence_type",
    "loss.f_alpha": "f_alpha_divergence_coef",
    "loss.wpo": "use_weighting dpo_use_weighting",
    "loss.dpop_lambda": "delta dpop_delta",
    "loss.ld_alpha": "pref_ld_alpha",
    "lora.method": "fine_tune_type finetuning_type use_peft peft train_type use_dora peft_use_dora",
    "lora.rank": "lora_r lora_rank r rank",
    "lora.alpha": "lora_alpha alpha",
    "lora.scale": "lora_scale",
    "lora.dropout": "lora_dropout dropout",
    "lora.keys": "lora_target_modules lora_target target_modules lora_targets lora_target_linear",
    "lora.layers": "num_layers lora_layers",
    "optim.name": "optimizer optim_name",
    "optim.lr": "learning_rate lr peak_lr max_lr learning_rate_init",
    "optim.schedule": "lr_scheduler_type lr_scheduler lr_schedule scheduler",
    "optim.warmup": "warmup_ratio warmup_steps warmup num_warmup_steps lr_warmup_steps",
    "optim.weight_decay": "wd",
    "optim.betas": "adam_beta1 adam_beta2",
    "optim.max_grad_norm": "gradient_clipping grad_clip clip_grad_norm clip max_norm",
    "train.epochs": "num_train_epochs num_epochs n_epochs epochs epoch",
    "train.steps": "max_steps iters iterations num_steps num_iters total_steps steps",
    "train.batch_size": "per_device_train_batch_size micro_batch_size train_batch_size batch_size batch bs",
    "train.gradient_accumulation": "gradient_accumulation_steps grad_accumulation_steps accumulate accumulation_steps",
    "train.gradient_checkpointing": "grad_checkpoint gradient_checkpoint checkpoint activation_checkpointing",
    "train.seed": "data_seed random_seed seed",
    "train.eval_every": "eval_steps steps_per_eval eval_interval",
    "train.save_every": "save_steps save_interval checkpointing_steps",
    "train.keep_checkpoints": "save_total_limit keep",
    "train.keep_model": "load_best_model_at_end final",
    "train.patience": "early_stopping_patience",
    "train.minutes": "max_time time_limit time",
    "log.every_steps": "logging_steps steps_per_report log_interval",
    "log.trackers": "report_to wandb tracker",
    "resume": "resume_from_checkpoint",
}
"""The settings of a recipe by the names that others have for them, most usual first."""

SYNONYMS = {theirs: ours for ours, names in THEIR_NAMES.items() for theirs in names.split()}
"""Their name -> ours, dotted."""


def right_name(given: str, known: Collection[str]) -> str | None:
    """Which of the dotted names in `known` is meant by `given`: by meaning, else by section or spelling; None if none.

    `given` may be dotted: in train.learning_rate the last part counts.
    """
    whole = given.replace("-", "_").lower()
    last = whole.rpartition(".")[2]
    leaves = [name for name in known if name.rpartition(".")[2] == last]
    for meant in (SYNONYMS.get(whole), SYNONYMS.get(last), leaves[0] if len(leaves) == 1 else None):
        if meant in known:
            return meant
    near = difflib.get_close_matches(whole, known, n=1, cutoff=0.7)
    if not near:  # a section that is right narrows the choice, a letter counts for more then
        section = whole.rpartition(".")[0]
        inside = [name for name in known if name.rpartition(".")[0] == section]
        tails = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in inside], n=1, cutoff=0.5)
        near = [f"{section}.{tails[0]}".lstrip(".")] if tails else []
    if not near and "." not in whole:  # the last word alone, spelled differently
        tails = difflib.get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1, cutoff=0.75)
        near = [name for name in known if name.rpartition(".")[2] in tails][:1]
    return near[0] if near else None
