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
    LORA,
    TUNE_SETTINGS,
    get_tolerance,
    merge_to_folder,
    tune_with_lora,
)
from safetensors.torch import load_file

from finesight.errors import UserError
from finesight.model.linear import find_adaptable_layers, iter_adapters
from finesight.model.lora.merge import Precision, merge_adapters
from finesight.model.lora.peft_io import ADAPTER_WEIGHTS_FILE, save_adapter
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
    save_model(
        make_native_model(settings, make_reference_model(settings)),
        ModelFolder(folder),
        folder,
        dtype,
    )
    return ModelFolder(folder)


def with_adapter(base: ModelFolder, tune: dict[str, Any] | None = None) -> VisionLanguageModel:
    return tune_with_lora(load_model(base, torch.float32, CPU), tune or TUNE_SETTINGS["all parts"])


def write_adapter_folder(model: VisionLanguageModel, base: ModelFolder, folder: Path) -> Path:
    folder.mkdir()
    save_adapter(folder, model, base_model=str(base.path), base_fingerprint=base.fingerprint())
    return folder


@torch.no_grad()
def logits(model: VisionLanguageModel, theirs: Any) -> torch.Tensor:
    return model.compute_logits(model(pack_conversations(theirs, SAMPLES)))


def from_transformers(folder: Path, family: str) -> Any:
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLForConditionalGeneration,
        Qwen3_5ForConditionalGeneration,
        Qwen3_5MoeForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeForConditionalGeneration,
    )

    kinds = {
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
        "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
        "qwen3_5": Qwen3_5ForConditionalGeneration,
        "qwen3_5_moe": Qwen3_5MoeForConditionalGeneration,
    }
    model, report = kinds[family].from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    ["all parts", "some targets"],
)
def test_merged_folder_matches_adapter_peft_and_transformers(
    family: str, how: str, tmp_path: Path
) -> None:
    base = base_folder(tmp_path / "base", family)
    model = with_adapter(base, TUNE_SETTINGS[how])
    adapter = write_adapter_folder(model, base, tmp_path / "adapter")
    layers = sum(len(a.configs) for _, _, a in iter_adapters(model))
    merged = merge_to_folder(base, adapter, tmp_path / "merged")
    assert (merged.merged_layers, merged.precision) == (layers, "fp32")

    theirs = make_reference_model(make_config(family))
    expected = logits(model, theirs)
    here = load_model(ModelFolder(merged.folder), torch.float32, CPU)
    assert max_relative_error(logits(here, theirs), expected) <= get_tolerance(family)
    loaded = from_transformers(merged.folder, family)
    with torch.no_grad():
        assert max_relative_error(reference_logits(loaded, SAMPLES[0]), expected) <= get_tolerance(
            family
        )
        baseline = reference_logits(theirs, SAMPLES[0])
        assert max_relative_error(baseline, expected) > 1e-2
        peft.PeftModel.from_pretrained(theirs, adapter).merge_and_unload()
        assert max_relative_error(reference_logits(theirs, SAMPLES[0]), expected) <= get_tolerance(
            family
        )


def test_merging_removes_adapters_and_keeps_outputs() -> None:
    theirs = make_reference_model(make_config("qwen2_vl"))
    model = tune_with_lora(
        make_native_model(make_config("qwen2_vl"), theirs), TUNE_SETTINGS["all parts"]
    )
    expected = logits(model, theirs)
    assert merge_adapters(model) == len(find_adaptable_layers(model))
    assert not list(iter_adapters(model))
    assert max_relative_error(logits(model, theirs), expected) <= 1e-5
    assert merge_adapters(model) == 0


def test_merge_sums_in_fp32_and_rounds_once(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_vl", torch.bfloat16)
    model = with_adapter(base, {"language": "lora", "lora": LORA | {"target_modules": ["v_proj"]}})
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


def test_merged_folder_is_complete_and_verifiable(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_5_vl")
    adapter = write_adapter_folder(with_adapter(base), base, tmp_path / "adapter")
    merged = merge_to_folder(base, adapter, tmp_path / "merged")
    verify_folder(merged.folder)
    names = {path.name for path in merged.folder.iterdir()}
    expected = {"config.json", "preprocessor_config.json", "model.safetensors", "sha256.json"}
    assert names == expected


def test_wrong_base_is_rejected_with_both_fingerprints(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_vl")
    other = base_folder(tmp_path / "other", "qwen2_vl", torch.bfloat16)
    adapter = write_adapter_folder(with_adapter(base), base, tmp_path / "adapter")
    with pytest.raises(UserError) as caught:
        merge_to_folder(other, adapter, tmp_path / "merged")
    assert base.fingerprint() in str(caught.value)
    assert other.fingerprint() in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_existing_folder_is_not_overwritten(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_vl")
    adapter = write_adapter_folder(with_adapter(base), base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="exists already"):
        merge_to_folder(base, adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_mismatched_adapter_leaves_no_files(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_vl")
    other = base_folder(tmp_path / "other", "qwen2_5_vl")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, with_adapter(other), base_model="other")
    with pytest.raises(UserError, match="are no layers of the model"):
        merge_to_folder(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]
