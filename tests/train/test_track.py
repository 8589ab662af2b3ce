"""Trackers for real: TensorBoard's files, SwanLab offline, and packages that are missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from finesight.config import Recipe
from finesight.errors import UserError
from finesight.train.track import trackers


def recipe(**track: Any) -> Recipe:
    return Recipe.model_validate(
        {"model": "m", "data": {"train": "t.jsonl"}, "output": "runs/x", "track": track}
    )


def test_nothing_asked_nothing_done(tmp_path: Path) -> None:
    assert trackers(recipe(), tmp_path, print) == []
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_every_figure(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    said: list[str] = []
    (tracker,) = trackers(recipe(tensorboard=True), tmp_path, said.append)
    for step in (1, 2):
        tracker.log(step, {"loss": 1.0 / step, "learning_rate/language": 1e-4})
    tracker.close()
    events: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 0.5)]
    assert events.Scalars("learning_rate/language")[0].value == pytest.approx(1e-4)
    assert str(tmp_path / "tensorboard") in said[0]


def test_tensorboard_forgets_the_steps_that_a_resumed_run_does_again(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for done, steps in ((0, (1, 2, 3, 4)), (2, (3, 4, 5))):
        (tracker,) = trackers(recipe(tensorboard=True), tmp_path, print, done)
        for step in steps:
            tracker.log(step, {"loss": step + done / 10})
        tracker.close()
    events: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    found = [(e.step, round(e.value, 4)) for e in events.Scalars("loss")]
    assert found == [(1, 1.0), (2, 2.0), (3, 3.2), (4, 4.2), (5, 5.2)]


def test_swanlab_without_a_key_is_offline_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("swanlab", reason="swanlab is not installed")
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    # Its credentials are looked for in the home and the working directory.
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    settings = recipe(swanlab={"project": "latex", "name": "first"})
    (tracker,) = trackers(settings, tmp_path / "run", said.append)
    tracker.log(1, {"loss": 1.5})
    tracker.close()
    assert "no key" in said[0]
    assert str(tmp_path / "run" / "swanlab") in said[0]
    files = [path for path in (tmp_path / "run" / "swanlab").rglob("*") if path.is_file()]
    configs = [path.read_text() for path in files if path.name == "config.yaml"]
    assert len(configs) == 1
    assert "pack_tokens" in configs[0], "the recipe is the run's configuration"
    assert any(path.suffix == ".swanlab" and path.stat().st_size > 0 for path in files)


@pytest.mark.parametrize(
    ("package", "module", "settings"),
    [
        ("swanlab", "swanlab", {"swanlab": {}}),
        ("tensorboard", "torch.utils.tensorboard", {"tensorboard": True}),
    ],
)
def test_missing_package_says_what_to_install(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: str,
    module: str,
    settings: dict[str, Any],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UserError, match=rf"{package} is not[\s\S]*pip install 'finesight\[track\]'"
    ):
        trackers(recipe(**settings), tmp_path, print)
