"""Convert an ms-swift configuration to recipe settings."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from finesight.bounded_files import parse_json
from finesight.convert import hf_trainer_config
from finesight.convert.external_config import ExternalConfig
from finesight.convert.family_detection import FamilySettings, detect_family
from finesight.convert.import_commands import (
    DatasetSource,
    ValidationSource,
    set_data_files,
    split_options,
)
from finesight.convert.recipe_draft import RecipeDraft
from finesight.convert.tuning_conversion import (
    TrainableParts,
    set_full_tuning,
    set_lora_config,
    set_lora_targets,
    set_lora_tuning,
    set_modules_to_save,
    set_nf4,
)

_METHODS = {"lora": "lora", "full": "full", "lora_llm": "lora_llm"}
_METHOD_REASONS = dict.fromkeys(
    ("longlora", "adalora", "llamapro", "adapter", "vera", "boft", "fourierft", "reft", "bone"),
    "an adapter type that finesight does not support",
)
_PART_NAMES = ("visual", "merger", "deepstack_merger_list", "language_model", "lm_head")
_TASK_REASONS = dict.fromkeys(
    ("seq_cls", "embedding", "reranker", "generative_reranker", "decision"),
    "a model without text generation",
)


def fill_recipe(config: ExternalConfig, draft: RecipeDraft) -> None:
    """Fill a recipe draft from an ms-swift configuration.

    Raises UserError for an unsupported training method or model.
    """
    method = hf_trainer_config.require_method(config, "tuner_type", _METHODS, _METHOD_REASONS)
    if config.has("task_type"):
        hf_trainer_config.require_method(
            config, "task_type", {"causal_lm": "causal_lm"}, _TASK_REASONS
        )
    model = config.get_str("model") or ""
    family = detect_family(
        model, (config.get_str("model_type"), config.get_str("template")), config.where
    )
    hub = _default_hub(config), "the default hub of ms-swift"
    hf_trainer_config.set_model(config, draft, model, hub, "adapters")
    _set_data(config, draft, family)
    _set_image(config, draft, family)
    _set_tune(config, draft, family, method)
    if epochs := config.get_float("max_epochs"):
        draft.add_note("max_epochs", f"{epochs:g}", "replaces num_train_epochs, as in ms-swift")
        config = replace(config, values={**config.values, "num_train_epochs": epochs})
    hf_trainer_config.set_schedule(config, draft)
    _set_batch_size(config, draft)
    _set_learning_rates(config, draft, method)
    hf_trainer_config.set_optimizer(config, draft)
    draft.set("train.precision", _get_precision(config))
    hf_trainer_config.set_checkpointing(config, draft)
    hf_trainer_config.set_parallelism(config, draft)
    hf_trainer_config.set_trackers(config, draft, config.get_str("swanlab_project"))
    hf_trainer_config.set_output_dir(
        config, draft, f"output/{model.rstrip('/').rpartition('/')[2]}"
    )


def _default_hub(config: ExternalConfig) -> str:
    return "hf" if config.get_bool("use_hf") or config.is_env_enabled("USE_HF") else "modelscope"


def _set_data(config: ExternalConfig, draft: RecipeDraft, family: FamilySettings) -> None:
    sources = [_build_source(config, draft, item) for item in config.get_list("dataset")]
    if not sources:
        raise config.build_error("dataset", "datasets")
    validation_sources = [
        _build_source(config, draft, item) for item in config.get_list("val_dataset")
    ]
    fraction = config.get_float("split_dataset_ratio") or 0.0
    options: tuple[str, ...] = ()
    if not validation_sources and fraction:
        if not 0 < fraction < 1:
            raise config.build_error("split_dataset_ratio", "a fraction from 0 to 1")
        options = split_options(fraction)
        draft.add_note("split_dataset_ratio", f"{fraction:g}", "split by image, not by row")
    set_data_files(draft, sources, ValidationSource(tuple(validation_sources), options))
    if system_prompt := config.get_str("system"):
        draft.set("data.system_prompt", _read_system_prompt(config, system_prompt))
    max_length = config.get_int("max_length")
    comment = "" if max_length else f"the maximum length of the model, {config.program}'s default"
    draft.set("data.max_length", max_length or family.max_length, comment)
    if config.get_bool("strict"):
        draft.set("data.on_invalid_sample", "fail")


def _read_system_prompt(config: ExternalConfig, system_prompt: str) -> str:
    """Return the system prompt of a `system` setting.

    Its value is a .txt file, or text with escaped newlines.
    """
    path = Path(system_prompt)
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise config.build_error("system", "text, or a readable text file") from error
    return system_prompt.replace("\\n", "\n")


def _build_source(config: ExternalConfig, draft: RecipeDraft, item: str) -> DatasetSource:
    """Parse an item of the `dataset` setting: `path#count` or `OWNER/NAME:subset#count`."""
    name, _, count = item.partition("#")
    limit = int(count) if count.isdecimal() and len(count) < 10 and int(count) else None
    if limit:
        text = (
            "the first ones are used; ms-swift draws random ones (with repetition if there"
            " are fewer)"
        )
        draft.add_difference("dataset", item, text)
    if Path(name).exists() or Path(name).suffix or name.startswith(("/", ".", "~")):
        return DatasetSource(name, limit=limit)
    hub = _default_hub(config)
    if name.startswith(("HF::", "MS::")):
        hub = "hf" if name.startswith("HF") else "modelscope"
        name = name[4:]
    name, _, subset = name.partition(":")
    if subset == "all" or "/" in subset:
        draft.add_difference("dataset", item, "import each subset, and list them in data.train")
    elif subset and subset != "default":
        return DatasetSource(f"{hub}:{name}:{subset}/train", limit=limit)
    return DatasetSource(f"{hub}:{name}", limit=limit)


def _set_image(config: ExternalConfig, draft: RecipeDraft, family: FamilySettings) -> None:
    """Set the pixel limits of images from IMAGE_MAX_TOKEN_NUM or MAX_PIXELS and their minimums.

    The default of ms-swift is 4 to 16,384 tokens per image.
    """
    if not family.token_size:
        return
    token_pixels = family.token_size**2
    tokens = (
        _get_image_variable(config, "IMAGE_MAX_TOKEN_NUM"),
        _get_image_variable(config, "IMAGE_MIN_TOKEN_NUM"),
    )
    pixels = _get_image_variable(config, "MAX_PIXELS"), _get_image_variable(config, "MIN_PIXELS")
    max_pixels, min_pixels = (
        count * token_pixels
        if count
        else limit // token_pixels * token_pixels
        if limit
        else default * token_pixels
        for count, limit, default in zip(tokens, pixels, (16_384, 4), strict=True)
    )
    comment = "" if tokens[0] or pixels[0] else "ms-swift's default, 16,384 tokens"
    if config.is_recorded and comment:
        draft.add_note(
            "MAX_PIXELS",
            "not recorded",
            "args.json contains no environment variables: set image.max_pixels to the"
            " value of the run",
        )
    if max_pixels_argument := config.get_int("max_pixels"):
        max_pixels, comment = (
            min(max_pixels, max(max_pixels_argument, min_pixels)),
            "max_pixels: applied before the image processor in ms-swift",
        )
    draft.set("image.min_pixels", min_pixels)
    draft.set("image.max_pixels", max(max_pixels, min_pixels), comment)


def _get_image_variable(config: ExternalConfig, name: str) -> int | None:
    """Return an image variable such as MAX_PIXELS as an integer.

    Returns None if it is not set. ms-swift reads these variables from the environment and, with
    precedence, from `model_kwargs`.
    """
    model_kwargs = config.get_value("model_kwargs")
    if isinstance(model_kwargs, str):
        try:
            model_kwargs = parse_json(model_kwargs)
        except ValueError as error:
            raise config.build_error("model_kwargs", "JSON") from error
    kwargs_variables = (
        {str(k).upper(): str(v) for k, v in model_kwargs.items()}
        if isinstance(model_kwargs, dict)
        else {}
    )
    environment = {key.upper(): value for key, value in config.environment.items()}
    return replace(config, environment=environment | kwargs_variables).get_env_int(name)


def _set_tune(
    config: ExternalConfig, draft: RecipeDraft, family: FamilySettings, method: str
) -> None:
    trainable = TrainableParts(
        not config.get_bool("freeze_vit"),
        not config.get_bool("freeze_aligner"),
        not config.get_bool("freeze_llm"),
    )
    _note_frozen_parameters(config, draft)
    if method == "full":
        set_full_tuning(draft, trainable)
        return
    if method == "lora_llm":
        _set_lora_llm(config, draft)
        return
    # ms-swift searches names in the whole model, including frozen parts.
    targets = tuple(target for item in config.get_list("target_modules") for target in item.split())
    if "all-linear" in targets or not targets:
        set_lora_tuning(draft, trainable, None)
    else:
        all_parts = TrainableParts(True, True, True)
        set_lora_targets(draft, family, all_parts, "target_modules", targets, match_suffix=True)
    if full_modules := [p for item in config.get_list("modules_to_save") for p in item.split()]:
        set_modules_to_save(draft, "modules_to_save", tuple(full_modules))
    set_lora_config(config, draft, config.get_float("lora_alpha") or 0.0)
    _set_quantization(config, draft)


def _set_lora_llm(config: ExternalConfig, draft: RecipeDraft) -> None:
    """Convert `tuner_type: lora_llm`: LoRA in the decoder, full fine-tuning of the other parts."""
    draft.set("tune.vision", "full", "lora_llm")
    draft.set("tune.merger", "full", "lora_llm")
    draft.set("tune.language", "lora")
    # ms-swift uses only rank and alpha here.
    default_values = {"use_rslora": False, "lora_dropout": 0.0}
    for key in default_values:
        if config.has(key):
            draft.add_note(key, config.get_str(key), "`lora_llm` uses only rank and alpha")
    config = replace(config, values={**config.values, **default_values})
    set_lora_config(config, draft, config.get_float("lora_alpha") or 0.0)
    _set_quantization(config, draft)


def _note_frozen_parameters(config: ExternalConfig, draft: RecipeDraft) -> None:
    """Add notes about settings that freeze parameters by name, which recipes do not support.

    In the args.json of a run, names of whole parts come from `freeze_vit` and similar settings, and
    are not noted.
    """
    for key in ("freeze_parameters", "trainable_parameters"):
        names = [part for item in config.get_list(key) for part in item.split()]
        user_names = [
            name for name in names if not (config.is_recorded and name.endswith(_PART_NAMES))
        ]
        if user_names:
            text = "only whole parts can be frozen: tune.vision, tune.merger, tune.language"
            draft.add_difference(key, ", ".join(user_names), text)


def _set_quantization(config: ExternalConfig, draft: RecipeDraft) -> None:
    method, bits = config.get_str("quant_method"), config.get_str("quant_bits")
    if method is None and bits is None:
        return
    if method in (None, "bnb") and bits == "4":
        is_double = config.get_bool("bnb_4bit_use_double_quant")
        set_nf4(draft, ["language"], config.get_str("bnb_4bit_quant_type") or "nf4", is_double)
    else:
        draft.add_difference(
            "quant_method",
            f"{method}, {bits} bits",
            "weights remain in 16 bits: tune.quantize.nf4 supports 4 bits",
        )


def _set_batch_size(config: ExternalConfig, draft: RecipeDraft) -> None:
    num_gpus, comment_suffix = hf_trainer_config.count_processes(config)
    if config.has("global_world_size"):
        num_gpus, comment_suffix = config.get_int("global_world_size"), ""
    if num_gpus is None:
        num_nodes = None if comment_suffix else config.get_env_int("NNODES")
        num_gpus = num_nodes or 1
        comment_suffix = comment_suffix or " (NPROC_PER_NODE is not set: one process)"
    context_parallel_size = config.get_int("sequence_parallel_size") or 1
    data_parallel_size = max(1, max(num_gpus, 1) // max(context_parallel_size, 1))
    per_device = config.get_int("per_device_train_batch_size") or 0
    accumulation = config.get_int("gradient_accumulation_steps")
    if accumulation is None:
        # Accumulate up to 16 samples per step.
        accumulation = max(1, math.ceil(16 / max(per_device, 1) / data_parallel_size))
        # The total does not depend on the number of GPUs.
        comment_suffix = (
            comment_suffix.replace(hf_trainer_config.NOTE_UNKNOWN_PROCESSES, "")
            + "; accumulation to 16 samples, ms-swift's default"
        )
    hf_trainer_config.set_batch_size(
        config, draft, accumulation, data_parallel_size, comment_suffix
    )


def _set_learning_rates(config: ExternalConfig, draft: RecipeDraft, method: str) -> None:
    learning_rate = config.get_float("learning_rate")
    comment = "" if learning_rate else f"ms-swift's default for {method}"
    learning_rate = learning_rate or (1e-5 if method == "full" else 1e-4)
    rates_by_part = {"vision": config.get_float("vit_lr"), "merger": config.get_float("aligner_lr")}
    if not any(rates_by_part.values()):
        draft.set("train.learning_rate", learning_rate, comment)
        return
    draft.set("train.learning_rate.default", learning_rate, comment)
    for part, part_rate in rates_by_part.items():
        if part_rate:
            draft.set(f"train.learning_rate.{part}", part_rate)


def _get_precision(config: ExternalConfig) -> str:
    dtype_name = (config.get_str("torch_dtype") or "").removeprefix("torch.")
    is_half = dtype_name in ("float16", "float32")
    bf16 = config.get_bool("bf16") if config.has("bf16") else not is_half
    fp16 = config.get_bool("fp16") if config.has("fp16") else is_half
    return "bf16" if bf16 else "fp16" if fp16 else "fp32"
