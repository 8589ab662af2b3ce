"""Tests of the command `finesight check`."""

import json
from pathlib import Path

import pytest
import yaml
from check_fixtures import make_record, write_records
from container_fixtures import write_parquet, write_tar_shards
from image_fixtures import write_gray_image, write_jsonl
from tiny_model import create_tiny_model

VALID_RECORD = make_record("0.png")
NOTED = make_record("0.png", "Where?", None, [0, 0, 100, 60])
WARNED = make_record("0.png", answer="A circle.")
WRONG = make_record("gone.png")
LONG = make_record("1.png", "word " * 500)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        write_gray_image(tmp_path / f"{number}.png", 100, 60, gray_level=number)
    return tmp_path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("check") / "model")


@pytest.mark.parametrize(
    ("records", "code"),
    [
        ([VALID_RECORD], 0),
        ([VALID_RECORD, NOTED], 0),
        ([VALID_RECORD, WARNED], 3),
        ([VALID_RECORD, WARNED, WRONG], 2),
    ],
)
def test_exit_code_follows_most_severe_issue(folder, records, code, cli):
    source = write_records(folder / "data.jsonl", records)
    fix = f"check {source} --fix {folder / 'data-fixed'}"
    command = fix if code == 2 else f"init {source}"
    assert cli("check", source, code=code).next_steps == f"finesight {command}"


@pytest.mark.parametrize(
    ("kind", "issue", "option"),
    [
        ("xywh", "boxes-xywh", "--box-format xywh"),
        ("1000", "boxes-thousandths", "--box-units 1000"),
    ],
)
def test_wrong_box_conventions_are_fixed_by_an_option_of_the_import(
    folder, kind, issue, option, cli
):
    rows = []
    for n in range(64):
        box = [60 + n % 20, 30 + n % 9, 12, 9]
        if kind == "1000":
            box = [7 * n, 5 * n, 7 * n + 500, 5 * n + 600]
        answer = json.dumps({"bbox_2d": box})
        rows.append({"image": [f"{n % 8}.png"], "query": f"Where is {n}?", "response": answer})
    source = write_jsonl(folder / "data.jsonl", rows)
    printed = cli("check", source, code=2)
    assert issue in printed.out
    assert f"remedy: give {option}" in printed.out
    # `--fix` writes no files then, so it is not proposed.
    assert not printed.next_steps
    error = cli("check", source, "--fix", folder / "out", code=2).err
    assert "no files were written" in error
    assert issue in error, "the summary of the check"
    cli("check", source, *option.split())


@pytest.mark.parametrize("source", ["hf:a/b", "modelscope:a/b:train", "https://h.com/a.zip", "zip"])
def test_remote_source_must_be_imported_first(tmp_path, source, cli):
    (tmp_path / "a.zip").write_bytes(b"PK")
    source = tmp_path / "a.zip" if source == "zip" else source
    error = cli("check", source, code=2).err
    assert f"remedy: import it first: finesight import {source} OUT" in error


def test_summary_table_and_first_issues(folder, cli):
    wrong = [make_record(f"gone-{n}.png", f"What is {n}?") for n in range(5)]
    source = write_records(folder / "data.jsonl", [VALID_RECORD, *wrong, NOTED])
    printed = cli("check", source, code=2)
    assert f"{source}: 7 rows, 7 samples, read as samples" in printed.out
    row = next(line for line in printed.lines if line.startswith("image-missing"))
    assert row.split() == ["image-missing", "error", "5", "71", "%", "2,", "3,", "4"]
    assert "error: the image file is missing (image-missing, 5)" in printed.out
    assert f"{source}:2 (sample s2): {folder / 'gone-0.png'}" in printed.out
    assert "gone-3.png" not in printed.out
    assert "  and 2 more" in printed.out
    assert printed.out.count("remedy: correct the path") == 1
    *findings, summary = cli("check", source, "--json", code=2).records
    wheres = [finding["where"] for finding in findings if finding["severity"] == "error"]
    assert wheres == [f"{source}:{n}" for n in range(2, 7)]
    issue = {"severity": "error", "count": 5, "num_samples": 5}
    assert summary["issues"]["image-missing"] == issue
    assert (summary["exit_code"], summary["num_samples"]) == (2, 7)
    assert {"too-long", "leaked-image", "boxes-xywh"} <= set(summary["skipped_checks"])


