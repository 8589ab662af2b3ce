"""Run with all installed trackers, and what each of them has logged of it."""

import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_task import TinyTask, rewind_to_checkpoint

from finesight.settings.config import TrackerKind
from finesight.tracker_components import TRACKERS

METRIC = {"metric": "ocr", "every": 2, "max_new_tokens": 4}
PLANTED_SECRETS = {name: f"planted-{name}" for name in ("variable", "password", "query")}
PLANTED_SECRETS["token"] = "hf_PlantedPlantedPlantedPlanted"
"""Secrets in the settings of the run."""

PROMPT = (
    f"Answer. {PLANTED_SECRETS['variable']} {PLANTED_SECRETS['token']}"
    f" s3://me:{PLANTED_SECRETS['password']}@store/x?token={PLANTED_SECRETS['query']}"
)
LOGS_OF_PACKAGES = ("WANDB_", "SWANLAB_", "MLFLOW_", "TRACKIO_")


@dataclass(frozen=True)
class TrackedRun:
    """Run whose first part ends after step 6. The second part resumes from step 4."""

    run: Path
    losses: dict[int, float]
    mlflow: str
    trackio: Path

    def folder(self, kind: TrackerKind) -> Path:
        return self.run / "track" / kind


def train_tracked_run(folder: Path) -> Iterator[TrackedRun]:
    home = folder / "alice"
    home.mkdir()
    mlflow = str(folder / "mlruns")
    trackio = folder / "trackio"
    settings = {"HOME": str(home), "SOME_SERVICE_API_KEY": PLANTED_SECRETS["variable"]}
    settings |= {"MLFLOW_ALLOW_FILE_STORE": "true", "TRACKIO_DIR": str(trackio)}
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(LOGS_OF_PACKAGES)]:
            patch.delenv(name)
        for name, value in settings.items():
            patch.setenv(name, value)
        patch.chdir(folder)
        task = TinyTask(home)
        task.recipe["data"]["system_prompt"] = PROMPT
        installed = [kind for kind in TRACKERS if find_spec(kind) is not None]
        track = [{"kind": k, "uri": mlflow if k == "mlflow" else None} for k in installed]
        task.run(eval=METRIC, track=track)
        run = rewind_to_checkpoint(task.folder / "run")
        task.run(resume=True, eval=METRIC, track=track)
        losses = {line["step"]: line["loss"] for line in task.read_metrics() if "loss" in line}
        yield TrackedRun(run, losses, mlflow, trackio)


Values = dict[int, Any]
"""Values of a metric by step."""


