"""Shared run that is stopped, resumed and finished with all installed trackers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tiny_task import TinyTask
from tracking_fixtures import METRIC, PLANTED_SECRETS, PROMPT, TrackedRun

from finesight import storage
from finesight.track.backends import TRACKERS


@pytest.fixture(scope="session")
def tracked_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TrackedRun]:
    """Run whose first part ends after step 6. The second part resumes from step 4."""
    folder = tmp_path_factory.mktemp("tracked")
    home = folder / "alice"
    home.mkdir()
    mlflow, trackio = str(folder / "mlruns"), str(folder / "trackio")
    with pytest.MonkeyPatch.context() as patch:
        for name in [n for n in os.environ if n.startswith(("WANDB_", "SWANLAB_", "MLFLOW_"))]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("SOME_SERVICE_API_KEY", PLANTED_SECRETS["variable"])
        patch.setenv("TRACKIO_DIR", trackio)
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.chdir(folder)
        task = TinyTask(home)
        track: list[Any] = [k for k in TRACKERS if k != "mlflow" and find_spec(k) is not None]
        if find_spec("mlflow") is not None:
            track.append({"kind": "mlflow", "uri": mlflow})
        task.recipe["data"]["system_prompt"] = PROMPT
        settings = {"eval": METRIC, "track": track}
        task.run(**settings)
        first = task.console_output
        run = task.folder / "run"
        (run / "result.json").unlink()
        storage.remove_folder(run / "checkpoints" / "step-6")
        task.run(resume=True, **settings)
        losses = {line["step"]: line["loss"] for line in task.read_metrics() if "loss" in line}
        yield TrackedRun(run, (first, task.console_output), losses, mlflow, trackio)


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return TinyTask(tmp_path)
