"""Trackers: TensorBoard, SwanLab, Weights & Biases and MLflow.

A new tracker needs a subclass of `Tracker`, an entry in `TRACKERS`, and a name in
`config.TrackerName`. The main process uses this module as well, so tracker packages are imported in
methods only.
"""

from __future__ import annotations

import json
import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from textwrap import indent
from typing import Any, ClassVar

import numpy as np

from finesight.config import TRACKER_MODES, TrackerSettings
from finesight.errors import UserError
from finesight.plugins import Registry
from finesight.track.tracker_records import (
    EXAMPLES_KEY,
    AlertLevel,
    AlertRecord,
    FinishRecord,
    ImagesRecord,
    MetricsRecord,
    RunState,
    StartRecord,
    TrackerRecord,
)


class Tracker(ABC):
    """Interface to one tracker package; its methods run in the process of the tracker.

    An exception in a method stops this tracker, but not the training. A call may take up to
    `tracker_manager.RESPONSE_TIMEOUT_S`.

    Attributes:
        telemetry_off_env: Environment variables that disable error and usage reports of the
            package. Variables that the user sets take precedence.
    """

    extra: ClassVar[str] = ""
    telemetry_off_env: ClassVar[Mapping[str, str]] = {}

    def handle(self, record: TrackerRecord) -> str | None:
        """Call the method for a record; return a message for the user, if any."""
        methods: dict[type[TrackerRecord], Callable[[Any], str | None]] = {
            StartRecord: self.start_run,
            MetricsRecord: self.log_metrics,
            ImagesRecord: self.log_images,
            AlertRecord: self.send_alert,
            FinishRecord: self.finish_run,
        }
        return methods[type(record)](record)

    @abstractmethod
    def start_run(self, record: StartRecord) -> str:
        """Create a run in the tracker, or resume the run with the ID `record.id`.

        Returns:
            A message for the user with the address of the dashboard, or the folder.
        """

    @abstractmethod
    def log_metrics(self, record: MetricsRecord) -> None:
        """Log the metrics of one or more training steps."""

    @abstractmethod
    def log_images(self, record: ImagesRecord) -> None:
        """Log the images of an evaluation with their captions."""

    @abstractmethod
    def send_alert(self, record: AlertRecord) -> None:
        """Send an alert, or log its text if the tracker has no alert function."""

    @abstractmethod
    def finish_run(self, record: FinishRecord) -> None:
        """Send buffered data and close the run."""


_NO_FILE_NAME = re.compile(r"^\.+|[^\w.-]")
"""Characters of a run name that its folder does not have."""

MAX_FILE_NAME_BYTES = 255
"""Maximum length of a file name in UTF-8 on Linux; 86 Chinese characters are longer."""


class TensorBoardTracker(Tracker):
    """Tracker that writes TensorBoard event files in the run folder; alerts are texts."""

    extra = "track"

    def start_run(self, record: StartRecord) -> str:
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the last checkpoint are repeated: TensorBoard discards their old values.
        purge_step = record.step + 1 if record.step else None
        folder = record.folder
        if record.tracker.run_name is not None:
            # TensorBoard names runs after their folders.
            name = _NO_FILE_NAME.sub("_", record.name)
            folder /= name.encode()[:MAX_FILE_NAME_BYTES].decode(errors="ignore")
        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)
        if record.description:
            self._writer.add_text("description", record.description, record.step)
        rows = "".join(
            f"| {name} | {value} |\n" for name, value in _flatten_settings(record.settings)
        )
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", record.step)
        return f"TensorBoard: tensorboard --logdir {record.folder}"

    def log_metrics(self, record: MetricsRecord) -> None:
        for step_metrics in record.steps:
            for name, value in step_metrics.values.items():
                self._writer.add_scalar(name, value, step_metrics.step)

    def log_images(self, record: ImagesRecord) -> None:
        for name, example in record.iter_named():
            pixels_HWC = np.asarray(example.image)
            self._writer.add_image(name, pixels_HWC, record.step, dataformats="HWC")
            # A code block, since TensorBoard renders texts as Markdown.
            self._writer.add_text(name, indent(example.caption, "    "), record.step)

    def send_alert(self, record: AlertRecord) -> None:
        text = f"**{record.title}** ({record.level})\n\n{record.text}"
        self._writer.add_text("alerts", text, record.step)

    def finish_run(self, record: FinishRecord) -> None:
        self._writer.close()


