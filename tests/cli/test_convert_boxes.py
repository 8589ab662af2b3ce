"""Tests of the command `finesight data convert-boxes`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from click.testing import Result
from image_fixtures import write_gray_image, write_jsonl
from typer.testing import CliRunner

from finesight.cli.data import convert_boxes
from finesight.errors import UserError

app = typer.Typer()
app.command()(convert_boxes)

OLD = "<ref>dog</ref><box>(100,200),(300,900)</box>"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_gray_image(tmp_path / "a.png", 1000, 500)
    rows = [
        {"image": "a.png", "query": "Where is the dog? Answer as JSON.", "response": OLD},
        {"image": "a.png", "query": "What is it?", "response": "A dog."},
    ]
    return write_jsonl(tmp_path / "old.jsonl", rows)


def test_summary_is_printed(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "new.jsonl"
    result = run(file, out, "--from", "qwen_vl", "--to", "qwen3_vl")
    assert result.exit_code == 0, result.output
    assert f"{out}: 2 records, 1 boxes rewritten in 1 answers" in result.output
    assert "1 answers without boxes" in result.output
    assert "warning: other texts of 1 records" in result.output
    assert "(line 1)" in result.output
    record = json.loads(out.read_text(encoding="utf-8").splitlines()[0])
    assert record["response"] == '{"bbox_2d": [100, 200, 300, 900], "label": "dog"}'


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        (["height=280", "width=560"], [56, 56, 168, 252]),
        (["longest_side=560"], [56, 56, 168, 252]),
        (["min_pixels=3136", "max_pixels=160000"], [56, 56, 168, 252]),
    ],
)
def test_image_rule_options(file: Path, tmp_path: Path, rule: list[str], values: list[int]) -> None:
    out = tmp_path / "new.jsonl"
    options = [word for pair in rule for word in ("--image", pair)]
    result = run(file, out, "--from", "qwen_vl", "--to", "qwen2_5_vl", *options, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {
        "file": str(out),
        "num_records": 2,
        "num_boxes": 1,
        "answers_with_boxes": 1,
        "answers_without_boxes": 1,
        "unconverted": ["line 1"],
    }
    record = json.loads(out.read_text(encoding="utf-8").splitlines()[0])
    assert json.loads(record["response"])["bbox_2d"] == values


def test_image_rule_of_model(file: Path, tmp_path: Path) -> None:
    out, model = tmp_path / "new.jsonl", tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2_5_vl"}', encoding="utf-8")
    limits = {"min_pixels": 3136, "max_pixels": 160000, "patch_size": 14, "merge_size": 2}
    (model / "preprocessor_config.json").write_text(json.dumps(limits), encoding="utf-8")
    options = ("--from", "qwen_vl", "--to", "qwen2_5_vl", "--model", model)
    result = run(file, out, *options)
    assert result.exit_code == 0, result.output
    record = json.loads(out.read_text(encoding="utf-8").splitlines()[0])
    assert json.loads(record["response"])["bbox_2d"] == [56, 56, 168, 252]
    (model / "config.json").write_text('{"model_type": "qwen2_vl"}', encoding="utf-8")
    result = run(file, tmp_path / "other.jsonl", *options)
    assert isinstance(result.exception, UserError)
    assert "the model family is qwen2_vl" in str(result.exception)


@pytest.mark.parametrize("pair", ["height=280", "longest_side=x", "size=5", "longest_side"])
def test_invalid_image_rules_are_rejected(file: Path, tmp_path: Path, pair: str) -> None:
    options = ("--from", "qwen_vl", "--to", "qwen2_5_vl", "--image", pair)
    result = run(file, tmp_path / "new.jsonl", *options)
    assert isinstance(result.exception, UserError)
    assert "--image height=112" in result.exception.remedy
