"""Tests of the run summary."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from run_dir_fixtures import (
    MANIFEST,
    START_RECORD,
    FakeRunDir,
    make_evaluation_line,
    make_step_line,
)

from finesight.report import summary
from finesight.report.run_reader import RunRecord, read_run


def run(folder: Path) -> FakeRunDir:
    return FakeRunDir(folder / "run")


def record(made: FakeRunDir) -> RunRecord:
    return read_run(made.folder)


@pytest.fixture
def finished_record(tmp_path: Path) -> RunRecord:
    made = run(tmp_path)
    made.write_metrics()
    made.write_finished()
    return record(made)


@pytest.fixture
def damaged_record(tmp_path: Path) -> RunRecord:
    """Run without a start event."""
    made = run(tmp_path)
    made.write_metrics(start=None)
    return record(made)


def test_run_summary_text(finished_record: RunRecord) -> None:
    assert summary.summarize_run(finished_record) == (
        "Qwen/Qwen2-VL-2B-Instruct fine-tuned on 950 samples, 2 epochs: language with LoRA of"
        " rank 4; merger with full fine-tuning. The run is finished after 60 steps."
    )


def test_quantized_frozen_weights_are_reported(tmp_path: Path) -> None:
    made = run(tmp_path)
    manifest = json.loads(json.dumps(MANIFEST))
    manifest["tune"]["quantize"] = {"nf4": ["vision", "language"]}
    made.write("manifest.json", json.dumps(manifest))
    assert summary.describe_trained_parts(record(made)).endswith(
        "merger with full fine-tuning; frozen weights of vision and language in NF4"
    )
    manifest["tune"]["quantize"] = {"nf4": None, "fp8": ["language"]}
    made.write("manifest.json", json.dumps(manifest))
    assert summary.describe_trained_parts(record(made)).endswith(
        "merger with full fine-tuning; frozen weights of language in FP8"
    )


def test_missing_start_event_is_reported(damaged_record: RunRecord) -> None:
    assert summary.count_training_samples(damaged_record) is None
    assert "not finished: 60 steps so far" in summary.summarize_run(damaged_record)
    assert dict(summary.list_versions(damaged_record))["device"] == "not recorded"
    assert dict(summary.list_versions(damaged_record))["torch"] == "2.13.0"
    assert dict(summary.list_checksums(damaged_record))["training data"] == "not recorded"
    assert dict(summary.summarize_cost(damaged_record))["starts"] == "not recorded"


def test_interrupted_run_reports_progress_and_resume_command(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.write_lines(
        "metrics.jsonl",
        [START_RECORD, make_evaluation_line(0, 0.1), *map(make_step_line, range(1, 21))],
    )
    found = record(made)
    assert summary.describe_progress(found) == "not finished: 20 of 60 steps so far"
    commands = dict(summary.list_commands(found, "What?"))
    assert commands["Resume"] == f"finesight train {made.folder}/recipe.yaml --resume"
    assert "Predict" not in commands


def test_run_before_first_step(tmp_path: Path) -> None:
    found = record(run(tmp_path))
    assert "not finished: 0 steps so far" in summary.summarize_run(found)
    assert summary.summarize_cost(found) == [("training steps", "none yet")]
    assert summary.compute_phases(found) == []
    assert ("trained weights", "not written yet") in summary.list_checksums(found)


def test_early_stopping_and_best_weights_are_reported(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.write_metrics()
    made.write_finished(stopped_early=True, weights_step=40)
    text = summary.describe_progress(record(made))
    assert text == (
        "finished after 60 steps, stopped early because the score did not improve;"
        " the saved weights are from step 40, the best"
    )


def test_time_is_split_into_phases(finished_record: RunRecord) -> None:
    phases = summary.compute_phases(finished_record)
    assert [(one.name, one.seconds) for one in phases] == [
        ("setup", 12.5),
        ("training steps", 30.0),
        ("evaluation", 8.0),
    ]
    assert sum(one.fraction for one in phases) == pytest.approx(1.0)
    assert phases[1].duration_text == "30.0 s"


def test_mfu_above_the_measured_peak_is_omitted(tmp_path: Path) -> None:
    run = FakeRunDir(tmp_path / "run")
    lines = [make_step_line(n + 1, mfu=mfu) for n, mfu in enumerate((4.73, 0.2, 0.4))]
    run.write_lines("metrics.jsonl", lines)
    record = read_run(run.folder)
    assert [line["mfu"] for line in record.steps] == [None, None, None]
    assert dict(summary.summarize_cost(record))["MFU"] == "not recorded"
    # A rank without packs in a step has no MFU.
    lines = [make_step_line(1, mfu=None, num_packs=0), make_step_line(2, mfu=0.4)]
    run.write_lines("metrics.jsonl", lines)
    assert dict(summary.summarize_cost(read_run(run.folder)))["MFU"] == "20 %"


def test_throughput_and_memory_cover_all_steps(finished_record: RunRecord) -> None:
    cost = dict(summary.summarize_cost(finished_record))
    assert cost["samples/s"] == "32"
    assert cost["tokens/s"] == "2,000"
    assert cost["MFU"] == "40 %"
    assert cost["peak memory"] == "11.5 GB"
    assert cost["median step"] == "500 ms"
    assert cost["processed samples"] == "960"


@pytest.mark.parametrize(
    ("losses", "scores", "train_losses", "words"),
    [
        ((3, 2, 2.1, 2.5), (0, 3, 2, 3), (3, 2, 1), "from 2 after step 20 to 2.5 after step 60"),
        ((3, 2, 2.1, 2.5), (0, 3, 4, 1), (3, 2, 1), "from 2 after step 20 to 2.5 after step 60"),
        ((3, 2, 2.1, 2.5), (0, 1, 2, 3), (3, 2, 1), None),
        ((3, 2, 2.1, 2.5), (0, 1, 2, 3), (1, 2, 3), None),
        ((3, 2, 1.9, 2.5), (0, 1, 2, 3), (3, 2, 1), None),
        ((3, 2, 2.001, 2.002), (0, 1, 2, 3), (3, 2, 1), None),
        ((3, 2, 1.9, 1.8), (1, 8, 5, 3), (3, 2, 1), "exact fell, from 0.8 after step 20 to 0.3"),
        ((3, 2, 1.9, 1.8), (1, 8, 7.9, 7.8), (3, 2, 1), None),
        ((3, 2, 2.5), (0, 1, 2), (3, 2), None),
    ],
    ids=[
        "rising",
        "score-improves-and-falls",
        "score-improves",
        "diverging",
        "recovering",
        "flat",
        "score-falls",
        "noise",
        "mixed-samples",
    ],
)
def test_overfitting_is_reported_with_best_checkpoint(
    tmp_path: Path,
    losses: tuple[float, ...],
    scores: tuple[float, ...],
    train_losses: tuple[float, ...],
    words: str | None,
) -> None:
    steps = [
        {"step": n, "loss": train_losses[(n - 1) // 20]} for n in range(1, 20 * len(losses) - 19)
    ]
    evaluations = [
        {
            "step": 20 * i,
            "validation_loss": loss,
            "scores": {"exact": score / 10},
            "primary_metric": "exact",
            "intervals": {"exact": [score / 10 - 0.1, score / 10 + 0.1]},
            "num_samples": 64,
            "num_loss_samples": 64 if i or len(losses) > 3 else 200,
        }
        for i, (loss, score) in enumerate(zip(losses, scores, strict=True))
    ]
    made = run(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-20").mkdir(parents=True)
    text = summary.describe_overfitting(tmp_path / "run", [*steps, *evaluations])
    assert (text is not None) == (words is not None)
    if text is not None and words is not None:
        assert words in text
        criterion = "exact" if words.startswith("exact") else "validation loss"
        assert f"The best {criterion} is that after step 20 (checkpoint {tmp_path}/run/" in text
        assert "checkpoints/step-20). Train fewer steps (train.steps=20)" in text
        lines = [make_step_line(line["step"]) | line for line in steps]
        made.write_lines("metrics.jsonl", [START_RECORD, *lines, *evaluations])
        assert text in summary.list_remarks(record(made))


@pytest.mark.parametrize(
    ("losses", "scores", "sign"),
    [
        ((0.5, 0.6, 0.7, 0.8), (9, 8, 7, 6), "falling loss"),
        ((0.5, 0.6, 0.7), (9, 8, 7), "falling loss"),
        ((0.8, 0.7, 0.6), (9, 8, 7), "exact"),
    ],
)
def test_model_before_training_may_be_the_best(
    tmp_path: Path, losses: tuple[float, ...], scores: tuple[float, ...], sign: str
) -> None:
    lines: list[dict[str, object]] = [{"step": n, "loss": 1 / n} for n in range(1, 31)]
    lines += [
        {
            "step": 10 * i,
            "validation_loss": loss,
            "scores": {"exact": score / 10},
            "primary_metric": "exact",
            "intervals": {"exact": [score / 10 - 0.1, score / 10 + 0.1]},
            "num_samples": 64,
        }
        for i, (loss, score) in enumerate(zip(losses, scores, strict=True))
    ]
    text = summary.describe_overfitting(tmp_path, lines)
    assert text is not None
    best = "exact" if sign == "exact" else "validation loss"
    assert f"The model before training has the best {best}. Lower train.learning_rate" in text


def test_data_wait_is_reported_with_advice(tmp_path: Path) -> None:
    made = run(tmp_path)
    start = START_RECORD | {"num_workers": 4}
    made.write_lines(
        "metrics.jsonl", [start, *(make_step_line(n, data_wait_s=0.01) for n in range(1, 21))]
    )
    calm = record(made)
    assert dict(summary.summarize_cost(calm))["data wait"] == "2 %"
    assert summary.list_remarks(calm) == []
    made.write_lines(
        "metrics.jsonl", [start, *(make_step_line(n, data_wait_s=0.125) for n in range(1, 21))]
    )
    starved = record(made)
    assert dict(summary.summarize_cost(starved))["data wait"] == "25 %"
    (remark,) = summary.list_remarks(starved)
    assert remark.startswith("Data wait is 25 % of the step time. To reduce it, increase")
    assert "train.num_workers (now 4)" in remark


def test_out_of_memory_recovery_is_reported(tmp_path: Path) -> None:
    made = run(tmp_path)
    made.write("recipe.yaml", "train: {pack_tokens: 4096, activation_checkpointing: false}\n")
    budgets = [(4096, False), (4096, False), (2048, False), (1024, False), (1024, True)]
    lines = [
        make_step_line(n, pack_tokens=tokens, activation_checkpointing=is_checkpointing)
        for n, (tokens, is_checkpointing) in enumerate(budgets, 1)
    ]
    made.write_lines("metrics.jsonl", [START_RECORD, *lines])
    assert summary.list_remarks(record(made)) == [
        "The run ran out of GPU memory and continued with less: packs of at most 2,048 tokens"
        " from step 3, packs of at most 1,024 tokens from step 4 and activation checkpointing from"
        " step 5."
    ]
    made.write_lines("metrics.jsonl", [START_RECORD, *lines[:2]])
    assert summary.list_remarks(record(made)) == []


def test_missing_values_are_not_recorded(finished_record: RunRecord) -> None:
    assert dict(summary.summarize_cost(finished_record))["data wait"] == "not recorded"
    assert summary.list_remarks(finished_record) == []


def test_vision_cache_time_is_a_phase(tmp_path: Path) -> None:
    outcome = {"step": 0, "vision_cache_s": 10.0, "images": 950}
    made = run(tmp_path)
    made.write_lines("metrics.jsonl", [START_RECORD, outcome, *map(make_step_line, range(1, 21))])
    found = record(made)
    assert [(one.name, one.seconds) for one in summary.compute_phases(found)] == [
        ("setup", 12.5),
        ("vision cache", 10.0),
        ("training steps", 10.0),
    ]
    cost = dict(summary.summarize_cost(found))
    assert (cost["samples/s"], cost["tokens/s"]) == ("16", "1,000")
    assert cost["median step"] == "500 ms"


def test_skipped_samples_are_grouped_by_reason(tmp_path: Path) -> None:
    made = run(tmp_path)
    cut = "cut off: the file ends before its image does"
    reasons = [f"over {8192} tokens"] * 7 + [f"images/{i}.png: {cut}" for i in range(2)]
    made.write_lines(
        "skipped_samples.jsonl", [{"id": f"s{i}", "reason": r} for i, r in enumerate(reasons)]
    )
    made.write_lines("metrics.jsonl", [make_step_line(1, skipped_samples=["late"])])
    found = summary.list_skipped_samples(record(made))
    assert [(one.reason, one.count) for one in found] == [
        ("over 8192 tokens", 7),
        (cut, 2),
        ("images that could not be decoded during training", 1),
    ]
    assert found[0].ids == "s0, s1, s2, s3, s4, …"
    assert found[1].ids == "s7, s8"


def test_checksums_of_inputs_and_outputs(finished_record: RunRecord) -> None:
    sums = dict(summary.list_checksums(finished_record))
    assert sums["base model"] == "ba5e" * 16
    assert sums["training data"] == "7ra1" * 16
    assert sums["validation data"] == "e7a1" * 16
    assert len(sums["adapter/adapter_model.safetensors"]) == 64


def test_commands_are_shell_quoted(tmp_path: Path) -> None:
    made = FakeRunDir(tmp_path / "a run; rm -rf x")
    made.write_finished()
    prompt = 'What\'s "this" $(x)?\n`y`'
    for name, command in summary.list_commands(record(made), prompt):
        words = shlex.split(command)
        assert words[0] == "finesight", name
        assert any(str(made.folder) in word for word in words), command
    assert shlex.split(summary.list_commands(record(made), prompt)[0][1])[-1] == prompt


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250 ms"), (12.34, "12.3 s"), (100, "1 min 40 s"), (3599.6, "1 h 00 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert summary.format_duration(seconds) == text
