"""`finesight export`: what it lists, prints and refuses."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from hub_servers import TOKEN, Serving, serving
from hubs import cache
from typer.testing import CliRunner, Result
from upload_servers import Bucket, TakingModelScope

from finesight.cli.export import export
from finesight.errors import UserError
from finesight.model.tiny import make_tiny

__all__ = ["cache"]

STAND_IN = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
out.write_bytes(b"GGUF")
"""


def run_command(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(export)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    result = run_command(*arguments)
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("models") / "latex")


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    with serving(TakingModelScope, Bucket) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        yield server


def test_without_a_place_the_lines_of_the_engines_are_printed(model: Path) -> None:
    result = run_command(model)
    assert result.exit_code == 0, result.exception
    lines = result.output.splitlines()
    assert lines[1].startswith(f"  vllm serve {model} --served-model-name latex")
    assert lines[3].startswith(f"  python -m sglang.launch_server --model-path {model}")
    told = json.loads(run_command(model, "--json").output)
    assert told["vllm"] == lines[1].strip()
    assert told["request"]["skip_special_tokens"] is False


def test_what_will_be_uploaded_is_listed_first(hub: Serving, model: Path) -> None:
    result = run_command(model, "modelscope:me/latex")
    assert result.exit_code == 0, result.exception
    *files, total, last = result.output.splitlines()
    assert {line.split()[1] for line in files} == {path.name for path in model.iterdir()}
    size = sum(path.stat().st_size for path in model.iterdir())
    assert total.strip() == f"{size:,}  bytes in {len(files)} files to modelscope:me/latex, private"
    assert last == "nothing was uploaded: start again with --yes"
    assert hub.asked == []


def test_with_yes_it_is_uploaded(hub: Serving, model: Path) -> None:
    result = run_command(model, "modelscope:me/latex", "--yes")
    assert result.exit_code == 0, result.exception
    assert result.output.splitlines()[-1] == f"{hub.url}/models/me/latex"
    sent = hub.repositories["models/me/latex"]
    assert sent == {path.name: path.read_bytes() for path in model.iterdir()}
    assert "models/me/latex" in hub.gated


def test_public_as_json(hub: Serving, model: Path) -> None:
    result = run_command(model, "modelscope:me/open", "--yes", "--public", "--json")
    told = json.loads(result.output)
    assert told["page"] == f"{hub.url}/models/me/open"
    assert told["public"] is True
    assert told["files"] == {path.name: path.stat().st_size for path in model.iterdir()}
    assert hub.gated == set()


def test_gguf(model: Path, tmp_path: Path) -> None:
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(STAND_IN)
    result = run_command(model, tmp_path / "out", "--converter", converter)
    assert result.exit_code == 0, result.exception
    assert "llama-server -m " in result.output.splitlines()[-1]
    result = run_command(model, tmp_path / "again", "--converter", converter, "--json")
    assert json.loads(result.output) == {
        "model": str(tmp_path / "again" / "model.gguf"),
        "projector": str(tmp_path / "again" / "mmproj.gguf"),
    }


def test_options_that_mean_nothing_are_refused(model: Path, tmp_path: Path) -> None:
    assert "--yes, and OUT is not given" in refused(model, "--yes")
    assert "--public, and OUT is" in refused(model, tmp_path / "out", "--public")
    assert "a converter, and OUT is" in refused(model, "hf:me/latex", "--converter", tmp_path)
    assert "names nothing on a hub" in refused(model, "hf:me")
    assert "no folder" in refused(tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
