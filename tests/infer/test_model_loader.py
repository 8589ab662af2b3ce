import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from engine_fixtures import make_sample, write_noise_image
from lora_fixtures import install_random_adapter
from tiny_model import create_tiny_model

from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.files.storage import write_folder
from finesight.infer.model_loader import load_inference_model, resolve_model_source
from finesight.infer.prediction import predict
from finesight.model.lora.peft_io import save_adapter
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model, save_model
from finesight.model_folder import ModelFolder
from finesight.settings.config import ExactSize, LoraSettings, TuneSettings
from finesight.settings.manifest import Manifest

IMAGE_RULE = ExactSize(height=56, width=112)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen2_5_vl")


def _write_manifest(run: Path, base: Path, **changes: object) -> None:
    folder = ModelFolder(base)
    manifest = Manifest(
        family=folder.family,
        base_model=str(base),
        base_fingerprint=folder.fingerprint(),
        image_rule=IMAGE_RULE,
        system_prompt="Speak in rhymes.",
        eos_token="<|im_end|>",
        tune=TuneSettings(lora=LoraSettings(rank=4)),
        versions={"finesight": "0"},
    )
    run.mkdir(exist_ok=True)
    content = json.loads(manifest.model_dump_json()) | changes
    (run / "manifest.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def trained(base: Path) -> VisionLanguageModel:
    model = load_model(ModelFolder(base), torch.float32, CPU)
    return install_random_adapter(model, 0, {"lora": {"rank": 4}})


@pytest.fixture
def run(base: Path, trained: VisionLanguageModel, tmp_path: Path) -> Path:
    _write_manifest(tmp_path / "run", base)
    with write_folder(tmp_path / "run/adapter") as folder:
        fingerprint = ModelFolder(base).fingerprint()
        save_adapter(folder, trained, base_model=str(base), base_fingerprint=fingerprint)
    return tmp_path / "run"


def _answer(model, renderer, folder: Path) -> str:
    write_noise_image(folder / "a.png", 90, 70)
    requested = [make_sample("s", folder, "a.png", "What is it?")]
    return predict(model, renderer, requested, max_new_tokens=12, batch_size=1)[0].raw_text


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


def test_run_uses_its_training_settings(base, trained, run, tmp_path):
    """A copy of the adapter alone is used with the settings of its family."""
    of_run = NativeRenderer(ModelFolder(base), IMAGE_RULE, "Speak in rhymes.")
    copy = shutil.copytree(run / "adapter", tmp_path / "adapter")
    for source, renderer, tuned in (
        (run, of_run, True),
        (run / "adapter", of_run, True),
        (copy, NativeRenderer(ModelFolder(base)), True),
        (base, NativeRenderer(ModelFolder(base)), False),
    ):
        found = load_inference_model(str(source), "cpu")
        assert not found.model.training
        assert found.renderer.system_prompt == renderer.system_prompt
        assert found.renderer.image_rule == renderer.image_rule
        answer = _answer(found.model, found.renderer, tmp_path)
        assert (answer == _answer(trained, renderer, tmp_path)) == tuned


def test_full_finetune_run_needs_no_base(base, tmp_path):
    run = tmp_path / "run"
    _write_manifest(run, base, base_model=str(tmp_path / "gone"), tune={"language": "full"})
    other = create_tiny_model(tmp_path / "other", "qwen2_5_vl", seed=7)
    model = load_model(ModelFolder(other), torch.float32, CPU)
    with write_folder(run / "model") as folder:
        save_model(model, ModelFolder(base), folder, torch.float32)
    answerer = load_inference_model(str(run), "cpu")
    expected = _answer(model, answerer.renderer, tmp_path)
    assert _answer(answerer.model, answerer.renderer, tmp_path) == expected


REJECTED_RUNS: list[tuple[dict[str, object], list[str], str]] = [
    ({"base_fingerprint": "0" * 64}, ["adapter"], "0" * 64),
    ({"family": "qwen2_vl"}, ["adapter"], r"(?s)qwen2_5_vl.*qwen2_vl"),
    ({"tune": {}}, [], "no adapter/: "),
    ({"tune": {"language": "full"}}, ["adapter"], "no model/: "),
    ({"tune": {"vision": "full"}}, [], "no model/ and no adapter/: "),
    ({"tune": {"vision": "full"}}, ["model"], "no adapter/: "),
    ({"format_version": 1}, [], "manifest has format version 1"),
    ({"famly": "x"}, [], r"manifest\.json"),
]


@pytest.mark.parametrize(("changes", "folders", "message"), REJECTED_RUNS)
def test_inconsistent_run_is_rejected(base, tmp_path, changes, folders, message):
    _write_manifest(tmp_path, base, **changes)
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=message):
        load_inference_model(str(tmp_path), "cpu")


def test_damaged_files_are_rejected(base, run, tmp_path):
    weights = run / "adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x00")
    empty = shutil.copytree(base, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    other = shutil.copytree(base, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    sources = [
        (str(run), r"adapter_model\.safetensors"),
        (str(empty), "without weights"),
        (str(other), r"(?s)llama.*qwen2_vl"),
        *((name, "no folder") for name in ("~nobody-of-that-name/model", "a" * 300, "a\0b", "")),
    ]
    for name, content in (
        ("adapter_config.json", "{"),
        ("adapter_config.json", "[]"),
        ("adapter_config.json", "{}"),
        ("adapter_config.json", '{"base_model_name_or_path": null}'),
        ("manifest.json", "{"),
    ):
        folder = tmp_path / f"damaged-{len(sources)}"
        folder.mkdir()
        (folder / name).write_text(content)
        sources.append((str(folder), re.escape(name)))
    for source, message in sources:
        with pytest.raises(UserError, match=message):
            load_inference_model(source, "cpu")
