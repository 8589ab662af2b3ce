"""Tracker for MLflow."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any, ClassVar

from finesight.track.tracker import Tracker, flatten_settings
from finesight.tracker_components import TrackerComponent

if TYPE_CHECKING:
    from finesight.track.tracker_records import (
        AlertRecord,
        FinishRecord,
        ImagesRecord,
        MetricsRecord,
        RunState,
        StartRecord,
    )

RUN_STATES: dict[RunState, str] = {
    "finished": "FINISHED",
    "failed": "FAILED",
    "interrupted": "KILLED",
}
"""States of ended runs in MLflow."""


class MLflowTracker(Tracker):
    """Tracker for MLflow servers and local MLflow stores.

    The server is `track.uri`, the environment variable `MLFLOW_TRACKING_URI`, or the MLflow
    default. The experiment has the name of the project. Alerts are logged as tags.
    """

    ID_TAG = "finesight_run"
    """Tag with the ID of the run, since MLflow chooses an ID of its own."""

    DESCRIPTION_TAG = "mlflow.note.content"
    """Tag with the text that MLflow shows as the description of a run."""

    MAX_PARAM_CHARS = 6000
    """Maximum number of characters of a parameter on MLflow servers."""

    MAX_PARAM_NAME_CHARS = 250

    NO_PARAM_NAME = re.compile(r"[^\w. -]")
    """Characters that names of parameters do not have on MLflow servers."""

    MAX_PER_REQUEST: ClassVar = {"params": 100, "metrics": 1000}
    """Maximum number of parameters and of metrics in one request to an MLflow server."""

    def start_run(self, record: StartRecord) -> str:
        import mlflow

        uri = record.tracker.uri
        project = record.tracker.project
        self._client = client = mlflow.MlflowClient(tracking_uri=uri or mlflow.get_tracking_uri())
        existing = client.get_experiment_by_name(project)
        experiment = existing.experiment_id if existing else client.create_experiment(project)
        # Without runs that the user has deleted.
        runs = client.search_runs([experiment], f"tags.{self.ID_TAG} = '{record.id}'")
        if runs:
            self._run_id = runs[0].info.run_id
            client.update_run(self._run_id, status="RUNNING")
        else:
            # Override the default tags, which contain the user name and command path.
            tags = {"mlflow.user": "finesight", "mlflow.source.name": "finesight"}
            tags[self.ID_TAG] = record.id
            if record.description:
                tags[self.DESCRIPTION_TAG] = record.description
            run = client.create_run(experiment, run_name=record.name, tags=tags)
            self._run_id = run.info.run_id
            # Names must be unique, also after the replacement of characters.
            values: dict[str, str] = {}
            for name, value in flatten_settings(record.settings):
                param_name = self.NO_PARAM_NAME.sub("_", name)[: self.MAX_PARAM_NAME_CHARS]
                values[param_name] = value[: self.MAX_PARAM_CHARS]
            parameters = [mlflow.entities.Param(name, value) for name, value in values.items()]
            self._log_batches("params", parameters)
        return f"MLflow: run {self._run_id} of experiment {project}"

    def _log_batches(self, kind: str, entities: list[Any]) -> None:
        size = self.MAX_PER_REQUEST[kind]
        for offset in range(0, len(entities), size):
            self._client.log_batch(self._run_id, **{kind: entities[offset : offset + size]})

    def log_metrics(self, record: MetricsRecord) -> None:
        import mlflow

        timestamp_ms = int(time.time() * 1000)
        metrics = []
        for step_metrics in record.steps:
            for name, value in step_metrics.values.items():
                metric = mlflow.entities.Metric(name, value, timestamp_ms, step_metrics.step)
                metrics.append(metric)
        self._log_batches("metrics", metrics)

    def log_images(self, record: ImagesRecord) -> None:
        from finesight.track.tracker_records import EXAMPLES_KEY

        captions = []
        for key, example in record.iter_named():
            self._client.log_image(self._run_id, example.image, key=key, step=record.step)
            captions.append(f"{key}\n{example.caption}\n")
        # MLflow images have no captions.
        name = f"{EXAMPLES_KEY}/captions-step-{record.step}.txt"
        self._client.log_text(self._run_id, "\n".join(captions), name)

    def send_alert(self, record: AlertRecord) -> None:
        import mlflow

        tag = mlflow.entities.RunTag(f"alert/{record.step}/{record.title}", record.text)
        self._client.log_batch(self._run_id, tags=[tag])

    def finish_run(self, record: FinishRecord) -> None:
        self._client.set_terminated(self._run_id, RUN_STATES[record.state])


COMPONENT = TrackerComponent(
    kind="trackers",
    name="mlflow",
    title="MLflow",
    implementation="finesight.track.trackers.mlflow:MLflowTracker",
    extra="mlflow",
    telemetry_off_env={"MLFLOW_DISABLE_TELEMETRY": "true"},
    position=4,
)
