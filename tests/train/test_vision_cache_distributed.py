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
from vision_cache_fixtures import decide_vision_cache, make_train_state, read_all_features

from finesight.errors import TrainingInterrupted, UserError
from finesight.train import vision_cache
from finesight.train.parallel.distributed import PeerFailedError, ProcessGroup, RankMonitor
from finesight.train.trainer import TrainState
from finesight.train.training_run import StopRequest
from finesight.train.vision_cache_builder import VisionCacheResult

COUNT = 3
RunRanks = Callable[..., list[Any]]


@pytest.fixture
def run_ranks(monkeypatch: pytest.MonkeyPatch) -> RunRanks:
    """Return a function that decides on all ranks, and returns their results or errors."""
    # Several rounds, and a last one in which not all have a chunk.
    monkeypatch.setattr(vision_cache, "CHUNK_PATCHES", 20)
    process_group = FakeProcessGroup(COUNT, monkeypatch)

    def run_ranks(states: list[TrainState], stopped_rank: int = -1) -> list[Any]:
        def run_rank(rank: int) -> VisionCacheResult | Exception:
            stop = StopRequest()
            if rank == stopped_rank:
                stop.request(signal.SIGTERM)
            try:
                return decide_vision_cache(states[rank], stop=stop)
            except Exception as error:
                return error

        return process_group.run_all(run_rank)

    return run_ranks


def make_states(folder: Path, **train: Any) -> list[TrainState]:
    """Create the states of processes on one machine."""
    make_train_state(folder, **train)
    store, states = dist.HashStore(), []
    for rank in range(COUNT):
        state = make_train_state(folder, **train)
        ranks = ProcessGroup(rank, COUNT, rank, COUNT, RankMonitor(store, rank, COUNT))
        states.append(replace(state, hardware=replace(state.hardware, process_group=ranks)))
    return states


@pytest.mark.parametrize("cache", ["auto", "memory", "disk"])
def test_each_rank_encodes_its_shard(
    tmp_path: Path, run_ranks: RunRanks, assets: Path, cache: str
) -> None:
    folder = tmp_path / "task"
    alone = make_train_state(folder, vision_cache="memory")
    single = decide_vision_cache(alone).cache
    expected = read_all_features(alone, single)
    states = make_states(folder, vision_cache=cache)
    patches = [0] * COUNT
    for rank, state in enumerate(states):
        encode = state.model.encode_images

        def count(*inputs: Any, rank: int = rank, encode: Any = encode) -> torch.Tensor:
            patches[rank] += len(inputs[0])
            return encode(*inputs)

        state.model.encode_images = count  # type: ignore[method-assign]
    for state, result in zip(states, run_ranks(states), strict=True):
        assert result.tier == ("disk" if cache == "disk" else "memory")
        assert torch.allclose(read_all_features(state, result.cache), expected, atol=1e-6)
    assert sum(patches) == sum(one.num_patches for one in single.reader.image_index.image_refs)
    assert min(patches) > 0
    is_on_disk = any(assets.rglob("*.safetensors"))
    assert is_on_disk == (cache != "memory")
    again = run_ranks(make_states(folder, vision_cache=cache))
    assert [bool(one.num_from_disk) for one in again] == [is_on_disk] * COUNT


def test_rank_out_of_memory_disables_cache_for_all(tmp_path: Path, run_ranks: RunRanks) -> None:
    def encode(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("so much and no more")

    states = make_states(tmp_path / "task")
    states[1].model.encode_images = encode  # type: ignore[method-assign]
    for result in run_ranks(states):
        assert result.cache is None
        assert "the GPU memory is full (so much and no more)" in result.reason


@pytest.mark.parametrize("rank", [0, 2])
def test_stop_signal_on_one_rank_stops_all(tmp_path: Path, run_ranks: RunRanks, rank: int) -> None:
    errors = run_ranks(make_states(tmp_path / "task"), stopped_rank=rank)
    assert {type(error) for error in errors} == {TrainingInterrupted}


def test_write_error_on_one_rank_fails_all(
    tmp_path: Path, run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    states = make_states(tmp_path / "task", vision_cache="disk")
    monkeypatch.setattr(vision_cache, "save_file", fail)
    first, *others = run_ranks(states)
    assert isinstance(first, UserError)
    assert "cannot be written" in first.what
    assert {type(error) for error in others} == {PeerFailedError}
