"""Name, description and values of the user in each tracker, as in the callbacks of trainers."""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_task import TinyTask
from tracking_fixtures import flatten, read_wandb_records

from finesight.errors import UserError
from finesight.settings.config import MAX_RUN_DESCRIPTION_CHARS, MAX_RUN_NAME_CHARS
from finesight.settings.recipe import recipe_from_dict
from finesight.track.tracker_manager import start_trackers
from finesight.tracker_components import TRACKERS

NAME, DESCRIPTION = "7B-1kdata / ü", "First try\nwith 500 samples"
CONFIG: dict[str, Any] = {
    "model": "https://modelscope.cn/models/Qwen/Qwen2-VL-7B-Instruct",
    "prompt": "COCO Yes: ",
    "train_data_number": 500,
    "augment": {"scales": [0.5, 1.0]},
    "api_key": "planted",
}
EXPECTED = {
    "config.model": CONFIG["model"],
    "config.train_data_number": "500",
    "config.augment.scales": "[0.5, 1.0]",
    "config.api_key": "[removed]",
    "tune.lora.rank": "4",
}


def start_all_trackers(folder: Path, own: dict[str, Any]) -> list[str]:
    """Start and finish all installed trackers with these settings; return the messages."""
    uris = {"swanlab": "offline", "wandb": "offline", "mlflow": str(folder / "mlruns")}
    track = [
        {"kind": kind, "uri": uris.get(kind)} | own
        for kind in TRACKERS
        if find_spec(kind) is not None
    ]
    recipe = TinyTask(folder / "task").recipe | {"track": track, "output_dir": str(folder / "run")}
    messages: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        with start_trackers(recipe_from_dict(recipe), folder / "run", 0, messages.append) as runs:
            runs.start_run({"device": "cpu"})
    return messages


@pytest.fixture(scope="module")
def named_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder after all installed trackers were started and finished."""
    folder = tmp_path_factory.mktemp("named")
    own = {
        "project": "Qwen2-VL-finetune",
        "run_name": NAME,
        "description": DESCRIPTION,
        "config": CONFIG,
    }
    messages = start_all_trackers(folder, own)
    assert not [message for message in messages if "without it" in message], messages
    return folder / "run"


def check(kind: str, found: tuple[str, str], settings: dict[str, Any]) -> None:
    assert found == (NAME, DESCRIPTION), kind
    flat = flatten(settings)
    assert {name: flat[name] for name in EXPECTED} == EXPECTED


def test_tensorboard(named_run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (folder,) = (named_run / "track" / "tensorboard").iterdir()
    assert folder.name == "7B-1kdata___ü"
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0}).Reload()
    texts = {
        name: events.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in ("description", "settings")
    }
    rows = dict(re.findall(r"^\| (\S+) \| (.*) \|$", texts["settings"], re.M))
    check("tensorboard", (NAME, texts["description"]), rows)


def test_swanlab(named_run: Path) -> None:
    pytest.importorskip("swanlab", reason="swanlab is not installed (extra `track`)")
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    (folder,) = (named_run / "track" / "swanlab").glob("run-*")
    (file,) = folder.glob("*.swanlab")
    reader = DataStoreReader()
    reader.open(file)
    (start,) = (r.start for r in map(Record.FromString, reader) if r.HasField("start"))
    config = yaml.safe_load((folder / "files" / "config.yaml").read_text())
    settings = {name: entry["value"] for name, entry in config.items()}
    assert start.project == "Qwen2-VL-finetune"
    check("swanlab", (start.name, start.description), settings)


def test_wandb(named_run: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (extra `wandb`)")
    (file,) = (named_run / "track" / "wandb").glob("wandb/offline-run-*/*.wandb")
    (run,) = (r.run for r in read_wandb_records(file) if r.HasField("run"))
    settings = {one.key: json.loads(one.value_json) for one in run.config.update}
    check("wandb", (run.display_name, run.notes), settings)


def test_mlflow(named_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed (extra `mlflow`)")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=str(named_run.parent / "mlruns"))
    experiment = client.get_experiment_by_name("Qwen2-VL-finetune")
    (run,) = client.search_runs([experiment.experiment_id])
    description = run.data.tags["mlflow.note.content"]
    check("mlflow", (run.info.run_name, description), run.data.params)


def test_longest_texts_and_unusual_keys_reach_all_trackers(tmp_path: Path) -> None:
    """A tracker that rejects a text is switched off for the whole run."""
    own = {
        "run_name": "训" * MAX_RUN_NAME_CHARS,
        "description": "描" * MAX_RUN_DESCRIPTION_CHARS,
        "config": {
            "训练样本数": 500,
            "a/b: c?\n": 1,
            "..": "x" * 10_000,
            "k" * 300: 10**30,
            "d.e": 1,
            "d": {"e": 2},
        },
    }
    messages = start_all_trackers(tmp_path, own)
    assert not [message for message in messages if "without it" in message], messages
    (folder,) = (tmp_path / "run" / "track" / "tensorboard").iterdir()
    assert folder.name == "训" * 85


def test_settings_in_a_recipe(tmp_path: Path) -> None:
    recipe = TinyTask(tmp_path).recipe | {"output_dir": "run"}

    def read(track: object, *overrides: str) -> Any:
        return recipe_from_dict(recipe | {"track": track}, overrides).track[0]

    dated = yaml.safe_load("{kind: swanlab, config: {day: 2024-05-01, 1: [a]}}")
    assert read(dated).config == {"day": "2024-05-01", "1": ["a"]}
    overridden = read("swanlab", "track.run_name=first", "track.config={github: mine}")
    assert (overridden.run_name, overridden.config) == ("first", {"github": "mine"})
    assert read("wandb").run_name is None
    for track, name in (
        ({"kind": "swanlab", "run_name": ""}, "run_name"),
        ({"kind": "swanlab", "run_name": "x" * 101}, "run_name"),
        ({"kind": "wandb", "config": ["a"]}, "config"),
        ({"kind": "wandb", "config": {(1, 2): "a"}}, "config"),
        ({"kind": "wandb", "config": {"ratio": float("nan")}}, "config"),
        ({"kind": "wandb", "config": {"ratios": [float("-inf")]}}, "config"),
        ({"kind": "swanlab", "description": "x" * 1025}, "description"),
        ({"kind": "wandb", "experiment_name": "a"}, "experiment_name"),
    ):
        with pytest.raises(UserError, match=rf"track.*{name}"):
            read(track)
