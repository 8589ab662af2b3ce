"""Tests of `finesight merge` with runs and adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from gptq_fixtures import GptqConfig, write_quantized_model
from hf_reference import CPU
from lora_fixtures import tune_with_lora
from thinking_fixtures import train_run
from tiny_model import create_tiny_model
from typer.testing import CliRunner, Result

from finesight.cli.models import merge
from finesight.config import PixelRange, TuneSettings
from finesight.errors import UserError
from finesight.infer.model_loader import load_inference_model
from finesight.infer.prediction import build_question
from finesight.manifest import Manifest
from finesight.model.lora.peft_io import save_adapter
from finesight.model.weights_io import load_model, save_model
from finesight.model_folder import ModelFolder
from finesight.storage import verify_folder, write_folder

TUNE = TuneSettings.model_validate({"language": "lora", "lora": {"rank": 2}})


def run_command(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(merge)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_rejected(*arguments: object) -> str:
    result = run_command(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.fixture
def base(tmp_path: Path) -> ModelFolder:
    return ModelFolder(create_tiny_model(tmp_path / "base"))


@pytest.fixture
def adapter(base: ModelFolder, tmp_path: Path) -> Path:
    model = tune_with_lora(
        load_model(base, torch.float32, CPU), {"language": "lora", "lora": {"rank": 2}}
    )
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    save_adapter(folder, model, base_model=str(base.path), base_fingerprint=base.fingerprint())
    return folder


@pytest.fixture
def run(base: ModelFolder, adapter: Path) -> Path:
    manifest = Manifest(
        family="qwen2_vl",
        base_model=str(base.path),
        base_fingerprint=base.fingerprint(),
        image_rule=PixelRange(min_pixels=784, max_pixels=7840),
        system_prompt="Speak in rhymes.",
        eos_token="<|im_end|>",
        tune=TUNE,
        versions={},
    )
    (adapter.parent / "manifest.json").write_text(manifest.model_dump_json())
    return adapter.parent


def test_run_is_merged_into_model_folder(run: Path, base: ModelFolder, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    result = run_command(run, out)
    assert result.exit_code == 0, result.exception
    # A slow merge also reports its progress.
    lines = [line for line in result.output.splitlines() if not line.startswith("merging ")]
    first, compared, *_, last, next_command = lines
    assert first == f"14 layers merged into {out}, fp32"
    assert next_command == f"next: finesight export {out}"
    assert compared.startswith("4 prompts about generated images")
    assert last == "4 of 4 completions have equal tokens"
    verify_folder(out)
    written = {path.name for path in out.iterdir()}
    assert written == {path.name for path in base.path.iterdir()} | {"manifest.json", "README.md"}
    assert (out / "model.safetensors").read_bytes() != base.weight_files()[0].read_bytes()


def test_merged_model_keeps_prompt_settings(run: Path, tmp_path: Path) -> None:
    assert run_command(run, tmp_path / "merged").exit_code == 0
    renderers = [
        load_inference_model(str(path), "cpu").renderer for path in (run, tmp_path / "merged")
    ]
    rule = PixelRange(min_pixels=784, max_pixels=7840)
    assert [renderer.image_rule for renderer in renderers] == [rule, rule]
    assert [renderer.system_prompt for renderer in renderers] == ["Speak in rhymes."] * 2


def test_merged_model_keeps_pixel_limits(run: Path, tmp_path: Path) -> None:
    assert run_command(run, tmp_path / "merged").exit_code == 0
    settings = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert (settings["min_pixels"], settings["max_pixels"]) == (784, 7840)
    assert settings["patch_size"] == 14


@pytest.mark.parametrize("alone", [False, True])
def test_processor_config_keeps_image_settings(
    run: Path, base: ModelFolder, tmp_path: Path, alone: bool
) -> None:
    """transformers 5 writes processor_config.json; without image settings it would hide them."""
    before = base.path / "preprocessor_config.json"
    settings = json.loads(before.read_text()) | {"image_mean": [0.5, 0.4, 0.3], "size": {}}
    (base.path / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    before.unlink() if alone else before.write_text(json.dumps(settings))
    (base.path / "sha256.json").unlink()
    assert run_command(run, tmp_path / "merged").exit_code == 0
    limits = {"shortest_edge": 784, "longest_edge": 7840}
    expected = settings | {"min_pixels": 784, "max_pixels": 7840, "size": limits}
    nested = json.loads((tmp_path / "merged" / "processor_config.json").read_text())
    assert nested == {"image_processor": expected}
    assert ModelFolder(tmp_path / "merged").preprocessor_config["image_mean"] == [0.5, 0.4, 0.3]
    assert (tmp_path / "merged" / "preprocessor_config.json").exists() is not alone


def test_unsupported_image_size_is_reported(run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["image_rule"] = {"height": 112, "width": 504}
    (run / "manifest.json").write_text(json.dumps(manifest))
    result = run_command(run, tmp_path / "merged")
    assert result.output.splitlines()[-2].endswith("resize images to height 112, width 504")


def test_merged_model_has_no_run_manifest(run: Path, tmp_path: Path) -> None:
    assert run_command(run, tmp_path / "merged").exit_code == 0
    merged, again = ModelFolder(tmp_path / "merged"), tmp_path / "again"
    again.mkdir()
    save_model(load_model(merged, torch.float32, CPU), merged, again, torch.float32)
    assert not (again / "manifest.json").exists()


def test_adapter_folder_merges_like_its_run(run: Path, adapter: Path, tmp_path: Path) -> None:
    assert run_command(run, tmp_path / "a").exit_code == 0
    result = run_command(adapter, tmp_path / "b", "--json")
    output = json.loads(result.output)
    parity = output.pop("parity")
    assert output == {"folder": str(tmp_path / "b"), "merged_layers": 14, "precision": "fp32"}
    assert (parity["num_prompts"], parity["num_equal"], parity["divergences"]) == (4, 4, [])
    assert 0 <= parity["merge_change"] < 1e-4 < parity["adapter_change"]
    assert parity["reload_difference"] < 1e-6
    assert (parity["rounding_change"], parity["quantized_comparison"]) == (None, None)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_base_option_finds_relocated_base(run: Path, base: ModelFolder, tmp_path: Path) -> None:
    changed = base.path.rename(tmp_path / "moved")
    assert "no folder" in run_rejected(run, tmp_path / "merged")
    result = run_command(run, tmp_path / "merged", "--base", changed, "--precision", "bf16")
    assert result.exit_code == 0, result.exception
    assert "bf16" in result.output


@pytest.mark.parametrize("source", ["run", "run/adapter"])
def test_wrong_base_is_rejected_with_both_fingerprints(
    run: Path, base: ModelFolder, source: str, tmp_path: Path
) -> None:
    other = ModelFolder(create_tiny_model(tmp_path / "other", "qwen2_5_vl"))
    message = run_rejected(tmp_path / source, tmp_path / "merged", "--base", other.path)
    assert base.fingerprint() in message
    assert other.fingerprint() in message
    assert not (tmp_path / "merged").exists()


def test_existing_output_folder_is_rejected(run: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    assert "exists already" in run_rejected(run, tmp_path / "merged")


def test_model_without_adapter_is_rejected(base: ModelFolder, tmp_path: Path) -> None:
    message = run_rejected(base.path, tmp_path / "merged")
    assert f"{base.path} has no adapter" in message
    assert "is a complete model" in run_rejected(base.path, tmp_path / "m", "--base", base.path)


def test_full_finetune_run_takes_no_base(run: Path, base: ModelFolder, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tune"]["merger"] = "full"
    (run / "manifest.json").write_text(json.dumps(manifest))
    create_tiny_model(run / "model")
    message = run_rejected(run, tmp_path / "merged", "--base", base.path)
    assert "contains a complete model in model/" in message
    assert run_command(run, tmp_path / "merged").exit_code == 0


@pytest.mark.parametrize("few", ["nf4", "fp8"])
def test_quantized_run_merges_into_published_weights(few: str, run: Path, tmp_path: Path) -> None:
    assert run_command(run, tmp_path / "plain").exit_code == 0
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tune"]["quantize"] = {few: ["language"]}
    (run / "manifest.json").write_text(json.dumps(manifest))
    result = run_command(run, tmp_path / "merged")
    assert result.exit_code == 0, result.exception
    assert (
        f"the run used quantized weights (language in {few.upper()})"
        in result.output.splitlines()[-2]
    )
    assert "compared with the quantized base used in training" in result.output.splitlines()[-3]
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "merged")]
    assert weights[0] == weights[1]
    output = json.loads(run_command(run, tmp_path / "again", "--json").output)
    assert output[f"{few}_parts"] == ["language"]
    trained = output["parity"]["quantized_comparison"]
    assert 1e-3 < trained["logits"] < 10
    assert 0 <= trained["equal_answers"] <= 1


def test_damaged_base_is_rejected(adapter: Path, base: ModelFolder, tmp_path: Path) -> None:
    file = base.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert "not a complete safetensors file" in run_rejected(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_bit_flip_in_adapter_is_rejected(
    run: Path, adapter: Path, base: ModelFolder, tmp_path: Path
) -> None:
    sealed = tmp_path / "sealed"
    with write_folder(sealed) as folder:
        for file in adapter.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    content = bytearray((sealed / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (sealed / "adapter_model.safetensors").write_bytes(content)
    message = run_rejected(sealed, tmp_path / "merged")
    assert "has changed since it was written" in message
    assert not (tmp_path / "merged").exists()


def test_four_bit_model_is_written_dequantized(base: ModelFolder, tmp_path: Path) -> None:
    four, dense = write_quantized_model(base, tmp_path, GptqConfig())
    out = tmp_path / "full"
    result = run_command(four.path, out)
    assert result.exit_code == 0, result.exception
    lines = result.output.splitlines()
    assert lines[0] == f"written to {out}, fp32"
    assert any(line.startswith("  4 bits, and dequantized") for line in lines)
    assert "adapter" not in result.output
    assert lines[-2].startswith("14 layers were dequantized from 4 bits to fp32")
    models = [load_model(f, torch.float32, CPU).state_dict() for f in (ModelFolder(out), dense)]
    assert all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())
    output = json.loads(run_command(four.path, tmp_path / "again", "--json").output)
    assert output["dequantized_layers"] == 14
    assert "has no adapter" in run_rejected(dense.path, tmp_path / "nothing")


def test_full_disk_is_reported_and_leaves_no_files(run: Path, tmp_path: Path) -> None:
    """The limit is exceeded within the weights; runs in a subprocess."""
    program = (
        "import resource, sys; from finesight.cli.app import run_command;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "sys.exit(run_command(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "merge", str(run), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "merged: cannot be written: file too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_ctrl_c_leaves_no_files(run: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from finesight.cli.app import run_command;"
        "from finesight.export import verified_merge;"
        # Tests started in the background inherit an ignored SIGINT.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "verified_merge.complete_hf_folder = lambda *all: os.kill(os.getpid(), signal.SIGINT);"
        "sys.exit(run_command(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "merge", str(run), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_full_finetune_run_is_written_as_complete_model(run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tune"] = {"language": "full"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    create_tiny_model(run / "model", seed=1)
    out = tmp_path / "merged"
    result = run_command(run, out)
    assert result.exit_code == 0, result.exception
    assert result.output.splitlines()[0] == f"written to {out}, fp32"
    card = (out / "README.md").read_text()
    assert "adapter" not in result.output + card.partition("## Written equals trained")[2]
    output = json.loads(run_command(run, tmp_path / "told", "--json").output)
    assert output["parity"]["adapter_change"] is output["parity"]["merge_change"] is None
    written = [path / "model.safetensors" for path in (run / "model", out)]
    assert written[0].read_bytes() == written[1].read_bytes()
    assert "language (full)" in card
    settings = json.loads((out / "preprocessor_config.json").read_text())
    assert settings["max_pixels"] == 7840
    assert "has no adapter" in run_rejected(out, tmp_path / "again")


def test_merged_model_keeps_the_thinking_mode_of_its_run(tmp_path: Path) -> None:
    lora = {"language": "lora", "lora": {"rank": 2}}
    run, merged = train_run(tmp_path / "task", steps=1, tune=lora), tmp_path / "merged"
    result = run_command(run, merged)
    assert result.exit_code == 0, result.output
    question = build_question((), "Which colour?", "s")
    prompts = [
        load_inference_model(str(path), "cpu").renderer.tokenize_prompt(question)
        for path in (run, merged)
    ]
    assert all(prompt.is_thinking for prompt in prompts)
    assert prompts[0].ids_T.tolist() == prompts[1].ids_T.tolist()
