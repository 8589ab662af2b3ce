"""Convert settings of the transformers Trainer, which ms-swift and LLaMA-Factory both accept.

These are model, schedule, optimizer, batch size, checkpoints, parallelism, trackers and output.
"""

from __future__ import annotations

import math
from pathlib import Path

from finesight.bounded_files import parse_json, read_json
from finesight.convert.external_config import ExternalConfig
from finesight.convert.recipe_draft import RecipeDraft, SettingValue
from finesight.convert.shell_parser import has_variable
from finesight.errors import UserError

_LR_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_8bit": "adamw_8bit",
}
_NOTE_SAVE_INTERVAL = "finesight saves four checkpoints per run and the final one"
_TRACKERS = ("swanlab", "tensorboard", "wandb", "mlflow", "trackio")
_PROCESS_COUNT_VARIABLES = ("NPROC_PER_NODE", "NNODES")
NOTE_UNKNOWN_PROCESSES = " (number of GPUs unknown: multiply by it)"
_NO_TRACKER_VALUES = ("none", "all", "[]")


def set_model(
    config: ExternalConfig, draft: RecipeDraft, model: str, hub: tuple[str, str], adapters: str
) -> None:
    """Set the base model and the adapter of the recipe.

    Args:
        config: Configuration of the other program.
        draft: Recipe to fill.
        model: Folder or hub name of the base model.
        hub: Hub of the model (`hf` or `modelscope`), and a comment for the recipe.
        adapters: Name of the setting that lists adapters to continue from.
    """
    revision = config.get_str("model_revision")
    is_local = Path(model).expanduser().exists() or model.startswith(("/", ".", "~"))
    model_name = model if is_local or revision in (None, "main") else f"{model}@{revision}"
    name, comment = hub
    if name == "modelscope" and not is_local:
        draft.set("model", f"modelscope:{model_name}", comment)
    else:
        draft.set("model", model_name)
    first_adapter, *other_adapters = config.get_list(adapters) or (None,)
    if first_adapter is not None:
        draft.set("adapter", first_adapter)
    for adapter in other_adapters:
        draft.add_difference(
            adapters, adapter, "only one adapter can be trained further: merge the others"
        )


def set_schedule(config: ExternalConfig, draft: RecipeDraft) -> None:
    """Set the training duration, learning rate schedule and warmup of the recipe."""
    steps = config.get_int("max_steps")
    if steps is not None and steps > 0:
        draft.set("train.steps", steps)
        if config.has("num_train_epochs") and not config.is_recorded:
            draft.add_note("max_steps", steps, "replaces num_train_epochs, as in transformers")
    else:
        epochs = config.get_float("num_train_epochs")
        draft.set("train.epochs", epochs, config.default_comment("num_train_epochs"))
    scheduler_type = config.get_str("lr_scheduler_type") or "linear"
    if scheduler_type not in _LR_SCHEDULES:
        draft.add_difference(
            "lr_scheduler_type",
            scheduler_type,
            "supported schedules: cosine, linear, constant; cosine is set: choose the"
            " most similar one",
        )
    draft.set(
        "train.lr_schedule",
        _LR_SCHEDULES.get(scheduler_type, "cosine"),
        config.default_comment("lr_scheduler_type"),
    )
    draft.set(
        "train.warmup",
        _compute_warmup(config, scheduler_type),
        _format_warmup_comment(config, scheduler_type),
    )


def _compute_warmup(config: ExternalConfig, scheduler_type: str) -> SettingValue:
    if scheduler_type == "constant":
        return 0
    steps, ratio = config.get_float("warmup_steps") or 0.0, config.get_float("warmup_ratio") or 0.0
    if min(steps, ratio) < 0 or ratio >= 1:
        raise config.build_error(
            "warmup_ratio" if ratio else "warmup_steps", "0 or more, a ratio below 1"
        )
    # transformers interprets warmup_steps below 1 as a ratio.
    if steps >= 1:
        return math.ceil(steps)
    fraction = steps or ratio
    return fraction or 0


def _format_warmup_comment(config: ExternalConfig, scheduler_type: str) -> str:
    keys = "warmup_ratio", "warmup_steps"
    if scheduler_type == "constant":
        text = "`constant` has no warmup in transformers"
        return text if config.is_any_set(*keys) else ""
    return config.default_comment(*keys)


