"""Tests of `finesight export`: upload, GGUF, serving commands, invalid arguments."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub_servers import (
    TOKEN,
    FakeHubServer,
    ModelScopeHandler,
    run_hub_server,
)
from hub_fixtures import cache
from tiny_model import create_tiny_model

__all__ = ["cache"]

FAKE_CONVERTER = """
import pathlib, sys
out = pathlib.Path(sys.argv[sys.argv.index("--outfile") + 1])
out.write_bytes(b"GGUF")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("models") / "latex")


@pytest.fixture
def hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHubServer]:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    with run_hub_server(ModelScopeHandler) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        yield server


def test_serving_commands_are_printed_without_out(model, cli):
    lines = cli("export", model).lines
    assert lines[1].startswith(f"  vllm serve {model} --served-model-name latex")
    assert lines[3].startswith(f"  python -m sglang.launch_server --model-path {model}")
    output = json.loads(cli("export", model, "--json").out)
    assert output["vllm"] == lines[1].strip()
    assert output["request"]["skip_special_tokens"] is False


def test_files_are_listed_and_uploaded_with_yes(hub, model, cli):
    content = {path.name: path.read_bytes() for path in model.iterdir()}
    sizes = {name: len(data) for name, data in content.items()}
    printed = cli("export", model, "modelscope:me/latex")
    *files, total, last = printed.lines
    assert {line.split()[1] for line in files} == content.keys()
    size = f"{sum(sizes.values()):,}  bytes in {len(files)} files"
    assert total.strip() == f"{size} to modelscope:me/latex, private"
    command = f"finesight export {model} modelscope:me/latex --yes"
    assert (last, printed.err) == ("nothing was uploaded", f"next: {command}\n")
    assert hub.requests == []
    lines = cli(*command.split()[1:]).lines
    assert lines[-1] == f"{hub.url}/models/me/latex"
    assert hub.repositories["models/me/latex"] == content
    assert hub.gated == {"models/me/latex"}
    output = json.loads(
        cli("export", model, "modelscope:me/open", "--yes", "--public", "--json").out
    )
    assert output["page"] == f"{hub.url}/models/me/open"
    assert (output["public"], output["files"]) == (True, sizes)
    assert hub.gated == {"models/me/latex"}


def test_gguf_conversion(model, tmp_path, cli):
    converter = tmp_path / "convert_hf_to_gguf.py"
    converter.write_text(FAKE_CONVERTER)
    export = ("export", model, tmp_path / "out", "--converter", converter)
    lines = cli(*export).lines
    assert lines[2].startswith("llama-server -m ")
    assert "--image-min-tokens 4 --image-max-tokens 256" in lines[2]
    again = tmp_path / "again"
    output = json.loads(cli("export", model, again, "--converter", converter, "--json").out)
    files = {"model": f"{again}/model.gguf", "mmproj": f"{again}/mmproj.gguf"}
    assert output.items() >= files.items()
    assert output["command"].replace(f"{again}", f"{tmp_path / 'out'}") == lines[2]
    assert output["resize_code"].splitlines() == lines[4:]


def test_inapplicable_options_are_rejected(model, tmp_path, cli):
    out = tmp_path / "out"
    for words, message in (
        ((model, "--yes"), "--yes: does not apply to serving commands"),
        ((model, out, "--public"), "--public: does not apply to GGUF files"),
        ((model, "hf:me/a", "--converter", tmp_path), "--converter: does not apply to an upload"),
        ((model, "--quantize", "w4a16"), "--quantize: does not apply to serving commands"),
        ((model, out, "--device", "cpu"), "--device: does not apply to GGUF files"),
        ((model, out, "--gpus", "2"), "--gpus: does not apply to GGUF files"),
        ((model, out, "--trust-metric"), "expected: --trust-metric for a folder with --quantize"),
        ((model, "--outtype", "f16"), "--outtype: does not apply to serving commands"),
        ((model, out, "--quantize", "w4a16", "--python", out), "to a folder with --quantize"),
        ((model, out, "--quantize", "w4a16"), "no run of the family"),
        ((model, "hf:me"), "is not the address of a repository"),
        ((tmp_path / "nowhere",), "no folder"),
    ):
        assert message in cli("export", *words, code=2).err
    assert not out.exists()
