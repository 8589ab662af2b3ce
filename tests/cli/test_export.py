"""Tests of `finesight export`: upload, GGUF, serving commands, invalid arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from fake_hub_servers import TOKEN, FakeHubServer, run_hub_server
from fake_upload_servers import UploadModelScopeHandler, UploadStorageHandler
from hf_reference import CPU
from hub_fixtures import cache
from lora_fixtures import tune_with_lora
from tiny_model import create_tiny_model
from typer.testing import CliRunner, Result

from finesight.cli.models import export
from finesight.errors import UserError
from finesight.model.lora.peft_io import save_adapter
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

__all__ = ["cache"]

FAKE_CONVERTER = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
out.write_bytes(b"GGUF")
"""


def run_command(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(export)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_rejected(*arguments: object) -> str:
    result = run_command(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("models") / "latex")


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHubServer]:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    with run_hub_server(UploadModelScopeHandler, UploadStorageHandler) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        yield server


def test_serving_commands_are_printed_without_out(model: Path) -> None:
    result = run_command(model)
    assert result.exit_code == 0, result.exception
    lines = result.output.splitlines()
    assert lines[1].startswith(f"  vllm serve {model} --served-model-name latex")
    assert lines[3].startswith(f"  python -m sglang.launch_server --model-path {model}")
    output = json.loads(run_command(model, "--json").output)
    assert output["vllm"] == lines[1].strip()
    assert output["request"]["skip_special_tokens"] is False


def test_upload_files_are_listed_first(hub: FakeHubServer, model: Path) -> None:
    result = run_command(model, "modelscope:me/latex")
    assert result.exit_code == 0, result.exception
    *files, total, last = result.output.splitlines()
    assert {line.split()[1] for line in files} == {path.name for path in model.iterdir()}
    size = sum(path.stat().st_size for path in model.iterdir())
    assert total.strip() == f"{size:,}  bytes in {len(files)} files to modelscope:me/latex, private"
    command = f"finesight export {model} modelscope:me/latex --yes"
    assert last == f"nothing was uploaded; next: {command}"
    assert hub.requests == []


def test_yes_option_uploads_files(hub: FakeHubServer, model: Path) -> None:
    result = run_command(model, "modelscope:me/latex", "--yes")
    assert result.exit_code == 0, result.exception
    assert result.output.splitlines()[-1] == f"{hub.url}/models/me/latex"
    sent = hub.repositories["models/me/latex"]
    assert sent == {path.name: path.read_bytes() for path in model.iterdir()}
    assert "models/me/latex" in hub.gated


def test_public_upload_with_json_output(hub: FakeHubServer, model: Path) -> None:
    result = run_command(model, "modelscope:me/open", "--yes", "--public", "--json")
    output = json.loads(result.output)
    assert output["page"] == f"{hub.url}/models/me/open"
    assert output["public"] is True
    assert output["files"] == {path.name: path.stat().st_size for path in model.iterdir()}
    assert hub.gated == set()


def test_adapter_upload_has_a_card_and_no_machine_paths(
    hub: FakeHubServer, model: Path, tmp_path: Path
) -> None:
    base = ModelFolder(model)
    tune = {"language": "lora", "lora": {"rank": 2}}
    tuned = tune_with_lora(load_model(base, torch.float32, CPU), tune)
    folder = tmp_path / "receipts"
    folder.mkdir()
    save_adapter(folder, tuned, base_model=str(base.path), base_fingerprint=base.fingerprint())
    result = run_command(folder, "modelscope:me/receipts", "--yes")
    assert result.exit_code == 0, result.exception
    sent = hub.repositories["models/me/receipts"]
    assert sent.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "latex"
    card = sent["README.md"].decode()
    assert "library_name: peft" in card
    assert "# receipts\n\nLoRA adapter of latex" in card
    assert not any(str(tmp_path).encode() in content for content in sent.values())


def test_gguf_conversion(model: Path, tmp_path: Path) -> None:
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(FAKE_CONVERTER)
    result = run_command(model, tmp_path / "out", "--converter", converter)
    assert result.exit_code == 0, result.exception
    assert "llama-server -m " in result.output.splitlines()[-1]
    result = run_command(model, tmp_path / "again", "--converter", converter, "--json")
    assert json.loads(result.output) == {
        "model": str(tmp_path / "again" / "model.gguf"),
        "mmproj": str(tmp_path / "again" / "mmproj.gguf"),
    }


def test_inapplicable_options_are_rejected(model: Path, tmp_path: Path) -> None:
    assert "--yes is given, but OUT is missing" in run_rejected(model, "--yes")
    assert "--public is given, but OUT is" in run_rejected(model, tmp_path / "out", "--public")
    assert "a converter is given, but OUT is" in run_rejected(
        model, "hf:me/latex", "--converter", tmp_path
    )
    assert "is not the address of a repository" in run_rejected(model, "hf:me")
    assert "no folder" in run_rejected(tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
