"""Rare keys of other trainers by their subject: one comment for all keys whose name fits a pattern.

A tool's table of single keys is asked first. Patterns are of whole names, the first that fits counts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

from mlxdpo.recipes.outcome import KeyOutcome, Rule, effect_of, needless

NOT_NEEDED = {
    r"(swanlab|mlflow|hf_mlflow|comet|otel|trackio|tensorboard)_.*"
    r"|use_(swanlab|mlflow|comet|wandb|trackio|tensorboard|otel_metrics)":
        "log.trackers: tensorboard, wandb or trackio; metrics.jsonl has every number",
    r"wandb_.*": "wandb reads WANDB_PROJECT, WANDB_ENTITY and WANDB_NAME from the environment",
    r"logging_.*|log_(level.*|on_.*)|disable_tqdm|plot_loss|include_.*|run_name|project(_name)?|debug"
    r"|(eval_)?compute_accuracy|skip_memory_metrics|(dpo_)?generate_during_eval":
        "every step is in metrics.jsonl, with loss, accuracy, tokens per second and memory",
    r"profiler_.*|profile_modules|enable_torch_profiler|print_param_status|.*_verbose":
        "of PyTorch's profiler; metrics.jsonl has the time and memory of each step",
    r"ddp.*|deepspeed|deepcompile|fsdp.*|fp32_norm.*|local_rank|world_size|accelerator_config|parallelism_config"
    r"|dataloader_.*|.*num_workers|dataset_(num_proc|processes)|average_tokens_across_devices"
    r"|(use_)?ray(_.*)?|resources_per_worker|master_(addr|port)|dp_(shard|replicate)_size|.*_parallel_(size|degree)"
    r"|(sequence|context|tensor)_parallel|hyper_parallel_.*|use_(mca|megatron_bridge|hyper_parallel)|megatron_.*"
    r"|heads_k_stride|ring_attn_func|overlap_(param|grad)_.*|use_distributed_optimizer|account_for_.*_pipeline_split"
    r"|export_hf_on_finish|extra_config":
        "one process on one Mac; mlx.launch starts several (docs/distributed.md)",
    r"flash_.*|flex_attn.*|(flash|flex|sage|xformers|sdp|eager|large_head)_attention|attn_implementation"
    r"|xformers_.*|sdpa_varlen|gemma4_hybrid_attn_impl|.*_kernels?|use_v1_kernels|torch_compile.*|tiled_mlp.*"
    r"|chunked_cross_entropy.*|.*_fusion|.*liger.*|use_unsloth.*|experts_implementation|moe_(grouped|token)_.*"
    r"|llama4_linearized_experts|dpo_use_logits_to_keep|half_precision_backend":
        "MLX's fused attention and the fused head are always used",
    r"bf16.*|fp16.*|tf32|float(16|32)|bfloat16|pure_bf16|mixed_precision|peft_autocast_adapter_dtype"
    r"|embeddings_skip_upcast|upcast_.*|infer_dtype":
        "model.dtype auto is bfloat16 on a GPU, float32 on a CPU",
    r"device(_map)?|max_memory|gpu_memory_limit|low_cpu_mem_usage|lora_on_cpu|layer_offloading|offload_folder|gc_.*"
    r"|torch_empty_cache_steps|experimental_skip_move_to_device|qlora_sharded_model_loading|torchdistx_path"
    r"|use_cpu|use_(reentrant_gc|kt)|kt_.*|relora_cpu_offload|(gradient|activation)_checkpointing_kwargs":
        "of PyTorch's memory; on a Mac CPU and GPU share one (mlxdpo plan estimates it)",
    r"recompute_.*|selective_checkpointing": "train.gradient_checkpointing recomputes every layer",
    r"gradio_.*|generation_.*|generate_samples|num_generation_samples|do_sample|temperature|top_[pk]|num_beams"
    r"|max_(new_tokens|length)|.*_penalty|skip_special_tokens|vllm(_.*)?|sglang_.*|infer_backend|use_(kv_)?cache"
    r"|predict_with_generate|eval_(num_beams|max_new_tokens|table_size)":
        "answers are sampled by mlxdpo generate, chat and eval, with options of these commands",
    r"do_(bench|causal_lm)_eval|bench_.*|eval_causal_lm_metrics|task(_dir)?|lang|n_shot|save_dir|download_mode"
    r"|eval_on_each_dataset|eval_sequence_len":
        "mlxdpo eval RUN judges the run; --tasks asks lm-evaluation-harness",
    r"export_.*|hub_.*|push_.*|merge_.*|hf_use_auth_token|.*hub_token|tokenizer_save_jinja_files":
        "mlxdpo export RUN writes and pushes; the Hub's login is that of huggingface_hub",
    r"save_.*|overwrite_.*|dynamic_checkpoint|enable_jit_checkpoint|ignore_data_skip|restore_callback_states.*":
        "checkpoints hold optimizer and order; no run is overwritten; Ctrl-C saves",
    r".*packing.*|.*_packed_sequences|.*multipack.*|.*_sample_concatenation|pretrain_.*attn|block_diag_attn"
    r"|batch_flattening|dpo_padding_free|padding_free|pad_to_.*|pad_token|group_by_length|length_column_name"
    r"|train_sampling_strategy|eval_(do_concat|use_gather|accumulation|batch|delay).*|batch_eval_metrics"
    r"|per_device_eval_batch_size":
        "batches are laid out without padding from the pairs' lengths",
    r"dataset_(keep_in_memory|prepared_path)|num_dataset_shards_to_save|preprocessing_batch_size|streaming|buffer_size"
    r"|data_shared_file_system|tokenized_path|skip_prepare_dataset|precompute_ref_.*|cache_dir|dataset_streaming":
        "encoded pairs and reference log-probs are cached on disk",
    r"bnb_.*|use_bnb_.*|quantization_(type|method|device_map)|double_quantization|gptq":
        "of bitsandbytes; MLX has its own quantisation",
    r"(image|video|audio)_.*|media_dir|crop_to_patches|use_audio_in_video|processor_.*|freeze_mm_modules"
    r"|freeze_(vision_tower|multi_modal_projector|language_model)|role_boundaries":
        "of images, video and sound; rows with them are refused",
    r"ppo_.*|reward_model_.*": "of another stage",
    r"ignore_pad_token_for_loss": "padding is never scored",
    r"is_preprocess|preprocess_iterable|axolotl_config_path|(env_)?capabilities|compute_dtype|model_max_length"
    r"|total_.*tokens|max_packed_sequence_len|strict": "set or checked by that tool alone",
    r"tokenizer_(type|config|legacy|use_fast|use_mistral_common)|use_fast_tokenizer|model_type|type_of_model"
    r"|is_.*_derived_model|base_model_config|cls_model_config|lora_fan_in_fan_out|(lora_)?task_type":
        "read from the model's files",
}  # fmt: skip
"""Keys that change nothing that is learnt, whatever their value: pattern -> why."""

OF_A_METHOD = {
    r"galore_.*": ("use_galore", "GaLore"),
    r"apollo_.*": ("use_apollo", "APOLLO"),
    r"badam_.*": ("use_badam", "BAdam"),
    r"pissa_.*": ("pissa_init", "PiSSA"),
    r"(relora|jagged)_.*": ("relora", "ReLoRA"),
    r"eaft_.*": ("use_eaft use_eaft_loss", "entropy-aware loss"),
    r"asft_.*": ("use_asft_loss", "ASFT"),
    r"pose_.*": ("use_pose", "PoSE"),
    r"qat_(?!enable).*": ("qat_enable", "quantisation-aware training"),
    r"scaling_softmax_.*": ("scaling_softmax", "scaled softmax"),
}
"""Keys of a method that another key switches on: pattern -> (names of that key, the method)."""

NOT_SUPPORTED = {
    r"(qgalore|dion)_.*|use_(galore|apollo|badam|adam_mini)|adam_(beta3|epsilon2)":
        "of another optimizer; optim.name says what is used",
    r"(cosine|lr)_.*|.*_lr(_scale|_ratio)?|.*_lr_embedding|optim_args|adam_epsilon|label_smoothing_factor":
        "one learning rate for all weights; optim.schedule: cosine, linear or constant, down to 0",
    r"(oft|lisa)_.*|pissa_init|module_dropout|relora|use_llama_pro|loftq":
        "the adapter is plain LoRA or DoRA, and starts as such",
    r"peft_init_lora_weights|peft_layer_replication|peft_ensure_weight_tying|peft":
        "the adapter is plain LoRA or DoRA, and starts as such",
    r"lora_(rank|alpha)_pattern": "all layers share lora.rank and lora.alpha",
    r"peft_layers_.*|unfrozen_parameters|freeze_.*": "choose layers with lora.layers and lora.keys",
    r"lora_modules_to_save|modules_to_save|additional_target|lora_target_parameters|optim_target_modules":
        "these layers stay frozen; train them with lora.method full",
    r".*added_tokens.*|(add_|add_special_)?tokens|.*special_tokens.*|resize_.*|.*_embeddings|fix_untrained_tokens"
    r"|.*_token_indices|eot_tokens|chat_template_kwargs":
        "tokens and embeddings stay those of the model",
    r"rope_scaling|overrides_of_model_.*|model_quantization_config.*|scaling_softmax|mixture_of_depths|shift_attn"
    r"|s2_attention|use_onebitllms|quantize_moe_experts":
        "the model is computed as its files describe it",
    r"use_pose": "positions are those of the tokens",
    r"reinit_weights|train_from_scratch": "training starts from the model's weights",
    r"fp8.*|qat(_enable)?|quantization": "training computes in model.dtype; quantise with mlxdpo export",
    r"n(oisy_embedding|eftune_noise)_alpha": "no noise is added to embeddings; runs with it differ",
    r"use_(dft|asft|eaft).*|sft_loss_type": "the loss of stage sft is cross-entropy",
    r"max_samples|dataset_shard_.*|min_sample_len|dataset_exact_deduplication":
        "all rows are trained on; to use some, write them to a file",
    r"preserve_thinking": "see data.thinking and data.reasoning",
    r"curriculum_sampling|shuffle_.*|disable_shuffling|data_seed":
        "pairs are drawn in an order that train.seed decides",
    r"tool_format|chat_template_jinja": "the model's own chat template is used",
    r"activation_(offloading|checkpointing)": "use train.gradient_checkpointing",
    r"plugins|trainer_cls|dpo_norm_loss|calculate_per_token_loss|loss_watchdog_.*":
        "code or checks of that tool are not run",
    r"ebft|diffusion|pretraining_dataset|process_reward_model|num_labels|reward_model(_adapters)?":
        "of another stage or trainer",
}  # fmt: skip
"""Keys without counterpart: pattern -> what leaving them out changes. Off, they change nothing."""


@cache
def rule_by_subject(key: str) -> Rule | None:
    """The rule of the first pattern that fits the whole name; None if none does."""
    for pattern, why in NOT_NEEDED.items():
        if re.fullmatch(pattern, key):
            return needless(why)
    for pattern, (switches, method) in OF_A_METHOD.items():
        if re.fullmatch(pattern, key):
            return _of_a_method(switches, method)
    return next((effect_of(effect) for pattern, effect in NOT_SUPPORTED.items() if re.fullmatch(pattern, key)), None)


def _of_a_method(switches: str, method: str) -> Rule:
    def rule(key: str, value: object, keys: Mapping[str, object]) -> KeyOutcome:
        """Nothing where the method is off."""
        if not any(keys.get(switch) for switch in switches.split()):
            return KeyOutcome("not needed", f"of {method}, which is off")
        return KeyOutcome("not supported", f"of {method}, which is not supported")

    return rule