@dataclass(frozen=True)
class LoggedRun:
    """Contents of a tracker. `parts` are the losses logged before and after the resume."""

    names: set[tuple[str, ...]]
    metrics: dict[str, Values]
    parts: list[Values]
    settings: dict[str, str]
    captions: dict[int, str]
    image: bytes
    alerts: set[str]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return settings as in `{"tune.lora.rank": "4"}`."""
    flat: dict[str, str] = {}
    for name, value in tree.items():
        is_tree = isinstance(value, dict)
        flat |= flatten(value, f"{prefix}{name}.") if is_tree else {f"{prefix}{name}": str(value)}
    return flat


def merge_parts(parts: list[dict[str, Values]]) -> dict[str, Values]:
    first, second = parts
    return {name: values | second.get(name, {}) for name, values in first.items()}


def read_tensorboard(run: TrackedRun) -> LoggedRun:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = str(run.folder("tensorboard"))
    events = EventAccumulator(folder, size_guidance={"images": 0, "tensors": 0}).Reload()

    def texts(name: str) -> dict[int, str]:
        found = events.Tensors(f"{name}/text_summary")
        return {event.step: event.tensor_proto.string_val[0].decode() for event in found}

    scalars = {name: events.Scalars(name) for name in events.Tags()["scalars"]}
    losses = [event.step for event in scalars["loss"]]
    assert losses == sorted(set(losses)), "repeated steps are logged twice"
    return LoggedRun(
        names={("run",)},
        metrics={name: {e.step: e.value for e in scalars[name]} for name in scalars},
        parts=[],
        settings=dict(re.findall(r"^\| (\S+) \| (.*) \|$", texts("settings")[0], re.M)),
        captions=texts("examples/1"),
        image=events.Images("examples/1")[0].encoded_image_string,
        alerts=set(re.findall(r"^\*\*(.*)\*\*", "\n".join(texts("alerts").values()), re.M)),
    )


def read_swanlab(run: TrackedRun) -> LoggedRun:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    folders = sorted(run.folder("swanlab").glob("run-*"))
    names, parts, shown = set(), [], {}
    for folder in folders:
        reader, metrics = DataStoreReader(), {}
        (file,) = folder.glob("*.swanlab")
        reader.open(file)
        for line in reader:
            record = Record.FromString(line)
            if record.HasField("start"):
                names.add((record.start.project, record.start.name, record.start.id))
            if record.HasField("scalar"):
                scalar = record.scalar
                metrics.setdefault(scalar.key, {})[scalar.step] = scalar.value.number
            if record.HasField("media") and record.media.key == "examples/1":
                (shown[record.media.step],) = record.media.value.items
        parts.append(metrics)
    config = yaml.safe_load((folders[0] / "files" / "config.yaml").read_text())
    image = next(run.folder("swanlab").glob(f"run-*/media/image/{shown[6].filename}"))
    texts = run.folder("swanlab").glob("run-*/media/text/*.txt")
    alerts = {text.read_text().partition(":")[0] for text in texts}
    return LoggedRun(
        names,
        merge_parts(parts),
        [part["loss"] for part in parts],
        flatten({name: value["value"] for name, value in config.items()}),
        {step: item.caption for step, item in shown.items()},
        image.read_bytes(),
        alerts,
    )


def read_wandb_records(file: Path) -> Iterator[Any]:
    """Read the W&B records of a LevelDB log: blocks with checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record

    block_size, head_size = 32768, 7
    data, at, full = file.read_bytes(), head_size, b""
    while at + head_size <= len(data):
        _, length, kind = struct.unpack_from("<IHB", data, at)
        full += data[at + head_size : at + head_size + length]
        at += head_size + length
        if block_size - at % block_size < head_size:
            at += block_size - at % block_size
        if kind in (1, 4):  # all of a record, or its last piece
            yield Record.FromString(full)
            full = b""


def read_wandb(run: TrackedRun) -> LoggedRun:
    names, alerts, parts, settings = set(), set(), [], {}
    axes, exit_codes = set(), []
    for file in sorted(run.folder("wandb").glob("wandb/offline-run-*/*.wandb")):
        metrics: dict[str, Values] = {}
        for record in read_wandb_records(file):
            if record.HasField("run"):
                names.add((record.run.project, record.run.display_name, record.run.run_id))
                settings |= {u.key: json.loads(u.value_json) for u in record.run.config.update}
            if record.HasField("history"):
                items = record.history.item
                row = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}
                for name, value in row.items():
                    metrics.setdefault(name, {})[row["step"]] = value
            if record.HasField("alert"):
                alerts.add(record.alert.title)
            if record.HasField("metric") and record.metric.glob_name == "*":
                axes.add(record.metric.step_metric)
            if record.HasField("exit"):
                exit_codes.append(record.exit.exit_code)
        parts.append(metrics)
    assert (axes, exit_codes) == ({"step"}, [0, 0])
    metrics = merge_parts(parts)
    path = metrics["examples/1.path"][6]
    image = next(run.folder("wandb").glob(f"wandb/offline-run-*/files/{path}")).read_bytes()
    captions = {step: str(text) for step, text in metrics["examples/1.caption"].items()}
    losses = [part["loss"] for part in parts]
    return LoggedRun(names, metrics, losses, flatten(settings), captions, image, alerts)


