import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from engine_fixtures import make_sample, write_noise_image
from tiny_model import create_tiny_model
from tiny_task import TinyTask

from finesight.evaluate.bootstrap import REASON_FEW_SAMPLES_UNBOUNDED
from finesight.infer.model_runner import ModelRunner
from finesight.operations import evaluation
from finesight.progress import ProgressConsole
from finesight.samples.sample import read_samples, write_samples
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
    assert re.search(r"cider_d\* +0\.00 +-\n", table)


def test_full_memory_is_reported_once_and_does_not_move_the_progress(evaluate, monkeypatch):
    """An evaluation continues with half the answers at once, and says so."""
    decode = ModelRunner.decode

    def limited_decode(self, num_seqs, longest):
        if num_seqs > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return decode(self, num_seqs, longest)

    monkeypatch.setattr(ModelRunner, "decode", limited_decode)
    counts = []
    show = ProgressConsole.progress_stage

    @contextmanager
    def progress_stage(self, *arguments):
        with show(self, *arguments) as on_progress:
            yield lambda count: (counts.append(count), on_progress(count))

    monkeypatch.setattr(ProgressConsole, "progress_stage", progress_stage)
    printed = evaluate("--metric", "captions", "--batch-size", 2)
    assert "the GPU memory is full: continuing with a batch of 1 answer\n" in printed.err
    assert sum(counts) == 2


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    task = TinyTask(tmp_path_factory.mktemp("run") / "task")
    task.run("train.steps=1", "train.epochs=null", eval={"metric": "qa", "max_new_tokens": 2})
    return task.folder / "run"


def test_pairs_of_a_run_need_no_data(run, tmp_path, cli):
    ids = [one.id for one in read_samples(run.parent / "train.jsonl")[:2]]
    write_graded(run / "responses.jsonl", (ids[0], "yes", 1), (ids[0], "no", 0), (ids[1], "no", 0))
    cli("pairs", run, tmp_path / "pairs.jsonl")
    assert [one.rejected[0].text for one in read_samples(tmp_path / "pairs.jsonl")] == ["no", "no"]


def test_changed_validation_data_of_a_run_are_noted(evaluate, run, tmp_path):
    data = run.parent / "eval.jsonl"
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
    printed = evaluate("--metric", "ocr", code=4)
    assert printed.err.endswith("\n1 sample skipped\n")
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


def write_graded(path: Path, *rows: tuple[str, str, float]) -> Path:
    """Write responses with ID, answer and score, as `eval --out` does."""
    common = {"boxes": [], "gold": "noise", "references": [], "gold_boxes": []}
    common["finish_reason"] = "stop"
    records = ({"id": n, "answer": a, "scores": {"ocr": x}, **common} for n, a, x in rows)
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return path


def test_best_responses_become_answers(tiny, data, tmp_path, cli):
    out = tmp_path / "best"
    words = ("sample", tiny, data, out, "--device", "cpu", "--max-new-tokens", 8, "--best-of", 3)
    error = cli(*words, code=2).err
    assert "no reward is given" in error
    assert "unknown reward: jsn" in cli(*words, "--reward", "jsn", code=2).err
    twice = tmp_path / "twice.jsonl"
    twice.write_text(data.read_text() * 2)
    assert "2 samples have the id" in cli("sample", tiny, twice, out, "--reward", "ocr", code=2).err
    rewards = ("--reward", "ocr", "--reward", "repetition", "--min-score", 0.1)
    summary = cli(*words, *rewards, "--json").json
    lines = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ["s0"] * 3 + ["s1"] * 3
    assert len({line["raw_text"] for line in lines}) > 2
    for line in lines:
        assert line["score"] == pytest.approx(sum(line["scores"].values()) / 2)
    best = {
        name: max((one for one in lines if one["id"] == name), key=lambda one: one["score"])
        for name in ("s0", "s1")
    }
    ended = [n for n, one in best.items() if one["finish_reason"] == "stop" and one["answer"]]
    kept = read_samples(out / "data.jsonl") if summary["num_kept"] else []
    assert {one.id for one in kept} >= {*ended}
    assert summary["mean_best_score"] == pytest.approx(
        sum(one["score"] for one in best.values()) / 2
    )
    again = cli(*words[:3], tmp_path / "again", *words[4:], *rewards, "--json").json
    assert again == summary
    assert "exists already" in cli(*words, *rewards, code=2).err


