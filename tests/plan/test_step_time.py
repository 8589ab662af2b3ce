"""Step time estimates: effects of GPU, precision, graphs and settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import create_tiny_model

from finesight.config import Recipe, TrainFileSettings
from finesight.model_folder import ModelFolder
from finesight.plan.planned_model import PlannedModel, build_planned_model
from finesight.plan.planned_pack import PlannedPack
from finesight.plan.step_time import FP8_SPEEDUP, StepTime
from finesight.plan.target_device import TargetDevice, build_named_target, measure_local_target

PACK = PlannedPack((500,) * 40, ((1, 20, 20),) * 40, 4000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "deep", preset="finesight-tiny")


def make_estimator(
    folder: Path, target: TargetDevice, train: dict[str, Any], tune: dict[str, Any]
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
    return build_planned_model(ModelFolder(folder), recipe, (), target)


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
    fast_timer, slow_timer = (
        make_estimator(folder, target, {}, lora).step_timer for target in (fast, slow)
    )
    baseline = fast_timer.estimate_step([PACK], 0.0)
    assert slow_timer.estimate_step([PACK], 0.0).matmul_s > 10 * baseline.matmul_s
    assert slow_timer.estimate_step([PACK], 0.0).memory_s > 10 * baseline.memory_s
    full, half = (fast_timer.estimate_step([PACK], fraction) for fraction in (1.0, 0.5))
    assert baseline.matmul_s < half.matmul_s < full.matmul_s
    # Two forward passes and one backward pass instead of one each: less than 1.5 times the FLOPs.
    assert full.matmul_s < 1.5 * baseline.matmul_s
    assert fast_timer.estimate_step([PACK, PACK], 0.0).matmul_s == pytest.approx(
        2 * baseline.matmul_s
    )
    assert fast_timer.estimate_step([PACK, PACK], 0.0).optimizer_s == baseline.optimizer_s
    cached = fast_timer.estimate_step([PACK], 0.0, has_cached_features=True)
    assert cached.matmul_s < baseline.matmul_s
    assert cached.data_loading_s == 0


def test_fp8_products_are_faster(folder: Path) -> None:
    target, lora = build_named_target("H200", "bf16"), {"language": "lora"}
    baseline, language_fp8, all_fp8 = (
        make_estimator(folder, target, {}, lora | quantize).step_timer
        for quantize in (
            {},
            {"quantize": {"fp8": ["language"]}},
            {"quantize": {"fp8": ["language", "vision"]}},
        )
    )
    times = [timer.estimate_step([PACK], 0.0) for timer in (baseline, language_fp8, all_fp8)]
    products = [time.matmul_s for time in times]
    assert products == sorted(products, reverse=True)
    assert 1.0 < products[0] / products[2] < FP8_SPEEDUP
    # In contrast to NF4, FP8 weights are not dequantized.
    assert times[0].memory_s == pytest.approx(times[2].memory_s, rel=0.1)
    cached_times = [
        timer.estimate_step([PACK], 0.0, has_cached_features=True).matmul_s
        for timer in (language_fp8, all_fp8)
    ]
    assert cached_times[0] == cached_times[1]


def test_fused_kernels_and_graphs_reduce_launch_time(folder: Path) -> None:
    h200, t4 = (build_named_target(name, "bf16") for name in ("H200", "T4"))
    lora, text_pack = {"language": "lora"}, PlannedPack((100,) * 8, (), 80)
    fused, unfused = (
        make_estimator(folder, target, {}, lora).step_timer
        for target in (h200, replace(h200, compute=t4.compute))
    )
    launch_s = fused.estimate_step([text_pack], 0.0, use_graphs=False).host_s
    assert 0 < launch_s < unfused.estimate_step([text_pack], 0.0, use_graphs=False).host_s
    assert fused.estimate_step([text_pack], 0.0).host_s == 0
    assert (
        unfused.estimate_step([text_pack], 0.0).host_s
        == unfused.estimate_step([text_pack], 0.0, use_graphs=False).host_s
    )
    image_pack = PlannedPack(text_pack.lengths, ((1, 20, 20),), 80)
    assert (
        fused.estimate_step([image_pack], 0.0).host_s
        > fused.estimate_step([image_pack], 0.0, has_cached_features=True).host_s
        == 0
    )
    assert fused.estimate_step([PACK], 0.0).host_s > launch_s


def test_optimizer_time_increases_with_parameters(folder: Path) -> None:
    target = build_named_target("H200", "bf16")
    full_tuning = {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"}
    lora = make_estimator(folder, target, {}, {"language": "lora"}).step_timer.estimate_step(
        [PACK], 0.0
    )
    full = make_estimator(folder, target, {}, full_tuning).step_timer.estimate_step([PACK], 0.0)
    adamw_8bit = make_estimator(
        folder, target, {"optimizer": "adamw_8bit"}, full_tuning
    ).step_timer.estimate_step([PACK], 0.0)
    assert lora.optimizer_s < full.optimizer_s < adamw_8bit.optimizer_s


def test_data_wait_depends_on_workers(folder: Path) -> None:
    target = build_named_target("H200", "bf16")
    main_process = make_estimator(
        folder, target, {"num_workers": 0}, {"language": "lora"}
    ).step_timer.estimate_step([PACK], 0.0)
    workers = make_estimator(
        folder, target, {"num_workers": 8}, {"language": "lora"}
    ).step_timer.estimate_step([PACK], 0.0)
    assert main_process.is_loading_blocking
    assert not workers.is_loading_blocking
    assert main_process.data_loading_s == pytest.approx(8 * workers.data_loading_s)


def test_own_machine_is_measured() -> None:
    target = measure_local_target("cpu", "auto")
    assert target.is_measured
    assert target.precision == "fp32"
    assert not target.compute.is_cuda
    assert 1e9 < target.peak_flops < 1e15
    assert 1e8 < target.memory_bandwidth < 1e13
    assert target.memory_bytes > 1e9
    assert measure_local_target("cpu", "bf16").compute.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [("T4", "auto", "fp16"), ("A10", "auto", "bf16"), ("A10", "fp32", "fp32")],
)
def test_precision_of_named_gpu(name: str, precision: Any, expected: str) -> None:
    target = build_named_target(name, precision)
    assert target.precision == expected
    assert target.compute.has_varlen_attention == (expected == "bf16")
    assert not target.is_measured
