"""What makes a step quicker or slower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finesight.config import Recipe, TrainFileSettings
from finesight.model.tiny import create_tiny_model
from finesight.model_folder import ModelFolder
from finesight.plan.planned_model import PlannedModel, build_planned_model
from finesight.plan.planned_pack import PlannedPack
from finesight.plan.step_time import FP8_SPEEDUP, StepTime
from finesight.plan.target_device import TargetDevice, build_named_target, measure_local_target

LOAD = PlannedPack((500,) * 40, ((1, 20, 20),) * 40, 4000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "deep", preset="finesight-tiny")


def make_estimator(
    folder: Path, on: TargetDevice, train: dict[str, Any], tune: dict[str, Any]
) -> PlannedModel:
    recipe = Recipe.model_validate(
        {
            "model": str(folder),
            "data": {"train": (TrainFileSettings(path=Path("none")),)},
            "tune": tune,
            "train": {"num_workers": 4, **train},
            "output_dir": Path("none"),
        }
    )
    return build_planned_model(ModelFolder(folder), recipe, (), on)


def test_step_time_is_longest_part_plus_optimizer() -> None:
    step = StepTime(
        matmul_s=3.0,
        memory_s=2.0,
        host_s=4.0,
        optimizer_s=0.5,
        data_loading_s=1.0,
        is_loading_blocking=False,
    )
    assert step.total == 5.5
    assert replace(step, host_s=7.0).total == 7.5
    assert replace(step, data_loading_s=9.0).total == 9.0
    assert replace(step, is_loading_blocking=True).total == 6.5


def test_time_scales_with_gpu_and_trained_parts(folder: Path) -> None:
    fast, slow = (build_named_target(name, "bf16") for name in ("H200", "RTX 3060"))
    lora = {"language": "lora"}
    on_fast, on_slow = (make_estimator(folder, on, {}, lora).step_timer for on in (fast, slow))
    baseline = on_fast.estimate_step([LOAD], 0.0)
    assert on_slow.estimate_step([LOAD], 0.0).matmul_s > 10 * baseline.matmul_s
    assert on_slow.estimate_step([LOAD], 0.0).memory_s > 10 * baseline.memory_s
    full, half = (on_fast.estimate_step([LOAD], share) for share in (1.0, 0.5))
    assert baseline.matmul_s < half.matmul_s < full.matmul_s
    # Twice forwards and once back in place of once each: never half as much again.
    assert full.matmul_s < 1.5 * baseline.matmul_s
    assert on_fast.estimate_step([LOAD, LOAD], 0.0).matmul_s == pytest.approx(2 * baseline.matmul_s)
    assert on_fast.estimate_step([LOAD, LOAD], 0.0).optimizer_s == baseline.optimizer_s
    seen = on_fast.estimate_step([LOAD], 0.0, has_cached_features=True)
    assert seen.matmul_s < baseline.matmul_s
    assert seen.data_loading_s == 0


def test_fp8_products_are_faster(folder: Path) -> None:
    on, lora = build_named_target("H200", "bf16"), {"language": "lora"}
    baseline, some, both = (
        make_estimator(folder, on, {}, lora | fp8).step_timer
        for fp8 in (
            {},
            {"quantize": {"fp8": ["language"]}},
            {"quantize": {"fp8": ["language", "vision"]}},
        )
    )
    times = [clock.estimate_step([LOAD], 0.0) for clock in (baseline, some, both)]
    products = [time.matmul_s for time in times]
    assert products == sorted(products, reverse=True)
    assert 1.0 < products[0] / products[2] < FP8_SPEEDUP
    # Nothing is made wide, as in four bits.
    assert times[0].memory_s == pytest.approx(times[2].memory_s, rel=0.1)
    of_encoder = [
        clock.estimate_step([LOAD], 0.0, has_cached_features=True).matmul_s
        for clock in (some, both)
    ]
    assert of_encoder[0] == of_encoder[1]


def test_fused_kernels_and_graphs_reduce_launch_time(folder: Path) -> None:
    fast, old = (build_named_target(name, "bf16") for name in ("H200", "T4"))
    lora, small = {"language": "lora"}, PlannedPack((100,) * 8, (), 80)
    few, many = (
        make_estimator(folder, on, {}, lora).step_timer
        for on in (fast, replace(fast, compute=old.compute))
    )
    launched = few.estimate_step([small], 0.0, use_graphs=False).host_s
    assert 0 < launched < many.estimate_step([small], 0.0, use_graphs=False).host_s
    assert few.estimate_step([small], 0.0).host_s == 0
    assert (
        many.estimate_step([small], 0.0).host_s
        == many.estimate_step([small], 0.0, use_graphs=False).host_s
    )
    seen = PlannedPack(small.lengths, ((1, 20, 20),), 80)
    assert (
        few.estimate_step([seen], 0.0).host_s
        > few.estimate_step([seen], 0.0, has_cached_features=True).host_s
        == 0
    )
    assert few.estimate_step([LOAD], 0.0).host_s > launched


def test_optimizer_time_increases_with_parameters(folder: Path) -> None:
    on = build_named_target("H200", "bf16")
    everything = {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"}
    lora = make_estimator(folder, on, {}, {"language": "lora"}).step_timer.estimate_step(
        [LOAD], 0.0
    )
    full = make_estimator(folder, on, {}, everything).step_timer.estimate_step([LOAD], 0.0)
    eight = make_estimator(
        folder, on, {"optimizer": "adamw_8bit"}, everything
    ).step_timer.estimate_step([LOAD], 0.0)
    assert lora.optimizer_s < full.optimizer_s < eight.optimizer_s


def test_data_wait_depends_on_workers(folder: Path) -> None:
    on = build_named_target("H200", "bf16")
    alone = make_estimator(
        folder, on, {"num_workers": 0}, {"language": "lora"}
    ).step_timer.estimate_step([LOAD], 0.0)
    ahead = make_estimator(
        folder, on, {"num_workers": 8}, {"language": "lora"}
    ).step_timer.estimate_step([LOAD], 0.0)
    assert alone.is_loading_blocking
    assert not ahead.is_loading_blocking
    assert alone.data_loading_s == pytest.approx(8 * ahead.data_loading_s)


def test_own_machine_is_measured() -> None:
    found = measure_local_target("cpu", "auto")
    assert found.is_measured
    assert found.precision == "fp32"
    assert not found.compute.is_cuda
    assert 1e9 < found.peak_flops < 1e15
    assert 1e8 < found.memory_bandwidth < 1e13
    assert found.memory_bytes > 1e9
    assert measure_local_target("cpu", "bf16").compute.element_size == 2


@pytest.mark.parametrize(
    ("name", "precision", "computed"),
    [("T4", "auto", "fp16"), ("A10", "auto", "bf16"), ("A10", "fp32", "fp32")],
)
def test_precision_of_named_gpu(name: str, precision: Any, computed: str) -> None:
    found = build_named_target(name, precision)
    assert found.precision == computed
    assert found.compute.has_varlen_attention == (computed == "bf16")
    assert not found.is_measured
