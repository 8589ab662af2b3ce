"""Merged models equal adapters, natively and in transformers; failed merges leave no files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hf_reference import (
    CPU,
    make_config,
    make_conversation,
    make_native_model,
    make_reference_model,
    max_relative_error,
    pack_conversations,
    reference_logits,
)
from lora_fixtures import (
    FAMILIES,
    TUNE_SETTINGS,
    get_tolerance,
    merge_to_folder,
    tune_with_lora,
)

from finesight.model.linear import iter_adapters
from finesight.model.lora.peft_io import save_adapter
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model, save_model
from finesight.model_folder import PREPROCESSOR_DEFAULTS, ModelFolder
from finesight.storage import verify_folder

SAMPLES = [make_conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4)]


def base_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> ModelFolder:
    settings = make_config(family)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings | {"torch_dtype": "float32"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(PREPROCESSOR_DEFAULTS)))
    model = make_native_model(settings, make_reference_model(settings))
    save_model(model, ModelFolder(folder), folder, dtype)
    return ModelFolder(folder)


def with_adapter(base: ModelFolder, tune: dict[str, Any]) -> VisionLanguageModel:
    return tune_with_lora(load_model(base, torch.float32, CPU), tune)


def write_adapter_folder(model: VisionLanguageModel, base: ModelFolder, folder: Path) -> Path:
    folder.mkdir()
    save_adapter(folder, model, base_model=str(base.path), base_fingerprint=base.fingerprint())
    return folder


@torch.no_grad()
def logits(model: VisionLanguageModel, theirs: Any) -> torch.Tensor:
    return model.compute_logits(model(pack_conversations(theirs, SAMPLES)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["all parts", "some targets"])
@torch.no_grad()
def test_merged_folder_matches_adapter_peft_and_transformers(
    family: str, how: str, tmp_path: Path
) -> None:
    base = base_folder(tmp_path / "base", family)
    model = with_adapter(base, TUNE_SETTINGS[how])
    adapter = write_adapter_folder(model, base, tmp_path / "adapter")
    layers = sum(len(a.configs) for _, _, a in iter_adapters(model))
    merged = merge_to_folder(base, adapter, tmp_path / "merged")
    assert (merged.merged_layers, merged.precision) == (layers, "fp32")
    verify_folder(merged.folder)

    theirs = make_reference_model(make_config(family))
    expected = logits(model, theirs)
    assert max_relative_error(reference_logits(theirs, SAMPLES[0]), expected) > 1e-2
    here = load_model(ModelFolder(merged.folder), torch.float32, CPU)
    loaded, report = type(theirs).from_pretrained(merged.folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    peft.PeftModel.from_pretrained(theirs, adapter).merge_and_unload()
    for found in (
        logits(here, theirs),
        reference_logits(loaded.eval(), SAMPLES[0]),
        reference_logits(theirs, SAMPLES[0]),
    ):
        assert max_relative_error(found, expected) <= get_tolerance(family)
