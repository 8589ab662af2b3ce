from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from asking import ask, noise
from click.testing import Result
from typer.testing import CliRunner

from finesight.cli.evaluate import evaluate
from finesight.data.jsonl import write_samples
from finesight.errors import UserError
from finesight.evaluate.bootstrap import FEW_UNBOUNDED
from finesight.model.tiny import make_tiny


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen2_5_vl")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    noise(tmp_path / "a.png", 80, 60)
    noise(tmp_path / "b.png", 60, 120, seed=1)
    asked = [
        ask("s0", tmp_path, "a.png", "What?", answer="noise"),
        ask("s1", tmp_path, "b.png", "What?", answer="more noise"),
    ]
    write_samples(tmp_path / "data.jsonl", [sample.sample for sample in asked])
    return tmp_path / "data.jsonl"


def _run(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(evaluate)
    words = [str(argument) for argument in (*arguments, "--device", "cpu", "--max-new-tokens", 3)]
    return CliRunner().invoke(app, words)


def test_scores_as_json_and_answers_in_a_file(tiny, data, tmp_path):
    out = tmp_path / "answers.jsonl"
    result = _run(tiny, "--data", data, "--metric", "captions", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["metric"], figures["samples"]) == ("captions", 2)
    assert {"bleu_4", "rouge_l", "cider_d", "stopped"} <= set(figures["scores"])
    assert len(out.read_text().splitlines()) == 2


def test_images_and_videos_in_one_batch_are_answered_as_alone(tiny, tmp_path):
    frames = tuple(noise(tmp_path / f"{n}.png", 56, 84, seed=n).name for n in range(3))
    contents = {"image": "0.png", "one": frames[:1], "two": frames[1:], "three": frames}
    asked = [ask(name, tmp_path, c, "What?", answer="noise") for name, c in contents.items()]
    data, out = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    write_samples(data, [sample.sample for sample in asked])
    answers = []
    for batch in (1, 4):
        options = ("--data", data, "--metric", "ocr", "--out", out, "--batch", batch)
        result = _run(tiny, *options)
        assert result.exit_code == 0, result.output
        answers.append(out.read_text())
    assert answers[0] == answers[1]


def test_a_table_for_people_marks_the_headline(tiny, data):
    result = _run(tiny, "--data", data, "--metric", "latex", "--limit", 1)
    assert result.exit_code == 0, result.output
    assert "latex: 1 samples" in result.stdout
    assert "similarity*" in result.stdout


def test_samples_with_damaged_pictures_are_named(tiny, data, tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    result = _run(tiny, "--data", data, "--metric", "ocr")
    assert result.exit_code == 0, result.output
    assert "left out: sample s0" in result.stderr
    assert "1 left out" in result.stdout


def test_a_folder_in_place_of_the_answers_is_a_usage_error(tiny, data, tmp_path):
    result = _run(tiny, "--data", data, "--metric", "ocr", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--out" in result.output


def test_an_unknown_metric_is_told_with_the_nearest(tiny, data):
    result = _run(tiny, "--data", data, "--metric", "captoins")
    assert isinstance(result.exception, UserError)
    assert "did you mean captions?" in str(result.exception)


def test_figures_come_with_their_intervals(tiny, data):
    result = _run(tiny, "--data", data, "--metric", "ocr", "--json")
    figures = json.loads(result.stdout)
    assert figures["intervals"].keys() == figures["scores"].keys()
    low, high = figures["intervals"]["similarity"]
    assert low <= figures["scores"]["similarity"] <= high
    table = _run(tiny, "--data", data, "--metric", "ocr").stdout
    assert "with 95 % intervals" in table
    assert f"{low:.4f} to {high:.4f}" in table


def test_a_score_without_an_interval_says_why(tiny, data):
    result = _run(tiny, "--data", data, "--metric", "captions", "--json")
    figures = json.loads(result.stdout)
    assert figures["intervals"]["cider_d"] is None
    assert figures["notes"] == {"cider_d": FEW_UNBOUNDED}
    table = _run(tiny, "--data", data, "--metric", "captions").stdout
    assert f"cider_d: {FEW_UNBOUNDED}" in table
    assert re.search(r"cider_d\* +0\.0000 +-\n", table)


def test_the_classes_most_often_mistaken_are_listed(tiny, data):
    result = _run(tiny, "--data", data, "--metric", "classification")
    assert "'more noise' taken for '(something else)': 1" in result.stdout


def test_a_function_of_the_users_own_scores_and_is_named(tiny, data, tmp_path):
    (tmp_path / "mine.py").write_text("def length(case):\n    return len(case.truths[0])\n")
    result = _run(tiny, "--data", data, "--metric", f"{tmp_path / 'mine.py'}:length", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["headline"] == "length"
    assert figures["scores"]["length"] == (len("noise") + len("more noise")) / 2
    assert f"scored by the program {tmp_path / 'mine.py'}:length" in result.stderr


@pytest.mark.parametrize("needed", ["metric", "data"])
def test_without_a_recipe_both_are_needed(tiny, data, needed):
    given = {"metric": "ocr", "data": data}
    del given[needed]
    result = _run(tiny, *(piece for name, value in given.items() for piece in (f"--{name}", value)))
    assert isinstance(result.exception, UserError)
    assert result.exception.where == needed
