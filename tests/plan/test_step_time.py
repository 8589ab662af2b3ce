"""Step time estimates: effects of GPU, precision, graphs and settings."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from case_files import load_cases
from plan_fixtures import plan_tiny_model

from finesight.errors import UserError
from finesight.plan.dry_run import PlannedPack
from finesight.plan.step_time import (
    FP8_SPEEDUP,
    StepTime,
    StepTimeEstimator,
    TargetDevice,
    build_named_target,
    find_gpu_spec,
    measure_local_target,
)

PACK = PlannedPack((500,) * 40, ((1, 20, 20),) * 40, 4000)
FULL = {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"}


H200 = build_named_target("H200", "bf16")


def make_timer(target: TargetDevice = H200, **settings: Any) -> StepTimeEstimator:
    return plan_tiny_model(target, **settings).step_timer


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


def test_time_scales_with_gpu_and_trained_parts() -> None:
    timer = make_timer()
    baseline, half, full = (timer.estimate_step([PACK], part) for part in (0.0, 0.5, 1.0))
    slow = make_timer(build_named_target("RTX 3060", "bf16")).estimate_step([PACK], 0.0)
    assert slow.matmul_s > 10 * baseline.matmul_s
    assert slow.memory_s > 10 * baseline.memory_s
    assert baseline.matmul_s < half.matmul_s < full.matmul_s
    # Two forward passes and one backward pass instead of one each: less than 1.5 times the FLOPs.
    assert full.matmul_s < 1.5 * baseline.matmul_s
    double = timer.estimate_step([PACK, PACK], 0.0)
    assert double.matmul_s == pytest.approx(2 * baseline.matmul_s)
    assert double.optimizer_s == baseline.optimizer_s
    cached = timer.estimate_step([PACK], 0.0, has_cached_features=True)
    assert cached.matmul_s < baseline.matmul_s
    assert cached.data_loading_s == 0


def test_fp8_products_are_faster() -> None:
    timers = [
        make_timer(tune={"quantize": {"fp8": parts}})
        for parts in (None, ["language"], ["language", "vision"])
    ]
    times = [timer.estimate_step([PACK], 0.0) for timer in timers]
    products = [time.matmul_s for time in times]
    assert products == sorted(products, reverse=True)
    assert 1.0 < products[0] / products[2] < FP8_SPEEDUP
    # In contrast to NF4, FP8 weights are not dequantized.
    assert times[0].memory_s == pytest.approx(times[2].memory_s, rel=0.1)
    language, both = (
        timer.estimate_step([PACK], 0.0, has_cached_features=True) for timer in timers[1:]
    )
    assert language.matmul_s == both.matmul_s


def test_fused_kernels_and_graphs_reduce_launch_time() -> None:
    fused = make_timer()
    unfused = make_timer(replace(H200, compute=build_named_target("T4", "bf16").compute))
    text_pack = PlannedPack((100,) * 8, (), 80)
    image_pack = replace(text_pack, grid_thw=((1, 20, 20),))

    def launch_s(timer: StepTimeEstimator, pack: PlannedPack, **options: bool) -> float:
        return timer.estimate_step([pack], 0.0, **options).host_s

    eager_s = launch_s(fused, text_pack, use_graphs=False)
    assert 0 < eager_s < launch_s(unfused, text_pack, use_graphs=False)
    assert launch_s(unfused, text_pack) == launch_s(unfused, text_pack, use_graphs=False)
    assert launch_s(fused, text_pack) == 0
    assert launch_s(fused, image_pack) > launch_s(fused, image_pack, has_cached_features=True) == 0
    assert launch_s(fused, PACK) > eager_s


def test_optimizer_time_increases_with_parameters() -> None:
    lora, full, adamw_8bit = (
        timer.estimate_step([PACK], 0.0).optimizer_s
        for timer in (
            make_timer(),
            make_timer(tune=FULL),
            make_timer(tune=FULL, optimizer="adamw_8bit"),
        )
    )
    assert lora < full < adamw_8bit


def test_data_wait_depends_on_workers() -> None:
    main_process, workers = (
        make_timer(num_workers=count).estimate_step([PACK], 0.0) for count in (0, 8)
    )
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


CASES = load_cases("target_device")


@pytest.mark.parametrize(("spelling", "name"), CASES["test_gpu_name_spellings"])
def test_gpu_name_spellings(spelling: str, name: str) -> None:
    assert find_gpu_spec(spelling).name == name


def test_unknown_gpu_suggests_similar_names() -> None:
    with pytest.raises(UserError, match="'RTX 4095'") as caught:
        find_gpu_spec("RTX 4095")
    assert caught.value.where == "--gpu"
    assert "RTX 4090" in caught.value.expected
    with pytest.raises(UserError, match=r"T4.*B200"):
        find_gpu_spec("abacus")


@pytest.mark.parametrize(
    ("name", "precision", "expected"),
    [("T4", "auto", "fp16"), ("A10", "auto", "bf16"), ("A10", "fp32", "fp32")],
)
def test_precision_of_named_gpu(name, precision, expected):
    target = build_named_target(name, precision)
    assert (target.precision, target.is_measured) == (expected, False)
    assert target.compute.has_varlen_attention == (expected == "bf16")
