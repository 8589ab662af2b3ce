"""`finesight data check`, through its command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
import yaml
from click.testing import Result
from conversing import lines, sample
from packing import as_parquet, as_tars
from scenery import paint
from typer.testing import CliRunner

from finesight.cli.data_check import check
from finesight.errors import UserError
from finesight.model.tiny import make_tiny

app = typer.Typer()
app.command()(check)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(8):
        paint(tmp_path / f"{number}.png", 100, 60, shade=number)
    return tmp_path


SOUND = sample("0.png")
NOTED = sample("0.png", "Where?", None, [0, 0, 100, 60])
WARNED = sample("0.png", answer="A circle.")
WRONG = sample("gone.png")


@pytest.mark.parametrize(
    ("records", "code"),
    [([SOUND], 0), ([SOUND, NOTED], 0), ([SOUND, WARNED], 3), ([SOUND, WARNED, WRONG], 2)],
)
def test_the_exit_code_tells_the_gravest_finding(folder, records, code):
    result = run(lines(folder / "data.jsonl", records))
    assert result.exit_code == code, result.output


@pytest.mark.parametrize("source", ["hf:a/b", "modelscope:a/b:train", "https://h.com/a.zip", "zip"])
def test_what_is_elsewhere_is_to_be_imported_first(tmp_path, source):
    (tmp_path / "a.zip").write_bytes(b"PK")
    problem = run(tmp_path / "a.zip" if source == "zip" else source).exception
    assert isinstance(problem, UserError)
    assert problem.remedy.startswith("import it first")


def test_a_table_and_the_first_findings_of_each_fault(folder):
    wrong = [sample(f"gone-{n}.png", f"What is {n}?") for n in range(5)]
    source = lines(folder / "data.jsonl", [SOUND, *wrong, NOTED])
    output = run(source).output
    assert f"{source}: 7 rows, 7 samples, read as samples" in output
    row = next(line for line in output.splitlines() if line.startswith("picture-missing"))
    assert row.split() == ["picture-missing", "error", "5", "71", "%", "2,", "3,", "4"]
    assert "error: the picture is missing (picture-missing, 5)" in output
    assert f"{source}:2 (sample s2): {folder / 'gone-0.png'}" in output
    assert "gone-3.png" not in output
    assert "  and 2 more" in output
    assert output.count("remedy: correct the path") == 1


def test_rows_that_are_no_samples_are_counted_with_them(folder):
    broken = {"messages": [{"role": "user", "content": [{"type": "sound"}]}]}
    source = lines(folder / "data.jsonl", [SOUND, broken, broken, broken])
    output = run(source).output
    assert f"{source}: 4 rows, 1 samples and 3 rows that are none, read as" in output
    row = next(line for line in output.splitlines() if line.startswith("row-unreadable"))
    assert row.split()[:5] == ["row-unreadable", "error", "3", "75", "%"]


def test_json_has_a_line_for_each_finding_and_one_for_all(folder):
    wrong = [sample(f"gone-{n}.png", f"What is {n}?") for n in range(5)]
    source = lines(folder / "data.jsonl", [SOUND, *wrong])
    result = run(source, "--json")
    *findings, summary = map(json.loads, result.stdout.splitlines())
    assert [finding["where"] for finding in findings] == [f"{source}:{n}" for n in range(2, 7)]
    assert {finding["severity"] for finding in findings} == {"error"}
    assert summary["faults"] == {
        "picture-missing": {"severity": "error", "findings": 5, "samples": 5}
    }
    assert (summary["exit_code"], summary["samples"], result.exit_code) == (2, 6, 2)


def test_numbers_that_json_lacks_are_text(folder):
    record = json.dumps(sample("0.png", "Where?", None, [1, 2, 30, "x"]))
    source = folder / "data.jsonl"
    source.write_text(record.replace('"x"', '"nan"') + "\n")
    *findings, _ = map(json.loads, run(source, "--json").stdout.splitlines())
    assert [finding["code"] for finding in findings] == ["box-empty"]
    assert findings[0]["shown"][0]["boxes"] == [[1, 2, 30, "nan"]]


def test_a_foreign_source_with_its_options_against_another(folder):
    rows = [{"file": f"{n}.png", "xywh": [50, 30, 20, 10]} for n in range(6)]
    for name, part in (("train", rows), ("eval", rows[5:])):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(text)
    options = ["--map", "image=file", "--map", "box=xywh", "--prompt", "Where?"]
    sides = [folder / "train.jsonl", "--against", folder / "eval.jsonl"]
    result = run(*sides, *options, "--box-format", "xywh", "--limit", "5")
    assert result.exit_code == 0, result.output
    assert "5 rows, 5 samples, read as table (--map)" in result.output
    assert "box-reversed" in run(folder / "train.jsonl", *options).output


def test_fix_writes_what_is_left_and_says_so(folder):
    source = lines(folder / "data.jsonl", [SOUND, WRONG])
    result = run(source, "--fix", folder / "out")
    assert result.exit_code == 2, result.output
    assert f"{folder / 'out/data.jsonl'}: 1 samples" in result.output
    assert "0 samples changed, 1 left out" in result.output
    again = run(source, "--fix", folder / "out")
    assert isinstance(again.exception, UserError), "an existing folder is not written into"


def test_the_page_of_findings(folder):
    page = folder / "check.html"
    result = run(lines(folder / "data.jsonl", [SOUND, NOTED, WRONG]), "--html", page)
    assert result.exit_code == 2, result.output
    assert "the picture is missing" in page.read_text()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("check") / "model")


def test_over_long_samples_need_a_model(folder, model):
    source = lines(folder / "data.jsonl", [SOUND, sample("1.png", "word " * 500)])
    assert run(source, "--model", model).exit_code == 0
    result = run(source, "--model", model, "--max-length", "300")
    assert result.exit_code == 2, result.output
    assert f"{source}:2 (sample s2): " in result.output
    assert "tokens, over 300" in result.output
    refused = run(source, "--max-length", "300").exception
    assert isinstance(refused, UserError)
    assert refused.where == "--max-length"


def test_a_recipe_is_checked_with_its_model(folder, model):
    train = lines(folder / "train.jsonl", [SOUND, sample("1.png", "word " * 500), WRONG])
    held_out = lines(folder / "eval.jsonl", [sample("2.png", "How?")])
    recipe = {
        "model": str(model),
        "data": {
            "train": {"path": str(train), "limit": 2},
            "eval": str(held_out),
            "max_length": 300,
        },
        "tune": {"language": "full"},
        "train": {"epochs": 1, "batch": 1, "learning_rate": 1e-4},
        "output": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    result = run(path)
    assert result.exit_code == 2, result.output
    assert f"{held_out}: 1 rows, 1 samples, read as samples (--format), held out" in result.output
    assert "too-long" in result.output
    assert "picture-missing" not in result.output, "the recipe takes the first two samples only"
    for beside in (["--model", model], ["--limit", "1"], [train]):
        refused = run(path, *beside).exception
        assert isinstance(refused, UserError)
        assert (refused.where, refused.expected.split()[1]) == (str(path), "recipe")
    shards = as_tars(held_out, folder / "shards", each=1)
    packed = {
        "train": {"path": shards, "limit": 2},
        "eval": str(as_parquet(lines(folder / "t.jsonl", [NOTED]), folder / "t.parquet")),
    }
    path.write_text(yaml.safe_dump(recipe | {"data": packed}))
    result = run(path)
    assert result.exit_code == 0, result.output
    assert f"{shards}: 1 rows, 1 samples, read as samples (as they are trained on)" in result.output
    for other in ("none/*.tar", "none.parquet", "nothing://bucket/train.tar"):
        path.write_text(yaml.safe_dump(recipe | {"data": {"train": other}}))
        refused = run(path).exception
        assert isinstance(refused, UserError), other
        assert refused.where.endswith(other)


def test_a_source_given_twice_is_refused(folder):
    source = lines(folder / "data.jsonl", [SOUND])
    refused = run(source, "--against", source).exception
    assert isinstance(refused, UserError)
    assert refused.where == str(source)


def test_help_has_an_example():
    assert "Example: finesight data check" in run("--help").output
