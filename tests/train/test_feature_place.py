"""Where features go: by their size, the setting, and what is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from looking_run import seen_by, session_of

from finesight.config import Cache
from finesight.memory import free_memory
from finesight.model.network import VisionLanguageModel
from finesight.model.tiny import TinyFamily
from finesight.train.feature_place import (
    Free,
    Place,
    choose_place,
    feature_bytes,
    free_on_gpu,
)

FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen3_vl", "qwen"]
GB = 10**9
H200 = Free(gpu=130 * GB, memory=120 * GB, disk=64 * GB)
DESKTOP = Free(gpu=6 * GB, memory=20 * GB, disk=64 * GB)
LAPTOP = Free(gpu=None, memory=4 * GB, disk=0)


@pytest.mark.parametrize(
    ("setting", "size", "free", "place"),
    [
        ("auto", GB * 0.15, H200, "gpu"),
        ("auto", 8 * GB, H200, "gpu"),
        ("auto", 9 * GB, H200, "memory"),
        ("auto", 31 * GB, H200, "memory"),
        ("auto", 61 * GB, H200, "disk"),
        ("auto", 65 * GB, H200, None),
        ("auto", GB * 0.15, DESKTOP, "gpu"),
        ("auto", GB, DESKTOP, "memory"),
        ("auto", 31 * GB, DESKTOP, "disk"),
        ("auto", 2 * GB, LAPTOP, "memory"),
        ("auto", 3 * GB, LAPTOP, None),
        ("memory", GB * 0.15, H200, "gpu"),
        ("memory", 61 * GB, H200, None),
        ("disk", 1000, H200, "disk"),
        ("disk", 1000, LAPTOP, None),
        ("never", 1000, H200, None),
    ],
)
def test_the_first_place_with_room(
    setting: Cache, size: float, free: Free, place: Place | None
) -> None:
    assert choose_place(setting, int(size), int(size), free) == place


def test_what_is_on_disk_already_needs_no_room_there() -> None:
    crowded = Free(gpu=None, memory=GB, disk=GB)
    assert choose_place("auto", 30 * GB, 2 * GB, crowded) is None
    assert choose_place("auto", 30 * GB, GB, crowded) == "disk"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_bytes_are_those_that_features_take(
    tmp_path: Path, family: TinyFamily, precision: str
) -> None:
    """Where every picture is in one sample; a model without weights is enough to know."""
    session = session_of(tmp_path / "task", family=family, precision=precision)
    model, patches = session.model, session.train.survey.patches
    assert isinstance(model, VisionLanguageModel)
    known = seen_by(session).known
    dtype, shape = known.form(session.train.survey.kept)
    expected = torch.Size(shape).numel() * dtype.itemsize
    assert feature_bytes(patches, model, session.machine.dtype) == expected
    assert feature_bytes(patches, model.to("meta"), session.machine.dtype) == expected


def test_a_cpu_has_no_gpu() -> None:
    assert free_on_gpu(torch.device("cpu")) is None
    assert free_memory() > 0


def test_memory_of_a_machine_and_of_a_container(tmp_path: Path) -> None:
    system, group = tmp_path / "proc", tmp_path / "group"
    system.mkdir()
    group.mkdir()
    meminfo = "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:    1000 kB\n"
    (system / "meminfo").write_text(meminfo)
    assert free_memory(system, group) == 1000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("600\n")
    assert free_memory(system, group) == 1000 * 1024
    (group / "memory.max").write_text("1000\n")
    assert free_memory(system, group) == 400
    (group / "memory.stat").write_text("anon 5\ninactive_file 250\nslab 3\n")
    assert free_memory(system, group) == 650
    (group / "memory.current").write_text("1600\n")
    assert free_memory(system, group) == 0
    assert free_memory(tmp_path / "nothing", tmp_path / "nothing") > 1 << 20
