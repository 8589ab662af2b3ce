import re
from pathlib import Path

import pytest
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model
from tiny_task import TinyTask

from finesight.data.sample import write_samples
from finesight.evaluate.bootstrap import REASON_FEW_SAMPLES_UNBOUNDED
from finesight.train.run_dir import describe_changed_data


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


@pytest.fixture
def evaluate(cli, tiny, data):
    """Evaluate the tiny model on the data, if no other model or data is given."""

    def run(*options: object, model=tiny, data=data, code=0):
        given = () if data is None else ("--data", data)
        words = (model, *given, *options, "--device", "cpu", "--max-new-tokens", 3)
        return cli("eval", *words, code=code)

    return run


def test_json_scores_and_predictions_file(evaluate, tmp_path):
    out = tmp_path / "answers.jsonl"
    figures = evaluate("--metric", "captions", "--out", out, "--json").json
    assert (figures["metric"], figures["num_samples"]) == ("captions", 2)
    assert {"bleu_4", "rouge_l", "cider_d", "ended_with_eos"} <= set(figures["scores"])
    assert len(out.read_text().splitlines()) == 2
    assert figures["intervals"]["cider_d"] is None
    assert figures["notes"] == {"cider_d": REASON_FEW_SAMPLES_UNBOUNDED}
    table = evaluate("--metric", "captions").out
    assert f"cider_d: {REASON_FEW_SAMPLES_UNBOUNDED}" in table
    assert re.search(r"cider_d\* +0\.0000 +-\n", table)


def test_scores_have_confidence_intervals(evaluate):
    figures = evaluate("--metric", "ocr", "--json").json
    assert figures["intervals"].keys() == figures["scores"].keys()
    low, high = figures["intervals"]["similarity"]
    assert low <= figures["scores"]["similarity"] <= high
    table = evaluate("--metric", "ocr").out
    assert "with 95 % intervals" in table
    assert f"{low:.4f} to {high:.4f}" in table
    table = evaluate("--metric", "latex", "--limit", 1).out
    assert "latex: 1 sample, with" in table
    assert "similarity*" in table


def test_most_confused_classes_are_listed(evaluate):
    output = evaluate("--metric", "classification").out
    assert "'more noise' predicted as '(something else)': 1" in output


def test_changed_validation_data_of_a_run_are_noted(evaluate, tmp_path):
    task = TinyTask(tmp_path / "task")
    task.run("train.steps=1", "train.epochs=null", eval={"metric": "qa", "max_new_tokens": 2})
    run, data = task.folder / "run", task.folder / "eval.jsonl"
    assert "note:" not in evaluate("--json", model=run, data=None).err
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    printed = evaluate("--json", model=run, data=None)
    assert printed.json["num_samples"] == 2
    assert "note: the validation data changed since the run (3 samples, now 2)" in printed.err
    assert "note:" not in evaluate(model=run, data=data).err
    # A recipe without a run has no recorded data.
    (tmp_path / "recipe.yaml").write_text("data: {}")
    assert describe_changed_data(str(tmp_path)) == ""


def test_samples_with_damaged_images_are_reported(evaluate, tmp_path):
    (tmp_path / "a.png").write_bytes(b"broken")
    printed = evaluate("--metric", "ocr")
    assert "skipped: sample s0" in printed.err
    assert "1 skipped" in printed.out


def test_custom_metric_function_is_used_and_named(evaluate, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def length(case):\n    return len(case.references[0])\n")
    printed = evaluate("--metric", f"{file}:length", "--json")
    assert printed.json["primary_metric"] == "length"
    assert printed.json["scores"]["length"] == (len("noise") + len("more noise")) / 2
    assert f"custom metric: {file}:length" in printed.err
    file.write_text("def accuracy(case):\n    return 0.5\n")
    table = evaluate("--metric", f"{file}:accuracy").out
    assert "accuracy*" in table
    assert "correct" not in table


def test_invalid_options_are_rejected(evaluate, tmp_path):
    assert "did you mean captions?" in evaluate("--metric", "captoins", code=2).err
    assert "--out" in evaluate("--metric", "ocr", "--out", tmp_path, code=2).err
    assert evaluate("--metric", "ocr", data=None, code=2).err.startswith("error: data: ")
    assert evaluate(code=2).err.startswith("error: metric: ")
