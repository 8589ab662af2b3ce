"""TensorBoard's files of a real run, read back by TensorBoard."""

from __future__ import annotations

from typing import Any

import pytest
from tracked_run import SCORE, Tracked


@pytest.fixture
def events(tracked: Tracked) -> Any:
    folder = tracked.folder("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"images": 0, "tensors": 0})
    return found.Reload()


def texts(events: Any, name: str) -> list[tuple[int, str]]:
    found = events.Tensors(f"{name}/text_summary")
    return [(event.step, event.tensor_proto.string_val[0].decode()) for event in found]


def test_every_figure_once_although_two_steps_were_done_twice(
    tracked: Tracked, events: Any
) -> None:
    found = {event.step: event.value for event in events.Scalars("loss")}
    assert found == pytest.approx(tracked.losses)
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    wanted = ("grad_norm", "learning_rate/language", "tokens_per_s", "utilisation", "memory_gb")
    assert set(wanted) <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars(SCORE)] == [0, 2, 4, 6]
    assert [event.step for event in events.Scalars("held_out_loss")] == [0, 2, 4, 6]


def test_settings_as_they_were_in_force(events: Any) -> None:
    step, table = texts(events, "settings")[0]
    assert step == 0
    assert "| tune.lora.rank | 4 |" in table
    assert "| train.schedule | cosine |" in table
    assert "| run.device | " in table
    assert "| run.data.train.samples | 11 |" in table


def test_answers_before_and_now_at_every_evaluation(events: Any) -> None:
    assert [event.step for event in events.Images("examples/1")] == [0, 2, 4, 6]
    assert events.Images("examples/1")[0].encoded_image_string[:2] == b"\xff\xd8"
    captions = dict(texts(events, "examples/3"))
    assert "question: Which colour?" in captions[0]
    assert "before: " not in captions[0]
    assert "before: " in captions[6]
    assert "now: " in captions[6]


def test_alerts(events: Any) -> None:
    said = [text for _, text in texts(events, "alerts")]
    assert any(text.startswith("**run finished** (info)") for text in said)


def test_where_to_look_is_said(tracked: Tracked) -> None:
    folder = tracked.folder("tensorboard")
    assert tracked.told("tensorboard") == [f"TensorBoard: tensorboard --logdir {folder}"] * 2
