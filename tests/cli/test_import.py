"""Tests of the command `finesight import`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from case_files import load_cases
from click.testing import Result
from image_fixtures import write_gray_image, write_jsonl
from typer.testing import CliRunner

from finesight.cli.data import import_data
from finesight.data.formats import FORMATS
from finesight.data.sample import read_samples
from finesight.errors import UserError

CASES = load_cases("import")

app = typer.Typer()
app.command()(import_data)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def source(tmp_path: Path) -> Path:
    rows = [
        {
            "image": write_gray_image(tmp_path / f"{n}.png", gray_level=n).name,
            "box": [n, 0, 10, 10],
            "n": n,
            "text": [f"first {n}", f"second {n}"],
        }
        for n in range(6)
    ]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def test_summary_is_printed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        *(source, out, "--map", "image=image", "--map", "answer=text"),
        *("--prompt", "Read.", "--eval-last", "2", "--limit", "5"),
    )
    assert result.exit_code == 0, result.output
    assert f"{source}: 6 rows, read as table (--map)" in result.output
    assert f"{out / 'train.jsonl'}: 6 samples from 3 rows" in result.output
    assert f"{out / 'eval.jsonl'}: 2 samples from 2 rows" in result.output
    assert "skipped: 1 row, not selected" in result.output
    assert "unused columns: box, n" in result.output
    files = f"{out / 'train.jsonl'} --against {out / 'eval.jsonl'}"
    assert result.output.splitlines()[-1] == f"next: finesight check {files}"
    assert read_samples(out / "eval.jsonl")[1].references == ("second 4",)


def test_json_output(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run(
        *(source, out, "--map", "image=image", "--map", "box=box", "--prompt", "", "--json"),
        *("--rows", "1:4", "--box-format", "xywh", "--box-units", "pixel", "--copy-images"),
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {
        "format": "table",
        "detected_by": "--map",
        "num_rows": 6,
        "output_files": [{"file": str(out / "data.jsonl"), "num_rows": 3, "num_samples": 3}],
        "skipped_rows": {"not selected by --rows and --limit": 3},
        "num_images": 3,
        "num_clipped_boxes": 0,
        "source_notes": {},
        "unused_columns": ["n", "text"],
        "other_keys": {"n": 3, "text": 3},
        "skipped_rows_file": None,
        "text_format": "",
        "first_errors": {},
    }
    sample = read_samples(out / "data.jsonl")[0]
    assert sample.messages[0].content[0].image == "images/1.png"
    assert sample.messages[1].content[0].xyxy == (1, 0, 11, 10)


def test_detected_format_is_printed_with_reason(tmp_path: Path) -> None:
    write_gray_image(tmp_path / "a.png")
    turns = [
        {"from": "user", "value": "Picture 1: <img>a.png</img>\nWhat?"},
        {"from": "assistant", "value": "A square."},
    ]
    source = tmp_path / "data.json"
    source.write_text(json.dumps([{"conversations": turns}]))
    result = run(source, tmp_path / "out", "--seed", "1")
    assert "read as qwen-vl (a turn contains 'Picture 1: <img>a.png</img>')" in result.output


def test_invalid_rows_can_be_skipped(source: Path, tmp_path: Path) -> None:
    (tmp_path / "3.png").unlink()
    arguments = ("--map", "image=image", "--map", "answer=text", "--prompt", "Read.")
    refused = run(source, tmp_path / "out", *arguments)
    assert isinstance(refused.exception, UserError)
    assert "--on-invalid-row skip" in refused.exception.remedy
    result = run(source, tmp_path / "out", *arguments, "--on-invalid-row", "skip")
    assert result.exit_code == 0, result.output
    assert (
        "skipped: 1 row, an image is missing or corrupt; first: line 4, 3.png: no such"
        in result.output
    )
    assert f"{tmp_path / 'out' / 'skipped_rows.jsonl'}: invalid rows with reasons" in result.output
    (line,) = (tmp_path / "out" / "skipped_rows.jsonl").read_text().splitlines()
    left_out = json.loads(line)
    assert left_out["location"] == "line 4"
    assert left_out["reason"] == "an image is missing or corrupt"
    assert "no such image" in left_out["error"]


def test_help_names_every_format() -> None:
    words = " ".join(run("--help").output.replace("\n", " ").split())
    assert [form.name for form in FORMATS if form.name not in words] == []


@pytest.mark.parametrize(("arguments", "where"), CASES["test_invalid_options_are_rejected"])
def test_invalid_options_are_rejected(
    source: Path, tmp_path: Path, arguments: list[str], where: str
) -> None:
    result = run(source, tmp_path / "out", *arguments)
    assert isinstance(result.exception, UserError)
    assert result.exception.where == where
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "remedy"), CASES["test_mapping_mistakes_have_a_remedy"])
def test_mapping_mistakes_have_a_remedy(
    source: Path, tmp_path: Path, arguments: list[str], remedy: str
) -> None:
    result = run(source, tmp_path / "out", *arguments)
    assert isinstance(result.exception, UserError)
    assert result.exception.remedy == remedy


@pytest.mark.parametrize(
    "arguments", [["--box-format", "corners"], ["--limit", "0"], ["--box-units", "px"]]
)
def test_usage_errors_exit_with_2(source: Path, tmp_path: Path, arguments: list[str]) -> None:
    assert run(source, tmp_path / "out", *arguments).exit_code == 2


def test_help_has_an_example() -> None:
    assert "Example: finesight import" in run("--help").output


def test_table_without_image_column_prints_the_option(source: Path, tmp_path: Path) -> None:
    result = run(source, tmp_path / "out", "--map", "answer=n", "--prompt", "Read.")
    assert "  no images: --map image=COLUMN sets the column of the image paths" in result.output


def test_missing_column_is_one_message_and_the_text_format_is_printed(tmp_path: Path) -> None:
    lines = [f"{write_gray_image(tmp_path / f'{n}.png').name};Größe {n}" for n in range(9)]
    table = tmp_path / "a.csv"
    table.write_bytes("\n".join(["image_path;text", *lines]).encode("cp1252"))
    arguments = ("--map", "image=image_path", "--prompt", "?")
    error = run(table, tmp_path / "out", *arguments, "--map", "answer=txt").exception
    assert str(error).splitlines() == [
        f"{table}: no column 'txt' for --map answer=txt",
        "  expected: one of image_path, text",
        "  remedy: did you mean text?",
    ]
    result = run(table, tmp_path / "out", *arguments, "--map", "answer=text")
    assert "  semicolon-separated, encoding guessed: CP1252" in result.output.splitlines()
    error = run(table, tmp_path / "2", *arguments[:2], "--map", "answer=text").exception
    assert str(error).count("a question without text") == 1
    assert "and 8 more such rows" in str(error)
