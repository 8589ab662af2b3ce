from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from case_files import load_cases
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model

from finesight.config import ExactSize, LoraSettings, TuneSettings
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.infer.model_loader import (
    load_inference_model,
    resolve_device,
    resolve_model_source,
    resolve_precision,
)
from finesight.infer.prediction import predict
from finesight.manifest import Manifest
from finesight.model.lora.peft_io import save_adapter
from finesight.model.trainable import configure_tuning
from finesight.model.weights_io import load_model, save_model
from finesight.model_folder import ModelFolder
from finesight.storage import write_folder

CASES = load_cases("model_loader")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen2_5_vl")


def _manifest(run: Path, base: Path) -> Manifest:
    folder = ModelFolder(base)
    manifest = Manifest(
        family=folder.family,
        base_model=str(base),
        base_fingerprint=folder.fingerprint(),
        image_rule=ExactSize(height=56, width=112),
        system_prompt="Speak in rhymes.",
        eos_token="<|im_end|>",
        tune=TuneSettings(lora=LoraSettings(rank=4)),
        versions={"finesight": "0"},
    )
    run.mkdir()
    (run / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def _edit_manifest(run: Path, **changes: object) -> None:
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _load_with_adapter(base: Path, seed: int = 0):
    """The base with an adapter whose B is not zero."""
    model = load_model(ModelFolder(base), torch.float32, CPU)
    configure_tuning(model, TuneSettings(lora=LoraSettings(rank=4)), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def _write_adapter(target: Path, base: Path) -> None:
    with write_folder(target) as folder:
        save_adapter(
            folder,
            _load_with_adapter(base),
            base_model=str(base),
            base_fingerprint=ModelFolder(base).fingerprint(),
        )


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    _manifest(tmp_path / "run", base)
    _write_adapter(tmp_path / "run/adapter", base)
    return tmp_path / "run"


def _answer(model, renderer, folder: Path) -> str:
    write_noise_image(folder / "a.png", 90, 70)
    requested = [make_sample("s", folder, "a.png", "What is it?")]
    return predict(model, renderer, requested, max_new_tokens=12, batch_size=1)[0].raw_text


def test_model_folder_uses_family_settings(base, tmp_path):
    answerer = load_inference_model(str(base), "cpu")
    assert not answerer.model.training
    assert answerer.renderer.system_prompt == answerer.renderer.family.system_prompt
    model = load_model(ModelFolder(base), torch.float32, CPU)
    expected = _answer(model, NativeRenderer(ModelFolder(base)), tmp_path)
    assert _answer(answerer.model, answerer.renderer, tmp_path) == expected


@pytest.mark.parametrize(
    ("metrics", "has_images"),
    [
        ('{"size_histograms": {"tokens": {"12": 2}, "patches": {"12": 2}}}\n{"step": 1}\n', True),
        ('{"size_histograms": {"tokens": {"12": 2}, "patches": {}}}\n', False),
        ("", None),
        ("broken\n", None),
        ("[]\n", None),
    ],
)
def test_images_of_the_training_are_known(base, run, tmp_path, metrics, has_images):
    (run / "metrics.jsonl").write_text(metrics)
    source = resolve_model_source(str(run))
    assert source.manifest.has_images is has_images
    # A merged model has no metrics.
    (run / "metrics.jsonl").unlink()
    (run / "manifest.json").write_text(source.manifest.model_dump_json())
    assert resolve_model_source(str(run)).manifest.has_images is has_images


def test_run_uses_its_training_settings(base, run, tmp_path):
    answerer = load_inference_model(str(run), "cpu")
    assert answerer.renderer.system_prompt == "Speak in rhymes."
    assert answerer.renderer.image_rule == ExactSize(height=56, width=112)
    rule = ExactSize(height=56, width=112)
    renderer = NativeRenderer(ModelFolder(base), rule, "Speak in rhymes.")
    baseline = _answer(load_model(ModelFolder(base), torch.float32, CPU), renderer, tmp_path)
    assert _answer(answerer.model, answerer.renderer, tmp_path) != baseline
    assert _answer(answerer.model, answerer.renderer, tmp_path) == _answer(
        _load_with_adapter(base), renderer, tmp_path
    )


def test_adapter_folder_finds_its_base(run, base, tmp_path):
    answerer = load_inference_model(str(run / "adapter"), "cpu")
    expected = _answer(_load_with_adapter(base), NativeRenderer(ModelFolder(base)), tmp_path)
    assert _answer(answerer.model, answerer.renderer, tmp_path) == expected


def test_full_finetune_run_needs_no_base(base, tmp_path):
    run = tmp_path / "run"
    _manifest(run, base)
    other = create_tiny_model(tmp_path / "other", "qwen2_5_vl", seed=7)
    model = load_model(ModelFolder(other), torch.float32, CPU)
    with write_folder(run / "model") as folder:
        save_model(model, ModelFolder(base), folder, torch.float32)
    _edit_manifest(run, base_model=str(tmp_path / "gone"), tune={"language": "full"})
    answerer = load_inference_model(str(run), "cpu")
    expected = _answer(model, answerer.renderer, tmp_path)
    assert _answer(answerer.model, answerer.renderer, tmp_path) == expected


def test_changed_base_is_rejected_with_both_fingerprints(run, base, tmp_path):
    right = ModelFolder(base).fingerprint()
    _edit_manifest(run, base_fingerprint="0" * 64)
    with pytest.raises(UserError, match=f"(?s){right}.*{'0' * 64}"):
        load_inference_model(str(run), "cpu")


@pytest.mark.parametrize(("tune", "written", "missing"), CASES["test_unfinished_run_is_rejected"])
def test_unfinished_run_is_rejected(base, tmp_path, tune, written, missing):
    run = tmp_path / "run"
    _manifest(run, base)
    _edit_manifest(run, tune=tune)
    for name in written:
        (run / name).mkdir()
    with pytest.raises(UserError, match=missing):
        load_inference_model(str(run), "cpu")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "a" * 300, "a\0b", ""])
