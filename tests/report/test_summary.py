"""Tests of the run summary."""

import fcntl
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from browser import Browser
from case_files import load_cases
from run_dir_fixtures import (
    START_RECORD,
    FakeRunDir,
    JsonLine,
    make_evaluation_line,
    make_step_line,
)

from finesight.report import summary
from finesight.report.i18n import use_language
from finesight.report.run_page import LiveReportState, render_run_page, write_report
from finesight.report.run_reader import read_run
from finesight.report.summary import get_run_status

CASES = load_cases("summary")


@pytest.fixture
def run(tmp_path: Path) -> FakeRunDir:
    return FakeRunDir(tmp_path / "run")


def read_cost(run: FakeRunDir) -> dict[str, str]:
    return dict(summary.summarize_cost(read_run(run.folder)))


def list_phases(run: FakeRunDir) -> list[tuple[str, float]]:
    return summary.compute_phases(read_run(run.folder))


def test_finished_run(run: FakeRunDir) -> None:
    run.write_metrics()
    run.write_finished()
    record = read_run(run.folder)
    assert summary.summarize_run(record) == (
        "Qwen/Qwen2-VL-2B-Instruct fine-tuned on 950 samples, 2 epochs: language with LoRA of"
        " rank 4; merger with full fine-tuning. The run is finished after 60 steps."
    )
    assert list_phases(run) == [("setup", 12.5), ("training steps", 30.0), ("evaluation", 8.0)]
    sums = dict(summary.list_checksums(record))
    assert sums["base model"] == "ba5e" * 16
    assert sums["training data"] == "7ra1" * 16
    assert sums["validation data"] == "e7a1" * 16
    assert len(sums["adapter/adapter_model.safetensors"]) == 64
    expected = {"samples/s": "32", "tokens/s": "2,000", "MFU": "40 %", "peak memory": "11.5 GB"}
    more = {"median step": "500 ms", "processed samples": "960", "data wait": "not recorded"}
    assert (expected | more).items() <= read_cost(run).items()
    assert summary.list_remarks(record) == []
    run.write_finished(stopped_early=True, weights_step=40)
    assert summary.describe_progress(read_run(run.folder)) == (
        "finished after 60 steps, stopped early because the score did not improve;"
        " the saved weights are from step 40, the best"
    )


def test_unfinished_run_reports_progress_and_resume_command(run: FakeRunDir) -> None:
    record = read_run(run.folder)
    assert "not finished: 0 steps so far" in summary.summarize_run(record)
    assert summary.summarize_cost(record) == [("training steps", "none yet")]
    assert list_phases(run) == []
    assert ("trained weights", "not written yet") in summary.list_checksums(record)
    steps = map(make_step_line, range(1, 21))
    run.write_lines("metrics.jsonl", [START_RECORD, make_evaluation_line(0, 0.1), *steps])
    record = read_run(run.folder)
    assert summary.describe_progress(record) == "not finished: 20 of 60 steps so far"
    commands = dict(summary.list_commands(record))
    assert commands["Resume"] == f"finesight train {run.folder}/recipe.yaml --resume"
    assert "Predict" not in commands


def test_mfu_above_the_measured_peak_is_omitted(run: FakeRunDir) -> None:
    lines = [make_step_line(n + 1, mfu=mfu) for n, mfu in enumerate((4.73, 0.2, 0.4))]
    run.write_lines("metrics.jsonl", lines)
    assert [line["mfu"] for line in read_run(run.folder).steps] == [None, None, None]
    assert read_cost(run)["MFU"] == "not recorded"
    # A rank without packs in a step has no MFU.
    lines = [make_step_line(1, mfu=None, num_packs=0), make_step_line(2, mfu=0.4)]
    run.write_lines("metrics.jsonl", lines)
    assert read_cost(run)["MFU"] == "20 %"


