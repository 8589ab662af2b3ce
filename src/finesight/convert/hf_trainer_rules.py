"""Conversion rules for settings of the transformers 5 Trainer.

ms-swift and LLaMA-Factory both accept these settings.
"""

from __future__ import annotations

from finesight.convert.setting_rules import SettingRule, ignored, maps_to, unsupported

REASON_AUTOMATIC = "finesight selects it automatically"
REASON_RECORDED = "the run folder always contains it"
REASON_NO_EFFECT = "no effect on the result"

RULES: dict[str, SettingRule] = {
    "per_device_train_batch_size": maps_to("train.batch_size"),
    "gradient_accumulation_steps": maps_to("train.batch_size"),
    "learning_rate": maps_to("train.learning_rate"),
    "num_train_epochs": maps_to("train.epochs"),
    "max_steps": maps_to("train.steps"),
    "lr_scheduler_type": maps_to("train.lr_schedule", "train.warmup"),
    "warmup_ratio": maps_to("train.warmup"),
    "warmup_steps": maps_to("train.warmup"),
    "weight_decay": maps_to("train.weight_decay"),
    "adam_beta1": maps_to("train.betas"),
    "adam_beta2": maps_to("train.betas"),
    "max_grad_norm": maps_to("train.max_grad_norm"),
    "optim": maps_to("train.optimizer"),
    "bf16": maps_to("train.precision"),
    "fp16": maps_to("train.precision"),
    "seed": maps_to("train.seed", "train.data_seed"),
    "data_seed": maps_to("train.data_seed"),
    "save_steps": maps_to("train.save_every"),
    "save_strategy": maps_to("train.save_every"),
    "save_total_limit": maps_to("train.keep_checkpoints"),
    "deepspeed": maps_to("train.parallel"),
    "fsdp": maps_to("train.parallel"),
    "report_to": maps_to("track"),
    "output_dir": maps_to("output_dir"),
    "use_cpu": maps_to("train.device"),
    **ignored(
        REASON_AUTOMATIC,
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
    **ignored(
        REASON_RECORDED,
        *("logging_steps", "logging_strategy", "logging_first_step", "logging_dir", "log_level"),
        *("log_level_replica", "log_on_each_node", "logging_nan_inf_filter", "disable_tqdm"),
        *("include_num_input_tokens_seen", "save_safetensors", "save_only_model", "plot_loss"),
        *("save_on_each_node", "load_best_model_at_end", "skip_memory_metrics", "run_name"),
        *("include_tokens_per_second", "max_shard_size", "safe_serialization"),
    ),
    **ignored(
        REASON_NO_EFFECT,
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
    **unsupported(
        "upload the trained model with `finesight export`", "push_to_hub", "hub_model_id"
    ),
    **unsupported(
        "the schedule has no parameters in finesight", "lr_scheduler_kwargs", "optim_args"
    ),
    **unsupported("all adapters or weights of a part are trained", "optim_target_modules"),
    **unsupported(
        "noisy embeddings are not supported", "neftune_noise_alpha", equivalent_values=(0.0,)
    ),
    **unsupported(
        "label smoothing is not supported", "label_smoothing_factor", equivalent_values=(0.0,)
    ),
    **unsupported("finesight uses 1e-8", "adam_epsilon", equivalent_values=(1e-8,)),
    **unsupported(
        "finesight shuffles the samples in each epoch",
        "train_sampling_strategy",
        equivalent_values=("random", "group_by_length"),
    ),
    **unsupported(
        "the validation loss is computed before and after training; for more evaluations,"
        " add eval: {metric: captions, every: STEPS}",
        *("eval_steps", "eval_on_start"),
    ),
    **unsupported(
        "the validation loss is computed before and after training; for more evaluations,"
        " add eval: {metric: captions, every: STEPS}",
        *("eval_strategy", "evaluation_strategy"),
        equivalent_values=("no",),
    ),
    **unsupported(
        "add eval: {metric: captions}, or another metric (finesight eval --help)",
        *("predict_with_generate", "generation_max_length", "generation_num_beams"),
        *("generation_config", "do_predict"),
    ),
    **unsupported(
        "checkpoints of other programs are not supported; set `adapter` to an adapter"
        " folder to continue with a new optimizer",
        "resume_from_checkpoint",
    ),
    **unsupported("set the environment variables of the tracker", "trackio_space_id"),
}
