"""Files of an exported model for transformers, vLLM and SGLang."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finesight.encode.renderer import is_native
from finesight.errors import Remedy, Step, UserError
from finesight.family_components import FAMILIES, ExportKind
from finesight.files.bounded_files import read_json_object
from finesight.files.storage import DIGESTS_FILE, verify_folder
from finesight.infer.model_loader import ModelSource
from finesight.model_folder import (
    PREPROCESSOR_DEFAULTS,
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    ModelFolder,
    list_model_files,
)

GENERATION_CONFIG_FILE = "generation_config.json"

PEFT_MERGE = "merge it with peft: PeftModel.from_pretrained(...).merge_and_unload()"
"""How to merge an adapter of a family without native code."""

GREEDY_CONFIG = {"do_sample": True, "temperature": 1e-6, "top_k": 1, "repetition_penalty": 1.0}
"""Greedy decoding without penalties, as in the evaluation.

It is written as sampling from one candidate, since vLLM and SGLang read their defaults from these
keys and do not know `do_sample`.
"""

_CHAT_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
_SAMPLING_KEYS = {
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "repetition_penalty",
    "encoder_repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "diversity_penalty",
    "length_penalty",
    "penalty_alpha",
    "presence_penalty",
    "frequency_penalty",
    "max_new_tokens",
    "max_length",
}
"""Generation settings that are removed, since predictions do not use them."""


def complete_hf_folder(folder: Path, family: str, end_ids: Sequence[int]) -> None:
    """Complete a model folder with settings that other programs need.

    Writes the model class into config.json, the image processor settings, and a greedy
    generation_config.json with the end tokens `end_ids`.
    """
    component = FAMILIES.describe(family)
    config = _read_json(folder / "config.json")
    # transformers writes the local path of the base, which is of no use elsewhere.
    config.pop("_name_or_path", None)
    if component.hf_class:
        config["architectures"] = [component.hf_class]
    _write_json(folder / "config.json", config)
    is_nested = "image_processor" in _read_json(folder / PROCESSOR_FILE)
    if component.processor_classes and not is_nested:
        settings = {
            **PREPROCESSOR_DEFAULTS,
            **component.processor_classes,
            **_read_json(folder / PREPROCESSOR_FILE),
        }
        _write_json(folder / PREPROCESSOR_FILE, settings)
    original = _read_json(folder / GENERATION_CONFIG_FILE)
    generation_config = {key: value for key, value in original.items() if key not in _SAMPLING_KEYS}
    previous = generation_config.get("eos_token_id")
    if not isinstance(previous, list):
        previous = [previous]
    eos_ids = dict.fromkeys([*end_ids, *previous])
    eos_ids.pop(None, None)
    _write_json(
        folder / GENERATION_CONFIG_FILE,
        {**generation_config, "eos_token_id": [*eos_ids], **GREEDY_CONFIG},
    )


def find_dropped_sampling(base_folder: ModelFolder) -> dict[str, Any]:
    """Return the generation settings of the base model that `complete_hf_folder` removes."""
    return {
        key: value
        for key, value in base_folder.generation_config.items()
        # None, 0 and 1 (equal to True) disable these settings.
        if key in _SAMPLING_KEYS and value not in (None, 0, 1, GREEDY_CONFIG.get(key))
    }


def find_missing_files(folder: ModelFolder) -> list[str]:
    """Return the names of files that other programs need but the folder lacks."""
    component = folder.family_component
    required: list[tuple[str, ...]] = [("config.json",), (GENERATION_CONFIG_FILE,)]
    required.append((component.tokenizer_file,))
    required.append(("tokenizer_config.json",))
    if component.read_image_settings is None:
        required.append((PREPROCESSOR_FILE, PROCESSOR_FILE))
    required.append(("model.safetensors", "model.safetensors.index.json"))
    missing = []
    for names in required:
        if all(folder.find_file(name) is None for name in names):
            missing.append(" or ".join(names))
    if component.has_chat_template and not folder.chat_template:
        missing.append(f"a chat template ({', '.join(_CHAT_TEMPLATE_FILES)})")
    return missing


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    return read_json_object(path)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def propose_export(folder: Path) -> Step:
    """Return the next step for a merged model: commands of vLLM and SGLang, or a server."""
    if "serving" in ModelFolder(folder).family_component.exports:
        return Step("export", {"source": folder})
    return Step("serve", {"run_or_model": folder})


def require_export_family(folder: ModelFolder, kind: ExportKind, source: str) -> None:
    """Raise UserError for a model whose family has no export of this kind.

    `source` is the model as the user named it.
    """
    if kind not in folder.family_component.exports:
        operation = "web"
        if is_native(folder):
            operation = "serve"
        raise UserError(
            f"{source} is of the family {folder.family}",
            where="export",
            expected=f"one of {', '.join(FAMILIES.list_exported(kind))}",
            remedy=Step(operation, {"run_or_model": source}, "serve it with finesight"),
        )


def propose_merge(folder: ModelFolder, source: str) -> Remedy:
    """Return how to merge an adapter. `source` is the model as the user named it."""
    if not is_native(folder):
        return PEFT_MERGE
    return Step("merge", {"source": source, "out": "OUT"}, "merge it, and use OUT")


def require_merged_model(model_source: ModelSource, source: str, where: str) -> None:
    """Raise UserError for an adapter and for quantized weights."""
    if model_source.adapter is not None or model_source.quantization_summary:
        raise UserError(
            f"{source} is an adapter on a base",
            where=where,
            expected="a merged model",
            remedy=propose_merge(model_source.folder, source),
        )


def list_uploads(model_source: ModelSource, source: str) -> dict[str, Path]:
    """List the weights, configuration and tokenizer files of a model by their name in the upload.

    Code and unrelated files are excluded. `source` is the model as the user named it, for messages.

    Raises UserError for an adapter, and for a folder whose files changed since they were written.
    """
    require_merged_model(model_source, source, "export")
    folder = model_source.folder
    if (folder.path / DIGESTS_FILE).is_file():
        verify_folder(folder.path)
    return list_model_files(folder)
