"""What a person is alerted to: void steps, jumps, a measurement worse than that before training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finesight.train.evaluation import EvalResult
from finesight.train.logging import TrackingEvents
from finesight.train.run_dir import RunDir
from finesight.train.train_state import TrainState


class Recorder:
    """Tracker manager that records all calls."""

    is_active = True

    def __init__(self) -> None:
        self.records: list[tuple[Any, ...]] = []

    def log_metrics(self, step: int, values: dict[str, float]) -> None:
        self.records.append(("figures", step, values))

    def log_images(self, step: int, images: list[Any]) -> None:
        self.records.append(("images", step, len(images)))

    def send_alert(self, level: str, title: str, text: str) -> None:
        self.records.append((level, title, text))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def tracking_events(tmp_path: Path, recorder: Recorder) -> TrackingEvents:
    session = cast(TrainState, SimpleNamespace(run_dir=RunDir(tmp_path)))
    return TrackingEvents(session, cast(Any, recorder))


STEP = {"step": 7, "loss": 2.5, "lr": {"language": 1e-4}, "num_samples": 16, "grad_norm": None}


def test_step_metrics(tracking_events: TrackingEvents, recorder: Recorder) -> None:
    tracking_events.log_step(STEP | {"nonfinite_samples": [], "loss_spike_samples": []})
    assert recorder.records == [("figures", 7, {"loss": 2.5, "learning_rate/language": 1e-4})]


@pytest.mark.parametrize(
    ("name", "title", "text"),
    [
        (
            "nonfinite_samples",
            "non-finite step",
            "step 7 had a non-finite loss or gradient; its update was skipped",
        ),
        ("loss_spike_samples", "loss spike", "the loss of step 7 increased to 2.5"),
    ],
)
def test_skipped_step_and_loss_jump_send_alerts(
    tracking_events: TrackingEvents, recorder: Recorder, name: str, title: str, text: str
) -> None:
    tracking_events.log_step(
        STEP | {"nonfinite_samples": (), "loss_spike_samples": ()} | {name: ("train.jsonl:3",)}
    )
    assert recorder.records[1:] == [("warning", title, text)]


@pytest.mark.parametrize(
    ("headline", "before", "now", "worse"),
    [
        ("f1", (0.5, 2.0), (0.4, 1.0), "f1 0.4000 after 4 steps, 0.5000 before"),
        ("f1", (0.5, 2.0), (0.5, 3.0), None),
        ("cer", (0.5, 2.0), (0.6, 1.0), "cer 0.6000 after 4 steps, 0.5000 before"),
        ("cer", (0.5, 2.0), (0.4, 3.0), None),
        (None, (0.5, 2.0), (0.4, 2.1), "validation_loss 2.1000 after 4 steps, 2.0000 before"),
        (None, (0.5, 2.0), (0.4, 1.9), None),
    ],
)
def test_worse_evaluation_sends_alert(
    tracking_events: TrackingEvents,
    recorder: Recorder,
    tmp_path: Path,
    headline: str | None,
    before: tuple[float, float],
    now: tuple[float, float],
    worse: str | None,
) -> None:
    first, second = (
        EvalResult(step, loss, {headline: score} if headline else {}, headline)
        for step, (score, loss) in ((0, before), (4, now))
    )
    RunDir(tmp_path).metrics_path.write_text(
        "".join(json.dumps(one.as_json()) + "\n" for one in (first, second))
    )
    tracking_events.log_evaluation(second, "step-4")
    scores = {f"scores/{headline}": now[0]} if headline else {}
    assert recorder.records[:2] == [
        ("figures", 4, {"validation_loss": now[1], **scores}),
        ("images", 4, 0),
    ]
    alerts = [] if worse is None else [("warning", "worse than before training", worse)]
    assert recorder.records[2:] == alerts
