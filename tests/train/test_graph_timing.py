"""Timing of CUDA graph replays against eager launches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cuda_graph_fixtures import CPU, encode_samples, make_model
from tiny_task import make_task
from torch import Tensor

from finesight.encode.packing import pack
from finesight.model.trainable import trainable_parameters
from finesight.train import cuda_graphs
from finesight.train.cuda_graphs import CudaGraphRunner, GraphTimer
from finesight.train.graph_buffers import GraphShape


class FakeEvent:
    """CUDA event with a simulated clock and status."""

    clock, through = 0.0, False

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def query(self) -> bool:
        return FakeEvent.through

    def elapsed_time(self, other: FakeEvent) -> float:
        return 1000 * (other.at - self.at)


@pytest.fixture(autouse=True)
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    FakeEvent.clock, FakeEvent.through = 0.0, False


def replay(timer: GraphTimer, tokens: int, seconds: float) -> None:
    with timer.time_replay(tokens):
        FakeEvent.clock += seconds


def test_replay_time_is_known_after_gpu_finishes() -> None:
    timer = GraphTimer()
    timer.record_launch(0.05)
    assert timer.is_replay_faster(1000) is None
    replay(timer, 1000, 0.02)
    assert timer.is_replay_faster(1000) is None
    replay(timer, 1000, 9.0)  # while the first is under way
    FakeEvent.through = True
    assert timer.is_replay_faster(1000) is True
    assert timer.is_replay_faster(2400) is True
    assert timer.is_replay_faster(2600) is False


def test_fastest_launch_and_replay_are_compared() -> None:
    timer = GraphTimer()
    FakeEvent.through = True
    replay(timer, 1000, 0.06)
    assert timer.is_replay_faster(1000) is None, "nothing was launched"
    for seconds in (3.0, 0.05, 0.2):
        timer.record_launch(seconds)
    assert timer.is_replay_faster(1000) is False
    replay(timer, 2000, 0.08)
    assert timer.is_replay_faster(1000) is True
    replay(timer, 1000, 0.06)
    assert timer.is_replay_faster(1000) is True


class FakeGraphCache:
    """Graph cache that replays from the third run on."""

    def __init__(self, device: torch.device) -> None:
        self.runs = 0

    def contains(self, key: int) -> bool:
        return self.runs > 1

    def run(self, key: int, function: Callable[[], Tensor]) -> Tensor:
        self.runs += 1
        FakeEvent.clock += 1.0
        return function()


def test_launches_and_replays_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_task(tmp_path)
    monkeypatch.setattr(cuda_graphs, "is_capturable", lambda model, device: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", FakeGraphCache)
    monkeypatch.setattr(cuda_graphs, "record_event", lambda device: None)
    FakeEvent.through = True
    model = make_model(torch.float32, CPU).eval()
    batch, share = pack(encode_samples(tmp_path)[:4]), torch.tensor(0.25)
    passes = CudaGraphRunner(model, list(trainable_parameters(model).values()))
    monkeypatch.setattr(passes, "run_static", lambda static_inputs: share)
    for _ in range(cuda_graphs.NUM_WARMUP_PACKS + 2):
        passes.forward_backward(batch, None, share)
    assert passes.timer.is_replay_faster(1) is None, "eager launches and captures are no replays"
    passes.forward_backward(batch, None, share)
    tokens = GraphShape.from_batch(batch).num_tokens
    assert passes.timer.is_replay_faster(100 * tokens) is False
    assert passes.timer.replay_s_per_token == 1 / tokens
    assert 0 < passes.timer.launch_s < 100
    passes.warm_up(batch)
    assert passes.timer.is_replay_faster(tokens) is None
