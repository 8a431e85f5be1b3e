"""What the tests' Mac (`pytest --mac`) does otherwise than a CPU, test by test, and why. Everything else is the same.

Keys are node ids or their beginnings, below tests/. `DIFFERENT` has to fail there: a difference that is gone is news.
`ROUNDED` may fail: its bounds are of float32, and how far bfloat16 is off depends on the processor.
"""

CHUNKS = "attention in chunks is for a CPU, and for a Mac from 1,024 keys on: these rows take Metal's own"
SHORT = "the test's own reference differentiates rows of 8 tokens or fewer, which Metal refuses"
FULL = "lora.method full needs float32, which has to be asked for where bfloat16 is the default"
GELU = "llama.cpp looks GELU up in a table of 16-bit numbers, and adapters trained otherwise meet it otherwise"
NUMPY = "the test reads arrays with NumPy, which has no bfloat16"
SAME = "what the test changes to (bfloat16, a device that is Metal) is what this machine has already"
MEMORY = "the arrays that MLX's CPU back end keeps for attention that the tests make up are not Metal's"
MADE_UP = "the made-up Mac computes on a CPU: its rate, its BLAS and its compiler are that machine's"
SAVED = "the stored run was made in float32 on a CPU, and a resumed or evaluated run keeps its number type"
EXPERTS = "MLX's CPU back end has experts in float32 only"
OTHER_ANSWERS = "other rounding draws other answers, and the judge is caught a round later"

DIFFERENT = {
    "forward/test_attention.py::test_whole_models_train_the_same": CHUNKS,
    "forward/test_attention.py::test_with_layers_under_checkpoint_in_a_compiled_step": CHUNKS,
    "forward/test_attention.py::test_behind_a_prefix_cache": CHUNKS,
    "forward/test_packed.py::test_long_rows_attend_in_chunks": CHUNKS,
    "training/test_preflight.py::test_long_rows_train_through_the_light_attention_to_the_same_losses": CHUNKS,
    "baselines/test_baselines_online.py::test_gradients_of_rloo_are_reinforce_and_do_not_depend_on_the_cut": SHORT,
    "inference/test_reward_model.py::test_rewards_and_gradients_are_those_of_whole_rows[gemma3_text]": SHORT,
    "inference/test_reward_model.py::test_rewards_and_gradients_are_those_of_whole_rows[llama]": SHORT,
    "inference/test_reward_model.py::test_rewards_and_gradients_are_those_of_whole_rows[qwen3]": SHORT,
    "commands/test_bench.py::test_the_answer[extra2]": FULL,
    "estimate/test_plan.py::test_a_skeleton_is_the_model_in_every_shape[gemma2-full]": FULL,
    "estimate/test_plan.py::test_a_skeleton_is_the_model_in_every_shape[gemma3_text-full]": FULL,
    "estimate/test_plan.py::test_a_skeleton_is_the_model_in_every_shape[llama-full]": FULL,
    "estimate/test_plan.py::test_a_skeleton_is_the_model_in_every_shape[qwen3-full]": FULL,
    "online/test_constitution.py::test_a_models_label_is_antisymmetric_to_the_bit_and_is_what_the_letters_say": NUMPY,
    "ui/test_ui_answers.py::test_the_base_is_untouched_by_the_voices": NUMPY,
    "training/test_reference.py::test_another_library_version_or_device_cannot_hit_the_table": SAME,
    "training/test_reference.py::test_runs_score_again_when_weights_dtype_or_adapter_change": SAME,
    "training/test_reference.py::test_runs_share_a_reference_across_beta_rate_seed_and_objective": SAME,
    "training/test_resume.py::test_a_changed_model_is_named": SAME,
    "training/test_resume.py::test_a_changed_reference_is_named": SAME,
    "training/test_former_runs.py::test_a_finished_run_is_evaluated_and_exported": SAVED,
    "training/test_former_runs.py::test_a_stopped_run_goes_on_to_the_bytes_of_the_run_that_finished": SAVED,
    "exporters/test_export_targets.py::test_experts_are_fused_one_by_one": EXPERTS,
    "data/test_audit.py::test_states_are_those_of_each_row_by_itself_whatever_it_is_batched_with": NUMPY,
    "training/test_experts.py::test_adapters_on_experts_learn[None]": EXPERTS,
    "training/test_experts.py::test_the_balancing_loss_is_part_of_the_loss": EXPERTS,
    "training/test_experts.py::test_it_is_refused_where_it_cannot_be_had": EXPERTS,
}

