"""Merged models equal adapters, natively and in transformers; failed merges leave no files."""

import json
from pathlib import Path

import hf_reference
import peft
import pytest
import torch
from lora_fixtures import (
    FAMILIES,
    LORA,
    TUNE_SETTINGS,
    get_tolerance,
    merge_to_folder,
    tune_with_lora,
)
from safetensors.torch import load_file

from finesight.files.storage import verify_folder
from finesight.model.linear import iter_adapters
from finesight.model.lora.merge import Precision
from finesight.model.lora.peft_io import ADAPTER_WEIGHTS_FILE, save_adapter
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

SAMPLES = [hf_reference.make_conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4)]


def write_adapter_folder(model: VisionLanguageModel, base: ModelFolder, folder: Path) -> Path:
    folder.mkdir()
    save_adapter(folder, model, base_model=str(base.path), base_fingerprint=base.fingerprint())
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("how", ["all parts", "some targets"])
@torch.no_grad()
def test_merged_folder_matches_adapter_peft_and_transformers(family, how, tmp_path):
    base = hf_reference.write_model_folder(tmp_path / "base", hf_reference.make_config(family))
    model = tune_with_lora(load_model(base, torch.float32, hf_reference.CPU), TUNE_SETTINGS[how])
    adapter = write_adapter_folder(model, base, tmp_path / "adapter")
    layers = sum(len(a.configs) for _, _, a in iter_adapters(model))
    merged = merge_to_folder(base, adapter, tmp_path / "merged")
    assert (merged.merged_layers, merged.precision) == (layers, "fp32")
    verify_folder(merged.folder)

    theirs = hf_reference.make_reference_model(hf_reference.make_config(family))
    expected = hf_reference.native_logits(model, theirs, SAMPLES)
    assert (
        hf_reference.max_relative_error(hf_reference.reference_logits(theirs, SAMPLES[0]), expected)
        > 1e-2
    )
    here = load_model(ModelFolder(merged.folder), torch.float32, hf_reference.CPU)
    loaded, report = type(theirs).from_pretrained(merged.folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    peft.PeftModel.from_pretrained(theirs, adapter).merge_and_unload()
    for found in (
        hf_reference.native_logits(here, theirs, SAMPLES),
        hf_reference.reference_logits(loaded.eval(), SAMPLES[0]),
        hf_reference.reference_logits(theirs, SAMPLES[0]),
    ):
        assert hf_reference.max_relative_error(found, expected) <= get_tolerance(family)


def test_merge_sums_in_fp32_and_rounds_once(tmp_path):
    base = hf_reference.write_model_folder(
        tmp_path / "base", hf_reference.make_config("qwen2_vl"), torch.bfloat16
    )
    tune = {"language": "lora", "lora": LORA | {"target_modules": ["v_proj"]}}
    model = tune_with_lora(load_model(base, torch.float32, hf_reference.CPU), tune)
    adapter = write_adapter_folder(model, base, tmp_path / "adapter")
    name = "model.layers.1.self_attn.v_proj.weight"
    theirs = "base_model.model.model.language_model.layers.1.self_attn.v_proj"
    factors = load_file(adapter / ADAPTER_WEIGHTS_FILE)
    stored = load_file(base.weight_files()[0])[name]
    update = 1.5 * factors[f"{theirs}.lora_B.weight"] @ factors[f"{theirs}.lora_A.weight"]
    exact = stored.double() + update.double()

    # The largest relative error of one rounding is half a unit in the last place.
    precisions: list[tuple[Precision, str, torch.dtype, float]] = [
        ("auto", "bf16", torch.bfloat16, 2**-8),
        ("fp32", "fp32", torch.float32, 2**-24),
        ("fp16", "fp16", torch.float16, 2**-11),
    ]
    for precision, name_of_type, dtype, step in precisions:
        merged = merge_to_folder(base, adapter, tmp_path / precision, precision)
        assert merged.precision == name_of_type
        found = load_file(merged.folder / "model.safetensors")[name]
        assert found.dtype == dtype
        error = (found.double() - exact).abs() - step * exact.abs()
        assert float(error.max()) <= 1e-7
        settings = json.loads((merged.folder / "config.json").read_text())
        assert settings["torch_dtype"] == str(dtype).removeprefix("torch.")
