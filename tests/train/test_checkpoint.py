"""Checkpoints: retention, verification and errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finesight import storage
from finesight.errors import UserError
from finesight.train.checkpoint import (
    OPTIMIZER_FILE,
    STATE_FILE,
    WEIGHTS_FILE,
    BestEval,
    CheckpointManager,
    CheckpointState,
    check_resume_config,
)
from finesight.train.oom import MemoryBudget


def state(step: int, best: BestEval | None = None) -> CheckpointState:
    return CheckpointState(
        step=step,
        consumed_samples=4 * step,
        last_eval_step=0,
        best=best,
        loss_scale={"scale": 1.0},
        budget=MemoryBudget(pack_tokens=100, activation_checkpointing=0.0),
        resume_config={"train.batch_size": 4, "train.betas": [0.9, 0.999]},
    )


def tensors(step: int) -> dict[str, torch.Tensor]:
    flat_E = torch.arange(256.0) + step
    return {"a": flat_E[:100].view(10, 10), "b": flat_E[128:200]}


def save(checkpoints: CheckpointManager, step: int, best: BestEval | None = None) -> None:
    checkpoints.save(state(step, best), tensors(step), {"num_steps": torch.tensor(float(step))})


def test_checkpoint_roundtrip(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path / "checkpoints", max_to_keep=2)
    assert checkpoints.load_latest(print) is None
    save(checkpoints, 7)
    found = checkpoints.load_latest(print)
    assert found[0] == state(7)
    assert {name: value.tolist() for name, value in found[1].items()} == {
        name: value.tolist() for name, value in tensors(7).items()
    }
    assert found[2]["num_steps"] == 7


def test_last_and_best_checkpoints_are_retained(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, max_to_keep=2)
    for step in (2, 4, 10, 100):
        save(checkpoints, step, BestEval(step=4, validation_loss=0.5) if step >= 4 else None)
    assert checkpoints.steps() == [4, 10, 100]
    save(checkpoints, 101, BestEval(step=100, validation_loss=0.4))
    assert checkpoints.steps() == [100, 101]


def test_existing_checkpoint_is_unchanged(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, max_to_keep=2)
    save(checkpoints, 3)
    before = (tmp_path / "step-3" / STATE_FILE).stat().st_mtime_ns
    save(checkpoints, 3)
    assert (tmp_path / "step-3" / STATE_FILE).stat().st_mtime_ns == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [WEIGHTS_FILE, OPTIMIZER_FILE, STATE_FILE, storage.DIGESTS_FILE])
@pytest.mark.parametrize(("spoil", "words"), [(flip, ""), (Path.unlink, "missing")])
def test_damaged_checkpoint_falls_back_to_previous(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], words: str
) -> None:
    checkpoints = CheckpointManager(tmp_path, max_to_keep=2)
    save(checkpoints, 5)
    save(checkpoints, 9)
    spoil(tmp_path / "step-9" / name)
    output: list[str] = []
    found = checkpoints.load_latest(output.append)
    assert found[0].step == 5
    message, outcome = output
    assert str(tmp_path / "step-9") in message
    assert words in message
    assert "resuming from step 5" in outcome
    if spoil is flip and name != storage.DIGESTS_FILE:
        assert name in message
        assert storage.sha256_file(tmp_path / "step-9" / name) in message
    checkpoints.quarantine_after(5)
    assert checkpoints.steps() == [5]
    assert (tmp_path / "corrupt-step-9").is_dir()


def test_single_damaged_checkpoint_raises(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, max_to_keep=2)
    save(checkpoints, 5)
    flip(tmp_path / "step-5" / WEIGHTS_FILE)
    with pytest.raises(UserError, match="to restart the run from step 0"):
        checkpoints.load_latest(print)


def test_leftover_files_of_a_crash_are_removed(tmp_path: Path) -> None:
    checkpoints = CheckpointManager(tmp_path, max_to_keep=2)
    save(checkpoints, 5)
    (tmp_path / ".step-9.partial").mkdir()
    (tmp_path / ".step-9.partial" / WEIGHTS_FILE).write_bytes(b"half")
    found = checkpoints.load_latest(print)
    assert found[0].step == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def rewrite(folder: Path, change: dict[str, Any]) -> None:
    """Change the state of a valid checkpoint."""
    content = json.loads((folder / STATE_FILE).read_text()) | change
    others = {name: (folder / name).read_bytes() for name in (WEIGHTS_FILE, OPTIMIZER_FILE)}
    storage.remove_folder(folder)
    with storage.write_folder(folder) as new:
        (new / STATE_FILE).write_text(json.dumps(content))
        for name, data in others.items():
            (new / name).write_bytes(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"format_version": 1}, "has format 1"), ({"extra": 1}, "extra"), ({"step": "x"}, "step")],
)
def test_state_of_other_version_is_rejected(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    checkpoints = CheckpointManager(tmp_path, max_to_keep=2)
    save(checkpoints, 5)
    rewrite(tmp_path / "step-5", change)
    with pytest.raises(UserError, match=words) as caught:
        checkpoints.load_latest(print)
    assert str(tmp_path / "step-5" / STATE_FILE) in str(caught.value)


def test_changed_settings_are_listed() -> None:
    stored = state(1).resume_config
    check_resume_config(stored, {"train.batch_size": 4, "train.betas": (0.9, 0.999)}, Path("x"))
    with pytest.raises(UserError) as caught:
        check_resume_config(stored, {"train.batch_size": 8, "train.betas": (0.9, 0.99)}, Path("x"))
    assert caught.value.what == "train.batch_size is 8 now; train.betas is [0.9, 0.99] now"
    assert caught.value.expected == "train.batch_size=4; train.betas=[0.9, 0.999]"


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        (BestEval(step=2, validation_loss=1.0), None, True),
        (BestEval(step=2, validation_loss=1.0), BestEval(step=1, validation_loss=2.0), True),
        (BestEval(step=2, validation_loss=2.0), BestEval(step=1, validation_loss=2.0), False),
        (
            BestEval(step=2, validation_loss=9, primary_metric="f1", primary_score=0.6),
            BestEval(step=1, validation_loss=1, primary_metric="f1", primary_score=0.5),
            True,
        ),
        (
            BestEval(step=2, validation_loss=1, primary_metric="f1", primary_score=0.4),
            BestEval(step=1, validation_loss=9, primary_metric="f1", primary_score=0.5),
            False,
        ),
        (
            BestEval(step=2, validation_loss=1, primary_metric="f1", primary_score=0.5),
            BestEval(step=1, validation_loss=9, primary_metric="f1", primary_score=0.5),
            True,
        ),
        (
            BestEval(step=2, validation_loss=9, primary_metric="f1", primary_score=0.0),
            BestEval(step=1, validation_loss=1),
            True,
        ),
    ],
)
def test_primary_score_then_loss_decides_best(
    now: BestEval, before: BestEval | None, expected: bool
) -> None:
    assert now.is_better_than(before) is expected