def make_evaluations(losses: tuple[float, ...], scores: tuple[float, ...]) -> list[JsonLine]:
    """Make evaluations every 20 steps; of three, the first has other samples."""
    return [
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


@pytest.mark.parametrize(
    ("losses", "scores", "train_losses", "words"),
    CASES["test_overfitting_is_reported_with_best_checkpoint"],
)
def test_overfitting_is_reported_with_best_checkpoint(
    tmp_path, losses, scores, train_losses, words
):
    run = FakeRunDir(tmp_path / "run")
    (run.folder / "checkpoints" / "step-20").mkdir(parents=True)
    num_steps = 20 * (len(losses) - 1)
    steps = [make_step_line(n, loss=train_losses[(n - 1) // 20]) for n in range(1, num_steps + 1)]
    lines = [*steps, *make_evaluations(losses, scores)]
    text = summary.describe_overfitting(run.folder, lines)
    assert (text is not None) == (words is not None)
    if text is not None and words is not None:
        assert words in text
        criterion = "exact" if words.startswith("exact") else "validation loss"
        assert f"The best {criterion} is that after step 20 (checkpoint {run.folder}/" in text
        assert "checkpoints/step-20). Train fewer steps (train.steps=20)" in text
        # The loss of a policy does not show overfitting.
        policy = [line | {"reward": 0.5} for line in lines]
        assert "validation loss rose" not in str(summary.describe_overfitting(run.folder, policy))
        run.write_lines("metrics.jsonl", [START_RECORD, *lines])
        assert text in summary.list_remarks(read_run(run.folder))
        # The weights of the best evaluation are saved.
        run.write_finished(stopped_early=True, weights_step=20)
        assert text not in summary.list_remarks(read_run(run.folder))


@pytest.mark.parametrize(
    ("losses", "scores", "best"),
    [
        ((0.5, 0.6, 0.7, 0.8), (9, 8, 7, 6), "validation loss"),
        ((0.9, 0.8, 0.7, 0.6), (10, 9, 8, 7), "exact"),
    ],
)
def test_model_before_training_may_be_the_best(tmp_path, losses, scores, best):
    steps = [{"step": n, "loss": 1 / n} for n in range(1, 61)]
    lines = [*steps, *make_evaluations(losses, scores)]
    text = summary.describe_overfitting(tmp_path, lines)
    assert text is not None
    assert f"The model before training has the best {best}. Lower train.learning_rate" in text


def test_data_wait_is_reported_with_advice(run: FakeRunDir) -> None:
    def write(data_wait_s: float) -> list[str]:
        lines = [make_step_line(n, data_wait_s=data_wait_s) for n in range(1, 21)]
        run.write_lines("metrics.jsonl", [START_RECORD | {"num_workers": 4}, *lines])
        return summary.list_remarks(read_run(run.folder))

    assert write(0.01) == []
    assert read_cost(run)["data wait"] == "2 %"
    assert "sampling" not in read_cost(run)
    (remark,) = write(0.125)
    assert read_cost(run)["data wait"] == "25 %"
    assert remark.startswith("Data wait is 25 % of the step time. To reduce it, increase")
    assert "train.num_workers (now 4)" in remark
    run.write_lines("metrics.jsonl", [make_step_line(1, rollout_s=0.25, reward_s=0.01)])
    assert read_cost(run)["sampling"] == "50 %"


def test_out_of_memory_recovery_is_reported(run: FakeRunDir) -> None:
    run.write("recipe.yaml", "train: {pack_tokens: 4096, activation_checkpointing: false}\n")
    budgets = [(4096, False), (4096, False), (2048, False), (1024, False), (1024, True)]
    lines = [
        make_step_line(n, pack_tokens=tokens, activation_checkpointing=is_checkpointing)
        for n, (tokens, is_checkpointing) in enumerate(budgets, 1)
    ]
    run.write_lines("metrics.jsonl", [START_RECORD, *lines])
    assert summary.list_remarks(read_run(run.folder)) == [
        "The run ran out of GPU memory and continued with less: packs of at most 2,048 tokens"
        " from step 3, packs of at most 1,024 tokens from step 4 and activation checkpointing from"
        " step 5."
    ]
    run.write_lines("metrics.jsonl", [START_RECORD, *lines[:2]])
    assert summary.list_remarks(read_run(run.folder)) == []


@pytest.mark.parametrize(("first", "last", "found"), CASES["test_signs_of_reward_hacking"])
def test_signs_of_reward_hacking(run, first, last, found):
    usual = {"completions/mean_length": 20.0, "rewards/exact/mean": 0.2, "rewards/exact/std": 0.4}
    usual |= {"rewards/format/mean": 0.2, "rewards/format/std": 0.4}
    run.write_rewards([usual | (first if step < 5 else last) for step in range(20)], [])
    signs = summary.list_reward_signs(read_run(run.folder), [])
    assert [name for name, is_found, _ in signs if is_found] == found


def test_interval_of_a_reward_depends_on_the_prompts(run: FakeRunDir) -> None:
    run.write_rewards([{"rewards/exact/mean": 0.5, "rewards/exact/std": 0.2}] * 2, [])
    record = read_run(run.folder)
    # The standard deviation of 0.2 of two steps with four prompts each.
    expected = 0.5, 1.96 * 0.2 / 8**0.5
    assert summary.estimate_reward(record, record.steps, "exact") == pytest.approx(expected)
    assert summary.list_reward_signs(record, []) == []
    text = summary.describe_rewards(record)
    assert text.startswith("Reward of the first and last 1 step: 0.50 → 0.50; exact match −0.28")
    run.write_rewards([{"rewards/exact/mean": 0.5, "rewards/exact/std": 0.2}], [])
    assert summary.describe_rewards(read_run(run.folder)) == ""


def test_reward_without_standard_deviation_has_no_gain(run: FakeRunDir) -> None:
    run.write_rewards([{"rewards/exact/mean": step / 20} for step in range(20)], [])
    _, gains = summary.compare_rewards(read_run(run.folder))
    assert gains == {}


def test_skipped_samples_are_grouped_by_reason(run: FakeRunDir) -> None:
    cut = "cut off: the file ends before its image does"
    reasons = [f"over {8192} tokens"] * 7 + [f"images/{i}.png: {cut}" for i in range(2)]
    lines = [{"id": f"s{i}", "reason": reason} for i, reason in enumerate(reasons)]
    run.write_lines("skipped_samples.jsonl", lines)
    found = summary.list_skipped_samples(read_run(run.folder))
    assert [one[:2] for one in found] == [("7", "over 8192 tokens"), ("2", cut)]
    assert [ids for _, _, ids in found] == ["s0, s1, s2, s3, s4, …", "s7, s8"]


def test_commands_are_shell_quoted(tmp_path: Path) -> None:
    run = FakeRunDir(tmp_path / "a run; rm -rf x")
    run.write_finished()
    prompt = 'What\'s "this" $(x)?\n`y`'
    prediction = {"image": "a.png", "question": f"<image>{prompt}"}
    run.write_lines("predictions/after.jsonl", [prediction])
    commands = summary.list_commands(read_run(run.folder))
    for name, command in commands:
        words = shlex.split(command)
        assert words[0] == "finesight", name
        assert any(str(run.folder) in word for word in words), command
    assert shlex.split(commands[0][1])[-1] == prompt


@pytest.fixture
def live_run(tmp_path: Path) -> FakeRunDir:
    """Run with 40 of 60 steps of half a second, evaluated at 0, 20 and 40."""
    made = FakeRunDir(tmp_path / "run")
    append_metrics(made)
    return made


def append_metrics(made: FakeRunDir, *more: JsonLine) -> None:
    early = [make_step_line(step) for step in range(1, 21)]
    late = [make_step_line(step) for step in range(21, 41)]
    measured = [make_evaluation_line(step, 0.5) for step in (0, 20, 40)]
    lines = [START_RECORD, measured[0], *early, measured[1], *late, measured[2], *more]
    made.write_lines("metrics.jsonl", lines)


@contextmanager
def lock_run(folder: Path) -> Iterator[None]:
    """Lock the run directory like a training process."""
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(handle)


def test_status_follows_the_lock_of_the_folder(live_run: FakeRunDir) -> None:
    with lock_run(live_run.folder):
        found = get_run_status(read_run(live_run.folder))
    # 20 steps of half a second, an evaluation of four seconds at the end, and one before.
    assert (found.kind, found.step, found.total_steps) == ("running", 40, 60)
    assert found.remaining_s == 18.0
    assert found.description == "The run is in progress: step 40 of 60, about 0 h 01 min remaining."
    found = get_run_status(read_run(live_run.folder))
    assert (found.kind, found.remaining_s) == ("killed", None)
    assert "was killed after step 40 of 60" in found.description
    live_run.write_finished()
    with lock_run(live_run.folder):
        assert get_run_status(read_run(live_run.folder)).kind == "finished"
        assert 'role="status"' not in render_run_page(live_run.folder)


@pytest.mark.parametrize("how", ["interrupted", "failed"])
def test_end_reason_is_shown_until_resumed(live_run: FakeRunDir, how: str) -> None:
    end = {"step": 40, "ended_at": "2026-01-02T04:00:00+00:00", "status": how, "reason": "<b>it"}
    append_metrics(live_run, end)
    with lock_run(live_run.folder):
        found = get_run_status(read_run(live_run.folder))
        assert (found.kind, found.reason) == (how, "<b>it")
        page = render_run_page(live_run.folder)
        assert f"The run {'was ' if how == 'interrupted' else ''}{how} after step 40 of 60" in page
        assert "&lt;b&gt;it" in page
        append_metrics(live_run, end, START_RECORD | {"step": 40})
        assert get_run_status(read_run(live_run.folder)).kind == "running"


def test_remaining_time(live_run: FakeRunDir) -> None:
    steps = [*map(make_step_line, range(1, 41))]
    live_run.write_lines("metrics.jsonl", [START_RECORD | {"total_steps": 7240}, *steps])
    found = get_run_status(read_run(live_run.folder), is_training=True)
    in_english = "The run is in progress: step 40 of 7,240, about 1 h 00 min remaining."
    assert found.description == in_english
    with use_language("zh"):
        in_chinese = "训练正在进行：第 40 步（共 7,240 步），大约还需 1 小时 00 分钟。"
        assert found.description == in_chinese
    # Step numbers below 1 occur only in a damaged file.
    live_run.write_lines("metrics.jsonl", [START_RECORD, make_step_line(0)])
    found = get_run_status(read_run(live_run.folder), is_training=True)
    assert (found.kind, found.remaining_s) == ("running", None)
    live_run.write_lines("metrics.jsonl", [])
    found = get_run_status(read_run(live_run.folder), is_training=True)
    assert found.description == "The run is in progress, before its first step."


def test_examples_are_rendered_again_only_for_new_answers(live_run: FakeRunDir) -> None:
    live, record = LiveReportState(interval_s=60.0), read_run(live_run.folder)
    live_run.write_predictions("before", [])
    first = live.get_examples(record, 9)
    assert live.get_examples(record, 9) is first
    live_run.write_predictions("step-20", [])
    assert live.get_examples(record, 9) is not first


def test_stale_page_shows_its_age(browser: Browser, live_run: FakeRunDir) -> None:
    with lock_run(live_run.folder):
        file = write_report(live_run.folder, language="en")
    shown = "return byId('stale').hidden ? '' : byId('stale').textContent;"
    browser.open(file)
    assert browser.run(shown) == ""
    browser.run("DATA.live.written_at -= 7200; showStaleNotice();")
    assert browser.run(shown) == "This page is 120 minutes old. The run may have ended."


@pytest.mark.parametrize(("num_rewards", "is_clear"), [(1, True), (4, False)])
def test_rewards_are_tested_together(num_rewards: int, is_clear: bool) -> None:
    """A gain with a p-value of 0.03 is clear alone, but not among four rewards."""
    gains = [0.22, 0.0, 0.0, 0.0][:num_rewards]
    steps = []
    for index in range(4):
        line: JsonLine = {"reward": 0.5}
        for number, gain in enumerate(gains):
            mean = 0.4 + gain * (index == 3)
            line |= {f"rewards/score_{number}/mean": mean, f"rewards/score_{number}/std": 0.1}
        steps.append(line)
    record = SimpleNamespace(steps=steps, recipe={"train": {"batch_size": 2}})
    _, found = summary.compare_rewards(record)  # type: ignore[arg-type]
    (low, high), verdict = found["score_0"]
    assert (low > 0) == (verdict == "better") == is_clear
    assert high > 0.4
    described = summary.describe_rewards(record)  # type: ignore[arg-type]
    assert ("better" in described) == is_clear