def read_mlflow(run: TrackedRun) -> LoggedRun:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=run.mlflow)
        experiment = client.get_experiment_by_name("finesight")
        (found,) = client.search_runs([experiment.experiment_id])
        run_id = found.info.run_id
        histories = {n: client.get_metric_history(run_id, n) for n in found.data.metrics}
        paths = {
            int(re.findall(r"examples\W1\Wstep\W(\d+)", file.path)[0]): file.path
            for file in client.list_artifacts(run_id, "images")
            if re.search(r"examples\W1\W.*png$", file.path)
        }
        files = {step: f"examples/captions-step-{step}.txt" for step in paths}
        texts = {step: client.download_artifacts(run_id, files[step]) for step in files}
        captions = {step: Path(text).read_text() for step, text in texts.items()}
        image = Path(client.download_artifacts(run_id, paths[6])).read_bytes()
    assert found.info.status == "FINISHED"
    assert found.data.tags["mlflow.user"] == "finesight", "the name of the user is logged"
    return LoggedRun(
        names={("finesight", found.info.run_name)},
        metrics={name: {m.step: m.value for m in history} for name, history in histories.items()},
        parts=[],
        settings=found.data.params,
        captions=captions,
        image=image,
        alerts={tag.rpartition("/")[2] for tag in found.data.tags if tag.startswith("alert/")},
    )


READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage as Store
runs = Store.get_runs("finesight")
print(json.dumps([runs, Store.get_run_config("finesight", runs[0]),
    Store.get_logs("finesight", runs[0]), Store.get_alerts("finesight")]))
"""


def read_trackio(run: TrackedRun) -> LoggedRun:
    # The package reads the name of its folder from the environment when it is imported.
    environment = os.environ | {"TRACKIO_DIR": str(run.trackio)}
    command = [sys.executable, "-c", READ_TRACKIO]
    output = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    names, settings, logs, alerts = json.loads(output)
    metrics: dict[str, Values] = {}
    for log in logs:
        for name, value in log.items():
            metrics.setdefault(name, {})[log["step"]] = value
    images = metrics["examples/1"]
    assert settings["_Username"] is None
    return LoggedRun(
        names={("finesight", name) for name in names},
        metrics=metrics,
        parts=[],
        settings=flatten(settings),
        captions={step: image["caption"] for step, image in images.items()},
        image=(run.trackio / "media" / images[6]["file_path"]).read_bytes(),
        alerts={alert["title"] for alert in alerts},
    )


READERS = {
    one.__name__.removeprefix("read_"): one
    for one in (read_tensorboard, read_swanlab, read_wandb, read_mlflow, read_trackio)
}


SWANLAB_SOURCE = '''
"""Like SwanLab, as far as a run needs it; `broken` is called at every figure."""
import os, sys, threading, types

calls = 0
def broken():
    {fault}

class Run:
    mode, dir = "offline", __import__("pathlib").Path("run-fake")
    def log(self, data, step=None):
        global calls
        calls += 1
        broken()
    def finish(self, state="success", error=None):
        open("finished-" + state, "x").close()

class Settings:
    Probe = Terminal = staticmethod(lambda **given: given)
    api_key, mode = None, "online"
    integration = types.SimpleNamespace(webhook=types.SimpleNamespace(url=""))
    def __init__(self, **given):
        pass

def init(**given):
    return Run()
Image = Text = lambda *given, **named: given
'''

FAULT_CODE = {
    "raises": "if calls == 3: raise ConnectionError('planted: the server is gone')",
    "hangs": "threading.Event().wait()",
    "dies": "if calls == 3: os._exit(9)",
    "crashes": "if calls == 3: os.kill(os.getpid(), 11)",
}


def install_broken_tracker(monkeypatch: pytest.MonkeyPatch, folder: Path, fault: str) -> None:
    """Install a faulty `swanlab` package for this process and its children."""
    install_package(monkeypatch, folder, "swanlab", SWANLAB_SOURCE.format(fault=FAULT_CODE[fault]))


def install_package(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, source: str) -> None:
    package = folder / f"{name}-packages"
    package.mkdir()
    (package / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setenv("PYTHONPATH", str(package), prepend=":")
