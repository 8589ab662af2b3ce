"""Convert a LLaMA-Factory configuration to recipe settings."""

from __future__ import annotations

from finesight.convert import hf_trainer_config
from finesight.convert.dataset_info import read_dataset_sources
from finesight.convert.external_config import ExternalConfig
from finesight.convert.family_detection import FamilySettings, detect_family
from finesight.convert.import_commands import ValidationSource, set_data_files, split_options
from finesight.convert.recipe_draft import RecipeDraft
from finesight.convert.shell_parser import has_variable
from finesight.convert.tuning_conversion import (
    TrainableParts,
    set_full_tuning,
    set_lora_config,
    set_lora_targets,
    set_lora_tuning,
    set_modules_to_save,
    set_nf4,
)
from finesight.errors import UserError

_STAGE_REASONS = {
    "pt": "pretraining on plain text",
    "rm": "a reward model",
    "ppo": "reinforcement learning",
    "dpo": "preference learning",
    "kto": "preference learning",
}
_METHODS = {"lora": "lora", "full": "full"}
_METHOD_REASONS = {
    "freeze": "trains some layers of a part; finesight trains whole parts with `full`",
    "oft": "an adapter type that finesight does not support",
}


def fill_recipe(config: ExternalConfig, draft: RecipeDraft) -> None:
    """Fill a recipe draft from a LLaMA-Factory configuration.

    Raises UserError for an unsupported training method or model.
    """
    _require_training(config)
    hf_trainer_config.require_method(config, "stage", {"sft": "sft"}, _STAGE_REASONS)
    method = hf_trainer_config.require_method(config, "finetuning_type", _METHODS, _METHOD_REASONS)
    model = config.get_str("model_name_or_path") or ""
    family = detect_family(model, (config.get_str("template"),), config.where)
    hub = "modelscope" if config.is_env_enabled("USE_MODELSCOPE_HUB") else "hf"
    hf_trainer_config.set_model(config, draft, model, (hub, ""), "adapter_name_or_path")
    _set_data(config, draft)
    _set_image(config, draft, family)
    _set_tune(config, draft, family, method)
    hf_trainer_config.set_schedule(config, draft)
    _set_batch_size(config, draft)
    learning_rate = config.get_float("learning_rate")
    draft.set("train.learning_rate", learning_rate, config.default_comment("learning_rate"))
    hf_trainer_config.set_optimizer(config, draft)
    if config.get_bool("use_muon"):
        draft.set("train.optimizer", "muon", "use_muon; matrices only, as in LLaMA-Factory")
    _set_precision(config, draft)
    hf_trainer_config.set_checkpointing(config, draft)
    hf_trainer_config.set_parallelism(config, draft)
    _set_trackers(config, draft)
    hf_trainer_config.set_output_dir(config, draft, "trainer_output")


def _require_training(config: ExternalConfig) -> None:
    has_do_train = config.has("do_train")
    if config.get_bool("do_train") or (
        not has_do_train and not config.has("export_dir") and config.has("dataset")
    ):
        return
    raise UserError(
        "is not a training: do_train is not set",
        where=config.where,
        expected="a configuration with `do_train: true` and a dataset",
        remedy="to merge, predict or evaluate: finesight merge, predict or eval",
    )


def _set_data(config: ExternalConfig, draft: RecipeDraft) -> None:
    sources = read_dataset_sources(config, draft, "dataset")
    if not sources:
        raise config.build_error("dataset", "dataset names")
    validation_sources = read_dataset_sources(config, draft, "eval_dataset")
    val_size = config.get_float("val_size") or 0.0
    options: tuple[str, ...] = ()
    if val_size and not validation_sources:
        if val_size < 0 or (val_size >= 1 and not val_size.is_integer()):
            raise config.build_error("val_size", "a fraction below 1, or a count")
        options = split_options(val_size) if val_size < 1 else ("--eval-last", str(int(val_size)))
        text = (
            "split by image"
            if val_size < 1
            else "the last rows of each dataset are the validation split"
        )
        draft.add_note("val_size", f"{val_size:g}", f"{text}; LLaMA-Factory draws random rows")
    set_data_files(draft, sources, ValidationSource(tuple(validation_sources), options))
    if system_prompt := config.get_str("default_system"):
        draft.set("data.system_prompt", system_prompt)
    max_length = config.get_int("cutoff_len")
    draft.set(
        "data.max_length", max_length, "longer samples are skipped; LLaMA-Factory truncates them"
    )
    text = "longer samples are skipped and counted; LLaMA-Factory truncates them, including images"
    draft.add_note("cutoff_len", max_length, text)


