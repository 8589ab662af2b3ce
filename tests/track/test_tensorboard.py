"""Tests of the TensorBoard files of a real run."""

from __future__ import annotations

from typing import Any

import pytest
from tracking_fixtures import SCORE_KEY, TrackedRun


@pytest.fixture
def events(tracked_run: TrackedRun) -> Any:
    folder = tracked_run.folder("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    return found.Reload()


def texts(events: Any, name: str) -> list[tuple[int, str]]:
    found = events.Tensors(f"{name}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def test_repeated_steps_are_logged_once(tracked_run: TrackedRun, events: Any) -> None:
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx(tracked_run.losses)
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    wanted = ("grad_norm", "learning_rate/language", "tokens_per_s", "mfu", "peak_memory_gb")
    assert set(wanted) <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars(SCORE_KEY)] == [0, 2, 4, 6]
    assert [event.step for event in events.Scalars("validation_loss")] == [0, 2, 4, 6]


def test_effective_settings(events: Any) -> None:
    step, table = texts(events, "settings")[0]
    assert step == 0
    assert "| tune.lora.rank | 4 |" in table
    assert "| train.lr_schedule | cosine |" in table
    assert "| run.device | " in table
    assert "| run.data.train.num_samples | 11 |" in table


def test_answers_at_every_evaluation(events: Any) -> None:
    assert [event.step for event in events.Images("examples/1")] == [0, 2, 4, 6]
    assert events.Images("examples/1")[0].encoded_image_string[:2] == b"\xff\xd8"
    captions = dict(texts(events, "examples/3"))
    assert "question: Which colour?" in captions[0]
    assert "before: " not in captions[0]
    assert "before: " in captions[6]
    assert "after: " in captions[6]


def test_alerts(events: Any) -> None:
    output = [text for _, text in texts(events, "alerts")]
    assert any(text.startswith("**run finished** (info)") for text in output)


def test_dashboard_command_is_printed(tracked_run: TrackedRun) -> None:
    folder = tracked_run.folder("tensorboard")
    assert (
        tracked_run.console_lines("tensorboard")
        == [f"TensorBoard: tensorboard --logdir {folder}"] * 2
    )
