"""The files beside the weights that transformers, vLLM and SGLang read a folder by."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from finesight.bounded_files import read_json_object
from finesight.hub import PREPROCESSOR, PREPROCESSOR_DEFAULTS, PROCESSOR, ModelFolder

GENERATION = "generation_config.json"

ARCHITECTURES: Mapping[str, str] = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
"""The class by which those programs know a family that they serve."""

PROCESSORS: Mapping[str, str] = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
}
"""What makes tokens and patches, for families whose folders may lack a file that names it."""

GREEDY = {"do_sample": True, "temperature": 1e-6, "top_k": 1, "repetition_penalty": 1.0}
"""The one most probable token, with no penalty: as answers were measured. Said by sampling from
one candidate: vLLM and SGLang take defaults from these keys and do not know `do_sample`."""

_NEEDED: tuple[tuple[str, ...], ...] = (
    ("config.json",),
    (GENERATION,),
    ("tokenizer.json",),
    ("tokenizer_config.json",),
    (PREPROCESSOR, PROCESSOR),
    ("model.safetensors", "model.safetensors.index.json"),
)
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_FIRST_NEEDED = (
    ("config.json",),
    (GENERATION,),
    ("qwen.tiktoken",),
    ("tokenizer_config.json",),
    ("model.safetensors", "model.safetensors.index.json"),
)

_SAMPLING = {
    *("do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "num_beams"),
    *("diversity_penalty", "length_penalty", "penalty_alpha", "presence_penalty"),
    *("frequency_penalty", "max_new_tokens", "max_length"),
}
"""What would answer otherwise than `finesight predict` does."""


def complete(folder: Path, family: str, end_ids: Sequence[int]) -> None:
    """Give a written model folder what other programs need and its base may lack: the class in
    config.json, the picture settings, and a generation_config.json that answers as was measured,
    ending with `end_ids`; and let its weights be read by whoever may read the rest."""
    for weights in folder.glob("*.safetensors"):
        # Their writer keeps them for this user alone; a server is often another.
        weights.chmod((folder / "config.json").stat().st_mode)
    config = _read(folder / "config.json")
    # Where transformers once read it from, on somebody's machine.
    config.pop("_name_or_path", None)
    if family in ARCHITECTURES:
        config["architectures"] = [ARCHITECTURES[family]]
    _write(folder / "config.json", config)
    if family in PROCESSORS and "image_processor" not in _read(folder / PROCESSOR):
        kind = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": PROCESSORS[family],
        }
        settings = {**PREPROCESSOR_DEFAULTS, **kind, **_read(folder / PREPROCESSOR)}
        _write(folder / PREPROCESSOR, settings)
    before = _read(folder / GENERATION)
    kept = {key: value for key, value in before.items() if key not in _SAMPLING}
    named = kept.get("eos_token_id")
    others = named if isinstance(named, list) else [] if named is None else [named]
    ends = list(dict.fromkeys([*end_ids, *others]))
    _write(folder / GENERATION, {**kept, "eos_token_id": ends, **GREEDY})


def dropped_sampling(base: ModelFolder) -> dict[str, Any]:
    """The settings of the base's generation_config.json that changed its answers and were not taken
    along."""
    return {
        key: value
        for key, value in base.generation.items()
        # None, 0 and 1, which is also true, are how each says that it does nothing.
        if key in _SAMPLING and value not in (None, 0, 1, GREEDY.get(key))
    }


def missing(folder: ModelFolder) -> list[str]:
    """What the folder lacks of the files that other programs serve its family by."""
    needed: Iterable[tuple[str, ...]] = _FIRST_NEEDED if folder.family == "qwen" else _NEEDED
    lacking = [
        " or ".join(names)
        for names in needed
        if not any(folder.file(name) is not None for name in names)
    ]
    if folder.family != "qwen" and not folder.chat_template:
        lacking.append(f"a chat template ({', '.join(_TEMPLATES)})")
    return lacking


def _read(path: Path) -> dict[str, Any]:
    return read_json_object(path) if path.is_file() else {}


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
