"""Trackers: TensorBoard, SwanLab, Weights & Biases and MLflow.

A new tracker needs a subclass of `Tracker`, an entry in `TRACKERS`, and a name in
`config.TrackerName`. The main process uses this module as well, so tracker packages are imported in
methods only.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

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
    RunStarted,
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

    def handle(self, record: TrackerRecord) -> RunStarted | None:
        """Call the method for a record."""
        methods: dict[str, Callable[[Any], RunStarted | None]] = {
            "start": self.start_run,
            "metrics": self.log_metrics,
            "images": self.log_images,
            "alert": self.send_alert,
            "finish": self.finish_run,
        }
        return methods[record.type](record)

    @abstractmethod
    def start_run(self, record: StartRecord) -> RunStarted:
        """Create a run in the tracker, or resume the run with the id `record.id`."""

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


class TensorBoardTracker(Tracker):
    """Tracker that writes TensorBoard event files in the run folder; alerts are texts.

    It uses the tensorboard package without torch.
    """

    extra = "track"

    def start_run(self, record: StartRecord) -> RunStarted:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event_writer: Any = EventFileWriter(str(record.folder), flush_secs=10)
        if record.step:
            # Steps after the last checkpoint are repeated: TensorBoard discards their old values.
            session_log = SessionLog(status=SessionLog.START)
            self._write_event(record.step + 1, session_log=session_log)
        rows = "".join(
            f"| {name} | {value} |\n" for name, value in _flatten_settings(record.settings)
        )
        self._write_text(record.step, "settings", f"| setting | value |\n|---|---|\n{rows}")
        return RunStarted(id=None, message=f"TensorBoard: tensorboard --logdir {record.folder}")

    def log_metrics(self, record: MetricsRecord) -> None:
        for step_metrics in record.steps:
            values = [{"tag": n, "simple_value": v} for n, v in step_metrics.values.items()]
            self._write_event(step_metrics.step, summary={"value": values})

    def log_images(self, record: ImagesRecord) -> None:
        for name, tracked_image in record.iter_named():
            width, height = tracked_image.decode().size
            image = {
                "encoded_image_string": tracked_image.jpeg,
                "width": width,
                "height": height,
                "colorspace": 3,
            }
            self._write_event(record.step, summary={"value": [{"tag": name, "image": image}]})
            # A code block, since TensorBoard renders texts as Markdown.
            caption_lines = tracked_image.caption.splitlines()
            self._write_text(record.step, name, "".join(f"    {line}\n" for line in caption_lines))
        self._event_writer.flush()

    def send_alert(self, record: AlertRecord) -> None:
        text = f"**{record.title}** ({record.level})\n\n{record.text}"
        self._write_text(record.step, "alerts", text)
        self._event_writer.flush()

    def finish_run(self, record: FinishRecord) -> None:
        self._event_writer.close()

    def _write_text(self, step: int, name: str, text: str) -> None:
        from tensorboard.plugins.text.plugin_data_pb2 import TextPluginData

        content = TextPluginData(version=0).SerializeToString()
        value = {
            "tag": f"{name}/text_summary",
            "metadata": {"plugin_data": {"plugin_name": "text", "content": content}},
            "tensor": {
                "dtype": "DT_STRING",
                "string_val": [text.encode()],
                "tensor_shape": {"dim": [{"size": 1}]},
            },
        }
        self._write_event(step, summary={"value": [value]})

    def _write_event(self, step: int, **fields: object) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._event_writer.add_event(Event(wall_time=time.time(), step=step, **fields))


class _LoggingTracker(Tracker):
    """Base class of trackers whose run has a `log` method for metrics and images.

    Attributes:
        package: Name of the package, which has a class `Image`.
        image_options: Additional arguments of `Image`.
    """

    package: ClassVar[str]
    image_options: ClassVar[Mapping[str, str]] = {}
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
            name: create_image(image.decode(), caption=image.caption, **self.image_options)
            for name, image in record.iter_named()
        }
        self.log_values(record.step, images)


class SwanLabTracker(_LoggingTracker):
    """Tracker for the SwanLab cloud, a self-hosted SwanLab server, or local SwanLab files.

    Machine, user, command, terminal output, code and packages are not recorded. Alerts are logged
    as texts, and sent to the webhook in the environment variable `SWANLAB_WEBHOOK`, if it is set.
    """

    extra, package = "track", "swanlab"
    image_options: ClassVar = {"file_type": "jpg"}

    def start_run(self, record: StartRecord) -> RunStarted:
        import swanlab

        tracker = record.tracker
        record.folder.mkdir(parents=True, exist_ok=True)
        is_self_hosted = tracker.uri not in (None, *TRACKER_MODES["swanlab"])
        extra_settings = {"api_host": tracker.uri} if is_self_hosted else {}
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
            "id": record.id,
            "resume": "never" if record.id is None else "allow",
            "config": record.settings,
            # A relative path, since SwanLab uploads it.
            "log_dir": ".",
            "settings": settings,
            "public": False,
        }
        os.chdir(record.folder)
        # Without a URI, SWANLAB_MODE applies.
        requested_mode = settings.mode if tracker.uri is None else tracker.uri
        mode, reason = requested_mode, ""
        if mode not in ("local", "offline", "disabled"):
            mode, reason = "offline", " (no key)"
            if settings.api_key:
                try:
                    self._run = swanlab.init(mode="online", **init_options)
                    return RunStarted(id=self._run.id, message=f"SwanLab: {self._run.url}")
                except Exception as error:  # SwanLab, HTTP and OS errors
                    reason = f" ({type(error).__name__}: {error})"
        self._run = swanlab.init(mode=mode, **init_options)
        commands = {
            "offline": f"swanlab sync {record.folder / self._run.dir.name}",
            "local": f"swanlab watch {record.folder}",
        }
        message = f"SwanLab: {mode}{reason}: {commands.get(mode, 'disabled')}"
        return RunStarted(id=self._run.id, message=message)

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
            requests.post(webhook.url, json=body, timeout=webhook.timeout).raise_for_status()
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

    extra, package = "wandb", "wandb"
    image_options: ClassVar = {"file_type": "jpg"}
    telemetry_off_env: ClassVar = {"WANDB_ERROR_REPORTING": "false"}

    def start_run(self, record: StartRecord) -> RunStarted:
        import wandb

        uri, folder = record.tracker.uri, record.folder
        folder.mkdir(parents=True, exist_ok=True)
        extra_settings = {"base_url": uri} if uri not in (None, "cloud", "offline") else {}
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
            "id": record.id or secrets.token_hex(4),
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
        return RunStarted(id=self._run.id, message=f"W&B: {message}")

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

    MAX_PARAM_CHARS = 6000
    """Maximum number of characters of a parameter on MLflow servers."""

    MAX_PER_REQUEST: ClassVar = {"params": 100, "metrics": 1000}
    """Maximum number of parameters and of metrics in one request to an MLflow server."""

    def start_run(self, record: StartRecord) -> RunStarted:
        import mlflow

        uri, project = record.tracker.uri, record.tracker.project
        self._client = client = mlflow.MlflowClient(tracking_uri=uri or mlflow.get_tracking_uri())
        if record.id is not None and self._run_exists(record.id):
            self._run_id = record.id
            client.update_run(self._run_id, status="RUNNING")
        else:
            existing = client.get_experiment_by_name(project)
            experiment = existing.experiment_id if existing else client.create_experiment(project)
            # Override the default tags, which contain the user name and command path.
            tags = {"mlflow.user": "finesight", "mlflow.source.name": "finesight"}
            run = client.create_run(experiment, run_name=record.name, tags=tags)
            self._run_id = run.info.run_id
            parameters = [
                mlflow.entities.Param(name, value[: self.MAX_PARAM_CHARS])
                for name, value in _flatten_settings(record.settings)
            ]
            self._log_batches("params", parameters)
        run_text = f"run {self._run_id} of experiment {project}"
        return RunStarted(id=self._run_id, message=f"MLflow: {run_text}")

    def _log_batches(self, kind: str, entities: list[Any]) -> None:
        size = self.MAX_PER_REQUEST[kind]
        for offset in range(0, len(entities), size):
            self._client.log_batch(self._run_id, **{kind: entities[offset : offset + size]})

    def _run_exists(self, run_id: str) -> bool:
        """Return whether an MLflow run exists and is not deleted."""
        import mlflow

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except mlflow.MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def log_metrics(self, record: MetricsRecord) -> None:
        import mlflow

        timestamp_ms = int(time.time() * 1000)
        metrics = [
            mlflow.entities.Metric(name, value, timestamp_ms, step_metrics.step)
            for step_metrics in record.steps
            for name, value in step_metrics.values.items()
        ]
        self._log_batches("metrics", metrics)

    def log_images(self, record: ImagesRecord) -> None:
        captions = []
        for key, image in record.iter_named():
            self._client.log_image(self._run_id, image.decode(), key=key, step=record.step)
            captions.append(f"{key}\n{image.caption}\n")
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
        packages = {tracker.kind: f"'finesight[{extra}]'"} if extra else {}
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
