"""Tests of the MLflow file store of a real run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tracking_fixtures import SCORE_KEY, TrackedRun

pytest.importorskip("mlflow", reason="mlflow is not installed (extra `mlflow`)")


@pytest.fixture
def client(tracked_run: TrackedRun, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracked_run.mlflow)


@pytest.fixture
def run(client: Any) -> Any:
    experiment = client.get_experiment_by_name("finesight")
    (found,) = client.search_runs([experiment.experiment_id])
    return found


def values(client: Any, run: Any, name: str) -> dict[int, float]:
    return {m.step: m.value for m in client.get_metric_history(run.info.run_id, name)}


def test_all_metrics_in_one_run(tracked_run: TrackedRun, client: Any, run: Any) -> None:
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert values(client, run, "loss") == pytest.approx(tracked_run.losses)
    assert sorted(values(client, run, SCORE_KEY)) == [0, 2, 4, 6]
    assert sorted(values(client, run, "learning_rate/language")) == [1, 2, 3, 4, 5, 6]


def test_settings_without_user_name(run: Any) -> None:
    assert run.data.params["tune.lora.rank"] == "4"
    assert run.data.params["run.precision"] == "fp32"
    assert run.data.tags["mlflow.user"] == "finesight"
    assert run.data.tags["mlflow.source.name"] == "finesight train"


def test_images_with_captions_and_alerts(client: Any, run: Any) -> None:
    name = run.info.run_id
    paths = [file.path for file in client.list_artifacts(name, "images")]
    for step in (0, 2, 4, 6):
        assert any(re.search(rf"examples\W1\Wstep\W{step}\W.*png$", path) for path in paths)
    captions = Path(client.download_artifacts(name, "examples/captions-step-6.txt")).read_text()
    assert "question: Which colour?" in captions
    assert "before: " in captions
    assert run.data.tags["alert/6/run finished"].startswith("6 steps")