def set_optimizer(config: ExternalConfig, draft: RecipeDraft) -> None:
    """Set optimizer, weight decay, betas, gradient clipping, seeds and device of the recipe."""
    name = config.get_str("optim") or "adamw_torch"
    if name not in _OPTIMIZERS:
        draft.add_difference(
            "optim", name, "supported optimizers: adamw, adamw_8bit, muon; adamw is set"
        )
    draft.set("train.optimizer", _OPTIMIZERS.get(name, "adamw"))
    draft.set(
        "train.weight_decay",
        config.get_float("weight_decay"),
        config.default_comment("weight_decay"),
    )
    betas: list[object] = [config.get_float("adam_beta1"), config.get_float("adam_beta2")]
    draft.set("train.betas", betas, config.default_comment("adam_beta1", "adam_beta2"))
    max_grad_norm = config.get_float("max_grad_norm")
    draft.set("train.max_grad_norm", max_grad_norm if max_grad_norm else None)
    seed = config.get_int("seed")
    draft.set("train.seed", seed, "the order of the samples still differs")
    data_seed = config.get_int("data_seed")
    draft.set("train.data_seed", seed if data_seed is None else data_seed)
    if config.get_bool("use_cpu"):
        draft.set("train.device", "cpu")


def count_processes(config: ExternalConfig) -> tuple[int | None, str]:
    """Return the number of training processes, which is the number of GPUs.

    It is the product of NPROC_PER_NODE and NNODES. The number is None if NPROC_PER_NODE is not set
    or if a script computes one of them. The second value is a note for the latter case.
    """
    if any(has_variable(config.environment.get(name, "")) for name in _PROCESS_COUNT_VARIABLES):
        return None, NOTE_UNKNOWN_PROCESSES
    procs_per_node, num_nodes = (config.get_env_int(name) for name in _PROCESS_COUNT_VARIABLES)
    return None if procs_per_node is None else procs_per_node * (num_nodes or 1), ""


def set_batch_size(
    config: ExternalConfig,
    draft: RecipeDraft,
    accumulation: int,
    num_gpus: int,
    comment_suffix: str,
) -> None:
    """Set `train.batch_size`, the number of samples per optimizer step over all GPUs.

    Args:
        config: Configuration with the batch size per device.
        draft: Recipe to fill.
        accumulation: Gradient accumulation steps.
        num_gpus: Number of GPUs with different samples.
        comment_suffix: End of the recipe comment.
    """
    per_device = config.get_int("per_device_train_batch_size")
    if (
        per_device is None
        or min(per_device, accumulation, num_gpus) < 1
        or max(per_device, accumulation, num_gpus) > 10**9
    ):
        raise config.build_error("per_device_train_batch_size", "an integer above 0")
    description = (
        f"{per_device} per device x {accumulation} accumulation steps x {num_gpus}"
        f" {_pluralize_gpus(num_gpus)}{comment_suffix}"
    )
    draft.set("train.batch_size", per_device * accumulation * num_gpus, description)
    draft.add_note("batch", per_device * accumulation * num_gpus, description)


def _pluralize_gpus(count: int) -> str:
    return "GPU" if count == 1 else "GPUs"


def set_checkpointing(config: ExternalConfig, draft: RecipeDraft) -> None:
    """Set the interval of checkpoints and the number of kept checkpoints."""
    strategy, steps = config.get_str("save_strategy"), config.get_float("save_steps")
    if strategy == "steps" and steps is not None and steps > 0:
        draft.set("train.save_every", steps if steps < 1 else math.ceil(steps))
    elif strategy == "epoch" and (epochs := draft.settings.get("train.epochs")):
        interval = 1 / float(str(epochs))
        if 0 < interval < 1:
            draft.set("train.save_every", round(interval, 6), "once per epoch")
        else:
            draft.add_note("save_strategy", strategy, _NOTE_SAVE_INTERVAL)
    else:
        draft.add_note("save_strategy", strategy, _NOTE_SAVE_INTERVAL)
    max_checkpoints = config.get_int("save_total_limit")
    if max_checkpoints is not None and max_checkpoints > 0:
        draft.set("train.keep_checkpoints", max_checkpoints)


