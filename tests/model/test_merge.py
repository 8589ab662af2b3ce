"""Merged equals adapter, here and as transformers loads it, and nothing half-merged is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from oracle import CPU, config, conversation, distance, native, packed, reference, reference_logits
from safetensors.torch import load_file
from tuned import FAMILIES, LORA, TUNES, tuned

from finesight.digests import verify_folder
from finesight.errors import UserError
from finesight.hub import PREPROCESSOR_DEFAULTS, ModelFolder
from finesight.model.adapter import WEIGHTS, write_adapter
from finesight.model.lora import adaptable_layers, adapters
from finesight.model.merge import Precision, merge_folder, merge_into
from finesight.model.network import VisionLanguageModel
from finesight.model.weights import load_model, save_model

SAMPLES = [conversation(3, 2, ("image", (1, 10, 14)), 3, ("image", (1, 2, 2)), 4)]


def base_folder(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> ModelFolder:
    settings = config(family)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings | {"torch_dtype": "float32"}))
    (folder / "preprocessor_config.json").write_text(json.dumps(dict(PREPROCESSOR_DEFAULTS)))
    save_model(native(settings, reference(settings)), ModelFolder(folder), folder, dtype)
    return ModelFolder(folder)


def with_adapter(base: ModelFolder, tune: dict[str, Any] | None = None) -> VisionLanguageModel:
    return tuned(load_model(base, torch.float32, CPU), tune or TUNES["all parts"])


def saved(model: VisionLanguageModel, base: ModelFolder, folder: Path) -> Path:
    folder.mkdir()
    write_adapter(folder, model, base=str(base.path), base_fingerprint=base.fingerprint())
    return folder


@torch.no_grad()
def logits(model: VisionLanguageModel, theirs: Any) -> torch.Tensor:
    return model.logits(model(packed(theirs, SAMPLES)))


def from_transformers(folder: Path, family: str) -> Any:
    from transformers import (
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLForConditionalGeneration,
        Qwen3VLForConditionalGeneration,
        Qwen3VLMoeForConditionalGeneration,
    )

    kinds = {
        "qwen2_vl": Qwen2VLForConditionalGeneration,
        "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
        "qwen3_vl": Qwen3VLForConditionalGeneration,
        "qwen3_vl_moe": Qwen3VLMoeForConditionalGeneration,
    }
    model, report = kinds[family].from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    ["all parts", "some targets"],
)
def test_a_merged_folder_answers_as_the_adapter_does_here_in_peft_and_in_transformers(
    family: str, how: str, tmp_path: Path
) -> None:
    base = base_folder(tmp_path / "base", family)
    model = with_adapter(base, TUNES[how])
    adapter = saved(model, base, tmp_path / "adapter")
    layers = sum(len(a.layers) for _, _, a in adapters(model))
    merged = merge_folder(base, adapter, tmp_path / "merged")
    assert (merged.layers, merged.precision) == (layers, "fp32")

    theirs = reference(config(family))
    expected = logits(model, theirs)
    here = load_model(ModelFolder(merged.folder), torch.float32, CPU)
    assert distance(logits(here, theirs), expected) <= 1e-5
    loaded = from_transformers(merged.folder, family)
    with torch.no_grad():
        assert distance(reference_logits(loaded, SAMPLES[0]), expected) <= 1e-5
        plain = reference_logits(theirs, SAMPLES[0])
        assert distance(plain, expected) > 1e-2
        peft.PeftModel.from_pretrained(theirs, adapter).merge_and_unload()
        assert distance(reference_logits(theirs, SAMPLES[0]), expected) <= 1e-5


def test_merging_takes_the_adapters_off_and_keeps_the_outputs() -> None:
    theirs = reference(config("qwen2_vl"))
    model = tuned(native(config("qwen2_vl"), theirs), TUNES["all parts"])
    expected = logits(model, theirs)
    assert merge_into(model) == len(adaptable_layers(model))
    assert not list(adapters(model))
    assert distance(logits(model, theirs), expected) <= 1e-5
    assert merge_into(model) == 0


def test_the_sum_is_made_in_fp32_and_rounded_once(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_vl", torch.bfloat16)
    model = with_adapter(base, {"language": "lora", "lora": LORA | {"targets": ["v_proj"]}})
    adapter = saved(model, base, tmp_path / "adapter")
    name = "model.layers.1.self_attn.v_proj.weight"
    theirs = "base_model.model.model.language_model.layers.1.self_attn.v_proj"
    factors = load_file(adapter / WEIGHTS)
    stored = load_file(base.weight_files()[0])[name]
    update = 1.5 * factors[f"{theirs}.lora_B.weight"] @ factors[f"{theirs}.lora_A.weight"]
    exact = stored.double() + update.double()

    # The largest relative error of one rounding is half a step of the type's significand.
    precisions: list[tuple[Precision, str, torch.dtype, float]] = [
        ("auto", "bf16", torch.bfloat16, 2**-8),
        ("fp32", "fp32", torch.float32, 2**-24),
        ("fp16", "fp16", torch.float16, 2**-11),
    ]
    for precision, name_of_type, dtype, step in precisions:
        merged = merge_folder(base, adapter, tmp_path / precision, precision)
        assert merged.precision == name_of_type
        found = load_file(merged.folder / "model.safetensors")[name]
        assert found.dtype == dtype
        error = (found.double() - exact).abs() - step * exact.abs()
        assert float(error.max()) <= 1e-7
        settings = json.loads((merged.folder / "config.json").read_text())
        assert settings["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_the_folder_is_whole_and_verifiable(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_5_vl")
    adapter = saved(with_adapter(base), base, tmp_path / "adapter")
    merged = merge_folder(base, adapter, tmp_path / "merged")
    verify_folder(merged.folder)
    names = {path.name for path in merged.folder.iterdir()}
    expected = {"config.json", "preprocessor_config.json", "model.safetensors", "sha256.json"}
    assert names == expected


def test_another_base_is_refused_with_both_fingerprints(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_vl")
    other = base_folder(tmp_path / "other", "qwen2_vl", torch.bfloat16)
    adapter = saved(with_adapter(base), base, tmp_path / "adapter")
    with pytest.raises(UserError) as caught:
        merge_folder(other, adapter, tmp_path / "merged")
    assert base.fingerprint() in str(caught.value)
    assert other.fingerprint() in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_vl")
    adapter = saved(with_adapter(base), base, tmp_path / "adapter")
    (tmp_path / "merged").mkdir()
    with pytest.raises(UserError, match="exists already"):
        merge_folder(base, adapter, tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_an_adapter_that_does_not_fit_leaves_nothing(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", "qwen2_vl")
    other = base_folder(tmp_path / "other", "qwen2_5_vl")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, with_adapter(other), base="other")
    with pytest.raises(UserError, match="are no layers of the model"):
        merge_folder(base, adapter, tmp_path / "merged")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base", "other"]
