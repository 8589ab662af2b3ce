"""Where features go: by their size, the setting, and what is free."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import TinyFamily
from vision_cache_fixtures import build_vision_store, make_train_state

from finesight.config import VisionCacheMode
from finesight.host_memory import available_memory
from finesight.model.vlm import VisionLanguageModel
from finesight.train.vision_cache import (
    CacheTier,
    FreeBytes,
    choose_cache_tier,
    estimate_feature_bytes,
    free_gpu_memory,
)

FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen3_vl", "qwen"]
GB = 10**9
H200 = FreeBytes(gpu=130 * GB, memory=120 * GB, disk=64 * GB)
DESKTOP = FreeBytes(gpu=6 * GB, memory=20 * GB, disk=64 * GB)
LAPTOP = FreeBytes(gpu=None, memory=4 * GB, disk=0)


@pytest.mark.parametrize(
    ("setting", "size", "free", "location"),
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
def test_first_tier_with_enough_space_is_used(
    setting: VisionCacheMode, size: float, free: FreeBytes, location: CacheTier | None
) -> None:
    assert choose_cache_tier(setting, int(size), int(size), free) == location


def test_cached_files_need_no_extra_space() -> None:
    crowded = FreeBytes(gpu=None, memory=GB, disk=GB)
    assert choose_cache_tier("auto", 30 * GB, 2 * GB, crowded) is None
    assert choose_cache_tier("auto", 30 * GB, GB, crowded) == "disk"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_feature_bytes_match_actual_features(
    tmp_path: Path, family: TinyFamily, precision: str
) -> None:
    """Each image is in one sample; a model on the meta device suffices."""
    session = make_train_state(tmp_path / "task", family=family, precision=precision)
    model, patches = session.model, session.train_data.stats.num_patches
    assert isinstance(model, VisionLanguageModel)
    known = build_vision_store(session).reader
    dtype, shape = known.tensor_spec(session.train_data.stats.sample_indices)
    expected = torch.Size(shape).numel() * dtype.itemsize
    assert estimate_feature_bytes(patches, model, session.hardware.dtype) == expected
    assert estimate_feature_bytes(patches, model.to("meta"), session.hardware.dtype) == expected


def test_cpu_has_no_gpu_memory() -> None:
    assert free_gpu_memory(torch.device("cpu")) is None
    assert available_memory() > 0


def test_memory_of_machine_and_container(tmp_path: Path) -> None:
    system, group = tmp_path / "proc", tmp_path / "group"
    system.mkdir()
    group.mkdir()
    meminfo = "MemTotal:       2000 kB\nMemFree:  10 kB\nMemAvailable:    1000 kB\n"
    (system / "meminfo").write_text(meminfo)
    assert available_memory(system, group) == 1000 * 1024
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("600\n")
    assert available_memory(system, group) == 1000 * 1024
    (group / "memory.max").write_text("1000\n")
    assert available_memory(system, group) == 400
    (group / "memory.stat").write_text("anon 5\ninactive_file 250\nslab 3\n")
    assert available_memory(system, group) == 650
    (group / "memory.current").write_text("1600\n")
    assert available_memory(system, group) == 0
    assert available_memory(tmp_path / "nothing", tmp_path / "nothing") > 1 << 20
