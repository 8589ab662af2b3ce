"""Search for settings with simulated runs, whose accuracy depends on their learning rate."""

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tiny_task import make_task, write_recipe

from finesight import api
from finesight.errors import TrainingInterrupted, UserError
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.task_metrics import compute_metrics
from finesight.launch import trial_search
from finesight.samples.corpus import load_corpus
from finesight.samples.sample import read_samples
from finesight.settings.recipe import load_recipe

NUM_SAMPLES = 60

MEASURE_RECIPE = trial_search.TrialSearch.measure_recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipe of 60 training samples, which are split once."""
    monkeypatch.setattr(trial_search, "MIN_SPLIT_SAMPLES", NUM_SAMPLES)
    # Simulated steps take longer than a start.
    monkeypatch.setattr(trial_search.TrialSearch, "measure_recipe", lambda self: (1e-3, 1e-2))
    task = make_task(tmp_path / "task", NUM_SAMPLES, 20)
    task |= {"eval": {"metric": "classification"}, "output_dir": str(tmp_path / "run")}
    return write_recipe(tmp_path / "recipe.yaml", task, num_workers=0)


@dataclass
class SimulatedRuns:
    """Replacement of `subprocess.Popen` that writes the answers of runs.

    Attributes:
        accuracy: Accuracy of a run by its settings; an exception kills the run.
        on_call: Called with the number of the call.
        calls: Name of the run, and fraction of the steps or `eval`, of each call.
        devices: CUDA_VISIBLE_DEVICES of each call.
        is_signaled: The search has sent a signal to a run.
    """

    accuracy: Callable[[dict[str, Any]], float]
    on_call: Callable[[int], object] = lambda number: None
    calls: list[tuple[str, str]] = field(default_factory=list)
    devices: list[str | None] = field(default_factory=list)
    is_signaled: threading.Event = field(default_factory=threading.Event)

    def __call__(self, command: list[str], **options: Any) -> "SimulatedRuns":
        _, _, _, operation, target, *words = command
        self.code = 0
        self.devices.append(options["env"].get("CUDA_VISIBLE_DEVICES"))
        given = dict(word.removeprefix("--").partition("=")[::2] for word in words)
        self.on_call(len(self.calls))
        if operation == "eval":
            run = Path(target)
            self.calls.append((run.name, "eval"))
            settings = yaml.safe_load(run.with_suffix(".yaml").read_text())
            self._answer(Path(given["data"]), Path(given["out"]), settings)
            return self
        settings = yaml.safe_load(Path(target).read_text())
        run, fraction = Path(settings["output_dir"]), float(given.get("stop-after", 1))
        self.calls.append((run.name, f"{fraction:.2f}"))
        (run / "predictions").mkdir(parents=True, exist_ok=True)
        step = math.ceil(fraction * 100)
        name = "after" if fraction == 1 else f"step-{step}"
        try:
            data = Path(settings["data"]["eval"][0]["path"])
            self._answer(data, run / "predictions" / f"{name}.jsonl", settings)
        except MemoryError:
            self.code = -9
            return self
        with (run / "metrics.jsonl").open("a") as file:
            scores = {"validation_loss": 1.0, "scores": {}, "primary_metric": None}
            for line in ({"step": step, "step_s": 10.0}, {"step": step, **scores}):
                file.write(json.dumps(line) + "\n")
        if fraction == 1:
            (run / "result.json").write_text("{}")
        return self

    def _answer(self, data: Path, out: Path, settings: dict[str, Any]) -> None:
        samples = read_samples(data)
        num_correct = round(self.accuracy(settings) * len(samples))
        rows = []
        for index, sample in enumerate(samples):
            gold = sample.messages[-1].content[0].text  # type: ignore[union-attr]
            answer = gold if index < num_correct else "none"
            row = {"id": sample.id, "answer": answer, "gold": gold, "finish_reason": "stop"}
            rows.append(row | {key: [] for key in ("boxes", "references", "gold_boxes")})
            rows[-1]["scores"] = {}
        out.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def wait(self) -> int:
        return self.code

    def send_signal(self, number: int) -> None:
        self.is_signaled.set()


def by_learning_rate(settings: dict[str, Any]) -> float:
    return 0.9 if settings["train"]["learning_rate"]["default"] > 0.015 else 0.1


@pytest.fixture
def simulate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., SimulatedRuns]:
    def start(*arguments: Any) -> SimulatedRuns:
        runs = SimulatedRuns(*arguments)
        monkeypatch.setattr(trial_search.subprocess, "Popen", runs)
        return runs

    return start


def test_clearly_better_trial_is_chosen(recipe, simulate, tmp_path):
    def accuracy(settings: dict[str, Any]) -> float:
        if settings["tune"]["lora"]["rank"] == 128:
            raise MemoryError
        return by_learning_rate(settings)

    runs, out = simulate(accuracy), tmp_path / "search"
    record = api.search(recipe, out=out, trials=12)
    chosen = record.trials[record.choice]
    assert chosen.settings["train.learning_rate.default"] > 0.015
    states = {one.number: one.state for one in record.trials}
    assert {*states.values()} == {"complete", "pruned", "fail"}, states
    assert states[0] == "complete"
    failed = next(one for one in record.trials if one.state == "fail")
    assert "exit code -9" in failed.error
    for trial in record.trials:
        resumed = [fraction for run, fraction in runs.calls if run == f"{trial.number:03}"]
        fractions = ["0.11", "0.33", "1.00"] if trial.number else ["0.11", "1.00"]
        expected = fractions[: max(1, len(trial.rungs))]
        tested = ["eval"] * (trial.number in (0, record.choice))
        assert resumed == expected + tested, trial
    assert record.test == {0: pytest.approx(0.1), record.choice: pytest.approx(0.9)}
    best = load_recipe(out / "best.yaml")
    original = load_recipe(recipe)
    assert best.data == original.data
    expected_lr = chosen.settings["train.learning_rate.default"]
    assert best.train.learning_rate.default == expected_lr
    assert f"trial {record.choice}" in (out / "report.html").read_text()
    num_calls = len(runs.calls)
    assert api.search(recipe, out=out, trials=20) == record
    assert len(runs.calls) == num_calls, "a complete search was continued"
    data = Path(original.data.train[0].path)
    data.write_text(data.read_text().replace("white", "black"))
    with pytest.raises(UserError, match="a search with other settings, ranges or data"):
        api.search(recipe, out=out)


def test_first_trials_vary_the_learning_rate_and_train_completely(
    recipe, simulate, tmp_path, monkeypatch
):
    # A start takes longer than all steps, so no trial starts three times.
    monkeypatch.setattr(trial_search.TrialSearch, "measure_recipe", lambda self: (10.0, 1.0))
    runs = simulate(by_learning_rate)
    record = api.search(recipe, out=tmp_path / "search", trials=4)
    default = load_recipe(recipe).train.learning_rate.default
    for trial, factor in zip(record.trials[1:], trial_search.LEARNING_RATE_FACTORS, strict=False):
        assert trial.settings == {"train.learning_rate.default": default * factor}
    assert {fraction for run, fraction in runs.calls if run != "000"} == {"1.00", "eval"}


def build_trial(number: int = 0, **fields: float) -> trial_search.TrialRecord:
    """Return a trial with the score 0 at its first rung."""
    values = {"rung": 1, "seconds": 3.0, "train_s": 1.0, "score": 0.0, "loss": 1.0, **fields}
    rung = trial_search.RungScore(interval=None, **values)
    return trial_search.TrialRecord(number=number, settings={}, rungs=[rung])


def test_start_and_steps_of_the_recipe_are_measured(recipe, tmp_path):
    search = trial_search.TrialSearch(load_recipe(recipe), None, tmp_path / "a", 1.0, None, print)
    search.record.trials = [build_trial()]
    assert MEASURE_RECIPE(search) == (2.0, 9.0)
    # Steps before an interruption count, its seconds do not.
    search.record.trials[0].rungs += build_trial(rung=9, seconds=4.0, train_s=9.9).rungs
    assert MEASURE_RECIPE(search) == (2.0, 9.9)


def test_validation_loss_decides_between_equal_scores():
    record = trial_search.SearchRecord(recipe={}, data="", space={}, metric="grounding")
    record.trials = [build_trial(number, loss=2.0 - number) for number in range(2)]
    assert [one.number for one in record.rank_trials()] == [1, 0]


def test_recipe_is_kept_without_a_clear_difference(recipe, simulate, tmp_path):
    simulate(lambda settings: 0.5 + 0.05 * (settings["train"]["learning_rate"]["default"] > 0.01))
    record = api.search(recipe, out=tmp_path / "search")
    assert record.choice == 0
    assert "no clear difference of the best two trials" in record.reasons[0]
    assert len(record.trials) < 60
    first = api.search(recipe, ["train.epochs=null"], out=tmp_path / "one", trials=1).trials[0]
    assert not first.settings
    assert "no clear change" in record.reasons[1]


def test_interrupted_search_continues(recipe, simulate, tmp_path):
    def interrupt(number: int) -> None:
        if number == 7:
            os.kill(os.getpid(), signal.SIGINT)
            assert first.is_signaled.wait(60), "the search did not notice the signal"

    out = tmp_path / "search"
    first = simulate(by_learning_rate, interrupt)
    with pytest.raises(TrainingInterrupted, match="SIGINT"):
        api.search(recipe, out=out, trials=5)
    second = simulate(by_learning_rate)
    record = api.search(recipe, out=out, trials=5)
    assert len(record.trials) == 5
    # The run of the signal has no score, and resumes.
    assert first.calls[7] == second.calls[0]
    assert not {*first.calls[:7]} & {*second.calls} - {("000", "eval")}


def test_each_gpu_trains_one_trial(recipe, simulate, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,7")
    # The second GPU asks for a trial before the recipe has been measured.
    monkeypatch.setattr(trial_search.TrialSearch, "measure_recipe", MEASURE_RECIPE)
    runs = simulate(by_learning_rate, lambda number: time.sleep(0.01))
    with pytest.raises(UserError, match="different numbers of 0, 1, 2"):
        api.search(recipe, ["train.device=auto"], out=tmp_path / "search", gpus="0,3")
    record = api.search(
        recipe, ["train.device=auto"], out=tmp_path / "search", gpus="0,2", trials=9
    )
    assert {*runs.devices} == {"4", "7"}
    assert sorted(one.number for one in record.trials) == [*range(9)]
    assert len({*runs.calls}) == len(runs.calls), "a rung was trained twice"
    assert "running" not in {one.state for one in record.trials}


def test_short_budget_is_rejected_and_extended(recipe, simulate, tmp_path, monkeypatch):
    monkeypatch.setattr(trial_search.TrialSearch, "measure_recipe", MEASURE_RECIPE)
    clock = iter(range(0, 10**6, 10))
    # Threads of other tests use the clock of the process.
    used = SimpleNamespace(monotonic=lambda: float(next(clock)))
    monkeypatch.setattr(trial_search, "time", used)
    simulate(by_learning_rate)
    with pytest.raises(UserError, match="too short for the recipe itself"):
        api.search(recipe, out=tmp_path / "search", budget="60s")
    record = api.search(recipe, out=tmp_path / "search", budget="1h")
    assert record.reasons[0] in ("the budget of 3600 s has ended",) or record.choice is not None
    assert record.trials[0].state == "complete"


SPACES = {
    "not a search space: [1]": [1],
    "not a search space: 3": {"train.steps": 3},
    "not a search space: {'low': 2, 'high': 'x'}": {"tune.lora.rank": {"low": 2, "high": "x"}},
    "train.stpes": {"train.stpes": [3, 4]},
    "tune.lora.rank: has the invalid value 0": {"tune.lora.rank": [0]},
}


@pytest.mark.parametrize(("words", "space"), SPACES.items())
def test_invalid_spaces(words, space, tmp_path):
    recipe = load_recipe(_write_minimal_recipe(tmp_path))
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        trial_search.build_search_space(recipe, space)


def _write_minimal_recipe(folder: Path) -> Path:
    path = folder / "recipe.yaml"
    path.write_text("model: m\ndata: {train: [a.jsonl, b.jsonl]}\noutput_dir: run\n")
    return path


def test_section_search_changes_the_space(tmp_path):
    recipe = load_recipe(_write_minimal_recipe(tmp_path))
    names = {"train.learning_rate.default", "tune.lora.rank", "train.epochs", "data.train.1.weight"}
    assert trial_search.build_search_space(recipe, None).keys() == names
    section = {"train.epochs": None, "train.learning_rate": [1e-3], "train.batch_size": [8]}
    space = trial_search.build_search_space(recipe, section)
    assert space.keys() == names - {"train.epochs"} | {"train.batch_size"}
    assert space["train.batch_size"].choices == (16, 8)  # type: ignore[attr-defined]


@pytest.mark.parametrize("num_splits", [1, trial_search.NUM_FOLDS])
def test_splits_have_no_common_images(recipe, num_splits, tmp_path, monkeypatch):
    if num_splits > 1:
        monkeypatch.setattr(trial_search, "MIN_SPLIT_SAMPLES", NUM_SAMPLES + 1)
    settings, folder = load_recipe(recipe), tmp_path / "data"
    corpus = load_corpus(settings.data.train)
    assert trial_search.write_splits(settings, corpus, folder) == num_splits
    validated = []
    for fold in sorted(folder.glob("fold-*")):
        digests = []
        for name in ("train-0", "validation"):
            samples = read_samples(fold / f"{name}.jsonl")
            parts = [one.messages[0].content[0] for one in samples]
            images = [fold / one.image for one in parts]  # type: ignore[union-attr]
            digests.append({image.read_bytes() for image in images})
            validated += [one.id for one in samples if name == "validation"]
        assert not digests[0] & digests[1]
    source = Path(settings.data.train[0].path)
    ids = [one.id for one in read_samples(source)]
    assert sorted(validated) == sorted(ids) if num_splits > 1 else {*validated} < {*ids}


@pytest.mark.parametrize(("num_others", "verdict"), [(0, "better"), (5, "no clear change")])
def test_gain_of_one_trial_is_not_clear_among_many(num_others: int, verdict: str) -> None:
    """Seven gained answers have a p-value of 0.016, the first step of six trials is 0.008."""
    recipe = [EvalCase("b", (), ("a",), (), str(index)) for index in range(40)]
    trial = [replace(case, answer="ab"[index >= 7]) for index, case in enumerate(recipe)]
    (found,) = trial_search.compare_primary("classification", recipe, [trial], num_others)
    assert (found.name, found.verdict) == ("accuracy", verdict)


def test_scores_of_the_recipe_are_computed_once(monkeypatch) -> None:
    recipe = [EvalCase("b", (), ("a",), (), str(index)) for index in range(12)]
    trial = [replace(case, answer="a") for case in recipe]
    computed = []

    def count_metrics(metric, cases):
        computed.append(len(cases))
        return compute_metrics(metric, cases)

    monkeypatch.setattr(trial_search, "compute_metrics", count_metrics)
    # The last trial has skipped a sample.
    trials = [trial, trial[::-1], trial, trial[1:]]
    found = trial_search.compare_primary("classification", recipe, trials)
    assert [(one.before, one.after, one.num_samples) for one in found] == [
        *[(0, 1, 12)] * 3,
        (0, 1, 11),
    ]
    assert computed == [12, 12, 12, 12, 11, 11]
