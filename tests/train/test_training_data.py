"""Partial scans of large datasets."""

from __future__ import annotations

import json

import pytest
from tiny_task import TinyTask, read_final_files, read_losses

from finesight.errors import UserError
from finesight.train.dataset_stats import draw_subset

SAMPLES = 11


@pytest.fixture(autouse=True)
def large_dataset(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat eleven samples as a large dataset, of which three are scanned."""
    monkeypatch.setattr("finesight.train.dataset_stats.MAX_FULL_SCAN_SAMPLES", SAMPLES - 1)
    monkeypatch.setattr("finesight.train.dataset_stats.PARTIAL_SCAN_SAMPLES", 3)


def others() -> list[int]:
    return [index for index in range(SAMPLES) if index not in draw_subset(SAMPLES)]


def corrupt_samples(task: TinyTask) -> dict[str, str]:
    """Corrupt four samples that are not scanned; return a part of each error."""
    path = task.folder / "train.jsonl"
    lines = path.read_text().splitlines()
    broken, turned, long, damaged = others()[:4]
    rows = {index: json.loads(lines[index]) for index in (turned, long)}
    rows[turned]["messages"].reverse()
    rows[long]["messages"][1]["content"] = "red " * 200
    for index, row in rows.items():
        lines[index] = json.dumps(row)
    lines[broken] = lines[broken][:-5]
    path.write_text("\n".join(lines) + "\n")
    (task.folder / f"train{damaged}.png").write_bytes(b"none")
    return {
        f"{path}:{broken + 1}": "broken JSON",
        f"{path}:{turned + 1}": "roles are assistant, user",
        f"train{long}": "tokens",
        f"train{damaged}": "not an image",
    }


def test_statistics_of_large_dataset_are_estimates(task: TinyTask) -> None:
    task.run(tune={"language": "lora"})
    seen = len(draw_subset(SAMPLES))
    assert (
        f"too many for a full scan; {seen} samples scanned, 0 of them invalid"
        in task.console_output
    )
    assert "data.eval: 3 samples, " in task.console_output
    assert "the dataset is too large for a full scan" in task.console_output
    steps = [line for line in task.read_metrics() if "loss" in line]
    assert sum(line["num_samples"] for line in steps) == 2 * SAMPLES
    estimate = task.read_metrics()[0]["data"]["train"]["num_tokens"]
    assert estimate == pytest.approx(sum(line["num_tokens"] for line in steps) / 2, rel=0.2)


def test_invalid_samples_are_found_while_reading(task: TinyTask) -> None:
    reasons = corrupt_samples(task)
    task.run("data.max_length=100", "train.epochs=1")
    steps = [line for line in task.read_metrics() if "loss" in line]
    dropped = [name for line in steps for name in line["skipped_samples"]]
    assert sorted(dropped) == sorted(reasons)
    assert sum(line["num_samples"] for line in steps) == SAMPLES - len(reasons)
    for name, reason in reasons.items():
        (result,) = (
            line for line in task.console_output.splitlines() if f"skipped {name}: " in line
        )
        assert reason in result


def test_fail_mode_raises(task: TinyTask) -> None:
    corrupt_samples(task)
    with pytest.raises(UserError, match=r"broken JSON|roles are|tokens|not an image"):
        task.run("data.max_length=100", "data.on_invalid_sample=fail")


def test_invalid_inspected_sample_raises_before_first_step(task: TinyTask) -> None:
    path = task.folder / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[draw_subset(SAMPLES)[0]] = "{"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match="broken JSON"):
        task.run()
    assert not (task.folder / "run").exists()


def test_resumed_run_equals_uninterrupted_run(task: TinyTask) -> None:
    corrupt_samples(task)
    task.recipe["data"]["max_length"] = 100
    task.run(name="whole")
    task.rewind_to_checkpoint()
    task.run(resume=True)
    assert read_losses(task.folder / "run") == read_losses(task.folder / "whole")
    assert read_final_files(task.folder / "run") == read_final_files(task.folder / "whole")


def test_full_inspection_changes_the_run_identity(
    task: TinyTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    task.rewind_to_checkpoint()
    monkeypatch.setattr("finesight.train.dataset_stats.MAX_FULL_SCAN_SAMPLES", SAMPLES)
    with pytest.raises(UserError, match=r"samples of data\.train"):
        task.run(resume=True)