def _set_image(config: ExternalConfig, draft: RecipeDraft, family: FamilySettings) -> None:
    if not family.token_size:
        return
    max_pixels, min_pixels = config.get_int("image_max_pixels"), config.get_int("image_min_pixels")
    if max_pixels is None or min_pixels is None or not 0 < min_pixels <= max_pixels:
        raise config.build_error("image_max_pixels", "pixels, not below image_min_pixels")
    # The image processor applies its own minimum.
    lower_bound = max(min_pixels, family.min_pixels)
    draft.set("image.min_pixels", lower_bound)
    comment = "" if config.has("image_max_pixels") else "LLaMA-Factory's default, 768 x 768"
    draft.set("image.max_pixels", max(max_pixels, lower_bound), comment)


def _set_tune(
    config: ExternalConfig, draft: RecipeDraft, family: FamilySettings, method: str
) -> None:
    vision, merger = (
        not config.get_bool("freeze_vision_tower"),
        not config.get_bool("freeze_multi_modal_projector"),
    )
    trainable = TrainableParts(vision, merger, not config.get_bool("freeze_language_model"))
    if family.token_size == 32 and vision and not merger:
        text = (
            "LLaMA-Factory trains the deepstack mergers with the vision encoder; here they"
            " belong to the merger"
        )
        draft.add_difference("freeze_multi_modal_projector", "true", f"{text} and are frozen")
    if method == "full":
        set_full_tuning(draft, trainable)
        return
    targets = config.get_list("lora_target")
    if targets == ("all",):
        targets = _expand_all_targets(family, trainable)
        if merger and not any("linear_fc" in name for name in targets):
            text = (
                "has no adapters: `lora_target: all` matches none of its layers in"
                " LLaMA-Factory either"
            )
            draft.add_note("freeze_multi_modal_projector", "false", text)
            trainable = TrainableParts(vision, False, trainable.language)
        set_lora_tuning(draft, trainable, None)
    else:
        set_lora_targets(draft, family, trainable, "lora_target", targets, match_suffix=False)
    if full_modules := config.get_list("additional_target"):
        set_modules_to_save(draft, "additional_target", full_modules)
    alpha = config.get_float("lora_alpha") or 2.0 * (config.get_int("lora_rank") or 0)
    set_lora_config(config, draft, alpha)
    _set_quantization(config, draft)


def _expand_all_targets(family: FamilySettings, trainable: TrainableParts) -> tuple[str, ...]:
    """Return the layer names that `lora_target: all` matches in LLaMA-Factory.

    These are the linear layers of the decoder and of a trained vision encoder. Layers of the merger
    have adapters only if a layer of the vision encoder has the same name.
    """
    return (*family.language_layers, *(family.vision_layers if trainable.vision else ()))


def _set_quantization(config: ExternalConfig, draft: RecipeDraft) -> None:
    bits = config.get_str("quantization_bit")
    if bits is None:
        return
    method = config.get_str("quantization_method") or "bnb"
    if bits == "4" and method in ("bnb", "bitsandbytes"):
        is_double = config.get_bool("double_quantization")
        quant_type = config.get_str("quantization_type") or "nf4"
        set_nf4(draft, ["vision", "merger", "language"], quant_type, is_double)
    else:
        text = "weights remain in 16 bits: tune.quantize.nf4 supports 4 bits"
        draft.add_difference("quantization_bit", f"{bits} by {method}", text)


def _set_batch_size(config: ExternalConfig, draft: RecipeDraft) -> None:
    num_gpus, comment_suffix = hf_trainer_config.count_processes(config)
    if num_gpus is None and not comment_suffix:
        visible = config.environment.get("CUDA_VISIBLE_DEVICES", "")
        gpus_per_node = (
            0 if has_variable(visible) else len([d for d in visible.split(",") if d.strip()])
        )
        num_gpus = gpus_per_node * (config.get_env_int("NNODES") or 1) or None
        comment_suffix = "" if num_gpus else hf_trainer_config.NOTE_UNKNOWN_PROCESSES
    accumulation = config.get_int("gradient_accumulation_steps") or 0
    hf_trainer_config.set_batch_size(config, draft, accumulation, num_gpus or 1, comment_suffix)


def _set_precision(config: ExternalConfig, draft: RecipeDraft) -> None:
    if config.get_bool("bf16") or config.get_bool("pure_bf16"):
        draft.set("train.precision", "bf16")
        if config.get_bool("pure_bf16"):
            draft.add_note(
                "pure_bf16",
                "true",
                "trainable weights always have fp32 master weights in finesight",
            )
    elif config.get_bool("fp16"):
        draft.set("train.precision", "fp16")
    else:
        draft.set("train.precision", "auto", "neither bf16 nor fp16 is set")


def _set_trackers(config: ExternalConfig, draft: RecipeDraft) -> None:
    project = config.get_str("swanlab_project")
    hf_trainer_config.set_trackers(config, draft, project)
    existing = draft.settings.get("track")
    if config.get_bool("use_swanlab") and "swanlab" not in str(existing):
        item: object = {"kind": "swanlab", "project": project} if project else "swanlab"
        draft.set("track", [*(existing if isinstance(existing, list) else []), item])
