"""Tests of damaged or malicious model and run folders: exit code 2 or a note, no traceback."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_task import make_task, write_recipe

from finesight.cli.app import run_command

DEEP = "[" * 200_000 + "]" * 200_000


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a task and its finished run once."""
    folder = tmp_path_factory.mktemp("original")
    task = make_task(folder / "task") | {"eval": {"metric": "ocr", "max_new_tokens": 2}}
    recipe = write_recipe(folder / "recipe.yaml", task | {"output_dir": str(folder / "run")})
    assert run_command(["train", str(recipe)]) == 0
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Copy the task and run for a test that damages them; the model has no digests."""
    shutil.copytree(original, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace(str(original), str(tmp_path)))
    (tmp_path / "task" / "tiny" / "sha256.json").unlink()
    return tmp_path


def commands(folder: Path) -> dict[str, list[str]]:
    requested = [str(folder / "task" / "train0.png"), "--prompt", "Which?", "--max-new-tokens", "2"]
    recipe, done, model = folder / "recipe.yaml", folder / "run", folder / "task" / "tiny"
    return {
        "predict": ["predict", str(done), *requested],
        "ask": ["predict", str(model), *requested],
        "report": ["report", str(done)],
        "doctor": ["doctor", str(done)],
        "examine": ["doctor", str(model)],
        "merge": ["merge", str(done), str(folder / "merged")],
        "resume": ["train", str(recipe), "--resume"],
        "train": ["train", str(recipe), f"output_dir={folder / 'new'}"],
        "plan": ["plan", str(recipe), "--gpu", "T4"],
        "show": ["show", str(recipe)],
    }


def ended(folder: Path, name: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command and return its exit code and output."""
    code = run_command(commands(folder)[name])
    output = capsys.readouterr()
    assert code in (0, 2), output
    return code, output.out + output.err


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def replace_file(path: Path, put: Callable[[Path], None]) -> None:
    """Replace a file by a folder, a pipe or a device."""
    path.unlink()
    put(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("content", [DEEP, '{"a": ' * 5_000, "{", "[]", "3", '{"../../x": "1"}'])
def test_damaged_digests(folder: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("model", "adapter", "checkpoints/step-6"):
        (folder / "run" / part / "sha256.json").write_text(content)
    for name in ("predict", "merge"):
        code, output = ended(folder, name, capsys)
        assert (code, "sha256.json" in output) == (2, True), output
    assert ended(folder, "report", capsys)[0] == 0
    assert ended(folder, "doctor", capsys)[0] == 2
    (folder / "run" / "result.json").unlink()
    code, output = ended(folder, "resume", capsys)
    assert "the checkpoint of step 6 is corrupt" in output


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, endless])
def test_other_file_types_as_predictions(
    folder: Path, put: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("before", "after"):
        replace_file(folder / "run" / "predictions" / f"{name}.jsonl", put)
    assert ended(folder, "report", capsys)[0] == 0
    page = (folder / "run" / "report.html").read_text()
    assert "predictions/after.jsonl" in page
    code, output = ended(folder, "doctor", capsys)
    assert code == 0 or "after.jsonl" in output
    second = folder / "second"
    shutil.copytree(folder / "run", second, symlinks=True, ignore=lambda *_: ["predictions"])
    assert (
        run_command(["compare", str(folder / "run"), str(second), "--out", str(folder / "c.html")])
        == 0
    )
    (folder / "run" / "result.json").unlink()
    code, output = ended(folder, "resume", capsys)
    assert (code, "remove the folder" in output) == (2, True) if put is Path.mkdir else code == 0


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "result.json", "param_audit.json", "skipped_samples.jsonl"]
)
@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo, endless])
def test_other_file_types_as_metrics(
    folder: Path, name: str, put: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    replace_file(folder / "run" / name, put)
    assert ended(folder, "report", capsys)[0] == 0
    ended(folder, "doctor", capsys)
    code, output = ended(folder, "resume", capsys)
    assert (code, name in output) == (2, True) if name == "result.json" else code == 0
    if name != "result.json":
        (folder / "run" / "result.json").unlink()
        code, output = ended(folder, "resume", capsys)
        refused = put is Path.mkdir or name == "metrics.jsonl"
        assert (code, name in output) == (2, True) if refused else code == 0


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "3", "loss": 1.0}',
        '{"loss": 1.0}',
        '{"step": 3, "loss": "low"}',
        '{"step": 3, "loss": 1.0, "nonfinite_samples": [3]}',
        '{"step": 3, "validation_loss": 1.0, "scores": 3, "primary_metric": null}',
        '{"step": 3, "skipped_samples": 3}',
        '{"step": 3, "validation_loss": 1.0, "scores": {"a": 1.0}, "primary_metric": "b"}',
        '{"step": 3, "validation_loss": 1.0, "scores": {}, "intervals": {"a": [1.0]}}',
        '{"step": ' + "9" * 400 + "}",
    ],
)
def test_a_damaged_line_of_metrics_is_named_when_a_run_is_resumed(
    folder: Path, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, *lines[1:]]) + "\n")
    (folder / "run" / "result.json").unlink()
    code, output = ended(folder, "resume", capsys)
    assert code == 2
    assert "metrics.jsonl:2: " in output
    assert "truncate it before the corrupt line" in output


