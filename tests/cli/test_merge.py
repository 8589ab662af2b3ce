"""`finesight merge` on runs and adapters: what it writes, says and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from gptq import Way, publish
from oracle import CPU
from tuned import tuned
from typer.testing import CliRunner, Result

from finesight.cli.merge import merge
from finesight.config import PixelRange, Tune
from finesight.digests import verify_folder
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.infer.load import load_answerer
from finesight.manifest import Manifest
from finesight.model.adapter import write_adapter
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model, save_model
from finesight.storage import write_folder

TUNE = Tune.model_validate({"language": "lora", "lora": {"rank": 2}})


def run_command(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(merge)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    result = run_command(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.fixture
def base(tmp_path: Path) -> ModelFolder:
    return ModelFolder(make_tiny(tmp_path / "base"))


@pytest.fixture
def adapter(base: ModelFolder, tmp_path: Path) -> Path:
    model = tuned(load_model(base, torch.float32, CPU), {"language": "lora", "lora": {"rank": 2}})
    folder = tmp_path / "run" / "adapter"
    folder.mkdir(parents=True)
    write_adapter(folder, model, base=str(base.path), base_fingerprint=base.fingerprint())
    return folder


@pytest.fixture
def run(base: ModelFolder, adapter: Path) -> Path:
    manifest = Manifest(
        family="qwen2_vl",
        base=str(base.path),
        base_fingerprint=base.fingerprint(),
        picture=PixelRange(min_pixels=784, max_pixels=7840),
        system="Speak in rhymes.",
        end_token="<|im_end|>",
        tune=TUNE,
        versions={},
    )
    (adapter.parent / "manifest.json").write_text(manifest.model_dump_json())
    return adapter.parent


def test_a_run_is_merged_into_a_whole_model_folder(
    run: Path, base: ModelFolder, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    result = run_command(run, out)
    assert result.exit_code == 0, result.exception
    first, compared, *_, last = result.output.splitlines()
    assert first == f"14 layers merged into {out}, fp32"
    assert compared.startswith("4 questions about drawn pictures")
    assert last == "4 of 4 answers are equal, token by token"
    verify_folder(out)
    written = {path.name for path in out.iterdir()}
    assert written == {path.name for path in base.path.iterdir()} | {"manifest.json", "README.md"}
    assert (out / "model.safetensors").read_bytes() != base.weight_files()[0].read_bytes()


def test_a_merged_run_is_asked_as_it_was_trained(run: Path, tmp_path: Path) -> None:
    assert run_command(run, tmp_path / "merged").exit_code == 0
    renderers = [load_answerer(str(path), "cpu").renderer for path in (run, tmp_path / "merged")]
    rule = PixelRange(min_pixels=784, max_pixels=7840)
    assert [renderer.rule for renderer in renderers] == [rule, rule]
    assert [renderer.system for renderer in renderers] == ["Speak in rhymes."] * 2


def test_other_programs_find_the_pixel_limits_of_the_training(run: Path, tmp_path: Path) -> None:
    assert run_command(run, tmp_path / "merged").exit_code == 0
    settings = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert (settings["min_pixels"], settings["max_pixels"]) == (784, 7840)
    assert settings["patch_size"] == 14


@pytest.mark.parametrize("alone", [False, True])
def test_picture_settings_within_those_of_a_processor_stay(
    run: Path, base: ModelFolder, tmp_path: Path, alone: bool
) -> None:
    """As transformers 5 writes them: a new file beside them would hide patches and colours."""
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
    assert ModelFolder(tmp_path / "merged").preprocessor["image_mean"] == [0.5, 0.4, 0.3]
    assert (tmp_path / "merged" / "preprocessor_config.json").exists() is not alone


def test_a_size_that_other_programs_cannot_be_told_is_said(run: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["picture"] = {"height": 112, "width": 504}
    (run / "manifest.json").write_text(json.dumps(manifest))
    result = run_command(run, tmp_path / "merged")
    assert result.output.splitlines()[-1].endswith("give them height 112, width 504")


def test_what_is_made_of_a_merged_model_has_not_its_manifest(run: Path, tmp_path: Path) -> None:
    assert run_command(run, tmp_path / "merged").exit_code == 0
    merged, again = ModelFolder(tmp_path / "merged"), tmp_path / "again"
    again.mkdir()
    save_model(load_model(merged, torch.float32, CPU), merged, again, torch.float32)
    assert not (again / "manifest.json").exists()


def test_an_adapter_folder_is_merged_as_its_run_is(
    run: Path, adapter: Path, tmp_path: Path
) -> None:
    assert run_command(run, tmp_path / "a").exit_code == 0
    result = run_command(adapter, tmp_path / "b", "--json")
    told = json.loads(result.output)
    parity = told.pop("parity")
    assert told == {"folder": str(tmp_path / "b"), "layers": 14, "precision": "fp32"}
    assert (parity["prompts"], parity["equal"], parity["partings"]) == (4, 4, [])
    assert 0 <= parity["summed"] < 1e-4 < parity["adapter"]
    assert parity["reloaded"] < 1e-6
    assert (parity["rounded"], parity["as_trained"]) == (None, None)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_base_that_moved_is_found_by_option(run: Path, base: ModelFolder, tmp_path: Path) -> None:
    moved = base.path.rename(tmp_path / "moved")
    assert "no folder" in refused(run, tmp_path / "merged")
    result = run_command(run, tmp_path / "merged", "--base", moved, "--precision", "bf16")
    assert result.exit_code == 0, result.exception
    assert "bf16" in result.output


@pytest.mark.parametrize("source", ["run", "run/adapter"])
def test_another_base_is_refused_with_the_two_fingerprints(
    run: Path, base: ModelFolder, source: str, tmp_path: Path
) -> None:
    other = ModelFolder(make_tiny(tmp_path / "other", "qwen2_5_vl"))
    message = refused(tmp_path / source, tmp_path / "merged", "--base", other.path)
    assert base.fingerprint() in message
    assert other.fingerprint() in message
    assert not (tmp_path / "merged").exists()


def test_an_existing_folder_is_refused(run: Path, tmp_path: Path) -> None:
    (tmp_path / "merged").mkdir()
    assert "exists already" in refused(run, tmp_path / "merged")


def test_what_has_no_adapter_is_refused(base: ModelFolder, tmp_path: Path) -> None:
    message = refused(base.path, tmp_path / "merged")
    assert f"{base.path} has no adapter" in message
    assert "is a model of its own" in refused(base.path, tmp_path / "m", "--base", base.path)


def test_a_run_with_its_own_whole_model_takes_no_base(
    run: Path, base: ModelFolder, tmp_path: Path
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tune"]["merger"] = "full"
    (run / "manifest.json").write_text(json.dumps(manifest))
    make_tiny(run / "model")
    message = refused(run, tmp_path / "merged", "--base", base.path)
    assert "holds its own whole model in model/" in message
    assert run_command(run, tmp_path / "merged").exit_code == 0


@pytest.mark.parametrize("few", ["nf4", "fp8"])
def test_a_run_in_few_bits_is_merged_into_the_published_weights_and_says_so(
    few: str, run: Path, tmp_path: Path
) -> None:
    assert run_command(run, tmp_path / "plain").exit_code == 0
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tune"][few] = ["language"]
    (run / "manifest.json").write_text(json.dumps(manifest))
    result = run_command(run, tmp_path / "merged")
    assert result.exit_code == 0, result.exception
    assert f"the run had the weights of language in {few.upper()}" in result.output.splitlines()[-1]
    assert "against the base in few bits, as it was trained" in result.output.splitlines()[-2]
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "merged")]
    assert weights[0] == weights[1]
    told = json.loads(run_command(run, tmp_path / "again", "--json").output)
    assert told[f"trained_in_{few}"] == ["language"]
    trained = told["parity"]["as_trained"]
    assert 1e-3 < trained["logits"] < 10
    assert 0 <= trained["equal_answers"] <= 1


def test_a_damaged_base_is_refused(adapter: Path, base: ModelFolder, tmp_path: Path) -> None:
    file = base.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])
    assert "not a whole safetensors file" in refused(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_flipped_bit_in_the_adapter_is_refused(
    run: Path, adapter: Path, base: ModelFolder, tmp_path: Path
) -> None:
    sealed = tmp_path / "sealed"
    with write_folder(sealed) as folder:
        for file in adapter.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    content = bytearray((sealed / "adapter_model.safetensors").read_bytes())
    content[-1] ^= 1
    (sealed / "adapter_model.safetensors").write_bytes(content)
    message = refused(sealed, tmp_path / "merged")
    assert "has changed since it was written" in message
    assert not (tmp_path / "merged").exists()


def test_a_model_in_four_bits_is_written_in_full(base: ModelFolder, tmp_path: Path) -> None:
    four, dense = publish(base, tmp_path, Way())
    out = tmp_path / "full"
    result = run_command(four.path, out)
    assert result.exit_code == 0, result.exception
    lines = result.output.splitlines()
    assert lines[0] == f"written to {out}, fp32"
    assert any(line.startswith("  in four bits, and in full") for line in lines)
    assert "adapter" not in result.output
    assert lines[-1].startswith("14 layers were published in four bits and are written in fp32")
    models = [load_model(f, torch.float32, CPU).state_dict() for f in (ModelFolder(out), dense)]
    assert all(torch.equal(models[0][name], tensor) for name, tensor in models[1].items())
    told = json.loads(run_command(four.path, tmp_path / "again", "--json").output)
    assert told["published_in_int4"] == 14
    assert "has no adapter" in refused(dense.path, tmp_path / "nothing")


def test_a_full_disk_is_said_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    """At a write in the middle of the weights, in a process of its own."""
    program = (
        "import resource, sys; from finesight.cli.app import run;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000));"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "merge", str(run), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "merged: cannot be written: file too large" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_run_that_is_stopped_by_ctrl_c_leaves_nothing(run: Path, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from finesight.cli.app import run;"
        "from finesight.export import merging;"
        # A shell that starts the tests in the background has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "merging.complete = lambda *all: os.kill(os.getpid(), signal.SIGINT);"
        "sys.exit(run(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, "merge", str(run), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 130, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "run"]


def test_a_run_that_trained_parts_whole_is_written_with_all_that_belongs_to_a_model(
    run: Path, tmp_path: Path
) -> None:
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["tune"] = {"language": "full"}
    (run / "manifest.json").write_text(json.dumps(manifest))
    make_tiny(run / "model", seed=1)
    out = tmp_path / "merged"
    result = run_command(run, out)
    assert result.exit_code == 0, result.exception
    assert result.output.splitlines()[0] == f"written to {out}, fp32"
    card = (out / "README.md").read_text()
    assert "adapter" not in result.output + card.partition("## Written equals trained")[2]
    told = json.loads(run_command(run, tmp_path / "told", "--json").output)
    assert told["parity"]["adapter"] is told["parity"]["summed"] is None
    written = [path / "model.safetensors" for path in (run / "model", out)]
    assert written[0].read_bytes() == written[1].read_bytes()
    assert "language (full)" in card
    settings = json.loads((out / "preprocessor_config.json").read_text())
    assert settings["max_pixels"] == 7840
    assert "has no adapter" in refused(out, tmp_path / "again")
