"""Tests of the command `finesight check`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from check_fixtures import make_record, write_records
from click.testing import Result
from container_fixtures import write_parquet, write_tar_shards
from image_fixtures import write_gray_image
from tiny_model import create_tiny_model
from typer.testing import CliRunner

from finesight.cli.data import check
from finesight.errors import UserError

app = typer.Typer()
app.command()(check)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        write_gray_image(tmp_path / f"{number}.png", 100, 60, gray_level=number)
    return tmp_path


VALID_RECORD = make_record("0.png")
NOTED = make_record("0.png", "Where?", None, [0, 0, 100, 60])
WARNED = make_record("0.png", answer="A circle.")
WRONG = make_record("gone.png")


@pytest.mark.parametrize(
    ("records", "code"),
    [
        ([VALID_RECORD], 0),
        ([VALID_RECORD, NOTED], 0),
        ([VALID_RECORD, WARNED], 3),
        ([VALID_RECORD, WARNED, WRONG], 2),
    ],
)
def test_exit_code_follows_most_severe_issue(folder, records, code):
    source = write_records(folder / "data.jsonl", records)
    result = run(source)
    assert result.exit_code == code, result.output
    fix = f"check {source} --fix {folder / 'data-fixed'}"
    command = fix if code == 2 else f"init {source}"
    assert result.output.splitlines()[-1] == f"next: finesight {command}"


def test_fix_is_not_proposed_for_wrong_box_conventions(folder):
    """`--fix` writes no files then, and the issue names the option of the import."""
    records = [
        make_record(f"{n % 8}.png", "Where?", None, [60 + n % 20, 30 + n % 9, 12, 9])
        for n in range(64)
    ]
    source = write_records(folder / "data.jsonl", records)
    result = run(source)
    assert result.exit_code == 2
    assert "boxes-xywh" in result.output
    assert "next: " not in result.output
    with pytest.raises(UserError, match="no files were written"):
        raise run(source, "--fix", folder / "out").exception


@pytest.mark.parametrize("source", ["hf:a/b", "modelscope:a/b:train", "https://h.com/a.zip", "zip"])
def test_remote_source_must_be_imported_first(tmp_path, source):
    (tmp_path / "a.zip").write_bytes(b"PK")
    problem = run(tmp_path / "a.zip" if source == "zip" else source).exception
    assert isinstance(problem, UserError)
    assert problem.remedy.startswith("import it first")


def test_summary_table_and_first_issues(folder):
    wrong = [make_record(f"gone-{n}.png", f"What is {n}?") for n in range(5)]
    source = write_records(folder / "data.jsonl", [VALID_RECORD, *wrong, NOTED])
    output = run(source).output
    assert f"{source}: 7 rows, 7 samples, read as samples" in output
    row = next(line for line in output.splitlines() if line.startswith("image-missing"))
    assert row.split() == ["image-missing", "error", "5", "71", "%", "2,", "3,", "4"]
    assert "error: the image file is missing (image-missing, 5)" in output
    assert f"{source}:2 (sample s2): {folder / 'gone-0.png'}" in output
    assert "gone-3.png" not in output
    assert "  and 2 more" in output
    assert output.count("remedy: correct the path") == 1


def test_video_frames_are_counted_apart_from_images(folder):
    records = [VALID_RECORD, make_record("1.png", "Which?"), make_record("2.png", "What?")]
    video = {"type": "video", "frames": ["3.png", "4.png", "5.png", "6.png"]}
    for record in records[1:]:
        record["messages"][0]["content"][0] = video
    source = write_records(folder / "data.jsonl", records)
    result = run(source)
    assert "1 image and 4 video frames, 5 unique" in result.output
    summary = json.loads(run(source, "--json").stdout.splitlines()[-1])
    counts = ("num_images", "num_video_frames", "num_unique_images")
    assert [summary[name] for name in counts] == [1, 4, 5]


def test_rows_that_are_no_samples_are_counted(folder):
    broken = {"messages": [{"role": "user", "content": [{"type": "sound"}]}]}
    source = write_records(folder / "data.jsonl", [VALID_RECORD, broken, broken, broken])
    output = run(source).output
    assert f"{source}: 4 rows, 1 sample and 3 invalid rows, read as" in output
    row = next(line for line in output.splitlines() if line.startswith("invalid-row"))
    assert row.split()[:5] == ["invalid-row", "error", "3", "75", "%"]


def test_json_output_has_one_line_per_issue(folder):
    wrong = [make_record(f"gone-{n}.png", f"What is {n}?") for n in range(5)]
    source = write_records(folder / "data.jsonl", [VALID_RECORD, *wrong])
    result = run(source, "--json")
    *findings, summary = map(json.loads, result.stdout.splitlines())
    assert [finding["where"] for finding in findings] == [f"{source}:{n}" for n in range(2, 7)]
    assert {finding["severity"] for finding in findings} == {"error"}
    assert summary["issues"] == {
        "image-missing": {"severity": "error", "count": 5, "num_samples": 5}
    }
    assert (summary["exit_code"], summary["num_samples"], result.exit_code) == (2, 6, 2)
    assert {"too-long", "leaked-image", "boxes-xywh"} <= set(summary["skipped_checks"])


def test_non_finite_values_become_json_text(folder):
    record = json.dumps(make_record("0.png", "Where?", None, [1, 2, 30, "x"]))
    source = folder / "data.jsonl"
    source.write_text(record.replace('"x"', '"nan"') + "\n")
    *findings, _ = map(json.loads, run(source, "--json").stdout.splitlines())
    assert [finding["code"] for finding in findings] == ["box-empty"]
    assert findings[0]["images"][0]["boxes"] == [[1, 2, 30, "nan"]]


def test_foreign_source_with_options_and_against(folder):
    rows = [{"file": f"{n}.png", "box": [50, 30, 20, 10]} for n in range(6)]
    for name, part in (("train", rows), ("eval", rows[5:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)
    options = ["--map", "image=file", "--map", "box=box", "--prompt", "Where?"]
    sides = [folder / "train.jsonl", "--against", folder / "eval.jsonl"]
    result = run(*sides, *options, "--box-format", "xywh", "--limit", "5")
    assert result.exit_code == 0, result.output
    assert "5 rows, 5 samples, read as table (--map)" in result.output
    assert "box-inverted" in run(folder / "train.jsonl", *options).output


def test_fix_writes_valid_samples_and_reports_them(folder):
    source = write_records(folder / "data.jsonl", [VALID_RECORD, WRONG])
    result = run(source, "--fix", folder / "out")
    assert result.exit_code == 2, result.output
    assert f"{folder / 'out/data.jsonl'}: 1 sample" in result.output
    assert "0 samples changed, 1 skipped" in result.output
    again = run(source, "--fix", folder / "out")
    assert isinstance(again.exception, UserError), "an existing folder is not written into"


def test_html_page_of_issues(folder):
    page = folder / "check.html"
    result = run(write_records(folder / "data.jsonl", [VALID_RECORD, NOTED, WRONG]), "--html", page)
    assert result.exit_code == 2, result.output
    assert "the image file is missing" in page.read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("check") / "model")


def test_max_length_needs_a_model(folder, model):
    source = write_records(
        folder / "data.jsonl", [VALID_RECORD, make_record("1.png", "word " * 500)]
    )
    assert run(source, "--model", model).exit_code == 0
    result = run(source, "--model", model, "--max-length", "300")
    assert result.exit_code == 2, result.output
    assert f"{source}:2 (sample s2): " in result.output
    assert "tokens, maximum 300" in result.output
    refused = run(source, "--max-length", "300").exception
    assert isinstance(refused, UserError)
    assert refused.where == "--max-length"


def test_recipe_is_checked_with_its_model(folder, model):
    train = write_records(
        folder / "train.jsonl", [VALID_RECORD, make_record("1.png", "word " * 500), WRONG]
    )
    validation = write_records(folder / "eval.jsonl", [make_record("2.png", "How?")])
    recipe = {
        "model": str(model),
        "data": {
            "train": {"path": str(train), "limit": 2},
            "eval": str(validation),
            "max_length": 300,
        },
        "tune": {"language": "full"},
        "train": {"epochs": 1, "batch_size": 1, "learning_rate": 1e-4},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = run(path)
    assert result.exit_code == 2, result.output
    assert f"{validation}: 1 row, 1 sample, read as samples (--format), validation" in result.output
    assert "too-long" in result.output
    assert "image-missing" not in result.output, "the recipe takes the first two samples only"
    recipe["data"]["train"]["limit"] = 1
    path.write_text(yaml.safe_dump(recipe))
    result = run(path, "--html", folder / "check.html", "--seed", "7", "--language", "en")
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == f"next: finesight plan {path}"
    page = (folder / "check.html").read_text()
    assert "Tokens per sample" in page
    assert "skipped: the check has no model" not in page
    for extra in (["--model", model], ["--limit", "1"], [train]):
        refused = run(path, *extra).exception
        assert isinstance(refused, UserError)
        assert (refused.where, refused.expected.split()[1]) == (str(path), "recipe")
    shards = write_tar_shards(validation, folder / "shards", each=1)
    packed = {
        "train": {"path": shards, "limit": 2},
        "eval": str(
            write_parquet(write_records(folder / "t.jsonl", [NOTED]), folder / "t.parquet")
        ),
    }
    path.write_text(yaml.safe_dump(recipe | {"data": packed}))
    result = run(path)
    assert result.exit_code == 0, result.output
    assert f"{shards}: 1 row, 1 sample, read as samples (as in training)" in result.output
    for other in ("none/*.tar", "none.parquet", "nothing://bucket/train.tar"):
        path.write_text(yaml.safe_dump(recipe | {"data": {"train": other}}))
        refused = run(path).exception
        assert isinstance(refused, UserError), other
        assert refused.where.endswith(other)


def test_duplicate_source_is_rejected(folder):
    source = write_records(folder / "data.jsonl", [VALID_RECORD])
    refused = run(source, "--against", source).exception
    assert isinstance(refused, UserError)
    assert refused.where == str(source)


def test_help_has_an_example():
    assert "Example: finesight check" in run("--help").output