@pytest.mark.parametrize(
    ("change_config", "words"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
        ({"vision_config": {"depth": 10**9}}, "vision_config.depth is 1000000000"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
        ({"rope_theta": 10**400}, "rope_theta is 1000000000"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"vocab_size": 10**30}, "vocab_size is 1000000000"),
    ],
)
def test_a_model_without_bounds_is_refused_before_it_is_built(
    folder: Path, change_config: dict[str, Any], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(folder / "task" / "tiny" / "config.json", **change_config)
    for name in ("train", "plan", "ask"):
        code, output = ended(folder, name, capsys)
        assert (code, words in output) == (2, True), output
    assert not (folder / "new").exists()


def test_a_configuration_of_any_depth_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for content in (DEEP, '{"a": ' * 5_000):
        (folder / "task" / "tiny" / "config.json").write_text(content)
        for name in ("train", "examine", "show"):
            code, output = ended(folder, name, capsys)
            assert (code, "recursion limit exceeded" in output) == (2, True), output


def replacing(content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"String": ""}, "content": content}


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        {"type": "Precompiled", "precompiled_charsmap": "/////w=="},
        {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": 3}]},
        {"type": "Prepend", "prepend": "x" * 1_000_000},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, replacing("x" * 1000)]},
        {"type": "Lowercase"},
    ],
)
def test_damaged_normalizers_are_refused(
    folder: Path, normalizer: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """The library panics on some normalizers and aborts the process on others."""
    change(folder / "task" / "tiny" / "tokenizer.json", normalizer=normalizer)
    code, output = ended(folder, "show", capsys)
    assert (code, "tokenizer.json: the normalizer is" in output) == (2, True), output


@pytest.mark.parametrize(
    "settings",
    [
        {"padding": {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
         | {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}},
        {"truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst"}
         | {"stride": 0}},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_padding_and_truncation_of_a_tokenizer_change_no_text(
    folder: Path, settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    basic = ended(folder, "show", capsys)
    change(folder / "task" / "tiny" / "tokenizer.json", **settings)
    assert ended(folder, "show", capsys) == basic


def test_a_token_beyond_the_embedding_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = folder / "task" / "tiny" / "tokenizer.json"
    content = json.loads(path.read_text())
    word = next(iter(content["model"]["vocab"]))
    content["model"]["vocab"][word] = 2**31
    path.write_text(json.dumps(content))
    code, output = ended(folder, "show", capsys)
    assert code == 2
    assert "has the id 2147483648" in output
