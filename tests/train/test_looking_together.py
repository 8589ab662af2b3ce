"""Pictures that several processes look at, here threads: each at its share, all know all."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from looking_run import SCREEN, all_features, look, session_of
from meeting import Meeting

from finesight.encode.encoded import Grid
from finesight.errors import Interrupted, UserError
from finesight.train import shown
from finesight.train.looking import Looked
from finesight.train.prepare import Session
from finesight.train.ranks import Ranks, Roll, ShareFailed
from finesight.train.stop import Stop

COUNT = 3
Result = Looked | BaseException


@pytest.fixture
def meeting(monkeypatch: pytest.MonkeyPatch) -> Meeting:
    # Several rounds, and a last one in which not all have a chunk.
    monkeypatch.setattr(shown, "CHUNK_PATCHES", 20)
    return Meeting(COUNT, monkeypatch)


def sessions(folder: Path, **train: Any) -> list[Session]:
    """Of processes on one machine."""
    session_of(folder, **train)
    store = dist.HashStore()
    found = []
    for number in range(COUNT):
        own = session_of(folder, **train)
        ranks = Ranks(number, COUNT, number, COUNT, Roll(store, number, COUNT))
        found.append(replace(own, machine=replace(own.machine, ranks=ranks)))
    return found


def looked(
    meeting: Meeting,
    those: list[Session],
    before: Callable[[int, Stop], None] = lambda number, stop: None,
) -> list[Result]:
    def one(number: int) -> Result:
        stop = Stop()
        before(number, stop)
        try:
            return look(those[number], SCREEN, stop)
        except Exception as error:
            return error

    return meeting.all(one)


@pytest.mark.parametrize("cache", ["auto", "memory", "disk"])
def test_each_looks_at_its_share_and_knows_all(
    tmp_path: Path, meeting: Meeting, assets: Path, cache: str
) -> None:
    alone = session_of(tmp_path / "task", cache="memory")
    seen = look(alone).seen
    assert seen is not None
    expected = all_features(alone, seen)
    those = sessions(tmp_path / "task", cache=cache)
    patches = [0] * COUNT
    for number, session in enumerate(those):
        see = session.model.see

        def counted(
            patches_ND: torch.Tensor, grids: tuple[Grid, ...], number: int = number, see: Any = see
        ) -> torch.Tensor:
            patches[number] += len(patches_ND)
            features_MKD: torch.Tensor = see(patches_ND, grids)
            return features_MKD

        session.model.see = counted  # type: ignore[method-assign]
    found = looked(meeting, those)
    for session, one in zip(those, found, strict=True):
        assert isinstance(one, Looked), one
        assert one.seen is not None
        assert one.place == ("disk" if cache == "disk" else "memory")
        assert torch.allclose(all_features(session, one.seen), expected, atol=1e-6)
    assert sum(patches) == sum(sight.patches for sight in seen.known.shown.sights)
    assert min(patches) > 0
    files = len([*assets.rglob("*.safetensors")])
    assert (files == 0) == (cache == "memory")
    again = looked(meeting, sessions(tmp_path / "task", cache=cache))
    assert all(isinstance(one, Looked) and bool(one.found) == bool(files) for one in again)


def test_a_damaged_picture_is_known_to_all(tmp_path: Path, meeting: Meeting) -> None:
    folder = tmp_path / "task"
    session_of(folder)
    whole = (folder / "train3.png").read_bytes()
    (folder / "train3.png").write_bytes(whole[:60])
    those = sessions(folder)
    found = looked(meeting, those)
    told = set()
    for one in found:
        assert isinstance(one, Looked), one
        assert one.seen is not None
        (sample,) = one.seen.known.shown.damaged
        told.add((sample, str(one.seen.known.shown.damaged[sample])))
    assert len(told) == 1
    assert "train3.png" in str(told)


def test_one_without_memory_keeps_all_from_it(tmp_path: Path, meeting: Meeting) -> None:
    those = sessions(tmp_path / "task")

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("so much and no more")

    those[1].model.see = full  # type: ignore[method-assign]
    for one in looked(meeting, those):
        assert isinstance(one, Looked), one
        assert one.seen is None
        assert "the GPU's memory was full (so much and no more)" in one.why


@pytest.mark.parametrize("number", [0, 2])
def test_one_that_is_asked_to_stop_stops_all(tmp_path: Path, meeting: Meeting, number: int) -> None:
    def asked(own: int, stop: Stop) -> None:
        if own == number:
            stop.heed(signal.SIGTERM)

    found = looked(meeting, sessions(tmp_path / "task"), asked)
    assert all(isinstance(one, Interrupted) for one in found)


def test_one_that_cannot_write_what_has_to_be_written(
    tmp_path: Path, meeting: Meeting, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    those = sessions(tmp_path / "task", cache="disk")
    monkeypatch.setattr("finesight.train.feature_files.save_file", refuse)
    first, *others = looked(meeting, those)
    assert isinstance(first, UserError)
    assert "cannot be written" in first.what
    assert all(isinstance(one, ShareFailed) for one in others)