def set_parallelism(config: ExternalConfig, draft: RecipeDraft) -> None:
    """Set `train.parallel` for the DeepSpeed or FSDP settings of the configuration."""
    deepspeed, fsdp = config.get_value("deepspeed"), config.get_str("fsdp")
    if deepspeed:
        stage, offload = _read_deepspeed_stage(deepspeed)
        if stage is None:
            draft.add_difference("deepspeed", deepspeed, "unknown stage: set train.parallel")
            return
        mode = "ddp" if stage == 0 else "zero2" if stage < 3 else "fsdp"
        if offload and stage:
            mode = "fsdp_offload"
        draft.set("train.parallel", mode, f"DeepSpeed stage {stage}{', offload' * offload}")
    elif fsdp and fsdp.lower() not in ("false", "[]"):
        draft.set(
            "train.parallel", "fsdp_offload" if "offload" in fsdp else "fsdp", f"fsdp: {fsdp}"
        )


def _read_deepspeed_stage(deepspeed: object) -> tuple[int | None, bool]:
    """Return the ZeRO stage of a DeepSpeed configuration, and whether it offloads to the CPU.

    Args:
        deepspeed: Content of the configuration, its file, or a name such as `zero2_offload`.

    Returns:
        The stage, None if it is unknown, and whether optimizer state or weights are offloaded.
    """
    name = str(deepspeed)
    content: object = deepspeed
    if isinstance(deepspeed, str) and (name.endswith(".json") or name.startswith("{")):
        try:
            content = parse_json(name) if name.startswith("{") else read_json(Path(name))
        except (UserError, ValueError):
            content = None
    if isinstance(content, dict):
        zero_config = content.get("zero_optimization")
        stage = zero_config.get("stage", 0) if isinstance(zero_config, dict) else 0
        offload = isinstance(zero_config, dict) and any(
            "offload" in str(key) and _offloads_to_cpu(zero_config[key]) for key in zero_config
        )
        return (stage, offload) if stage in (0, 1, 2, 3) else (None, False)
    normalized = Path(name).name.lower().replace("_", "").replace("-", "")
    stages = [
        stage for stage in range(4) if f"zero{stage}" in normalized or f"z{stage}" in normalized
    ]
    return (stages[0] if stages else None), "offload" in normalized


def _offloads_to_cpu(offload: object) -> bool:
    return isinstance(offload, dict) and offload.get("device", "cpu") != "none"


def set_trackers(config: ExternalConfig, draft: RecipeDraft, project: str | None) -> None:
    """Set the experiment trackers of the recipe, with `project` for SwanLab."""
    names = [name for item in config.get_list("report_to") for name in item.split()]
    supported = [name for name in dict.fromkeys(names) if name in _TRACKERS]
    for name in names:
        if name not in (*_TRACKERS, *_NO_TRACKER_VALUES):
            draft.add_difference("report_to", name, f"supported trackers: {', '.join(_TRACKERS)}")
    if supported:
        items: list[object] = [
            {"kind": name, "project": project} if project and name == "swanlab" else name
            for name in supported
        ]
        draft.set("track", items, config.default_comment("report_to"))


def set_output_dir(config: ExternalConfig, draft: RecipeDraft, default: str) -> None:
    """Set the output folder of the recipe.

    It is a new one if a run recorded the configuration.
    """
    output_dir = config.get_str("output_dir")
    if config.is_recorded and output_dir:
        comment = f"new folder: {output_dir} contains the run of {config.program}"
        draft.set("output_dir", f"runs/{Path(output_dir).name or 'converted'}", comment)
        return
    draft.set("output_dir", output_dir or default, config.default_comment("output_dir"))


def require_method(
    config: ExternalConfig, key: str, supported: dict[str, str], reasons: dict[str, str]
) -> str:
    """Return the recipe name of the training method.

    Args:
        config: Configuration of the other program.
        key: Setting with the method.
        supported: Recipe names by method.
        reasons: Reasons why other methods are not supported, for messages.

    Raises UserError for a method that is not supported.
    """
    name = config.get_str(key) or ""
    if name in supported:
        return supported[name]
    raise UserError(
        f"{key} is {name}: {reasons.get(name, 'not supported by finesight')}",
        where=config.where,
        expected=f"one of {', '.join(supported)}",
        remedy="use the other program for this training, or choose a supported method",
    )
