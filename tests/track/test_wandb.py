"""Tests of the W&B offline log of a real run."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tracking_fixtures import SCORE_KEY, TrackedRun

wandb = pytest.importorskip("wandb", reason="wandb is not installed (extra `wandb`)")

BLOCK, HEAD = 32768, 7


def records(file: Path) -> Iterator[Any]:
    """Read the W&B records of a LevelDB log: blocks with checksum, length and type."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, full = file.read_bytes(), HEAD, b""
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        full += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # all of a record, or its last piece
            record = Record()
            record.ParseFromString(full)
            yield record
            full = b""


@pytest.fixture
def parts(tracked_run: TrackedRun) -> list[list[Any]]:
    """Return records of the original run and of the resumed one."""
    files = sorted(tracked_run.folder("wandb").glob("wandb/offline-run-*/*.wandb"))
    return [list(records(file)) for file in files]


def rows(part: list[Any]) -> list[dict[str, Any]]:
    found = (record.history for record in part if record.HasField("history"))
    return [{_name(item): json.loads(item.value_json) for item in h.item} for h in found]


def _name(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def values(part: list[Any], name: str) -> dict[int, float]:
    return {row["step"]: row[name] for row in rows(part) if name in row}


def test_all_metrics_in_one_run(tracked_run: TrackedRun, parts: list[list[Any]]) -> None:
    first, second = parts
    started = [next(r.run for r in part if r.HasField("run")) for part in parts]
    assert started[0].project == "finesight"
    assert started[0].display_name == "run"
    assert started[0].run_id == started[1].run_id
    assert sorted(values(first, "loss")) == [1, 2, 3, 4, 5, 6]
    assert values(first, "loss") | values(second, "loss") == pytest.approx(tracked_run.losses)
    assert sorted(values(second, "loss")) == [5, 6]
    assert sorted(values(first, SCORE_KEY)) == [0, 2, 4, 6]
    assert sorted(values(first, "learning_rate/language")) == [1, 2, 3, 4, 5, 6]
    axes = {m.step_metric for part in parts for r in part if (m := r.metric).glob_name == "*"}
    assert axes == {"step"}


def test_settings(parts: list[list[Any]]) -> None:
    updates = [u for r in parts[0] if r.HasField("run") for u in r.run.config.update]
    settings = {_name(update): json.loads(update.value_json) for update in updates}
    assert settings["tune"]["lora"]["rank"] == 4
    assert settings["run"]["precision"] == "fp32"


def test_images_with_captions(tracked_run: TrackedRun, parts: list[list[Any]]) -> None:
    captions = values(parts[0], "examples/1.caption")
    assert sorted(captions) == [0, 2, 4, 6]
    assert "question: Which colour?" in str(captions[6])
    assert "before: " in str(captions[6])
    path = values(parts[0], "examples/1.path")[6]
    file = next(tracked_run.folder("wandb").glob(f"wandb/offline-run-*/files/{path}"))
    assert file.read_bytes()[:2] == b"\xff\xd8"


def test_alerts_and_exit_code(parts: list[list[Any]]) -> None:
    alerts = [record.alert for record in parts[0] if record.HasField("alert")]
    assert ("run finished", "INFO") in {(alert.title, alert.level) for alert in alerts}
    assert [record.exit.exit_code for record in parts[0] if record.HasField("exit")] == [0]


def test_dashboard_command_is_printed(tracked_run: TrackedRun) -> None:
    folder = tracked_run.folder("wandb") / "wandb"
    result = tracked_run.console_lines("w&b")
    assert all("offline (" in line and "wandb sync" in line for line in result)
    assert [Path(line.split()[-1]) for line in result] == sorted(folder.glob("offline-run-*"))