def test_video_frames_are_counted_apart_from_images(folder, cli):
    records = [VALID_RECORD, make_record("1.png", "Which?"), make_record("2.png", "What?")]
    video = {"type": "video", "frames": ["3.png", "4.png", "5.png", "6.png"]}
    for record in records[1:]:
        record["messages"][0]["content"][0] = video
    source = write_records(folder / "data.jsonl", records)
    assert "1 image and 4 video frames, 5 unique" in cli("check", source).out
    summary = cli("check", source, "--json").json
    counts = ("num_images", "num_video_frames", "num_unique_images")
    assert [summary[name] for name in counts] == [1, 4, 5]


def test_non_finite_values_become_json_text(folder, cli):
    record = json.dumps(make_record("0.png", "Where?", None, [1, 2, 30, "x"]))
    source = folder / "data.jsonl"
    source.write_text(record.replace('"x"', '"nan"') + "\n")
    finding, _ = cli("check", source, "--json", code=2).records
    assert finding["code"] == "box-empty"
    assert finding["images"][0]["boxes"] == [[1, 2, 30, "nan"]]


def test_foreign_source_with_options_and_against(folder, cli):
    rows = [{"file": f"{n}.png", "box": [50, 30, 20, 10]} for n in range(6)]
    train, validation = folder / "train.jsonl", folder / "eval.jsonl"
    for file, part in ((train, rows), (validation, rows[5:])):
        file.write_text("".join(json.dumps(row) + "\n" for row in part))
    options = ["--map", "image=file", "--map", "box=box", "--prompt", "Where?"]
    given = ("--against", validation, *options, "--box-format", "xywh", "--limit", "5")
    assert "5 rows, 5 samples, read as table (--map)" in cli("check", train, *given).out
    assert "box-inverted" in cli("check", train, *options, code=2).out
    refused = cli("check", train, "--against", train, code=2).err
    assert f"error: {train}: " in refused


def test_fix_writes_valid_samples_and_reports_them(folder, cli):
    source = write_records(folder / "data.jsonl", [VALID_RECORD, WRONG])
    page, out = folder / "check.html", folder / "out"
    printed = cli("check", source, "--fix", out, "--html", page, code=2)
    assert f"{out / 'data.jsonl'}: 1 sample" in printed.out
    assert "0 samples changed, 1 skipped" in printed.out
    assert "the image file is missing" in page.read_text()
    assert "exists already" in cli("check", source, "--fix", out, code=2).err


def test_recipe_is_checked_with_its_model(folder, model, cli):
    train = write_records(folder / "train.jsonl", [VALID_RECORD, LONG, WRONG])
    validation = write_records(folder / "eval.jsonl", [make_record("2.png", "How?")])
    path, page = folder / "recipe.yaml", folder / "check.html"

    def write_recipe(train: object, **data: object) -> None:
        recipe = {"model": str(model), "output_dir": str(folder / "run")}
        path.write_text(yaml.safe_dump(recipe | {"data": {"train": train, **data}}))

    data = {"eval": str(validation), "max_length": 300}
    write_recipe({"path": str(train), "limit": 2}, **data)
    output = cli("check", path, code=2).out
    assert f"{validation}: 1 row, 1 sample, read as samples (--format), validation" in output
    assert "too-long" in output
    assert "image-missing" not in output, "the recipe takes the first two samples only"
    write_recipe({"path": str(train), "limit": 1}, **data)
    printed = cli("check", path, "--html", page, "--seed", "7", "--language", "en")
    assert printed.next_steps == f"finesight plan {path}"
    assert "Tokens per sample" in page.read_text()
    assert "skipped: the check has no model" not in page.read_text()
    for extra in (["--model", model], ["--limit", "1"], [train]):
        assert f"error: {path}: " in cli("check", path, *extra, code=2).err
    shards = write_tar_shards(validation, folder / "shards", each=1)
    parquet = write_parquet(write_records(folder / "t.jsonl", [NOTED]), folder / "t.parquet")
    write_recipe({"path": shards, "limit": 2}, eval=str(parquet))
    output = cli("check", path).out
    assert f"{shards}: 1 row, 1 sample, read as samples (as in training)" in output
    for other in ("none/*.tar", "none.parquet", "nothing://bucket/train.tar"):
        write_recipe(other)
        assert f"{other}: " in cli("check", path, code=2).err
