"""GGUF by llama.cpp's converter: how it is called, what it may see, and what happens if it fails.

Tests call a program of a few lines in its place, which takes the same options.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from tiny_model import create_tiny_model

from finesight.errors import UserError
from finesight.export.deployment import (
    CONVERTER_SCRIPT,
    GGUF_MODEL_FILE,
    MMPROJ_FILE,
    find_converter,
    write_gguf,
)
from finesight.infer.model_loader import ModelSource
from finesight.model_folder import ModelFolder

FAKE_CONVERTER = """
import argparse, json, os, pathlib, sys
parser = argparse.ArgumentParser()
parser.add_argument("model", type=pathlib.Path)
parser.add_argument("--outfile", type=pathlib.Path)
parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
parser.add_argument("--mmproj", action="store_true")
args = parser.parse_args()
assert (args.model / "config.json").is_file()
out = args.outfile.with_name("mmproj-" + args.outfile.name) if args.mmproj else args.outfile
out.write_bytes(b"GGUF" + json.dumps([args.outtype, dict(os.environ)]).encode())
"""
"""Takes the converter's options, puts a prefix before a projector's name as it does, and writes
its data type and environment."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    folder = create_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen3_5")
    return ModelSource(ModelFolder(folder), None, None)


def converter(folder: Path, text: str = FAKE_CONVERTER) -> Path:
    path = folder / CONVERTER_SCRIPT
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("kind", "encoder"), [("auto", "auto"), ("q8_0", "f16"), ("bf16", "bf16"), ("f32", "f32")]
)
def test_model_and_mmproj_are_written(model, tmp_path, monkeypatch, kind, encoder):
    """The vision encoder keeps 16 bits, and the converter gets no secrets."""
    for name in ("HF_TOKEN", "MODELSCOPE_API_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH"):
        monkeypatch.setenv(name, "secret")
    made = write_gguf(model, tmp_path / "gguf", converter(tmp_path), kind, source="tiny")
    names = {path.name for path in (tmp_path / "gguf").iterdir()}
    assert names == {GGUF_MODEL_FILE, MMPROJ_FILE, "sha256.json"}
    for file, expected in ((made.model, kind), (made.mmproj, encoder)):
        data = file.read_bytes()
        written_kind, environment = json.loads(data[4:])
        assert (data[:4], written_kind) == (b"GGUF", expected)
        assert "secret" not in environment.values()
        assert environment["HF_HUB_OFFLINE"] == "1"
        assert environment["PATH"]


@pytest.mark.parametrize(
    ("text", "output"),
    [
        ("print('no such model'); raise SystemExit(3)", "exit code 3: no such model"),
        ("import package_that_is_not_there", "No module named 'package_that_is_not_there'"),
        ("print('nothing to do')", "the converter wrote no files"),
        (FAKE_CONVERTER.replace('b"GGUF"', 'b"PK"'), r"gguf \(starts with b'PK\["),
        (
            FAKE_CONVERTER.replace("if args.mmproj", "if not args.mmproj"),
            "the converter wrote mmproj-",
        ),
    ],
)
def test_failed_conversion_leaves_no_files(model, tmp_path, text, output):
    with pytest.raises(UserError, match=output):
        write_gguf(model, tmp_path / "gguf", converter(tmp_path, text), source="tiny")
    assert [path.name for path in tmp_path.iterdir()] == [CONVERTER_SCRIPT]


def test_unsupported_models_are_rejected(model, tmp_path, monkeypatch):
    program = converter(tmp_path)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "config.json").write_text('{"model_type": "qwen"}')
    first = ModelSource(ModelFolder(tmp_path / "first"), None, None)
    adapted = ModelSource(model.folder, tmp_path, None)
    for source, message, remedy in (
        (adapted, "tiny is an adapter on a base", "finesight merge tiny OUT"),
        (first, "of the family qwen\n", "finesight serve tiny"),
    ):
        with pytest.raises(UserError, match=f"{message}(.|\n)*{remedy}"):
            write_gguf(source, tmp_path / "gguf", program, source="tiny")
    with pytest.raises(UserError, match="exists already"):
        write_gguf(model, tmp_path, program, source="tiny")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match="1e-06 GB are free on this disk"):
        write_gguf(model, tmp_path / "gguf", program, source="tiny")
    assert not (tmp_path / "gguf").exists()


def test_converter_search_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=f"{CONVERTER_SCRIPT} is not in PATH") as caught:
        find_converter(None)
    assert "git clone https://github.com/ggml-org/llama.cpp" in str(caught.value)
    with pytest.raises(UserError, match="does not exist"):
        find_converter(tmp_path / "elsewhere.py")
    program = converter(tmp_path, f"#!{sys.executable}\n")
    program.chmod(0o755)
    assert find_converter(None) == find_converter(program) == program.resolve()
