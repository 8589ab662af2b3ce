"""Vision cache of several ranks, here threads: each encodes its share, all get all features."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fake_dist import FakeProcessGroup
from vision_cache_fixtures import CONSOLE, decide_vision_cache, make_train_state, read_all_features

from finesight.errors import TrainingInterrupted, UserError
from finesight.train import vision_cache
from finesight.train.parallel.distributed import PeerFailedError, ProcessGroup, RankMonitor
from finesight.train.trainer import TrainState
from finesight.train.training_run import StopRequest
from finesight.train.vision_cache_builder import VisionCacheResult
from finesight.vision.image_processing import GridTHW

COUNT = 3
Result = VisionCacheResult | BaseException


@pytest.fixture
def process_group(monkeypatch: pytest.MonkeyPatch) -> FakeProcessGroup:
    # Several rounds, and a last one in which not all have a chunk.
    monkeypatch.setattr(vision_cache, "CHUNK_PATCHES", 20)
    return FakeProcessGroup(COUNT, monkeypatch)


def sessions(folder: Path, **train: Any) -> list[TrainState]:
    """Of processes on one machine."""
    make_train_state(folder, **train)
    store = dist.HashStore()
    found = []
    for number in range(COUNT):
        own = make_train_state(folder, **train)
        ranks = ProcessGroup(number, COUNT, number, COUNT, RankMonitor(store, number, COUNT))
        found.append(replace(own, hardware=replace(own.hardware, process_group=ranks)))
    return found


def run_on_all_ranks(
    process_group: FakeProcessGroup,
    those: list[TrainState],
    before: Callable[[int, StopRequest], None] = lambda number, stop: None,
) -> list[Result]:
    def one(number: int) -> Result:
        stop = StopRequest()
        before(number, stop)
        try:
            return decide_vision_cache(those[number], CONSOLE, stop)
        except Exception as error:
            return error

    return process_group.run_all(one)


@pytest.mark.parametrize("cache", ["auto", "memory", "disk"])
def test_each_rank_encodes_its_shard(
    tmp_path: Path, process_group: FakeProcessGroup, assets: Path, cache: str
) -> None:
    alone = make_train_state(tmp_path / "task", vision_cache="memory")
    seen = decide_vision_cache(alone).cache
    expected = read_all_features(alone, seen)
    those = sessions(tmp_path / "task", vision_cache=cache)
    patches = [0] * COUNT
    for number, session in enumerate(those):
        see = session.model.encode_images

        def counted(
            patches_ND: torch.Tensor,
            grids: tuple[GridTHW, ...],
            number: int = number,
            see: Any = see,
        ) -> torch.Tensor:
            patches[number] += len(patches_ND)
            features_MKD: torch.Tensor = see(patches_ND, grids)
            return features_MKD

        session.model.encode_images = counted  # type: ignore[method-assign]
    found = run_on_all_ranks(process_group, those)
    for session, one in zip(those, found, strict=True):
        assert isinstance(one, VisionCacheResult), one
        assert one.cache is not None
        assert one.tier == ("disk" if cache == "disk" else "memory")
        assert torch.allclose(read_all_features(session, one.cache), expected, atol=1e-6)
    assert sum(patches) == sum(
        image_ref.num_patches for image_ref in seen.reader.image_index.image_refs
    )
    assert min(patches) > 0
    files = len([*assets.rglob("*.safetensors")])
    assert (files == 0) == (cache == "memory")
    again = run_on_all_ranks(process_group, sessions(tmp_path / "task", vision_cache=cache))
    assert all(
        isinstance(one, VisionCacheResult) and bool(one.num_from_disk) == bool(files)
        for one in again
    )


def test_damaged_image_is_known_to_all_ranks(
    tmp_path: Path, process_group: FakeProcessGroup
) -> None:
    folder = tmp_path / "task"
    make_train_state(folder)
    full = (folder / "train3.png").read_bytes()
    (folder / "train3.png").write_bytes(full[:60])
    those = sessions(folder)
    found = run_on_all_ranks(process_group, those)
    result = set()
    for one in found:
        assert isinstance(one, VisionCacheResult), one
        (sample,) = one.cache.reader.image_index.corrupt_samples
        result.add((sample, str(one.cache.reader.image_index.corrupt_samples[sample])))
    assert len(result) == 1
    assert "train3.png" in str(result)


def test_rank_out_of_memory_disables_cache_for_all(
    tmp_path: Path, process_group: FakeProcessGroup
) -> None:
    those = sessions(tmp_path / "task")

    def full(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("so much and no more")

    those[1].model.encode_images = full  # type: ignore[method-assign]
    for one in run_on_all_ranks(process_group, those):
        assert isinstance(one, VisionCacheResult), one
        assert one.cache is None
        assert "the GPU memory is full (so much and no more)" in one.reason


@pytest.mark.parametrize("number", [0, 2])
def test_stop_signal_on_one_rank_stops_all(
    tmp_path: Path, process_group: FakeProcessGroup, number: int
) -> None:
    def on_progress(own: int, stop: StopRequest) -> None:
        if own == number:
            stop.request(signal.SIGTERM)

    found = run_on_all_ranks(process_group, sessions(tmp_path / "task"), on_progress)
    assert all(isinstance(one, TrainingInterrupted) for one in found)


def test_write_error_on_one_rank_fails_all(
    tmp_path: Path, process_group: FakeProcessGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    those = sessions(tmp_path / "task", vision_cache="disk")
    monkeypatch.setattr("finesight.train.vision_cache.save_file", refuse)
    first, *others = run_on_all_ranks(process_group, those)
    assert isinstance(first, UserError)
    assert "cannot be written" in first.what
    assert all(isinstance(one, PeerFailedError) for one in others)
