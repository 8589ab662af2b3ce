"""What a person is alerted to: void steps, jumps, a measurement worse than that before training."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from finesight.train.measure import Measured
from finesight.train.prepare import Session
from finesight.train.run import Run
from finesight.train.telling import Telling


class Recorder:
    """A tracking that keeps what it is told."""

    on = True

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def figures(self, step: int, values: dict[str, float]) -> None:
        self.told.append(("figures", step, values))

    def pictures(self, step: int, pictures: list[Any]) -> None:
        self.told.append(("pictures", step, len(pictures)))

    def alert(self, level: str, title: str, text: str) -> None:
        self.told.append((level, title, text))


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def telling(tmp_path: Path, recorder: Recorder) -> Telling:
    session = cast(Session, SimpleNamespace(run=Run(tmp_path)))
    return Telling(session, cast(Any, recorder))


STEP = {"step": 7, "loss": 2.5, "lr": {"language": 1e-4}, "samples": 16, "grad_norm": None}


def test_a_step_is_its_numbers(telling: Telling, recorder: Recorder) -> None:
    telling.step(STEP | {"void": [], "jumped": []})
    assert recorder.told == [("figures", 7, {"loss": 2.5, "learning_rate/language": 1e-4})]


@pytest.mark.parametrize(
    ("name", "title", "text"),
    [
        ("void", "void step", "step 7 had no finite loss or gradient; nothing has moved"),
        ("jumped", "loss has jumped", "the loss of step 7 has jumped to 2.5"),
    ],
)
def test_a_void_step_and_a_jump_alert(
    telling: Telling, recorder: Recorder, name: str, title: str, text: str
) -> None:
    telling.step(STEP | {"void": (), "jumped": ()} | {name: ("train.jsonl:3",)})
    assert recorder.told[1:] == [("warning", title, text)]


@pytest.mark.parametrize(
    ("headline", "before", "now", "worse"),
    [
        ("f1", (0.5, 2.0), (0.4, 1.0), "f1 0.4000 after 4 steps, 0.5000 before"),
        ("f1", (0.5, 2.0), (0.5, 3.0), None),
        ("cer", (0.5, 2.0), (0.6, 1.0), "cer 0.6000 after 4 steps, 0.5000 before"),
        ("cer", (0.5, 2.0), (0.4, 3.0), None),
        (None, (0.5, 2.0), (0.4, 2.1), "held_out_loss 2.1000 after 4 steps, 2.0000 before"),
        (None, (0.5, 2.0), (0.4, 1.9), None),
    ],
)
def test_a_measurement_worse_than_before_training_alerts(
    telling: Telling,
    recorder: Recorder,
    tmp_path: Path,
    headline: str | None,
    before: tuple[float, float],
    now: tuple[float, float],
    worse: str | None,
) -> None:
    first, second = (
        Measured(step, loss, {headline: score} if headline else {}, headline)
        for step, (score, loss) in ((0, before), (4, now))
    )
    Run(tmp_path).metrics.write_text(
        "".join(json.dumps(one.as_json()) + "\n" for one in (first, second))
    )
    telling.measured(second, "step-4")
    scores = {f"scores/{headline}": now[0]} if headline else {}
    assert recorder.told[:2] == [
        ("figures", 4, {"held_out_loss": now[1], **scores}),
        ("pictures", 4, 0),
    ]
    alerts = [] if worse is None else [("warning", "worse than before training", worse)]
    assert recorder.told[2:] == alerts
