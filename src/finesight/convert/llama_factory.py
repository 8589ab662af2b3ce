"""A configuration of LLaMA-Factory, setting by setting of the recipe."""

from __future__ import annotations

from finesight.convert import trainer
from finesight.convert.dataset_info import sources_of
from finesight.convert.draft import Draft
from finesight.convert.families import Family, family_of
from finesight.convert.given import Given
from finesight.convert.parts import (
    Free,
    in_four_bits,
    modules_to_save,
    set_lora,
    set_targets,
    tune_adapters,
    tune_full,
)
from finesight.convert.shell import is_open
from finesight.convert.sources import HeldOut, set_apart, set_data
from finesight.errors import UserError

_STAGES = {
    "pt": "learning from plain text, without questions",
    "rm": "a reward model",
    "ppo": "reinforcement learning",
    "dpo": "preference learning",
    "kto": "preference learning",
}
_METHODS = {"lora": "lora", "full": "full"}
_REASONS = {
    "freeze": "some layers of a part; here a part learns as a whole, by `full`",
    "oft": "a kind of adapter that finesight does not have",
}


def fill(given: Given, draft: Draft) -> None:
    """Decide every setting of the recipe. Raises UserError for what finesight cannot train."""
    _require_training(given)
    trainer.require_method(given, "stage", {"sft": "sft"}, _STAGES)
    method = trainer.require_method(given, "finetuning_type", _METHODS, _REASONS)
    model = given.text("model_name_or_path") or ""
    family = family_of(model, (given.text("template"),), given.where)
    hub = "modelscope" if given.switched("USE_MODELSCOPE_HUB") else "hf"
    trainer.start(given, draft, model, (hub, ""), "adapter_name_or_path")
    _set_data(given, draft)
    _set_picture(given, draft, family)
    _set_tune(given, draft, family, method)
    trainer.schedule(given, draft)
    _set_batch(given, draft)
    rate = given.number("learning_rate")
    draft.set("train.learning_rate", rate, given.default("learning_rate"))
    trainer.optimisation(given, draft)
    if given.flag("use_muon"):
        draft.set("train.optimizer", "muon", "use_muon; matrices alone, as there")
    _set_precision(given, draft)
    trainer.saving(given, draft)
    trainer.sharing(given, draft)
    _set_trackers(given, draft)
    trainer.output(given, draft, "trainer_output")


def _require_training(given: Given) -> None:
    told = given.has("do_train")
    if given.flag("do_train") or (
        not told and not given.has("export_dir") and given.has("dataset")
    ):
        return
    raise UserError(
        "is not for training: do_train is not set",
        where=given.where,
        expected="a configuration with `do_train: true` and a dataset",
        remedy="to merge, answer or measure: finesight merge, predict or eval",
    )


def _set_data(given: Given, draft: Draft) -> None:
    sources = sources_of(given, draft, "dataset")
    if not sources:
        raise given.refused("dataset", "names of data sets to learn from")
    held_out = sources_of(given, draft, "eval_dataset")
    size = given.number("val_size") or 0.0
    apart: tuple[str, ...] = ()
    if size and not held_out:
        if size < 0 or (size >= 1 and not size.is_integer()):
            raise given.refused("val_size", "a share below 1, or a count")
        apart = set_apart(size) if size < 1 else ("--eval-last", str(int(size)))
        text = "held out by picture" if size < 1 else "the last rows are held out, of each data set"
        draft.note("val_size", f"{size:g}", f"{text}; there they were drawn by chance")
    set_data(draft, sources, HeldOut(tuple(held_out), apart))
    if system := given.text("default_system"):
        draft.set("data.system", system)
    longest = given.count("cutoff_len")
    draft.set("data.max_length", longest, "longer samples are left out; there they were cut")
    text = "longer samples are left out here, and counted; there they were cut, pictures too"
    draft.note("cutoff_len", longest, text)


