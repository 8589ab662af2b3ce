"""Tests of the command `finesight import`."""

import json
import re
from pathlib import Path

import pytest
from case_files import load_cases
from image_fixtures import write_gray_image, write_jsonl

from finesight.ingest.formats import FORMATS
from finesight.samples.sample import read_samples

CASES = load_cases("import")
ANSWERS = ("--map", "image=image", "--map", "answer=text", "--prompt", "Read.")


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


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), "box format: xyxy (assumed; for another one, import with --box-format)"),
        (("--box-format", "xyxy"), ""),
    ],
)
def test_order_of_boxes_that_no_name_states_is_printed(source, tmp_path, cli, options, expected):
    roles = ("--map", "image=image", "--map", "box=box", "--rows", "0:3", "--prompt", "Find.")
    printed = cli("import", source, tmp_path / "out", *roles, *options)
    assert ("box format" in printed.out) == bool(expected)
    assert expected in printed.out


def test_summary_is_printed(source, tmp_path, cli):
    out = tmp_path / "out"
    printed = cli("import", source, out, *ANSWERS, "--eval-last", "2", "--limit", "5")
    assert f"{source}: 6 rows, read as table (--map)" in printed.out
    assert f"{out / 'train.jsonl'}: 6 samples from 3 rows" in printed.out
    assert f"{out / 'eval.jsonl'}: 2 samples from 2 rows" in printed.out
    assert "skipped: 1 row, not selected" in printed.out
    assert "unused columns: box, n" in printed.out
    files = f"{out / 'train.jsonl'} --against {out / 'eval.jsonl'}"
    assert printed.next_steps == f"finesight check {files}"
    assert read_samples(out / "eval.jsonl")[1].references == ("second 4",)
    output = cli("import", source, tmp_path / "b", "--map", "answer=n", "--prompt", "Read.").out
    assert "  no images: --map image=COLUMN sets the column of the image paths" in output


def test_json_output(source, tmp_path, cli):
    out = tmp_path / "out"
    columns = ("--map", "image=image", "--map", "box=box", "--prompt", "", "--copy-images")
    boxes = ("--box-format", "xywh", "--box-units", "pixel", "--rows", "1:4")
    assert json.loads(cli("import", source, out, *columns, *boxes, "--json").out) == {
        "format": "table",
        "detected_by": "--map",
        "num_rows": 6,
        "output_files": [{"file": str(out / "data.jsonl"), "num_rows": 3, "num_samples": 3}],
        "skipped_rows": {"not selected by --rows and --limit": 3},
        "num_images": 3,
        "num_videos": 0,
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


def test_invalid_rows_can_be_skipped(source, tmp_path, cli):
    (tmp_path / "3.png").unlink()
    out = tmp_path / "out"
    assert "--on-invalid-row skip" in cli("import", source, out, *ANSWERS, code=2).err
    output = cli("import", source, out, *ANSWERS, "--on-invalid-row", "skip").out
    reason = "an image is missing or corrupt"
    assert f"skipped: 1 row, {reason}; first: line 4, 3.png: no such" in output
    assert f"{out / 'skipped_rows.jsonl'}: invalid rows with reasons" in output
    (line,) = (out / "skipped_rows.jsonl").read_text().splitlines()
    skipped = json.loads(line)
    assert (skipped["location"], skipped["reason"]) == ("line 4", reason)
    assert "no such image" in skipped["error"]


def test_prompt_lists_the_labels_of_a_table(source, tmp_path, cli):
    columns = ("--map", "image=image", "--map", "box=box", "--map", "label=n")
    columns += ("--box-format", "xywh", "--rows", "1:4")
    cli("import", source, tmp_path / "out", *columns, "--prompt", "Find {labels}.")
    for sample in read_samples(tmp_path / "out" / "data.jsonl"):
        assert sample.messages[0].content[1].text == "Find 1, 2, 3."


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Find {{label}} and {{labels}}.", "Find {label} and {labels}."),
        ('Return {{"label": 1}} or {label }.', 'Return {{"label": 1}} or {label }.'),
    ],
)
def test_doubled_braces_are_words_of_a_prompt(source, tmp_path, prompt, question, cli):
    columns = ("--map", "image=image", "--map", "answer=text", "--rows", "1:3")
    cli("import", source, tmp_path / "out", *columns, "--prompt", prompt)
    cli("import", source, tmp_path / "replaced", *columns, "--replace-prompts", prompt)
    boxes = ("--map", "image=image", "--map", "box=box", "--map", "label=n", "--rows", "1:3")
    boxes += ("--box-format", "xywh", "--prompt", f"{{labels}}: {prompt}")
    cli("import", source, tmp_path / "boxes", *boxes)
    expected = {"out": question, "replaced": question, "boxes": f"1, 2: {question}"}
    for name, text in expected.items():
        for sample in read_samples(tmp_path / name / "data.jsonl"):
            assert sample.messages[0].content[-1].text == text