def test_responses_survive_a_failed_reward(tiny, data, tmp_path, cli):
    """Rewards are tried before generation; a later error keeps the responses for a rerun."""
    file, out = tmp_path / "mine.py", tmp_path / "best"
    words = ("sample", tiny, data, out, "--device", "cpu", "--max-new-tokens", 4, "--best-of", 2)
    words += ("--reward", f"{file}:early", "--reward", f"{file}:late", "--json")
    file.write_text("def early(case): return 1 / 0\ndef late(case): return None\n")
    error = cli(*words, code=2).err
    assert "ZeroDivisionError" in error
    assert "with a reference and with an empty answer" in error
    text = "def early(case): return 1.0\ndef late(case):\n    {}\n    return None\n"
    file.write_text(text.format("if case.id == 's1': raise KeyError(case.answer)"))
    error = cli(*words, code=2).err
    assert "reward late: KeyError" in error
    (kept,) = tmp_path.glob("best-*.jsonl")
    assert str(kept) in error
    assert not out.exists()
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [one["id"] for one in lines] == ["s0", "s0", "s1", "s1"]
    kept.write_text(kept.read_text().replace('"answer": "', '"answer": "again '))
    file.write_text(text.format(""))
    printed = cli(*words)
    assert "0 of 4 responses have a score of the reward late" in printed.err
    assert printed.json["mean_score"] == 1
    found = [json.loads(line) for line in (out / "responses.jsonl").read_text().splitlines()]
    assert [one["answer"] for one in found] == [f"again {one['answer']}" for one in lines]
    assert not kept.exists()


def test_undesirable_answers_are_no_references(tiny, data, evaluate, tmp_path, cli):
    samples = read_samples(data)
    write_samples(data, [samples[0], samples[1].model_copy(update={"label": False})])
    for printed in (
        evaluate("--metric", "ocr", code=2),
        cli("sample", tiny, data, tmp_path / "out", "--reward", "ocr", code=2),
    ):
        assert "'s1' has the label false" in printed.err


def test_json_output_has_no_nan(tiny, data, tmp_path, cli):
    """Without a reference in JSON, the reward `json` scores no response."""
    words = (tiny, data, tmp_path / "out", "--device", "cpu", "--max-new-tokens", 2)
    printed = cli("sample", *words, "--best-of", 2, "--reward", "json", "--json")
    assert "NaN" not in printed.out
    assert printed.json["mean_score"] is None


def test_text_around_boxes_of_responses_is_kept(data, tmp_path, cli):
    raw = 'A: {"bbox_2d": [1, 2, 3, 4]}, found.'
    box = {"image": 0, "label": None, "xyxy": [1, 2, 3, 4]}
    common = {"gold": "", "references": [], "gold_boxes": [box], "finish_reason": "stop"}
    rows = [(raw, [box]), ("[1, 2, 3, 4]", [box]), ("none", [])]
    rows.append(('{"point_2d": [1, 2]}', [box | {"xyxy": [1, 2, 1, 2]}]))
    records = (
        {"id": "s0", "answer": one, "raw_text": one, "boxes": boxes, "scores": {"x": 1}, **common}
        for one, boxes in rows
    )
    graded = tmp_path / "graded.jsonl"
    graded.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    cli("pairs", graded, tmp_path / "out.jsonl", "--data", data, "--labels")
    contents = [one.messages[-1].content for one in read_samples(tmp_path / "out.jsonl")]
    kinds = [[getattr(part, "text", part.type) for part in one] for one in contents]
    assert kinds == [["A: ", "box", ", found."], ["box"], ["none"], ["point"]]


