"""Tests of damaged or malicious model and run folders: exit code 2 or a note, no traceback."""

import json
import os
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from tiny_task import make_task, write_recipe

from finesight.cli.app import run_command

CASES = load_cases("damaged_folders")

DEEP = "[" * 200_000 + "]" * 200_000
MODEL, RUN = Path("task/tiny"), Path("run")
COMMANDS = CASES["commands"]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a task and its finished run once."""
    folder = tmp_path_factory.mktemp("original")
    with chdir(folder):
        task = make_task(Path("task")) | {"eval": {"metric": "ocr", "max_new_tokens": 2}}
        write_recipe(Path("recipe.yaml"), task | {"output_dir": "run"})
        assert run_command(["train", "recipe.yaml"]) == 0
    return folder


@pytest.fixture(autouse=True)
def folder(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the task and run for a test that damages them; the model has no digests."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    (MODEL / "sha256.json").unlink()


def ended(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command and return its exit code and output."""
    code = run_command(COMMANDS[name].split())
    output = capsys.readouterr()
    assert code in (0, 2), output
    return code, output.out + output.err


def change(file: str, **values: Any) -> None:
    path = MODEL / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("content", [DEEP, '{"a": ' * 5_000, "{", "[]", "3", '{"../../x": "1"}'])
def test_damaged_digests(content, capsys):
    for part in ("model", "adapter", "checkpoints/step-6"):
        (RUN / part / "sha256.json").write_text(content)
    for name in ("predict", "merge"):
        code, output = ended(name, capsys)
        assert (code, "sha256.json" in output) == (2, True), output
    assert ended("report", capsys)[0] == 0
    assert ended("doctor", capsys)[0] == 2
    (RUN / "result.json").unlink()
    assert "the checkpoint of step 6 is corrupt" in ended("resume", capsys)[1]


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, endless])
def test_other_file_types_as_predictions(put, capsys):
    for name in ("before", "after"):
        file = RUN / "predictions" / f"{name}.jsonl"
        file.unlink()
        put(file)
    assert ended("report", capsys)[0] == 0
    assert "predictions/after.jsonl" in (RUN / "report.html").read_text()
    code, output = ended("doctor", capsys)
    assert code == 0 or "after.jsonl" in output
    shutil.copytree(RUN, "second", symlinks=True, ignore=lambda *_: ["predictions"])
    assert run_command(["compare", "run", "second", "--out", "c.html"]) == 0
    (RUN / "result.json").unlink()
    code, output = ended("resume", capsys)
    assert (code, "remove the folder" in output) == (2, True) if put is Path.mkdir else code == 0


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "result.json", "param_audit.json", "skipped_samples.jsonl"]
)
@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, endless])
def test_other_file_types_as_metrics(name, put, capsys):
    (RUN / name).unlink()
    put(RUN / name)
    assert ended("report", capsys)[0] == 0
    ended("doctor", capsys)
    code, output = ended("resume", capsys)
    assert (code, name in output) == (2, True) if name == "result.json" else code == 0
    if name != "result.json":
        (RUN / "result.json").unlink()
        code, output = ended("resume", capsys)
        refused = put is Path.mkdir or name == "metrics.jsonl"
        assert (code, name in output) == (2, True) if refused else code == 0


@pytest.mark.parametrize(
    "line", CASES["test_a_damaged_line_of_metrics_is_named_when_a_run_is_resumed"]
)
def test_a_damaged_line_of_metrics_is_named_when_a_run_is_resumed(line, capsys):
    path = RUN / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    (RUN / "result.json").unlink()
    code, output = ended("resume", capsys)
    assert code == 2
    assert "metrics.jsonl:2: " in output
    assert "truncate it before the corrupt line" in output


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vision_config": {"depth": 10**9}}, "vision_config.depth is 1000000000"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"rope_theta": 10**400}, "rope_theta is 1000000000"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000"),
        (DEEP, "recursion limit exceeded"),
        ('{"a": ' * 5_000, "recursion limit exceeded"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_model_without_bounds_is_refused_before_it_is_built(config, words, capsys):
    commands = ("train", "plan", "ask")
    if isinstance(config, str):
        (MODEL / "config.json").write_text(config)
        commands = ("train", "examine", "show")
    else:
        change("config.json", **config)
    for name in commands:
        code, output = ended(name, capsys)
        assert (code, words in output) == (2, True), output
    assert not Path("new").exists()


@pytest.mark.parametrize("normalizer", CASES["test_damaged_normalizers_are_refused"])
def test_damaged_normalizers_are_refused(normalizer, capsys):
    """The library panics on some normalizers and aborts the process on others."""
    change("tokenizer.json", normalizer=normalizer)
    code, output = ended("show", capsys)
    assert (code, "tokenizer.json: the normalizer is" in output) == (2, True), output


def test_padding_and_truncation_of_a_tokenizer_change_no_text(capsys):
    basic = ended("show", capsys)
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    change("tokenizer.json", padding=padding)
    assert ended("show", capsys) == basic
    truncation = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    change("tokenizer.json", padding=None, truncation=truncation)
    assert ended("show", capsys) == basic


def test_a_token_beyond_the_embedding_is_refused(capsys):
    tokens = json.loads((MODEL / "tokenizer.json").read_text())["model"]
    tokens["vocab"][next(iter(tokens["vocab"]))] = 2**31
    change("tokenizer.json", model=tokens)
    code, output = ended("show", capsys)
    assert code == 2
    assert "has the id 2147483648" in output
