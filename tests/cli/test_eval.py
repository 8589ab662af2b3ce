from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import typer
from click.testing import Result
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model
from tiny_task import TinyTask
from typer.testing import CliRunner

from finesight.cli.results import describe_changed_data, evaluate
from finesight.data.sample import write_samples
from finesight.errors import UserError
from finesight.evaluate.bootstrap import REASON_FEW_SAMPLES_UNBOUNDED


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen2_5_vl")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    write_noise_image(tmp_path / "a.png", 80, 60)
    write_noise_image(tmp_path / "b.png", 60, 120, seed=1)
    requested = [
        make_sample("s0", tmp_path, "a.png", "What?", answer="noise"),
        make_sample("s1", tmp_path, "b.png", "What?", answer="more noise"),
    ]
    write_samples(tmp_path / "data.jsonl", [sample.sample for sample in requested])
    return tmp_path / "data.jsonl"


def run_eval(*arguments: object) -> Result:
    app = typer.Typer()
    app.command()(evaluate)
    words = [str(argument) for argument in (*arguments, "--device", "cpu", "--max-new-tokens", 3)]
    return CliRunner().invoke(app, words)


def test_json_scores_and_predictions_file(tiny, data, tmp_path):
    out = tmp_path / "answers.jsonl"
    result = run_eval(tiny, "--data", data, "--metric", "captions", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert (figures["metric"], figures["num_samples"]) == ("captions", 2)
    assert {"bleu_4", "rouge_l", "cider_d", "ended_with_eos"} <= set(figures["scores"])
    assert len(out.read_text().splitlines()) == 2


def test_thinking_mode_is_selected(data, tmp_path):
    model, out = create_tiny_model(tmp_path / "qwen3_5", "qwen3_5"), tmp_path / "answers.jsonl"
    result = run_eval(model, "--data", data, "--metric", "qa", "--thinking", "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 of 2 completions ended within the reasoning" in result.stdout
    assert all(json.loads(line)["answer"] == "" for line in out.read_text().splitlines())


def test_batched_images_and_videos_match_single_answers(tiny, tmp_path):
    frames = tuple(write_noise_image(tmp_path / f"{n}.png", 56, 84, seed=n).name for n in range(3))
    contents = {"image": "0.png", "one": frames[:1], "two": frames[1:], "three": frames}
    requested = [
        make_sample(name, tmp_path, c, "What?", answer="noise") for name, c in contents.items()
    ]
    data, out = tmp_path / "data.jsonl", tmp_path / "answers.jsonl"
    write_samples(data, [sample.sample for sample in requested])
    answers = []
    for batch in (1, 4):
        options = ("--data", data, "--metric", "ocr", "--out", out, "--batch-size", batch)
        result = run_eval(tiny, *options)
        assert result.exit_code == 0, result.output
        answers.append(out.read_text())
    assert answers[0] == answers[1]


def test_table_marks_the_primary_score(tiny, data):
    result = run_eval(tiny, "--data", data, "--metric", "latex", "--limit", 1)
    assert result.exit_code == 0, result.output
    assert "latex: 1 sample, with" in result.stdout
    assert "similarity*" in result.stdout


def test_changed_validation_data_of_a_run_are_noted(tmp_path):
    task = TinyTask(tmp_path)
    task.run("train.steps=1", "train.epochs=null", eval={"metric": "qa", "max_new_tokens": 2})
    run, data = tmp_path / "run", tmp_path / "eval.jsonl"
    assert "note:" not in run_eval(run, "--json").stderr
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    result = run_eval(run, "--json")
    assert json.loads(result.stdout)["num_samples"] == 2
    assert "note: the validation data changed since the run (3 samples, now 2)" in result.stderr
    assert "note:" not in run_eval(run, "--data", data).stderr


def test_recipe_without_a_run_has_no_recorded_data(tmp_path):
    (tmp_path / "recipe.yaml").write_text("data: {}")
    assert describe_changed_data(str(tmp_path)) == ""


def test_samples_with_damaged_images_are_reported(tiny, data, tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    result = run_eval(tiny, "--data", data, "--metric", "ocr")
    assert result.exit_code == 0, result.output
    assert "skipped: sample s0" in result.stderr
    assert "1 skipped" in result.stdout


def test_out_folder_is_a_usage_error(tiny, data, tmp_path):
    result = run_eval(tiny, "--data", data, "--metric", "ocr", "--out", tmp_path)
    assert result.exit_code == 2
    assert "--out" in result.output


def test_unknown_metric_suggests_closest_name(tiny, data):
    result = run_eval(tiny, "--data", data, "--metric", "captoins")
    assert isinstance(result.exception, UserError)
    assert "did you mean captions?" in str(result.exception)


def test_scores_have_confidence_intervals(tiny, data):
    result = run_eval(tiny, "--data", data, "--metric", "ocr", "--json")
    figures = json.loads(result.stdout)
    assert figures["intervals"].keys() == figures["scores"].keys()
    low, high = figures["intervals"]["similarity"]
    assert low <= figures["scores"]["similarity"] <= high
    table = run_eval(tiny, "--data", data, "--metric", "ocr").stdout
    assert "with 95 % intervals" in table
    assert f"{low:.4f} to {high:.4f}" in table


def test_score_without_interval_has_a_reason(tiny, data):
    result = run_eval(tiny, "--data", data, "--metric", "captions", "--json")
    figures = json.loads(result.stdout)
    assert figures["intervals"]["cider_d"] is None
    assert figures["notes"] == {"cider_d": REASON_FEW_SAMPLES_UNBOUNDED}
    table = run_eval(tiny, "--data", data, "--metric", "captions").stdout
    assert f"cider_d: {REASON_FEW_SAMPLES_UNBOUNDED}" in table
    assert re.search(r"cider_d\* +0\.0000 +-\n", table)


def test_most_confused_classes_are_listed(tiny, data):
    result = run_eval(tiny, "--data", data, "--metric", "classification")
    assert "'more noise' predicted as '(something else)': 1" in result.stdout


def test_custom_metric_function_is_used_and_named(tiny, data, tmp_path):
    (tmp_path / "mine.py").write_text("def length(case):\n    return len(case.references[0])\n")
    result = run_eval(tiny, "--data", data, "--metric", f"{tmp_path / 'mine.py'}:length", "--json")
    assert result.exit_code == 0, result.output
    figures = json.loads(result.stdout)
    assert figures["primary_metric"] == "length"
    assert figures["scores"]["length"] == (len("noise") + len("more noise")) / 2
    assert f"custom metric: {tmp_path / 'mine.py'}:length" in result.stderr
    (tmp_path / "mine.py").write_text("def accuracy(case):\n    return 0.5\n")
    table = run_eval(tiny, "--data", data, "--metric", f"{tmp_path / 'mine.py'}:accuracy").stdout
    assert "accuracy*" in table
    assert "correct" not in table


@pytest.mark.parametrize("needed", ["metric", "data"])
def test_metric_and_data_are_required_without_recipe(tiny, data, needed):
    given = {"metric": "ocr", "data": data}
    del given[needed]
    result = run_eval(
        tiny, *(piece for name, value in given.items() for piece in (f"--{name}", value))
    )
    assert isinstance(result.exception, UserError)
    assert result.exception.where == needed