def test_class_names_in_braces_are_no_placeholders(tmp_path, cli):
    rows = "image,xmin,ymin,xmax,ymax,class\n1.png,1,2,9,9,{label}\n1.png,5,6,9,9,{labels}\n"
    table = tmp_path / "boxes.csv"
    table.write_text(rows, encoding="utf-8")
    write_gray_image(tmp_path / "1.png", 20, 20)
    cli("import", table, tmp_path / "out", "--prompt", "Find {labels}.")
    (sample,) = read_samples(tmp_path / "out" / "data.jsonl")
    assert sample.messages[0].content[-1].text == "Find {labels}, {label}."


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("car", "a box without a label beside 1 label"),
        ("", "2 boxes without a label, because class is empty"),
    ],
)
def test_boxes_without_a_label_are_named(source, tmp_path, label, message, cli):
    table = tmp_path / "boxes.csv"
    rows = f"image,xmin,ymin,xmax,ymax,class\n1.png,1,2,9,9,{label}\n1.png,5,6,9,9,\n"
    table.write_text(f"{rows}2.png,1,2,9,9,dog\n", encoding="utf-8")
    code = 2 if label else 0
    printed = cli("import", table, tmp_path / "out", "--prompt", "Locate.", code=code)
    assert message in printed.out + printed.err


def test_help_names_every_format(cli):
    words = re.sub(r"-\s+", "-", cli("import", "--help").out)  # lines can end within a name
    assert [form.name for form in FORMATS.list_built_in() if form.name not in words] == []


@pytest.mark.parametrize(("arguments", "where"), CASES["test_invalid_options_are_rejected"])
def test_invalid_options_are_rejected(source, tmp_path, arguments, where, cli):
    error = cli("import", source, tmp_path / "out", *arguments, code=2).err
    assert error.startswith(f"error: {where}: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("arguments", "remedy"), CASES["test_mapping_mistakes_have_a_remedy"])
def test_mapping_mistakes_have_a_remedy(source, tmp_path, arguments, remedy, cli):
    error = cli("import", source, tmp_path / "out", *arguments, code=2).err
    assert error.endswith(f"remedy: {remedy}\n")


def test_missing_column_is_one_message_and_the_text_format_is_printed(tmp_path, cli):
    lines = [f"{write_gray_image(tmp_path / f'{n}.png').name};Größe {n}" for n in range(9)]
    table, out = tmp_path / "a.csv", tmp_path / "out"
    table.write_bytes("\n".join(["image_path;text", *lines]).encode("cp1252"))
    columns = ("--map", "image=image_path", "--prompt", "?")
    error = cli("import", table, out, *columns, "--map", "answer=txt", code=2).err
    assert error.splitlines() == [
        f"error: {table}: no column 'txt' for --map answer=txt",
        "  expected: one of image_path, text",
        "  remedy: did you mean text?",
    ]
    printed = cli("import", table, out, *columns, "--map", "answer=text")
    assert "  semicolon-separated, encoding guessed: CP1252" in printed.lines
    columns = ("--map", "image=image_path", "--map", "answer=text")
    error = cli("import", table, tmp_path / "2", *columns, code=2).err
    assert error.count("a question without text") == 1
    assert "and 8 more such rows" in error
