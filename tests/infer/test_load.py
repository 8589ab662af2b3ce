from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from asking import ask, noise

from finesight.config import ExactSize, Lora, Tune
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer.load import load_answerer, resolve_device, resolve_precision
from finesight.infer.predict import predict
from finesight.manifest import Manifest
from finesight.model.adapter import write_adapter
from finesight.model.parts import apply_tuning
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model, save_model
from finesight.storage import write_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen2_5_vl")


def _manifest(run: Path, base: Path) -> Manifest:
    folder = ModelFolder(base)
    manifest = Manifest(
        family=folder.family,
        base=str(base),
        base_fingerprint=folder.fingerprint(),
        picture=ExactSize(height=56, width=112),
        system="Speak in rhymes.",
        end_token="<|im_end|>",
        tune=Tune(lora=Lora(rank=4)),
        versions={"finesight": "0"},
    )
    run.mkdir()
    (run / "manifest.json").write_text(manifest.model_dump_json())
    return manifest


def _tuned(base: Path, seed: int = 0):
    """The base with an adapter whose B is not zero."""
    model = load_model(ModelFolder(base), torch.float32, CPU)
    apply_tuning(model, Tune(lora=Lora(rank=4)), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return model


def _write_adapter(target: Path, base: Path) -> None:
    with write_folder(target) as folder:
        write_adapter(
            folder,
            _tuned(base),
            base=str(base),
            base_fingerprint=ModelFolder(base).fingerprint(),
        )


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    _manifest(tmp_path / "run", base)
    _write_adapter(tmp_path / "run/adapter", base)
    return tmp_path / "run"


def _answer(model, renderer, folder: Path) -> str:
    noise(folder / "a.png", 90, 70)
    asked = [ask("s", folder, "a.png", "What is it?")]
    return predict(model, renderer, asked, max_new_tokens=12, batch=1)[0].raw


def test_a_model_folder_takes_the_familys_settings(base, tmp_path):
    answerer = load_answerer(str(base), "cpu")
    assert not answerer.model.training
    assert answerer.renderer.system == answerer.renderer.family.system_prompt
    model = load_model(ModelFolder(base), torch.float32, CPU)
    expected = _answer(model, Renderer(ModelFolder(base)), tmp_path)
    assert _answer(answerer.model, answerer.renderer, tmp_path) == expected


def test_a_run_answers_as_it_was_trained(base, run, tmp_path):
    answerer = load_answerer(str(run), "cpu")
    assert answerer.renderer.system == "Speak in rhymes."
    assert answerer.renderer.rule == ExactSize(height=56, width=112)
    rule = ExactSize(height=56, width=112)
    renderer = Renderer(ModelFolder(base), rule, "Speak in rhymes.")
    plain = _answer(load_model(ModelFolder(base), torch.float32, CPU), renderer, tmp_path)
    assert _answer(answerer.model, answerer.renderer, tmp_path) != plain
    assert _answer(answerer.model, answerer.renderer, tmp_path) == _answer(
        _tuned(base), renderer, tmp_path
    )


def test_an_adapter_folder_finds_its_base(run, base, tmp_path):
    answerer = load_answerer(str(run / "adapter"), "cpu")
    expected = _answer(_tuned(base), Renderer(ModelFolder(base)), tmp_path)
    assert _answer(answerer.model, answerer.renderer, tmp_path) == expected


def test_a_run_of_full_training_needs_no_base(base, tmp_path):
    run = tmp_path / "run"
    _manifest(run, base)
    other = make_tiny(tmp_path / "other", "qwen2_5_vl", seed=7)
    model = load_model(ModelFolder(other), torch.float32, CPU)
    with write_folder(run / "model") as folder:
        save_model(model, ModelFolder(base), folder, torch.float32)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["base"] = str(tmp_path / "gone")
    manifest["tune"]["language"] = "full"
    (run / "manifest.json").write_text(json.dumps(manifest))
    answerer = load_answerer(str(run), "cpu")
    expected = _answer(model, answerer.renderer, tmp_path)
    assert _answer(answerer.model, answerer.renderer, tmp_path) == expected


def test_a_changed_base_is_refused_with_both_fingerprints(run, base, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    right = manifest["base_fingerprint"]
    manifest["base_fingerprint"] = "0" * 64
    (run / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"(?s){right}.*{'0' * 64}"):
        load_answerer(str(run), "cpu")


@pytest.mark.parametrize(
    ("tune", "written", "missing"),
    [
        ({}, [], "no adapter/: "),
        ({"language": "full"}, ["adapter"], "no model/: "),
        ({"vision": "full"}, [], "no model/ and no adapter/: "),
        # Stopped between the two: the model alone is not what was trained.
        ({"vision": "full"}, ["model"], "no adapter/: "),
    ],
)
def test_a_run_that_is_not_finished_is_refused(base, tmp_path, tune, written, missing):
    run = tmp_path / "run"
    _manifest(run, base)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tune"] |= tune
    (run / "manifest.json").write_text(json.dumps(manifest))
    for name in written:
        (run / name).mkdir()
    with pytest.raises(UserError, match=missing):
        load_answerer(str(run), "cpu")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/model", "a" * 300, "a\0b", ""])
def test_what_cannot_be_a_path_is_no_model(name):
    with pytest.raises(UserError, match="no folder"):
        load_answerer(name, "cpu")


def test_a_damaged_adapter_is_refused(run):
    file = run / "adapter/adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        load_answerer(str(run), "cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "the file"), ('{"format": 1}', "family"), ('{"famly": "x"}', "manifest.json")],
)
def test_a_broken_manifest_is_refused(tmp_path, content, message):
    (tmp_path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_answerer(str(tmp_path), "cpu")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"base_model_name_or_path": null}'])
def test_a_broken_adapter_configuration_is_refused(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(UserError, match=r"adapter_config\.json"):
        load_answerer(str(tmp_path), "cpu")


def test_a_folder_without_weights_is_refused(base, tmp_path):
    shutil.copytree(base, tmp_path / "empty")
    (tmp_path / "empty/model.safetensors").unlink()
    with pytest.raises(UserError, match="without weights"):
        load_answerer(str(tmp_path / "empty"), "cpu")


def test_another_family_is_refused_before_its_weights_are_read(base, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(base, folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(UserError, match=r"(?s)llama.*qwen2_vl"):
        load_answerer(str(folder), "cpu")


def test_a_run_of_another_family_than_its_base_is_refused(run, tmp_path):
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"family": "qwen2_vl"}))
    with pytest.raises(UserError, match=r"(?s)qwen2_5_vl.*qwen2_vl"):
        load_answerer(str(run), "cpu")


def test_devices_and_precisions():
    assert resolve_precision("auto", CPU) == torch.float32
    assert resolve_precision("bf16", CPU) == torch.bfloat16
    assert resolve_device("cpu") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_cuda_without_a_card_is_refused():
    assert resolve_device("auto") == CPU
    with pytest.raises(UserError, match=r"device is cuda.*no CUDA"):
        resolve_device("cuda")
