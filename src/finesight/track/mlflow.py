"""Tracker for MLflow servers and local MLflow stores.

The server is `track.uri`, the environment variable `MLFLOW_TRACKING_URI`, or the MLflow default.
"""

from __future__ import annotations

import time

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from finesight.track.tracker import Tracker, flatten_settings
from finesight.track.tracker_records import (
    EXAMPLES_KEY,
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    RunStarted,
    RunState,
    StartRecord,
)

MAX_PARAM_CHARS = 6000
"""Maximum number of characters of a parameter on MLflow servers."""

MAX_PARAMS_PER_REQUEST, MAX_METRICS_PER_REQUEST = 100, 1000
"""Maximum number of parameters and of metrics in one request to an MLflow server."""

MLFLOW_STATUSES: dict[RunState, str] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}


class MLflowTracker(Tracker):
    """Tracker that logs to an MLflow run; the experiment has the name of the project.

    Alerts are logged as tags.
    """

    def start_run(self, record: StartRecord) -> RunStarted:
        uri, project = record.tracker.uri, record.tracker.project
        self._client = client = MlflowClient(tracking_uri=uri or mlflow.get_tracking_uri())
        if record.id is not None and _run_exists(client, record.id):
            self._run_id = record.id
            client.update_run(self._run_id, status="RUNNING")
        else:
            existing = client.get_experiment_by_name(project)
            experiment = existing.experiment_id if existing else client.create_experiment(project)
            # Override the default tags, which contain the user name and command path.
            tags = {"mlflow.user": "finesight", "mlflow.source.name": "finesight train"}
            self._run_id = client.create_run(
                experiment, run_name=record.name, tags=tags
            ).info.run_id
            parameters = [
                Param(name, value[:MAX_PARAM_CHARS])
                for name, value in flatten_settings(record.settings)
            ]
            for offset in range(0, len(parameters), MAX_PARAMS_PER_REQUEST):
                client.log_batch(
                    self._run_id, params=parameters[offset : offset + MAX_PARAMS_PER_REQUEST]
                )
        run_text = f"run {self._run_id} of experiment {project}"
        return RunStarted(id=self._run_id, message=f"MLflow: {run_text}")

    def log_metrics(self, record: MetricsRecord) -> None:
        timestamp_ms = int(time.time() * 1000)
        metrics = [
            Metric(name, value, timestamp_ms, step_metrics.step)
            for step_metrics in record.steps
            for name, value in step_metrics.values.items()
        ]
        for offset in range(0, len(metrics), MAX_METRICS_PER_REQUEST):
            self._client.log_batch(
                self._run_id, metrics=metrics[offset : offset + MAX_METRICS_PER_REQUEST]
            )

    def log_images(self, record: ImagesRecord) -> None:
        captions = []
        for key, image in record.iter_named():
            self._client.log_image(self._run_id, image.decode(), key=key, step=record.step)
            captions.append(f"{key}\n{image.caption}\n")
        # MLflow images have no captions.
        name = f"{EXAMPLES_KEY}/captions-step-{record.step}.txt"
        self._client.log_text(self._run_id, "\n".join(captions), name)

    def send_alert(self, record: AlertRecord) -> None:
        tag = RunTag(f"alert/{record.step}/{record.title}", record.text)
        self._client.log_batch(self._run_id, tags=[tag])

    def finish_run(self, record: FinishRecord) -> None:
        self._client.set_terminated(self._run_id, MLFLOW_STATUSES[record.state])


def _run_exists(client: MlflowClient, run_id: str) -> bool:
    """Return whether an MLflow run exists and is not deleted."""
    try:
        return bool(client.get_run(run_id).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