class _LoggingTracker(Tracker):
    """Base class of trackers whose run has a `log` method for metrics and images.

    Attributes:
        package: Name of the package, which has a class `Image`.
    """

    package: ClassVar[str]
    _run: Any

    def log_values(self, step: int, values: dict[str, Any]) -> None:
        """Log values of a training step by name."""
        self._run.log(values, step=step)

    def log_metrics(self, record: MetricsRecord) -> None:
        for step_metrics in record.steps:
            self.log_values(step_metrics.step, dict(step_metrics.values))

    def log_images(self, record: ImagesRecord) -> None:
        # Separate names, since W&B would resize the images of a list to one size.
        create_image = import_module(self.package).Image
        images = {
            name: create_image(example.image, caption=example.caption, file_type="jpg")
            for name, example in record.iter_named()
        }
        self.log_values(record.step, images)


class SwanLabTracker(_LoggingTracker):
    """Tracker for the SwanLab cloud, a self-hosted SwanLab server, or local SwanLab files.

    Machine, user, command, terminal output, code and packages are not recorded. Alerts are logged
    as texts, and sent to the webhook in the environment variable `SWANLAB_WEBHOOK`, if it is set.
    """

    extra = "track"
    package = "swanlab"

    def start_run(self, record: StartRecord) -> str:
        import swanlab

        tracker = record.tracker
        record.folder.mkdir(parents=True, exist_ok=True)
        is_self_hosted = tracker.uri not in (None, *TRACKER_MODES["swanlab"])
        extra_settings: dict[str, Any] = {}
        if is_self_hosted:
            extra_settings["api_host"] = tracker.uri
        probes = ("hardware", "runtime", "requirements", "git", "swanlab", "monitor")
        self._settings = settings = swanlab.Settings(
            interactive=False,
            probe=swanlab.Settings.Probe(**dict.fromkeys(probes, False)),
            terminal=swanlab.Settings.Terminal(proxy_type="none"),
            **extra_settings,
        )
        init_options: dict[str, Any] = {
            "project": tracker.project,
            "name": record.name,
            "description": record.description or None,
            "id": record.id,
            "resume": "allow",
            "config": record.settings,
            # A relative path, since SwanLab uploads it.
            "log_dir": ".",
            "settings": settings,
            "public": False,
        }
        os.chdir(record.folder)
        # Without a URI, SWANLAB_MODE applies.
        mode = tracker.uri or settings.mode
        reason = ""
        if mode not in ("local", "offline", "disabled"):
            mode = "offline"
            reason = " (no key)"
            if settings.api_key:
                try:
                    self._run = swanlab.init(mode="online", **init_options)
                    return f"SwanLab: {self._run.url}"
                except Exception as error:  # SwanLab, HTTP and OS errors
                    reason = f" ({type(error).__name__}: {error})"
        self._run = swanlab.init(mode=mode, **init_options)
        commands = {
            "offline": f"swanlab sync {record.folder / self._run.dir.name}",
            "local": f"swanlab watch {record.folder}",
        }
        return f"SwanLab: {mode}{reason}: {commands.get(mode, 'disabled')}"

    def send_alert(self, record: AlertRecord) -> None:
        import requests
        import swanlab

        self._run.log({"alerts": swanlab.Text(f"{record.title}: {record.text}")}, step=record.step)
        webhook = self._settings.integration.webhook
        if not webhook.url:
            return
        experiment = {
            "version": swanlab.__version__,
            "mode": self._run.mode,
            "run_dir": self._run.dir.name,
            "exp_url": self._run.url if self._run.mode == "online" else None,
        }
        alert_fields = record.model_dump(include={"step", "level", "title", "text"})
        body = {"value": webhook.value, "swanlab": experiment, "alert": alert_fields}
        try:
            # The content of the response, which may be endless, is not read.
            with requests.post(
                webhook.url, json=body, timeout=webhook.timeout, stream=True
            ) as response:
                response.raise_for_status()
        except requests.RequestException as error:
            # Not fatal. The webhook URL is a secret.
            print(f"webhook alert failed ({type(error).__name__})", flush=True)

    def finish_run(self, record: FinishRecord) -> None:
        error = record.reason if record.state == "failed" else None
        self._run.finish(state=RUN_STATE_NAMES[record.state][0], error=error)


