"""Checkpoints: kept, verified, refused with what is wrong and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finesight import digests, storage
from finesight.errors import UserError
from finesight.train.checkpoint import (
    MOMENTS,
    STATE,
    VALUES,
    Best,
    Checkpoints,
    State,
    check_identity,
)


def state(step: int, best: Best | None = None) -> State:
    return State(
        step=step,
        samples=4 * step,
        measured=0,
        best=best,
        loss_scale={"value": 1.0},
        identity={"train.batch": 4, "train.betas": [0.9, 0.999]},
    )


def tensors(step: int) -> dict[str, torch.Tensor]:
    flat_E = torch.arange(256.0) + step
    return {"a": flat_E[:100].view(10, 10), "b": flat_E[128:200]}


def save(checkpoints: Checkpoints, step: int, best: Best | None = None) -> None:
    checkpoints.save(state(step, best), tensors(step), {"steps": torch.tensor(float(step))})


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.newest(print) is None
    save(checkpoints, 7)
    found = checkpoints.newest(print)
    assert found is not None
    assert found[0] == state(7)
    assert {name: value.tolist() for name, value in found[1].items()} == {
        name: value.tolist() for name, value in tensors(7).items()
    }
    assert found[2]["steps"] == 7


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (2, 4, 10, 100):
        save(checkpoints, step, Best(step=4, loss=0.5) if step >= 4 else None)
    assert checkpoints.steps() == [4, 10, 100]
    save(checkpoints, 101, Best(step=100, loss=0.4))
    assert checkpoints.steps() == [100, 101]


def test_one_that_is_there_stays_as_it_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 3)
    before = (tmp_path / "step-3" / STATE).stat().st_mtime_ns
    save(checkpoints, 3)
    assert (tmp_path / "step-3" / STATE).stat().st_mtime_ns == before


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [VALUES, MOMENTS, STATE, digests.DIGESTS])
@pytest.mark.parametrize(("spoil", "words"), [(flip, ""), (Path.unlink, "missing")])
def test_damage_is_named_and_the_last_whole_one_found(
    tmp_path: Path, name: str, spoil: Callable[[Path], None], words: str
) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    save(checkpoints, 9)
    spoil(tmp_path / "step-9" / name)
    said: list[str] = []
    found = checkpoints.newest(said.append)
    assert found is not None
    assert found[0].step == 5
    message, outcome = said
    assert str(tmp_path / "step-9") in message
    assert words in message
    assert "from that of step 5" in outcome
    if spoil is flip and name != digests.DIGESTS:
        assert name in message
        assert digests.digest(tmp_path / "step-9" / name) in message
    checkpoints.set_aside(5)
    assert checkpoints.steps() == [5]
    assert (tmp_path / "damaged-step-9").is_dir()


def test_damage_to_the_only_one(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    flip(tmp_path / "step-5" / VALUES)
    with pytest.raises(UserError, match="to start from the beginning"):
        checkpoints.newest(print)


def test_leftovers_of_a_crash_are_cleared_and_never_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    (tmp_path / ".step-9.partial").mkdir()
    (tmp_path / ".step-9.partial" / VALUES).write_bytes(b"half")
    found = checkpoints.newest(print)
    assert found is not None
    assert found[0].step == 5
    assert [path.name for path in tmp_path.iterdir()] == ["step-5"]


def rewrite(folder: Path, change: dict[str, Any]) -> None:
    """Another state in an otherwise sound checkpoint."""
    content = json.loads((folder / STATE).read_text()) | change
    others = {name: (folder / name).read_bytes() for name in (VALUES, MOMENTS)}
    storage.remove_folder(folder)
    with storage.write_folder(folder) as new:
        (new / STATE).write_text(json.dumps(content))
        for name, data in others.items():
            (new / name).write_bytes(data)


@pytest.mark.parametrize(
    ("change", "words"),
    [({"format": 2}, "has format 2"), ({"extra": 1}, "extra"), ({"step": "x"}, "step")],
)
def test_state_of_another_release(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save(checkpoints, 5)
    rewrite(tmp_path / "step-5", change)
    with pytest.raises(UserError, match=words) as caught:
        checkpoints.newest(print)
    assert str(tmp_path / "step-5" / STATE) in str(caught.value)


def test_every_difference_in_settings_is_named() -> None:
    stored = state(1).identity
    check_identity(stored, {"train.batch": 4, "train.betas": (0.9, 0.999)}, Path("x"))
    with pytest.raises(UserError) as caught:
        check_identity(stored, {"train.batch": 8, "train.betas": (0.9, 0.99)}, Path("x"))
    assert caught.value.what == "train.batch is 8 now; train.betas is [0.9, 0.99] now"
    assert caught.value.expected == "train.batch=4; train.betas=[0.9, 0.999]"


@pytest.mark.parametrize(
    ("now", "before", "expected"),
    [
        (Best(step=2, loss=1.0), None, True),
        (Best(step=2, loss=1.0), Best(step=1, loss=2.0), True),
        (Best(step=2, loss=2.0), Best(step=1, loss=2.0), False),
        (
            Best(step=2, loss=9, headline="f1", score=0.6),
            Best(step=1, loss=1, headline="f1", score=0.5),
            True,
        ),
        (
            Best(step=2, loss=1, headline="f1", score=0.4),
            Best(step=1, loss=9, headline="f1", score=0.5),
            False,
        ),
        (
            Best(step=2, loss=1, headline="f1", score=0.5),
            Best(step=1, loss=9, headline="f1", score=0.5),
            True,
        ),
        (Best(step=2, loss=9, headline="f1", score=0.0), Best(step=1, loss=1), True),
    ],
)
def test_the_headline_decides_and_among_equals_the_loss(
    now: Best, before: Best | None, expected: bool
) -> None:
    assert now.better_than(before) is expected
