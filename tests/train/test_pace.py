"""What a recording is compared with: launches, and the card's own time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from recorded_packs import CPU, encoded, tuned
from small_run import make_task
from torch import Tensor

from finesight.encode.pack import pack
from finesight.model.parts import trainable
from finesight.train import recorded
from finesight.train.held import Kind
from finesight.train.pace import Pace
from finesight.train.recorded import Passes


class Event:
    """Of a card whose clock the test turns, and that is through with what the test says."""

    clock, through = 0.0, False

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Event.clock

    def query(self) -> bool:
        return Event.through

    def elapsed_time(self, other: Event) -> float:
        return 1000 * (other.at - self.at)


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    Event.clock, Event.through = 0.0, False


def replay(pace: Pace, tokens: int, seconds: float) -> None:
    with pace.replaying(tokens):
        Event.clock += seconds


def test_it_is_known_once_the_card_is_through_with_a_replay() -> None:
    pace = Pace()
    pace.launched(0.05)
    assert pace.replays_sooner(1000) is None
    replay(pace, 1000, 0.02)
    assert pace.replays_sooner(1000) is None
    replay(pace, 1000, 9.0)  # while the first is under way
    Event.through = True
    assert pace.replays_sooner(1000) is True
    assert pace.replays_sooner(2400) is True
    assert pace.replays_sooner(2600) is False


def test_the_shortest_launch_and_the_shortest_replay_count() -> None:
    pace = Pace()
    Event.through = True
    replay(pace, 1000, 0.06)
    assert pace.replays_sooner(1000) is None, "nothing was launched"
    for seconds in (3.0, 0.05, 0.2):
        pace.launched(seconds)
    assert pace.replays_sooner(1000) is False
    replay(pace, 2000, 0.08)
    assert pace.replays_sooner(1000) is True
    replay(pace, 1000, 0.06)
    assert pace.replays_sooner(1000) is True


class Replayed:
    """Recordings that are replayed from their third run on."""

    def __init__(self, device: torch.device) -> None:
        self.runs = 0

    def has(self, number: int) -> bool:
        return self.runs > 1

    def run(self, number: int, function: Callable[[], Tensor]) -> Tensor:
        self.runs += 1
        Event.clock += 1.0
        return function()


def test_launches_and_replays_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_task(tmp_path)
    monkeypatch.setattr(recorded, "_recordable", lambda model, device: True)
    monkeypatch.setattr(recorded, "Recorded", Replayed)
    monkeypatch.setattr(recorded, "_mark", lambda device: None)
    Event.through = True
    model = tuned(torch.float32, CPU).eval()
    batch, share = pack(encoded(tmp_path)[:4]), torch.tensor(0.25)
    passes = Passes(model, list(trainable(model).values()))
    monkeypatch.setattr(passes, "_forth_and_back", lambda held: share)
    for _ in range(recorded.LAUNCHED + 2):
        passes.learn(batch, None, share)
    assert passes._pace.replays_sooner(1) is None, "what is launched or recorded is no replay"
    passes.learn(batch, None, share)
    tokens = Kind.of(batch).tokens
    assert passes._pace.replays_sooner(100 * tokens) is False
    assert passes._pace._token_s == 1 / tokens
    assert 0 < passes._pace._launch_s < 100
    passes.rehearse(batch)
    assert passes._pace.replays_sooner(tokens) is None