def _set_picture(given: Given, draft: Draft, family: Family) -> None:
    if not family.side:
        return
    most, least = given.count("image_max_pixels"), given.count("image_min_pixels")
    if most is None or least is None or not 0 < least <= most:
        raise given.refused("image_max_pixels", "pixels, no fewer than image_min_pixels")
    # Its processor's own rule follows, which never goes below the family's fewest pixels.
    fewest = max(least, family.least)
    draft.set("picture.min_pixels", fewest)
    comment = "" if given.has("image_max_pixels") else "LLaMA-Factory's default, 768 x 768"
    draft.set("picture.max_pixels", max(most, fewest), comment)


def _set_tune(given: Given, draft: Draft, family: Family, method: str) -> None:
    vision, merger = (
        not given.flag("freeze_vision_tower"),
        not given.flag("freeze_multi_modal_projector"),
    )
    free = Free(vision, merger, not given.flag("freeze_language_model"))
    if family.side == 32 and vision and not merger:
        text = "the deepstack mergers learn there, with the tower; here they are of the merger"
        draft.differs("freeze_multi_modal_projector", "true", f"{text}, and frozen")
    if method == "full":
        tune_full(draft, free)
        return
    names = given.words("lora_target")
    if names == ("all",):
        names = _all(family, free)
        if merger and not any("linear_fc" in name for name in names):
            text = (
                "stays without adapters: `lora_target: all` finds none of its layers there either"
            )
            draft.note("freeze_multi_modal_projector", "false", text)
            free = Free(vision, False, free.language)
        tune_adapters(draft, free, None)
    else:
        set_targets(draft, family, free, "lora_target", names, whole=False)
    if whole := given.words("additional_target"):
        modules_to_save(draft, "additional_target", whole)
    alpha = given.number("lora_alpha") or 2.0 * (given.count("lora_rank") or 0)
    set_lora(given, draft, alpha)
    _set_bits(given, draft)


def _all(family: Family, free: Free) -> tuple[str, ...]:
    """The names that `all` stands for: of the merger's layers only those that the tower's are
    called by."""
    return (*family.language, *(family.vision if free.vision else ()))


def _set_bits(given: Given, draft: Draft) -> None:
    bits = given.text("quantization_bit")
    if bits is None:
        return
    kind = given.text("quantization_method") or "bnb"
    if bits == "4" and kind in ("bnb", "bitsandbytes"):
        twice = given.flag("double_quantization")
        named = given.text("quantization_type") or "nf4"
        in_four_bits(draft, ["vision", "merger", "language"], named, twice)
    else:
        text = "weights stay in 16 bits: tune.nf4 has four"
        draft.differs("quantization_bit", f"{bits} by {kind}", text)


def _set_batch(given: Given, draft: Draft) -> None:
    gpus, told = trainer.processes(given)
    if gpus is None and not told:
        visible = given.environment.get("CUDA_VISIBLE_DEVICES", "")
        each = 0 if is_open(visible) else len([d for d in visible.split(",") if d.strip()])
        gpus = each * (given.variable("NNODES") or 1) or None
        told = "" if gpus else trainer.UNTOLD
    accumulation = given.count("gradient_accumulation_steps") or 0
    trainer.batch(given, draft, accumulation, gpus or 1, told)


def _set_precision(given: Given, draft: Draft) -> None:
    if given.flag("bf16") or given.flag("pure_bf16"):
        draft.set("train.precision", "bf16")
        if given.flag("pure_bf16"):
            draft.note("pure_bf16", "true", "weights that learn have an fp32 master here, always")
    elif given.flag("fp16"):
        draft.set("train.precision", "fp16")
    else:
        draft.set("train.precision", "auto", "neither bf16 nor fp16 was set")


def _set_trackers(given: Given, draft: Draft) -> None:
    project = given.text("swanlab_project")
    trainer.trackers(given, draft, project)
    listed = draft.settings.get("track")
    if given.flag("use_swanlab") and "swanlab" not in str(listed):
        item: object = {"kind": "swanlab", "project": project} if project else "swanlab"
        draft.set("track", [*(listed if isinstance(listed, list) else []), item])
