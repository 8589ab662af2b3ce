"""What is said of a run, with and without what newer versions note."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from run_folders import MANIFEST, START, MadeRun, measured_line, step_line

from finesight.report import facts
from finesight.report.record import Record, read_record


def run(folder: Path) -> MadeRun:
    return MadeRun(folder / "run")


def record(made: MadeRun) -> Record:
    return read_record(made.folder)


@pytest.fixture
def whole(tmp_path: Path) -> Record:
    made = run(tmp_path)
    made.trained()
    made.finished()
    return record(made)


@pytest.fixture
def old(tmp_path: Path) -> Record:
    """A run of a version that noted nothing at the start."""
    made = run(tmp_path)
    made.trained(start=None)
    return record(made)


def test_a_run_in_two_sentences(whole: Record) -> None:
    assert facts.what_was_done(whole) == (
        "Qwen/Qwen2-VL-2B-Instruct tuned on 950 samples, 2 epochs: language by LoRA of rank 4;"
        " merger as a whole. The run is finished after 60 steps."
    )


def test_frozen_weights_in_few_bits_are_said(tmp_path: Path) -> None:
    made = run(tmp_path)
    manifest = json.loads(json.dumps(MANIFEST))
    manifest["tune"]["nf4"] = ["vision", "language"]
    made.write("manifest.json", json.dumps(manifest))
    assert facts.trained_parts(record(made)).endswith(
        "merger as a whole; frozen weights of vision and language in NF4"
    )
    manifest["tune"] |= {"nf4": None, "fp8": ["language"]}
    made.write("manifest.json", json.dumps(manifest))
    assert facts.trained_parts(record(made)).endswith(
        "merger as a whole; frozen weights of language multiplied in FP8"
    )


def test_an_old_run_is_counted_by_its_epochs(old: Record) -> None:
    assert facts.training_samples(old) == 480
    assert "not finished: 60 steps so far" in facts.what_was_done(old)
    assert dict(facts.versions(old))["device"] == "not recorded"
    assert dict(facts.versions(old))["torch"] == "2.13.0"
    assert dict(facts.checksums(old))["training data"] == "not recorded"
    assert dict(facts.cost(old))["starts"] == "not recorded"


def test_an_interrupted_run_says_how_far_it_came(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.lines("metrics.jsonl", [START, measured_line(0, 0.1), *map(step_line, range(1, 21))])
    found = record(made)
    assert facts.state(found) == "not finished: 20 of 60 steps so far"
    commands = dict(facts.commands(found, "What?"))
    assert commands["Go on"] == f"finesight train {made.folder}/recipe.yaml --resume"
    assert "Ask it" not in commands


def test_a_run_before_its_first_step(tmp_path: Path) -> None:
    found = record(run(tmp_path))
    assert "not finished: 0 steps so far" in facts.what_was_done(found)
    assert facts.cost(found) == [("training steps", "none yet")]
    assert facts.phases(found) == []
    assert ("trained weights", "not written yet") in facts.checksums(found)


def test_patience_and_the_best_weights_are_said(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.trained()
    made.finished(stopped_early=True, weights_of=40)
    text = facts.state(record(made))
    assert text == (
        "finished after 60 steps, early, for want of a better score;"
        " the weights are those of step 40, the best"
    )


def test_time_goes_to_phases(whole: Record) -> None:
    phases = facts.phases(whole)
    assert [(one.name, one.seconds) for one in phases] == [
        ("preparing", 12.5),
        ("training steps", 30.0),
        ("measuring", 8.0),
    ]
    assert sum(one.share for one in phases) == pytest.approx(1.0)
    assert phases[1].text == "30.0 s"


def test_speed_and_memory_are_of_all_steps(whole: Record) -> None:
    cost = dict(facts.cost(whole))
    assert cost["samples a second"] == "32"
    assert cost["tokens a second"] == "2,000"
    assert cost["of the device's peak"] == "40 %"
    assert cost["peak memory"] == "11.5 GB"
    assert cost["median step"] == "500 ms"
    assert cost["samples seen"] == "960"


def test_waiting_for_data_is_told_with_what_helps(tmp_path: Path) -> None:
    made = run(tmp_path)
    start = START | {"workers": 4}
    made.lines("metrics.jsonl", [start, *(step_line(n, waited_s=0.01) for n in range(1, 21))])
    calm = record(made)
    assert dict(facts.cost(calm))["waiting for data"] == "2 %"
    assert facts.remarks(calm) == []
    made.lines("metrics.jsonl", [start, *(step_line(n, waited_s=0.125) for n in range(1, 21))])
    starved = record(made)
    assert dict(facts.cost(starved))["waiting for data"] == "25 %"
    (remark,) = facts.remarks(starved)
    assert remark.startswith("In 25 % of the steps' time the device waited for data. More reading")
    assert "(train.workers, 4 now)" in remark


def test_full_memory_is_told_with_the_steps_that_it_came_in(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.write("recipe.yaml", "train: {pack_tokens: 4096, recompute: false}\n")
    budgets = [(4096, False), (4096, False), (2048, False), (1024, False), (1024, True)]
    lines = [
        step_line(n, pack_tokens=tokens, recompute=twice)
        for n, (tokens, twice) in enumerate(budgets, 1)
    ]
    made.lines("metrics.jsonl", [START, *lines])
    assert facts.remarks(record(made)) == [
        "The GPU's memory was full, and the run went on with less: packs of at most 2,048 tokens"
        " from step 3 on, packs of at most 1,024 tokens from step 4 on and activations computed"
        " twice from step 5 on."
    ]
    made.lines("metrics.jsonl", [START, *lines[:2]])
    assert facts.remarks(record(made)) == []


def test_runs_of_versions_that_noted_neither(whole: Record) -> None:
    assert dict(facts.cost(whole))["waiting for data"] == "not recorded"
    assert facts.remarks(whole) == []


def test_looking_at_pictures_before_the_steps_takes_time(tmp_path: Path) -> None:
    looked = {"step": 0, "seen_s": 10.0, "pictures": 950}
    made = run(tmp_path)
    made.lines("metrics.jsonl", [START, looked, *map(step_line, range(1, 21))])
    found = record(made)
    assert [(one.name, one.seconds) for one in facts.phases(found)] == [
        ("preparing", 12.5),
        ("looking at pictures", 10.0),
        ("training steps", 10.0),
    ]
    cost = dict(facts.cost(found))
    assert (cost["samples a second"], cost["tokens a second"]) == ("16", "1,000")
    assert cost["median step"] == "500 ms"


def test_dropped_samples_are_grouped_by_reason(tmp_path: Path) -> None:
    made = run(tmp_path)
    cut = "cut off: the file ends before its picture does"
    reasons = [f"over {8192} tokens"] * 7 + [f"images/{i}.png: {cut}" for i in range(2)]
    made.lines("dropped.jsonl", [{"id": f"s{i}", "reason": r} for i, r in enumerate(reasons)])
    made.lines("metrics.jsonl", [step_line(1, dropped=["late"])])
    found = facts.left_out(record(made))
    assert [(one.reason, one.count) for one in found] == [
        ("over 8192 tokens", 7),
        (cut, 2),
        ("pictures that could not be decoded, found on the way", 1),
    ]
    assert found[0].ids == "s0, s1, s2, s3, s4, …"
    assert found[1].ids == "s7, s8"


def test_checksums_of_what_went_in_and_came_out(whole: Record) -> None:
    sums = dict(facts.checksums(whole))
    assert sums["base model"] == "ba5e" * 16
    assert sums["training data"] == "7ra1" * 16
    assert sums["held-out data"] == "e7a1" * 16
    assert len(sums["adapter/adapter_model.safetensors"]) == 64


def test_commands_survive_a_shell(tmp_path: Path) -> None:
    made = MadeRun(tmp_path / "a run; rm -rf x")
    made.finished()
    prompt = 'What\'s "this" $(x)?\n`y`'
    for name, command in facts.commands(record(made), prompt):
        words = shlex.split(command)
        assert words[0] == "finesight", name
        assert any(str(made.folder) in word for word in words), command
    assert shlex.split(facts.commands(record(made), prompt)[0][1])[-1] == prompt


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250 ms"), (12.34, "12.3 s"), (100, "1 min 40 s"), (3599.6, "1 h 00 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert facts.duration(seconds) == text