def test_reward_copies_of_a_received_run_need_trust(tiny, data, tmp_path, cli):
    """Copies of reward functions in the folder of a run that its recipe does not name."""
    run = tmp_path / "received"
    run.mkdir()
    recipe = {"model": str(tiny), "data": {"train": str(data)}, "output_dir": "runs/other"}
    recipe["train"] = {"objective": "grpo", "epochs": 1}
    (run / "recipe.yaml").write_text(json.dumps(recipe | {"rewards": ["gone.py:score"]}))
    (run / "reward_1.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    error = cli("sample", run, data, tmp_path / "out", code=2).err
    assert "untrusted program" in error
    planned = cli("plan", run / "recipe.yaml", f"output_dir={run}", code=2).err
    assert "untrusted program" in planned
    assert not (tmp_path / "executed").exists()


def test_pairs_are_the_best_and_worst_responses(data, tmp_path, cli):
    rows = [("s0", "a", 0.5), ("s0", "noise", 1), ("s0", "b", 0.25), ("s1", "c", 0), ("s2", "d", 1)]
    graded, out = write_graded(tmp_path / "graded.jsonl", *rows), tmp_path / "pairs" / "p.jsonl"
    assert "add --data" in cli("pairs", graded, out, code=2).err
    assert "init" in cli("pairs", graded, out, "--data", data).next_steps
    first, second = read_samples(out)
    texts = [(one.messages[-1].content[0].text, one.rejected[0].text) for one in (first, second)]
    # Without a correct response, the answer of the sample is chosen.
    assert texts == [("noise", "b"), ("more noise", "c")]
    assert first.messages[0].content[0].image == "../a.png"
    labels = tmp_path / "labels.jsonl"
    cli("pairs", graded, labels, "--data", data, "--labels", "--min-score", 0.5)
    verdicts = [(one.id, one.label) for one in read_samples(labels)]
    assert verdicts == [("s0-0", True), ("s0-1", True), ("s0-2", False), ("s1-0", False)]
    alike = write_graded(tmp_path / "alike.jsonl", ("s0", "noise", 1), ("s1", "more noise", 1))
    error = cli("pairs", alike, tmp_path / "none.jsonl", "--data", data, code=2).err
    assert "--min-score" in error
    assert "no responses" in cli("pairs", tmp_path / "gone", tmp_path / "x.jsonl", code=2).err


def test_guard_checks_images_before_it_loads_the_models(tmp_path, cli, monkeypatch):
    task = TinyTask(tmp_path / "task")
    task.run("train.steps=1", "train.epochs=null")
    monkeypatch.setattr(evaluation, "load_model", None)
    truncated = write_noise_image(tmp_path / "a.png", 80, 60)
    truncated.write_bytes(truncated.read_bytes()[:-30])
    group = {"metric": "qa", "questions": [{"image": ["a.png"], "prompt": "A?", "answer": ["a"]}]}
    (tmp_path / "suite.yaml").write_text(json.dumps({"groups": {"one": group}}))
    error = cli("guard", task.folder / "run", "--suite", tmp_path / "suite.yaml", code=2).err
    assert f"{truncated}: truncated" in error


@pytest.mark.parametrize("tune", [{"language": "lora", "lora": {"rank": 4}}, {"language": "full"}])
def test_guard_compares_a_run_with_its_base_model(tmp_path, cli, tune):
    """Train two steps; the answers of both models are those of `eval`."""
    task = TinyTask(tmp_path / "task")
    task.run("train.steps=2", "train.epochs=null", "train.learning_rate=0.02", tune=tune)
    run, suite = task.folder / "run", task.folder / "suite.yaml"
    text = "groups: {colors: {metric: ocr, data: eval.jsonl, max_new_tokens: 4, min_score: 1}}"
    suite.write_text(text)
    words = ("guard", run, "--suite", suite, "--device", "cpu")
    printed = cli(*words, "--json", code=3)
    (group,) = printed.json["groups"]
    data = task.folder / "eval.jsonl"
    options = ("--metric", "ocr", "--data", data, "--max-new-tokens", 4, "--device", "cpu")
    for name, model in (("before", task.folder / "tiny"), ("after", run)):
        scores = cli("eval", model, *options, "--json").json["scores"]
        assert group["difference"][name] == scores["similarity"], name
    assert group["difference"]["before"] != group["difference"]["after"]
    assert json.loads((run / "guard.json").read_text()) == printed.json
    assert 'id="guard"' in (run / "report.html").read_text()
    assert "GENERAL.jsonl" in cli(*words, code=3).err
    assert "no regression" in cli(*words, "--update").out
    assert "no regression" in cli(*words).out
    assert "is not a run" in cli("guard", task.folder / "tiny", code=2).err
    assert "--suite" in cli("guard", run, "--update", code=2).err


@pytest.mark.parametrize(
    ("words", "has_references"),
    [
        (("eval", "--data", "{data}", "--metric", "captions"), True),
        (("sample", "{data}", "{out}", "--reward", "ocr", "--best-of", "2"), True),
        (("predict", "--data", "{data}"), False),
        (("label", "{images}", "--suggest-only", "--prompt", "What?", "--out", "{out}"), False),
    ],
)
def test_limits_below_the_answers_are_warned_of(tiny, data, tmp_path, cli, words, has_references):
    """Before the generation by the references, and after it by the truncated answers."""
    names = {"data": data, "images": data.parent / "a.png", "out": tmp_path / "out"}
    command, *others = (word.format(**names) for word in words)
    written = tmp_path / "out"
    for limit, is_small in ((1, True), (30, False)):
        limits = ("--max-new-tokens", limit, "--device", "cpu")
        err = cli(command, tiny, *others, *limits).err
        reference = re.search(r"is too small for 2 of 2 .*answers \(100%\), which have up to", err)
        assert (reference is not None) == (is_small and has_references), command
        if is_small:
            assert re.search(r"\(100%\) were truncated at --max-new-tokens 1: raise it", err)
        if written.exists():
            shutil.rmtree(written)


def test_truncated_responses_are_no_pairs(tiny, data, tmp_path, cli):
    words = ("sample", tiny, data, tmp_path / "out", "--reward", "ocr", "--device", "cpu")
    cli(*words, "--max-new-tokens", 1, "--best-of", 2)
    words = ("pairs", tmp_path / "out", tmp_path / "pairs.jsonl", "--data", data)
    error = cli(*words, code=2).err
    assert "4 of 4 responses are truncated" in error
    assert "remedy: sample longer responses, with a larger --max-new-tokens" in error
