"""What becomes of the settings that both programs take from transformers (5)."""

from __future__ import annotations

from finesight.convert.rules import Rule, becomes, lacks, needless

PLANNED = "planned by finesight itself"
KEPT = "the run's folder keeps it anyway"
RUNS = "how the other program runs, without an effect on the result"

RULES: dict[str, Rule] = {
    "per_device_train_batch_size": becomes("train.batch"),
    "gradient_accumulation_steps": becomes("train.batch"),
    "learning_rate": becomes("train.learning_rate"),
    "num_train_epochs": becomes("train.epochs"),
    "max_steps": becomes("train.steps"),
    "lr_scheduler_type": becomes("train.schedule", "train.warmup"),
    "warmup_ratio": becomes("train.warmup"),
    "warmup_steps": becomes("train.warmup"),
    "weight_decay": becomes("train.weight_decay"),
    "adam_beta1": becomes("train.betas"),
    "adam_beta2": becomes("train.betas"),
    "max_grad_norm": becomes("train.clip"),
    "optim": becomes("train.optimizer"),
    "bf16": becomes("train.precision"),
    "fp16": becomes("train.precision"),
    "seed": becomes("train.seed", "train.data_seed"),
    "data_seed": becomes("train.data_seed"),
    "save_steps": becomes("train.save_every"),
    "save_strategy": becomes("train.save_every"),
    "save_total_limit": becomes("train.keep"),
    "deepspeed": becomes("train.parallel"),
    "fsdp": becomes("train.parallel"),
    "report_to": becomes("track"),
    "output_dir": becomes("output"),
    "use_cpu": becomes("train.device"),
    **needless(
        PLANNED,
        *("gradient_checkpointing", "gradient_checkpointing_kwargs", "dataloader_num_workers"),
        *("dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor"),
        *("dataloader_in_order", "dataloader_multiprocessing_context", "activation_checkpointing"),
        *("activation_checkpointing_kwargs", "group_by_length", "length_column_name"),
        *("use_liger_kernel", "liger_kernel_config", "torch_compile", "torch_compile_backend"),
        *("torch_compile_mode", "tf32", "torch_empty_cache_steps", "auto_find_batch_size"),
        *("per_device_eval_batch_size", "eval_accumulation_steps", "bf16_full_eval"),
        *("fp16_full_eval", "use_cache", "fsdp_config", "parallelism_config"),
        *("accelerator_config", "average_tokens_across_devices"),
    ),
    **needless(
        KEPT,
        *("logging_steps", "logging_strategy", "logging_first_step", "logging_dir", "log_level"),
        *("log_level_replica", "log_on_each_node", "logging_nan_inf_filter", "disable_tqdm"),
        *("include_num_input_tokens_seen", "save_safetensors", "save_only_model", "plot_loss"),
        *("save_on_each_node", "load_best_model_at_end", "skip_memory_metrics", "run_name"),
        *("include_tokens_per_second", "max_shard_size", "safe_serialization"),
    ),
    **needless(
        RUNS,
        *("local_rank", "ddp_backend", "ddp_timeout", "ddp_find_unused_parameters"),
        *("ddp_bucket_cap_mb", "ddp_broadcast_buffers", "ddp_static_graph", "debug", "do_train"),
        *("remove_unused_columns", "label_names", "overwrite_output_dir", "full_determinism"),
        *("eval_do_concat_batches", "eval_use_gather_object", "prediction_loss_only"),
        *("include_for_metrics", "batch_eval_metrics", "sortish_sampler", "ignore_data_skip"),
        *("restore_callback_states_from_checkpoint", "enable_jit_checkpoint", "eval_delay"),
        *("do_eval", "project", "trackio_bucket_id", "trackio_static_space_id", "hub_strategy"),
        *("hub_always_push", "hub_revision", "hub_private_repo", "greater_is_better"),
        *("metric_for_best_model", "dataloader_drop_last"),
    ),
    **lacks("push the finished model by `finesight export`", "push_to_hub", "hub_model_id"),
    **lacks("the curve has no settings here", "lr_scheduler_kwargs", "optim_args"),
    **lacks("every part's adapters or weights learn", "optim_target_modules"),
    **lacks("noise on embeddings does not exist here", "neftune_noise_alpha", same=(0.0,)),
    **lacks("labels are not smoothed here", "label_smoothing_factor", same=(0.0,)),
    **lacks("it is 1e-8 here", "adam_epsilon", same=(1e-8,)),
    **lacks(
        "samples are drawn anew in each epoch here",
        "train_sampling_strategy",
        same=("random", "group_by_length"),
    ),
    **lacks(
        "held-out loss is measured before the first step and after the last; for more, add"
        " eval: {metric: captions, every: STEPS}",
        *("eval_steps", "eval_on_start"),
    ),
    **lacks(
        "held-out loss is measured before the first step and after the last; for more, add"
        " eval: {metric: captions, every: STEPS}",
        *("eval_strategy", "evaluation_strategy"),
        same=("no",),
    ),
    **lacks(
        "add eval: {metric: captions}, or another of docs/en/metrics.md",
        *("predict_with_generate", "generation_max_length", "generation_num_beams"),
        *("generation_config", "do_predict"),
    ),
    **lacks(
        "checkpoints of other programs are not read; a folder with an adapter can be named as"
        " `adapter`, and starts with a new optimiser",
        "resume_from_checkpoint",
    ),
    **lacks("set it up in the tracker's own variables", "trackio_space_id"),
}
