"""Tests of `finesight merge` with runs and adapters."""

import json
from pathlib import Path

import pytest
import torch
from gptq_fixtures import GptqConfig, write_quantized_model
from hf_reference import CPU
from lora_fixtures import save_random_adapter
from tiny_model import create_tiny_model

from finesight.files.storage import verify_folder
from finesight.infer.model_loader import load_inference_model
from finesight.model.weights_io import load_model, save_model
from finesight.model_folder import ModelFolder
from finesight.settings.config import PixelRange, TuneSettings
from finesight.settings.manifest import Manifest

TUNE = {"language": "lora", "lora": {"rank": 2}}
WEIGHTS = "model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> ModelFolder:
    return ModelFolder(create_tiny_model(tmp_path / "base"))


@pytest.fixture
def adapter(base: ModelFolder, tmp_path: Path) -> Path:
    return save_random_adapter(base, tmp_path / "run" / "adapter", TUNE)


@pytest.fixture
def run(base: ModelFolder, adapter: Path) -> Path:
    manifest = Manifest(
        family="qwen2_vl",
        base_model=str(base.path),
        base_fingerprint=base.fingerprint(),
        image_rule=PixelRange(min_pixels=784, max_pixels=7840),
        system_prompt="Speak in rhymes.",
        eos_token="<|im_end|>",
        tune=TuneSettings.model_validate(TUNE),
        versions={},
    )
    (adapter.parent / "manifest.json").write_text(manifest.model_dump_json())
    return adapter.parent


def change_manifest(run: Path, **values: object) -> None:
    path = run / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_run_is_merged_into_model_folder(run, base, tmp_path, cli):
    out = tmp_path / "merged"
    printed = cli("merge", run, out)
    lines = printed.lines
    assert lines[0] == f"14 layers merged into {out}, fp32"
    assert lines[1].startswith("4 prompts about generated images")
    assert lines[-1] == "4 of 4 completions have equal tokens"
    assert printed.err.endswith(f"next: finesight export {out}\n")
    verify_folder(out)
    written = {path.name for path in out.iterdir()}
    assert written == {path.name for path in base.path.iterdir()} | {"manifest.json", "README.md"}
    assert (out / WEIGHTS).read_bytes() != base.weight_files()[0].read_bytes()
    # The merged model keeps the prompt and the pixel limits of the run.
    for path in (run, out):
        renderer = load_inference_model(str(path), "cpu").renderer
        assert renderer.image_rule == PixelRange(min_pixels=784, max_pixels=7840)
        assert renderer.system_prompt == "Speak in rhymes."
    settings = json.loads((out / "preprocessor_config.json").read_text())
    limits = [settings[name] for name in ("min_pixels", "max_pixels", "patch_size")]
    assert limits == [784, 7840, 14]
    # A model trained from the merged model has no manifest of this run.
    again = tmp_path / "again"
    again.mkdir()
    merged = ModelFolder(out)
    save_model(load_model(merged, torch.float32, CPU), merged, again, torch.float32)
    assert not (again / "manifest.json").exists()


