"""One real run that is stopped, resumed and finished under all trackers that are installed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from small_run import Task
from tracked_run import METRIC, PLANTED, PROMPT, Tracked

from finesight import storage
from finesight.track.kinds import EXTRAS


@pytest.fixture(scope="session")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracked]:
    """The first part ends after step 6, the second begins again after step 4."""
    folder = tmp_path_factory.mktemp("tracked")
    home = folder / "alice"
    home.mkdir()
    mlflow, trackio = str(folder / "mlruns"), str(folder / "trackio")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("WANDB_", "SWANLAB_", "MLFLOW_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("SOME_SERVICE_API_KEY", PLANTED["variable"])
        patch.setenv("TRACKIO_DIR", trackio)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.chdir(folder)
        task = Task(home)
        track: list[Any] = [k for k in EXTRAS if k != "mlflow" and find_spec(k) is not None]
        if find_spec("mlflow") is not None:
            track.append({"kind": "mlflow", "address": mlflow})
        task.recipe["data"]["system"] = PROMPT
        settings = {"eval": METRIC, "track": track}
        task.run(**settings)
        first = task.screen
        run = task.folder / "run"
        (run / "result.json").unlink()
        storage.remove_folder(run / "checkpoints" / "step-6")
        task.run(resume=True, **settings)
        losses = {line["step"]: line["loss"] for line in task.history() if "loss" in line}
        yield Tracked(run, (first, task.screen), losses, mlflow, trackio)


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(tmp_path)