class WandbTracker(_LoggingTracker):
    """Tracker for the Weights & Biases cloud, a self-hosted server, or offline files.

    The x axis is the training step. Machine, user, command, code and packages are not recorded.
    """

    extra = "wandb"
    package = "wandb"
    telemetry_off_env: ClassVar = {"WANDB_ERROR_REPORTING": "false"}

    def start_run(self, record: StartRecord) -> str:
        import wandb

        uri = record.tracker.uri
        folder = record.folder
        folder.mkdir(parents=True, exist_ok=True)
        extra_settings: dict[str, Any] = {}
        if uri not in (None, "cloud", "offline"):
            extra_settings["base_url"] = uri
        settings = wandb.Settings(
            # Seconds to reach the server; afterwards, the run is logged offline.
            init_timeout=30,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
            **extra_settings,
        )
        init_options: dict[str, Any] = {
            "project": record.tracker.project,
            "name": record.name,
            "notes": record.description or None,
            "id": record.id,
            "resume": "allow",
            "config": record.settings,
            "dir": str(folder),
            "settings": settings,
        }
        # Without a URI, WANDB_MODE applies.
        mode = uri if uri in (None, "offline") else "online"
        reason = ""
        try:
            self._run = wandb.init(mode=mode, **init_options)
        except wandb.errors.Error as error:
            if mode == "offline":
                raise
            reason = f" ({type(error).__name__}: {error})"
            # Otherwise wandb would continue to connect for this run ID.
            wandb.teardown()
            self._run = wandb.init(mode="offline", **init_options)
        # The built-in step rejects steps that a resumed run repeats.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        message = self._run.url or "disabled"
        if self._run.offline:
            message = f"offline{reason}: wandb sync {Path(self._run.dir).parent}"
        return f"W&B: {message}"

    def log_values(self, step: int, values: dict[str, Any]) -> None:
        self._run.log({"step": step, **values})

    def send_alert(self, record: AlertRecord) -> None:
        import wandb

        text = f"{record.text} (step {record.step})"
        level = wandb.AlertLevel[ALERT_LEVEL_NAMES[record.level]]
        self._run.alert(title=record.title, text=text, level=level)

    def finish_run(self, record: FinishRecord) -> None:
        self._run.finish(exit_code=0 if record.state == "finished" else 1)


class MLflowTracker(Tracker):
    """Tracker for MLflow servers and local MLflow stores.

    The server is `track.uri`, the environment variable `MLFLOW_TRACKING_URI`, or the MLflow
    default. The experiment has the name of the project. Alerts are logged as tags.
    """

    extra = "mlflow"
    telemetry_off_env: ClassVar = {"MLFLOW_DISABLE_TELEMETRY": "true"}

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
            for name, value in _flatten_settings(record.settings):
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
        self._client.set_terminated(self._run_id, RUN_STATE_NAMES[record.state][1])


_BUILT_IN: dict[str, type[Tracker]] = {
    "swanlab": SwanLabTracker,
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "mlflow": MLflowTracker,
}
TRACKERS = Registry("trackers", Tracker, _BUILT_IN)

RUN_STATE_NAMES: dict[RunState, tuple[str, str]] = {
    "finished": ("success", "FINISHED"),
    "failed": ("crashed", "FAILED"),
    "interrupted": ("aborted", "KILLED"),
}
"""State of an ended run in SwanLab and in MLflow."""

ALERT_LEVEL_NAMES: dict[AlertLevel, str] = {"info": "INFO", "warning": "WARN", "error": "ERROR"}


def require_packages(trackers: Sequence[TrackerSettings]) -> None:
    """Raise UserError if the package of a tracker is not installed. Imports no package."""
    for tracker in trackers:
        extra = TRACKERS[tracker.kind].extra
        packages = {}
        if extra:
            packages[tracker.kind] = f"'finesight[{extra}]'"
        if tracker.kind == "swanlab" and tracker.uri == "local":
            packages["swanboard"] = "'swanlab[dashboard]'"
        for package, install in packages.items():
            if find_spec(package) is None:
                raise UserError(
                    f"{package} is not installed",
                    where=f"track: {tracker.kind}",
                    expected=f"the packages of {install}",
                    remedy=f"Run pip install {install}, or remove {tracker.kind} from track.",
                )


def _flatten_settings(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield nested settings as pairs of dotted name and text, for packages without nesting."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str) else json.dumps(value)
