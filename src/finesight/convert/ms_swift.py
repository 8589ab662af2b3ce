"""A configuration of ms-swift, setting by setting of the recipe."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from finesight.bounded_files import parse_json
from finesight.convert import trainer
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
from finesight.convert.sources import HeldOut, Source, set_apart, set_data

_METHODS = {"lora": "lora", "full": "full", "lora_llm": "lora_llm"}
_REASONS = dict.fromkeys(
    ("longlora", "adalora", "llamapro", "adapter", "vera", "boft", "fourierft", "reft", "bone"),
    "a kind of adapter that finesight does not have",
)
_PARTS = ("visual", "merger", "deepstack_merger_list", "language_model", "lm_head")
_TASKS = dict.fromkeys(
    ("seq_cls", "embedding", "reranker", "generative_reranker", "decision"),
    "a model that does not answer in words",
)


def fill(given: Given, draft: Draft) -> None:
    """Decide every setting of the recipe. Raises UserError for what finesight cannot train."""
    method = trainer.require_method(given, "tuner_type", _METHODS, _REASONS)
    if given.has("task_type"):
        trainer.require_method(given, "task_type", {"causal_lm": "causal_lm"}, _TASKS)
    model = given.text("model") or ""
    family = family_of(model, (given.text("model_type"), given.text("template")), given.where)
    hub = _hub(given), "the hub that ms-swift asks unless told otherwise"
    trainer.start(given, draft, model, hub, "adapters")
    _set_data(given, draft, family)
    _set_picture(given, draft, family)
    _set_tune(given, draft, family, method)
    if epochs := given.number("max_epochs"):
        draft.note("max_epochs", f"{epochs:g}", "holds over num_train_epochs, as it did there")
        given = replace(given, values={**given.values, "num_train_epochs": epochs})
    trainer.schedule(given, draft)
    _set_batch(given, draft)
    _set_rates(given, draft, method)
    trainer.optimisation(given, draft)
    draft.set("train.precision", _precision(given))
    trainer.saving(given, draft)
    trainer.sharing(given, draft)
    trainer.trackers(given, draft, given.text("swanlab_project"))
    trainer.output(given, draft, f"output/{model.rstrip('/').rpartition('/')[2]}")


def _hub(given: Given) -> str:
    return "hf" if given.flag("use_hf") or given.switched("USE_HF") else "modelscope"


def _set_data(given: Given, draft: Draft, family: Family) -> None:
    sources = [_source(given, draft, word) for word in given.words("dataset")]
    if not sources:
        raise given.refused("dataset", "data sets to learn from")
    held_out = [_source(given, draft, word) for word in given.words("val_dataset")]
    share = given.number("split_dataset_ratio") or 0.0
    apart: tuple[str, ...] = ()
    if not held_out and share:
        if not 0 < share < 1:
            raise given.refused("split_dataset_ratio", "a share from 0 up to 1")
        apart = set_apart(share)
        draft.note("split_dataset_ratio", f"{share:g}", "held out by picture, not row by row")
    set_data(draft, sources, HeldOut(tuple(held_out), apart))
    if system := given.text("system"):
        draft.set("data.system", _system(given, system))
    longest = given.count("max_length")
    comment = "" if longest else f"the model's longest text, {given.program}'s default"
    draft.set("data.max_length", longest or family.longest, comment)
    if given.flag("strict"):
        draft.set("data.unusable", "refuse")


def _system(given: Given, system: str) -> str:
    """As ms-swift reads it: a .txt file is read, and its way of writing line ends undone."""
    path = Path(system)
    if path.suffix == ".txt":
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise given.refused("system", "a text, or a file of text that can be read") from error
    return system.replace("\\n", "\n")


def _source(given: Given, draft: Draft, word: str) -> Source:
    """`path#count`, or `OWNER/NAME:subset#count` of a hub."""
    name, _, count = word.partition("#")
    limit = int(count) if count.isdecimal() and len(count) < 10 and int(count) else None
    if limit:
        text = "the first ones are taken, there they were drawn by chance (repeated, where fewer)"
        draft.differs("dataset", word, text)
    if Path(name).exists() or Path(name).suffix or name.startswith(("/", ".", "~")):
        return Source(name, limit=limit)
    hub = _hub(given)
    if name.startswith(("HF::", "MS::")):
        hub = "hf" if name.startswith("HF") else "modelscope"
        name = name[4:]
    name, _, subset = name.partition(":")
    if subset == "all" or "/" in subset:
        draft.differs("dataset", word, "import each of the subsets, and list them in data.train")
    elif subset and subset != "default":
        return Source(f"{hub}:{name}:{subset}/train", limit=limit)
    return Source(f"{hub}:{name}", limit=limit)


def _set_picture(given: Given, draft: Draft, family: Family) -> None:
    """The sizes that its picture reader keeps to, by tokens or by pixels (4 to 16,384 tokens)."""
    if not family.side:
        return
    square = family.side**2
    tokens = _variable(given, "IMAGE_MAX_TOKEN_NUM"), _variable(given, "IMAGE_MIN_TOKEN_NUM")
    pixels = _variable(given, "MAX_PIXELS"), _variable(given, "MIN_PIXELS")
    most, least = (
        count * square if count else limit // square * square if limit else otherwise * square
        for count, limit, otherwise in zip(tokens, pixels, (16_384, 4), strict=True)
    )
    comment = "" if tokens[0] or pixels[0] else "ms-swift's default, 16,384 tokens"
    if given.finished and comment:
        draft.note(
            "MAX_PIXELS",
            "not recorded",
            "args.json keeps no variables: set picture.max_pixels to what was set",
        )
    if argument := given.count("max_pixels"):
        most, comment = (
            min(most, max(argument, least)),
            "max_pixels: shrunk before its own rule there",
        )
    draft.set("picture.min_pixels", least)
    draft.set("picture.max_pixels", max(most, least), comment)


def _variable(given: Given, name: str) -> int | None:
    """From the environment, or from model_kwargs, which become its variables there."""
    inner = given.value("model_kwargs")
    if isinstance(inner, str):
        try:
            inner = parse_json(inner)
        except ValueError as error:
            raise given.refused("model_kwargs", "JSON") from error
    named = {str(k).upper(): str(v) for k, v in inner.items()} if isinstance(inner, dict) else {}
    lowered = {key.upper(): value for key, value in given.environment.items()}
    return replace(given, environment=lowered | named).variable(name)


def _set_tune(given: Given, draft: Draft, family: Family, method: str) -> None:
    free = Free(
        not given.flag("freeze_vit"), not given.flag("freeze_aligner"), not given.flag("freeze_llm")
    )
    _tell_of_parameters(given, draft)
    if method == "full":
        tune_full(draft, free)
        return
    if method == "lora_llm":
        _set_lora_llm(given, draft)
        return
    # Names are looked for in all of the model there, whatever is frozen.
    names = tuple(piece for word in given.words("target_modules") for piece in word.split())
    if "all-linear" in names or not names:
        tune_adapters(draft, free, None)
    else:
        everything = Free(True, True, True)
        set_targets(draft, family, everything, "target_modules", names, whole=True)
    if whole := [p for word in given.words("modules_to_save") for p in word.split()]:
        modules_to_save(draft, "modules_to_save", tuple(whole))
    set_lora(given, draft, given.number("lora_alpha") or 0.0)
    _set_bits(given, draft)


def _set_lora_llm(given: Given, draft: Draft) -> None:
    """Adapters in the language model, the tower and its merger whole, whatever else is frozen."""
    draft.set("tune.vision", "full", "lora_llm")
    draft.set("tune.merger", "full", "lora_llm")
    draft.set("tune.language", "lora")
    # It hands on rank and alpha alone.
    plain = {"use_rslora": False, "lora_dropout": 0.0}
    for key in plain:
        if given.has(key):
            draft.note(key, given.text(key), "`lora_llm` takes rank and alpha alone")
    given = replace(given, values={**given.values, **plain})
    set_lora(given, draft, given.number("lora_alpha") or 0.0)
    _set_bits(given, draft)


def _tell_of_parameters(given: Given, draft: Draft) -> None:
    """Parameters by name cannot be frozen here. A finished run has put parts into these lists by
    itself, as freeze_vit and its like say."""
    for key in ("freeze_parameters", "trainable_parameters"):
        names = [piece for word in given.words(key) for piece in word.split()]
        own = [name for name in names if not (given.finished and name.endswith(_PARTS))]
        if own:
            text = "only whole parts are frozen here: tune.vision, tune.merger, tune.language"
            draft.differs(key, ", ".join(own), text)


def _set_bits(given: Given, draft: Draft) -> None:
    kind, bits = given.text("quant_method"), given.text("quant_bits")
    if kind is None and bits is None:
        return
    if kind in (None, "bnb") and bits == "4":
        twice = given.flag("bnb_4bit_use_double_quant")
        in_four_bits(draft, ["language"], given.text("bnb_4bit_quant_type") or "nf4", twice)
    else:
        draft.differs(
            "quant_method", f"{kind}, {bits} bits", "weights stay in 16 bits: tune.nf4 has four"
        )


def _set_batch(given: Given, draft: Draft) -> None:
    gpus, told = trainer.processes(given)
    if given.has("global_world_size"):
        gpus, told = given.count("global_world_size"), ""
    if gpus is None:
        nodes = None if told else given.variable("NNODES")
        gpus = nodes or 1
        told = told or " (NPROC_PER_NODE is not set: one process)"
    apart = given.count("sequence_parallel_size") or 1
    shared = max(1, max(gpus, 1) // max(apart, 1))
    size = given.count("per_device_train_batch_size") or 0
    accumulation = given.count("gradient_accumulation_steps")
    if accumulation is None:
        # Until a step has 16 samples.
        accumulation = max(1, math.ceil(16 / max(size, 1) / shared))
        # However many GPUs there are, then.
        told = told.replace(trainer.UNTOLD, "") + "; accumulated by ms-swift's default, up to 16"
    trainer.batch(given, draft, accumulation, shared, told)


def _set_rates(given: Given, draft: Draft, method: str) -> None:
    rate = given.number("learning_rate")
    comment = "" if rate else f"ms-swift's default for {method}"
    rate = rate or (1e-5 if method == "full" else 1e-4)
    parts = {"vision": given.number("vit_lr"), "merger": given.number("aligner_lr")}
    if not any(parts.values()):
        draft.set("train.learning_rate", rate, comment)
        return
    draft.set("train.learning_rate.default", rate, comment)
    for part, own in parts.items():
        if own:
            draft.set(f"train.learning_rate.{part}", own)


def _precision(given: Given) -> str:
    told = (given.text("torch_dtype") or "").removeprefix("torch.")
    half = told in ("float16", "float32")
    bf16 = given.flag("bf16") if given.has("bf16") else not half
    fp16 = given.flag("fp16") if given.has("fp16") else half
    return "bf16" if bf16 else "fp16" if fp16 else "fp32"