ROUNDED = {
    "exporters/test_export_gguf.py::test_llama_cpp_tokenises_and_continues_alike[gemma3]": GELU,
    "exporters/test_export_targets.py::test_a_base_that_mlx_lm_alone_cannot_load": EXPERTS,
    "inference/test_influence.py::test_the_product_of_the_gradients": "a finite step is lost in bfloat16",
    "estimate/test_memory.py::test_mlx_keeps_what_the_formula_says": MEMORY,
    "estimate/test_plan.py::test_no_weight_is_loaded": MEMORY,
    "commands/test_cli.py::test_doctor_reports_the_fast_blas": MADE_UP,
    "commands/test_bench.py::test_for_a_person": MADE_UP,
    "selfcheck/test_doctor.py::test_where_compiling_does_nothing_no_traces_are_asked_for": MADE_UP,
    "selfcheck/test_doctor.py::test_all_checks_hold_here_and_the_table_is_markdown": MADE_UP,
    "online/test_iterate.py::test_a_gamed_judge_stops_the_rounds": OTHER_ANSWERS,
    "eval/test_eval_command.py::test_a_program_repeats_itself_when_asked_again": "bfloat16",
    "inference/test_strength.py::test_strength_scales_the_product": "bfloat16",
    "exporters/test_export_gate.py::test_a_small_tune_does_not_survive_4_bits": "bfloat16",
    "exporters/test_export_gate.py::test_the_command_prints_figures_and_its_status_is_the_verdict": "bfloat16",
    "exporters/test_export_import.py::test_ranks_scales_and_single_layers_keep_the_function": "bfloat16",
    "exporters/test_export_targets.py::test_a_packed_base_is_unpacked_or_left_alone": "bfloat16",
    "exporters/test_export_targets.py::test_a_packed_run_goes_onto_the_full_model_that_is_named": "bfloat16",
    "exporters/test_export_targets.py::test_a_tied_embedding_is_fused_in_both_places_and_refused_by_peft": "bfloat16",
    "exporters/test_export_targets.py::test_an_export_ends_where_training_taught_it_to": "bfloat16",
    "exporters/test_export_targets.py::test_bfloat16_weights_are_rounded_once": "bfloat16",
    "exporters/test_export_targets.py::test_every_exact_target_is_the_run": "bfloat16",
    "exporters/test_export_targets.py::test_full_training_has_no_peft_form": "bfloat16",
    "exporters/test_export_targets.py::test_only_trained_tensors_change_and_shards_stay": "bfloat16",
    "exporters/test_export_targets.py::test_other_adapters": "bfloat16",
    "exporters/test_export_targets.py::test_weights_packed_when_loading_leave_as_they_computed": "bfloat16",
    "forward/test_architectures.py::test_one_architecture_of_each_kind_of_cache[gpt_oss]": "no gradient with sinks",
    "forward/test_vocabulary.py::test_token_logps_have_no_bias_over_a_large_vocabulary": "Metal's fused cross-entropy",
    "training/test_objective_runs.py::test_a_step_is_the_same_however_it_is_cut": "bfloat16",
    "training/test_preflight.py::test_a_model_without_a_fast_way_takes_the_plain_way_to_the_same_run": "bfloat16",
    "training/test_stages.py::test_however_a_window_is_cut_it_is_one_trajectory": "bfloat16",
    "training/test_stages.py::test_the_supervised_step_is_the_mean_over_completion_tokens": "bfloat16",
    "training/test_step.py::test_batch_times_accumulation_walks_one_trajectory": "bfloat16",
}