def test_invalid_path_is_rejected(name):
    with pytest.raises(UserError, match="no folder"):
        load_inference_model(name, "cpu")


def test_damaged_adapter_is_rejected(run):
    file = run / "adapter/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_inference_model(str(run), "cpu")


@pytest.mark.parametrize(("content", "message"), CASES["test_invalid_manifest_is_rejected"])
def test_invalid_manifest_is_rejected(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_inference_model(str(tmp_path), "cpu")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_invalid_adapter_config_is_rejected(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_inference_model(str(tmp_path), "cpu")


def test_folder_without_weights_is_rejected(base, tmp_path):
    shutil.copytree(base, tmp_path / "empty")
    (tmp_path / "empty/model.safetensors").unlink()
    with pytest.raises(UserError, match="without weights"):
        load_inference_model(str(tmp_path / "empty"), "cpu")


def test_unknown_family_is_rejected_before_reading_weights(base, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(UserError, match=r"(?s)llama.*qwen2_vl"):
        load_inference_model(str(folder), "cpu")


def test_family_mismatch_of_run_and_base_is_rejected(run, tmp_path):
    _edit_manifest(run, family="qwen2_vl")
    with pytest.raises(UserError, match=r"(?s)qwen2_5_vl.*qwen2_vl"):
        load_inference_model(str(run), "cpu")


def test_device_and_precision_resolution():
    assert resolve_precision("auto", CPU) == torch.float32
    assert resolve_precision("bf16", CPU) == torch.bfloat16
    assert resolve_device("cpu") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_cuda_without_gpu_is_rejected():
    assert resolve_device("auto") == CPU
    with pytest.raises(UserError, match=r"device is cuda.*no CUDA"):
        resolve_device("cuda")