@pytest.mark.parametrize("alone", [False, True])
def test_processor_config_keeps_image_settings(run, base, tmp_path, alone, cli):
    """transformers 5 writes processor_config.json; without image settings it would hide them."""
    before, out = base.path / "preprocessor_config.json", tmp_path / "merged"
    settings = json.loads(before.read_text()) | {"image_mean": [0.5, 0.4, 0.3], "size": {}}
    (base.path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    before.unlink() if alone else before.write_text(json.dumps(settings))
    (base.path / "sha256.json").unlink()
    cli("merge", run, out)
    limits = {"shortest_edge": 784, "longest_edge": 7840}
    expected = settings | {"min_pixels": 784, "max_pixels": 7840, "size": limits}
    nested = json.loads((out / "processor_config.json").read_text())
    assert nested == {"image_processor": expected}
    assert ModelFolder(out).preprocessor_config["image_mean"] == [0.5, 0.4, 0.3]
    assert (out / "preprocessor_config.json").exists() is not alone


def test_invalid_arguments_are_rejected(run, adapter, base, tmp_path, cli):
    out = tmp_path / "merged"
    other = ModelFolder(create_tiny_model(tmp_path / "other", "qwen2_5_vl"))
    for source in (run, adapter):
        error = cli("merge", source, out, "--base", other.path, code=2).err
        assert base.fingerprint() in error
        assert other.fingerprint() in error
    assert f"{base.path} has no adapter" in cli("merge", base.path, out, code=2).err
    error = cli("merge", base.path, out, "--base", base.path, code=2).err
    assert "is a complete model" in error
    assert "exists already" in cli("merge", run, base.path, code=2).err
    moved = base.path.rename(tmp_path / "moved")
    assert "no folder" in cli("merge", run, out, code=2).err
    assert not out.exists()
    assert "bf16" in cli("merge", run, out, "--base", moved, "--precision", "bf16").out


@pytest.mark.parametrize("few", ["nf4", "fp8"])
def test_quantized_run_merges_into_published_weights(few, run, tmp_path, cli):
    cli("merge", run, tmp_path / "plain")
    tune = json.loads((run / "manifest.json").read_text())["tune"]
    change_manifest(run, tune=tune | {"quantize": {few: ["language"]}})
    lines = cli("merge", run, tmp_path / "merged").lines
    assert f"the run used quantized weights (language in {few.upper()})" in lines[-1]
    assert "compared with the quantized base used in training" in lines[-2]
    weights = [(tmp_path / name / WEIGHTS).read_bytes() for name in ("plain", "merged")]
    assert weights[0] == weights[1]
    output = cli("merge", run, tmp_path / "again", "--json").json
    assert output[f"{few}_parts"] == ["language"]
    trained = output["parity"]["quantized_comparison"]
    assert 1e-3 < trained["logits"] < 10
    assert 0 <= trained["equal_answers"] <= 1


def test_four_bit_model_is_written_dequantized(base, tmp_path, cli):
    four, dense = write_quantized_model(base, tmp_path, GptqConfig())
    out = tmp_path / "full"
    lines = cli("merge", four.path, out).lines
    assert lines[0] == f"written to {out}, fp32"
    assert any(line.startswith("  4 bits, and dequantized") for line in lines)
    assert "adapter" not in "".join(lines)
    assert lines[-1].startswith("14 layers were dequantized from 4 bits to fp32")
    models = [load_model(f, torch.float32, CPU).state_dict() for f in (ModelFolder(out), dense)]
    assert all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())
    output = cli("merge", four.path, tmp_path / "again", "--json").json
    assert output["dequantized_layers"] == 14


def test_full_finetune_run_is_written_as_complete_model(run, base, tmp_path, cli):
    create_tiny_model(run / "model", seed=1)
    # With a full merger, the model folder is used, too.
    change_manifest(run, tune=TUNE | {"merger": "full"})
    error = cli("merge", run, tmp_path / "a", "--base", base.path, code=2).err
    assert "contains a complete model in model/" in error
    cli("merge", run, tmp_path / "a")
    change_manifest(run, tune={"language": "full"})
    out = tmp_path / "merged"
    printed = cli("merge", run, out)
    assert printed.lines[0] == f"written to {out}, fp32"
    card = (out / "README.md").read_text()
    assert "adapter" not in printed.text + card.partition("## Written equals trained")[2]
    assert "language (full)" in card
    parity = cli("merge", run, tmp_path / "json", "--json").json["parity"]
    assert parity["adapter_change"] is parity["merge_change"] is None
    assert (run / "model" / WEIGHTS).read_bytes() == (out / WEIGHTS).read_bytes()
    settings = json.loads((out / "preprocessor_config.json").read_text())
    assert settings["max_pixels"] == 7840
    assert "has no adapter" in cli("merge", out, tmp_path / "again", code=2).err
