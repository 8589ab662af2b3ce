"""Run a smoke test on each device: create samples, train, and generate."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from finesight.doctor import probe_process
from finesight.doctor.diagnosis import Diagnosis, make_error, make_ok
from finesight.doctor.gpu_check import CUDA_VISIBLE_DEVICES, TorchInfo, list_visible_devices

STAGES = ("load", "data", "train", "generate")

TIMEOUT_S = 180.0
"""Timeout of the smoke test per device in seconds.

The test takes about 10 seconds, and longer if kernels are compiled.
"""


@dataclass(frozen=True, slots=True)
class SmokeStage:
    """Stage of the smoke test that has passed.

    Attributes:
        stage: Name of the stage.
        seconds: Duration of the stage.
        what: Description of the result.
    """

    stage: str
    seconds: float
    what: str


@dataclass(frozen=True, slots=True)
class SmokeResult:
    """Result of the smoke test on one device.

    Attributes:
        device: Display name of the device.
        visible_device: Value of CUDA_VISIBLE_DEVICES that selects the GPU. None for the CPU.
        stages: Stages that have passed.
        error: Error of the stage after them. Empty if all stages have passed.
    """

    device: str
    visible_device: str | None
    stages: tuple[SmokeStage, ...]
    error: str


def run_smoke_tests(torch_info: TorchInfo) -> list[SmokeResult]:
    """Run the smoke test on the CPU and on each GPU. Temporary files are deleted."""
    gpus = [
        (f"GPU {index}", name)
        for index, name in enumerate(list_visible_devices(len(torch_info.gpus)))
    ]
    # GPUs are tested in parallel, each in its own process.
    with ThreadPoolExecutor(max(1, len(gpus))) as pool:
        return [_run_smoke_test("CPU", None), *pool.map(lambda gpu: _run_smoke_test(*gpu), gpus)]


def _run_smoke_test(device: str, visible_device: str | None) -> SmokeResult:
    with tempfile.TemporaryDirectory(prefix="finesight-doctor-") as folder:
        # Use temporary caches and no hub.
        extra_env = {"HF_ASSETS_CACHE": str(Path(folder) / "assets"), "HF_HUB_OFFLINE": "1"}
        if visible_device is not None:
            extra_env[CUDA_VISIBLE_DEVICES] = visible_device
        device_type = "cpu" if visible_device is None else "cuda"
        probe_result = probe_process.run_probe(
            "finesight.doctor.smoke_test_stages", [device_type, folder], TIMEOUT_S, extra_env
        )
    lines = [json.loads(line) for line in probe_result.stdout.splitlines() if line.startswith("{")]
    return SmokeResult(
        device, visible_device, tuple(SmokeStage(**line) for line in lines), probe_result.error
    )


def check_smoke_tests(results: Sequence[SmokeResult]) -> list[Diagnosis]:
    """Convert the result of each smoke test to a diagnosis."""
    working_devices = [
        result.visible_device
        for result in results
        if result.visible_device is not None and not result.error
    ]
    return [_diagnose_result(result, working_devices) for result in results]


def _diagnose_result(result: SmokeResult, working_devices: Sequence[str]) -> Diagnosis:
    passed = "; ".join(_format_stage(stage) for stage in result.stages)
    if not result.error:
        return make_ok("smoke-test", f"{result.device}: {passed}")
    failed_stage = STAGES[min(len(result.stages), len(STAGES) - 1)]
    passed_note = f"passed before: {passed or 'no stage'}"
    if result.visible_device is None:
        why, remedy = (
            f"{passed_note}; run the command for the full error",
            "finesight quickstart --out trial",
        )
    else:
        others = ",".join(working_devices) or "-1"
        why, remedy = (
            f"{passed_note}; exclude this GPU from runs",
            f"export {CUDA_VISIBLE_DEVICES}={others}",
        )
    what = f"{result.device}: stage {failed_stage} failed: {result.error}"
    return make_error("smoke-test", what, why=why, remedy=remedy)


def _format_stage(stage: SmokeStage) -> str:
    return f"{stage.stage} {stage.seconds:.1f} s" + (f" ({stage.what})" if stage.what else "")
