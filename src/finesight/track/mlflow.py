"""MLflow: the server or store of its address, else of MLFLOW_TRACKING_URI, else MLflow's own."""

from __future__ import annotations

import time

import mlflow
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from finesight.track.records import EXAMPLES, Alert, Begin, Begun, End, Figures, Pictures, State
from finesight.track.writer import Writer, flat

LONGEST = 6000
"""Characters of a parameter that servers take."""

PARAMETERS, METRICS = 100, 1000
"""How many of them servers take in one request."""

STATES: dict[State, str] = {"finished": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}


class MLflow(Writer):
    """A run of the experiment that is called as the project; alerts are tags."""

    def begin(self, begin: Begin) -> Begun:
        address, project = begin.tracker.address, begin.tracker.project
        self._client = client = MlflowClient(tracking_uri=address or mlflow.get_tracking_uri())
        if begin.id is not None and _exists(client, begin.id):
            self._id = begin.id
            client.update_run(self._id, status="RUNNING")
        else:
            known = client.get_experiment_by_name(project)
            experiment = known.experiment_id if known else client.create_experiment(project)
            # Otherwise it notes the user's name, and the command with its path.
            tags = {"mlflow.user": "finesight", "mlflow.source.name": "finesight train"}
            self._id = client.create_run(experiment, run_name=begin.name, tags=tags).info.run_id
            parameters = [Param(name, value[:LONGEST]) for name, value in flat(begin.settings)]
            for first in range(0, len(parameters), PARAMETERS):
                client.log_batch(self._id, params=parameters[first : first + PARAMETERS])
        where = f"run {self._id} of experiment {project}"
        return Begun(id=self._id, told=f"MLflow: {where}")

    def figures(self, figures: Figures) -> None:
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, value, now, row.step)
            for row in figures.rows
            for name, value in row.values.items()
        ]
        for first in range(0, len(metrics), METRICS):
            self._client.log_batch(self._id, metrics=metrics[first : first + METRICS])

    def pictures(self, pictures: Pictures) -> None:
        captions = []
        for key, picture in pictures.named():
            self._client.log_image(self._id, picture.image(), key=key, step=pictures.step)
            captions.append(f"{key}\n{picture.caption}\n")
        # Its pictures have no captions.
        name = f"{EXAMPLES}/captions-step-{pictures.step}.txt"
        self._client.log_text(self._id, "\n".join(captions), name)

    def alert(self, alert: Alert) -> None:
        tag = RunTag(f"alert/{alert.step}/{alert.title}", alert.text)
        self._client.log_batch(self._id, tags=[tag])

    def end(self, end: End) -> None:
        self._client.set_terminated(self._id, STATES[end.state])


def _exists(client: MlflowClient, name: str) -> bool:
    """Whether the run is still there: somebody may have tidied up."""
    try:
        return bool(client.get_run(name).info.lifecycle_stage == "active")
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return False
        raise
