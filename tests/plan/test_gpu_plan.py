"""Plans for several GPUs: shares of the samples, memory of a GPU, time, and advice."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from case_files import load_cases
from plan_fixtures import edit_config, make_plan
from rich.console import Console
from tiny_task import TinyTask, write_recipe

from finesight import api
from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.plan import run_plan, step_time
from finesight.plan.peak_memory import USABLE_MEMORY_FRACTION, compute_peak_memory
from finesight.plan.plan_format import format_plan, format_short_plan, plan_to_dict
from finesight.plan.run_planner import ADVISED_GPUS
from finesight.plan.settings_search import PlannedSteps, StepShares, build_planned_model
from finesight.plan.step_time import (
    GPUS_PER_MACHINE,
    NETWORK_BYTES_PER_S,
    TargetDevice,
    build_named_target,
    extend_to_gpus,
    find_link,
)
from finesight.progress import ProgressConsole
from finesight.settings.recipe import load_recipe
from finesight.train import setup
from finesight.train.dataset_stats import SampleStats
from finesight.train.parallel.distributed import ProcessGroup
from finesight.train.run_dir import RunDir
from finesight.train.setup import build_state

SINGLE_PACK = "train.batch_size=8", "train.pack_tokens=4096"
FULL = {"language": "full", "embeddings": "full", "vision": "full", "merger": "full"}


def limit_memory(monkeypatch: pytest.MonkeyPatch, memory_bytes: float, **changes: Any) -> None:
    """Give GPUs by name this memory."""

    def build(name: str, precision: Any) -> TargetDevice:
        target = build_named_target(name, precision)
        return replace(target, memory_bytes=round(memory_bytes), **changes)

    monkeypatch.setattr(run_plan, "build_named_target", build)


def limit_below_need(task: TinyTask, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> None:
    """Give GPUs less memory than one of them needs for a full tuning with any settings."""
    limit_memory(monkeypatch, 1e9)
    need = make_plan(task, *overrides, tune=FULL).chosen_estimate.peak.total
    limit_memory(monkeypatch, 0.95 * need / USABLE_MEMORY_FRACTION)


def widen(task: TinyTask) -> None:
    """Make the weights large in comparison with the activations."""
    edit_config(task, num_hidden_layers=4, intermediate_size=400_000)


def test_samples_of_a_step_are_shared(task: TinyTask) -> None:
    one, two, four = (make_plan(task, *SINGLE_PACK, gpus=count) for count in (1, 2, 4))
    assert [plan.target.num_gpus for plan in (one, two, four)] == [1, 2, 4]
    activations = [plan.recipe_estimate.peak.activations for plan in (one, two, four)]
    assert activations[0] > activations[1] > activations[2]
    # The run has the same steps, and a sample costs the same.
    assert {plan.total_steps for plan in (one, two, four)} == {one.total_steps}
    assert two.flops_per_sample == one.flops_per_sample
    times = [plan.recipe_estimate.step_time for plan in (one, two, four)]
    assert times[0].matmul_s > times[1].matmul_s > times[2].matmul_s
    assert times[0].communication_s == 0 < times[1].communication_s < times[2].communication_s
    assert two.single_step_s == pytest.approx(one.recipe_estimate.step_time.total)
    assert one.single_step_s is None


def test_lines_and_record_name_the_gpus(task: TinyTask) -> None:
    plan = make_plan(task, "train.parallel=fsdp", gpus=2, tune=FULL)
    text, record = "\n".join(format_plan(plan)), json.loads(json.dumps(plan_to_dict(plan)))
    assert "target  2 x A10 (data sheet): 24 GB each" in text
    assert "GB/s between GPUs" in text
    rows = {line[:34].strip(): line[34:].split() for line in format_plan(plan)}
    assert rows["train.parallel"][0] == "fsdp"
    assert rows["highest during"][0] == "training"
    for title in ("gathered weights", "NCCL buffers", "communication of a step"):
        assert title in rows, title
    assert "speed-up over one such GPU" in text
    assert "on each of 2 GPUs" in format_short_plan(plan)[0]
    assert (record["target"]["num_gpus"], record["advice"]) == (2, None)
    assert sum(record["recipe"]["memory"].values()) == record["recipe"]["total_bytes"]
    assert record["recipe"]["step_time"]["communication_s"] > 0
    alone = "\n".join(format_plan(make_plan(task)))
    for words in ("train.parallel", "between GPUs", "NCCL", "communication", "speed-up"):
        assert words not in alone, words


def test_sharded_recipe_on_one_gpu_is_planned_as_it_is_trained(task: TinyTask) -> None:
    """A single process never shards, and accepts every mode and optimizer."""
    plain = make_plan(task, tune=FULL)
    for overrides in (
        ("train.parallel=fsdp",),
        ("train.parallel=zero2", "train.optimizer=adamw_8bit"),
        ("train.parallel=fsdp_offload",),
    ):
        plan = make_plan(task, *overrides, gpus=1, tune=FULL)
        assert f"{overrides[0]} has no effect on a single GPU" in "\n".join(format_plan(plan))
        assert not any("parallel" in override for override in plan.overrides)
        if len(overrides) == 1:
            assert plan.recipe_estimate.peak == plain.recipe_estimate.peak
    assert "has no effect" not in "\n".join(format_plan(plain))


@pytest.mark.parametrize(
    ("mode", "optimizer", "is_refused"),
    [
        ("fsdp", "muon", True),
        ("zero2", "adamw_8bit", True),
        ("fsdp_offload", "muon", True),
        ("fsdp", "adamw", False),
        ("ddp", "muon", False),
        ("ddp", "adamw_8bit", False),
    ],
)
def test_plan_refuses_what_training_refuses(tmp_path, mode, optimizer, is_refused):
    task = TinyTask(tmp_path)
    overrides = [f"train.parallel={mode}", f"train.optimizer={optimizer}"]
    if not is_refused:
        assert make_plan(task, *overrides, gpus=2).recipe_estimate.peak.total > 0
        return
    with pytest.raises(UserError) as planned:
        make_plan(task, *overrides, gpus=2)
    recipe = load_recipe(task.folder / "recipe.yaml", overrides)
    if mode == "fsdp_offload":  # on a CPU, training refuses the device first
        assert f"train.optimizer={optimizer}" in planned.value.what
        return
    console = ProgressConsole(Console(quiet=True))
    with patch.object(setup, "load_base_model", None), pytest.raises(UserError) as trained:
        build_state(recipe, RunDir(tmp_path / "run"), console, False, ProcessGroup(0, 2))
    assert str(planned.value) == str(trained.value)


def test_quantized_weights_are_replicated_and_accepted(task: TinyTask) -> None:
    """As in training, FP8 weights stay complete on every GPU, and all others are sharded."""
    tune = {"language": "lora", "quantize": {"fp8": ["language"]}}
    alone, two = (
        make_plan(task, "train.parallel=fsdp", gpu="H100", gpus=count, tune=tune)
        for count in (1, 2)
    )
    plain = make_plan(task, "train.parallel=fsdp", gpu="H100", gpus=2, tune={"language": "lora"})
    weights = [plan.recipe_estimate.peak.weights for plan in (alone, two, plain)]
    assert weights[0] / 2 < weights[1] < weights[0]
    assert weights[1] > weights[2]


def test_chosen_mode_fits_without_changing_the_task(task, monkeypatch):
    """Sharding is chosen before 4 bits, and an unsharded mode before sharding."""
    widen(task)
    alone = make_plan(task, tune=FULL).recipe_estimate.peak
    limit_memory(monkeypatch, 0.7 * alone.total / 0.9)
    plan = make_plan(task, gpus=4, tune=FULL)
    assert not plan.recipe_estimate.fits
    assert plan.chosen_estimate.fits
    assert plan.chosen_estimate.settings.parallel in ("zero2", "fsdp")
    assert plan.overrides[0] == f"train.parallel={plan.chosen_estimate.settings.parallel}"
    second = make_plan(task, *plan.overrides, gpus=4, tune=FULL)
    assert (second.overrides, second.recipe_estimate.fits) == ((), True)
    limit_memory(monkeypatch, 100 * alone.total)
    assert make_plan(task, gpus=4, tune=FULL).chosen_estimate.settings.parallel == "ddp"


def test_run_that_does_not_fit_is_advised_to_use_more_gpus(task, monkeypatch):
    widen(task)
    limit_below_need(task, monkeypatch)
    plan = make_plan(task, tune=FULL)
    advice = plan.advice
    assert not plan.chosen_estimate.fits
    assert advice is not None
    assert advice.num_gpus in ADVISED_GPUS
    assert advice.estimate.fits
    (line,) = [line for line in format_plan(plan) if line.startswith("does not fit")]
    use, hints = line.split("; ")[1].split(", or try ")
    assert use.startswith(f"use {advice.num_gpus} such GPUs with train.parallel=")
    assert "lora instead of full" in hints
    assert plan_to_dict(plan)["advice"]["num_gpus"] == advice.num_gpus
    # The advice is true, and with fewer GPUs the run does not fit.
    assert make_plan(task, *advice.overrides, gpus=advice.num_gpus, tune=FULL).recipe_estimate.fits
    if advice.num_gpus > 2:
        fewer = make_plan(task, gpus=advice.num_gpus // 2, tune=FULL)
        assert not fewer.chosen_estimate.fits or fewer.chosen_estimate.host_bytes


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "muon"])
def test_advice_names_the_optimizer_that_sharding_needs(task, monkeypatch, optimizer):
    widen(task)
    limit_below_need(task, monkeypatch, f"train.optimizer={optimizer}")
    plan = make_plan(task, f"train.optimizer={optimizer}", tune=FULL)
    assert plan.advice is not None
    assert "train.optimizer=adamw" in plan.advice.overrides
    overrides = [f"train.optimizer={optimizer}", *plan.advice.overrides]
    assert make_plan(task, *overrides, gpus=plan.advice.num_gpus, tune=FULL).recipe_estimate.fits


def test_no_number_of_gpus_helps_a_model_that_none_can_load(task, monkeypatch):
    widen(task)
    plan = make_plan(task, tune=FULL)
    weights = plan.recipe_estimate.peak.weights
    limit_memory(monkeypatch, 0.5 * weights)
    for gpus in (1, 8, 64):
        plan = make_plan(task, gpus=gpus, tune=FULL)
        assert plan.advice is None
        text = "\n".join(format_plan(plan))
        assert "does not fit" in text
        assert ("up to 64 such GPUs are not sufficient either; try " in text) == (gpus < 64)


def test_offloaded_shards_need_host_memory(task, monkeypatch):
    widen(task)
    settings = "train.parallel=fsdp_offload", "train.pack_tokens=64"
    plan = make_plan(task, *settings, gpus=2, tune=FULL)
    estimate = plan.recipe_estimate
    assert estimate.fits
    # Weights and gradients are page-locked, in powers of two per tensor.
    assert 20 * plan.num_trainable <= estimate.host_bytes <= 28 * plan.num_trainable
    assert f"{estimate.host_bytes / 1e9:.0f} GB" in "\n".join(format_plan(plan))
    limit_memory(monkeypatch, 24e9, host_memory_bytes=estimate.host_bytes // 2)
    plan = make_plan(task, *settings, gpus=2, tune=FULL)
    assert not plan.recipe_estimate.fits
    assert plan.chosen_estimate.settings.parallel != "fsdp_offload"


def test_lack_of_host_memory_is_named(task, monkeypatch):
    """GPUs too small for other modes do not lead to a message about their memory."""
    widen(task)
    offload = make_plan(task, "train.parallel=fsdp_offload", gpus=2, tune=FULL).recipe_estimate
    host_bytes = offload.host_bytes // 2
    limit_memory(monkeypatch, 1.2 * offload.peak.total, host_memory_bytes=host_bytes)
    plan = make_plan(task, "train.parallel=fsdp_offload", gpus=2, tune=FULL)
    assert plan.chosen_estimate.exceeds_host_memory
    (line,) = [line for line in format_plan(plan) if line.startswith("does not fit")]
    needed, available = f"{offload.host_bytes / 1e9:.0f} GB", f"{host_bytes / 1e9:.0f} GB"
    assert f"needs at least {needed}, this machine has {available} of host memory; " in line
    assert "fsdp_offload" not in line


@pytest.mark.parametrize(
    ("gpus", "batch_size", "num_idle"), [(1000, 16, 984), (8, 4, 4), (2, 2, 0), (3, 11, 0)]
)
def test_gpus_without_samples_are_named(task, gpus, batch_size, num_idle):
    plan = make_plan(task, f"train.batch_size={batch_size}", gpus=gpus)
    warnings = [line for line in format_plan(plan) if line.startswith("warning: a step has")]
    assert bool(warnings) == bool(num_idle)
    if num_idle:
        assert f"for {gpus} GPUs, so {num_idle} GPUs have nothing to do" in warnings[0]
        assert warnings[0] in format_short_plan(plan)


# Number of GPUs


@pytest.fixture
def local_gpus(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Two GPUs of this machine, which the test may change."""
    gpus = [
        SimpleNamespace(name="NVIDIA A10", gb=24.0, flops=1e14, has_context=False) for _ in range(2)
    ]

    def find(device: Any) -> SimpleNamespace:
        index = device if isinstance(device, int) else torch.device(device).index
        return gpus[index or 0]

    def measure(device: torch.device, dtype: torch.dtype) -> float:
        return float(find(device).flops)

    def query(device: Any) -> tuple[int, int]:
        find(device).has_context = True
        return 0, round(find(device).gb * 1e9)

    def read_properties(index: int) -> SimpleNamespace:
        return SimpleNamespace(total_memory=round(gpus[index].gb * 1e9))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gpus))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: find(device).name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "mem_get_info", query)
    monkeypatch.setattr(torch.cuda, "get_device_properties", read_properties)
    monkeypatch.setattr(step_time, "measure_peak_flops", measure)
    monkeypatch.setattr(step_time, "_measure_bandwidth", lambda device: 5e11)
    return gpus


def plan_here(task: TinyTask, gpus: int | None = None) -> TargetDevice:
    """Return the target of a plan for the GPUs of this machine."""
    return make_plan(task, "train.device=auto", gpu=None, gpus=gpus).target


def test_all_gpus_of_this_machine_are_planned(task, local_gpus):
    target = plan_here(task)
    assert (target.num_gpus, target.is_measured) == (2, True)
    # A context would take memory from the rank of the other GPU.
    assert [gpu.has_context for gpu in local_gpus] == [True, False]
    assert plan_here(task, gpus=1).num_gpus == 1
    # More GPUs than this machine has are assumed to be equal to them.
    assert plan_here(task, gpus=4).num_gpus == 4
    del local_gpus[1]
    assert plan_here(task).num_gpus == 1


def test_smallest_and_slowest_gpu_counts(task, local_gpus):
    local_gpus.append(SimpleNamespace(name="NVIDIA L4", gb=12.0, flops=4e13))
    target = plan_here(task)
    assert (target.num_gpus, target.memory_bytes, target.peak_flops) == (3, 12 * 10**9, 4e13)
    # The first GPUs are used.
    target = plan_here(task, gpus=2)
    assert (target.memory_bytes, target.peak_flops) == (24 * 10**9, 1e14)
    local_gpus[1].gb = 20.0
    assert plan_here(task, gpus=2).memory_bytes == 20 * 10**9


@pytest.mark.parametrize(
    ("world_size", "gpu", "expected"),
    [("4", None, 4), ("4", "A10", 4), ("1", "A10", 1), ("1", None, 2), ("x", "A10", 1)],
)
def test_launcher_sets_the_number_of_gpus(task, local_gpus, monkeypatch, world_size, gpu, expected):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    for gpus, count in ((None, expected), (3, 3)):
        plan = make_plan(task, "train.device=auto", gpu=gpu, gpus=gpus)
        assert plan.target.num_gpus == count


@pytest.mark.parametrize(
    ("device", "reason"), [("auto", "this machine has no GPU"), ("cpu", "train.device=cpu")]
)
def test_gpus_without_a_gpu_are_refused(task, device, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(step_time, "measure_peak_flops", lambda device, dtype: 1e11)
    monkeypatch.setattr(step_time, "_measure_bandwidth", lambda device: 1e10)
    overrides = [f"train.device={device}"]
    with pytest.raises(UserError, match=reason) as error:
        make_plan(task, *overrides, gpu=None, gpus=2)
    assert error.value.where == "--gpus"
    # Following the remedy works.
    assert make_plan(task, *overrides, gpu="RTX 4090", gpus=2).target.num_gpus == 2
    assert make_plan(task, *overrides, gpu=None, gpus=1).target.num_gpus == 1
    assert make_plan(task, *overrides, gpu=None).target.num_gpus == 1


@pytest.mark.parametrize("gpus", [0, -2, 10_001, 1.5, "two"])
def test_python_checks_the_number_of_gpus(task, gpus):
    path = write_recipe(task.folder / "recipe.yaml", task.recipe | {"output_dir": "run"})
    with pytest.raises(UserError) as error:
        api.plan(path, gpu="T4", gpus=gpus)
    assert error.value.where == "gpus"


def test_python_plans_several_gpus(task):
    path = write_recipe(task.folder / "recipe.yaml", task.recipe | {"output_dir": "run"})
    assert api.plan(path, gpu="T4", gpus=2).target.num_gpus == 2


@pytest.mark.parametrize(
    ("name", "link"),
    [
        ("NVIDIA H100 80GB HBM3", "NVLink 4"),
        ("NVIDIA H100 PCIe", "PCIe 5"),
        ("NVIDIA A100-SXM4-80GB", "NVLink 3"),
        ("NVIDIA A100 80GB PCIe", "PCIe 4"),
        ("A100-PCIE-40GB", "PCIe 4"),
        ("Tesla V100-PCIE-32GB", "PCIe 3"),
        ("NVIDIA A10", "PCIe 4"),
        ("NVIDIA GeForce RTX 3090", "PCIe 4"),
        ("Tesla T4", "PCIe 3"),
        ("NVIDIA B200", "NVLink 5"),
        ("another GPU", "PCIe 4"),
    ],
)
def test_link_of_a_gpu_name(name, link):
    assert find_link(name) == link


def test_network_limits_several_machines():
    target = build_named_target("H100", "bf16")
    local, many = (extend_to_gpus(target, count) for count in (GPUS_PER_MACHINE, 16))
    assert local.link_bandwidth == target.link_bandwidth > many.link_bandwidth
    assert many.link_bandwidth == NETWORK_BYTES_PER_S
    assert extend_to_gpus(target, 1) == target


# Samples of each rank


def make_sample(num_tokens: int, name: str = "") -> SampleStats:
    return SampleStats(name, num_tokens, num_tokens, 8, ((4, 8, 8),), ())


def test_long_samples_are_split_over_the_ranks():
    step = [make_sample(100), make_sample(900), make_sample(20)]
    whole = PlannedSteps([step], shares=StepShares(2))
    split = PlannedSteps([step], shares=StepShares(2, can_split_samples=True))
    assert [pack.num_ranks for pack in whole.timed_steps(100)[0]] == [1]
    first, *others = split.timed_steps(100)[0]
    # Half of the tokens and of the frames.
    assert (first.num_ranks, first.lengths, first.grid_thw) == (2, (450,), ((2, 8, 8),))
    assert all(pack.num_ranks == 1 for pack in others)
    assert split.has_split_samples(100)
    assert not split.has_split_samples(400)
    assert not PlannedSteps([step]).has_split_samples(100)


def test_split_sample_has_the_memory_of_gathered_keys(task: TinyTask) -> None:
    edit_config(task, num_hidden_layers=2)
    recipe = load_recipe(
        write_recipe(task.folder / "recipe.yaml", task.recipe | {"output_dir": "run"}), ()
    )
    target = extend_to_gpus(build_named_target("A10", "bf16"), 2)
    planned = build_planned_model(ModelFolder(Path(recipe.model)), recipe, (), target)
    steps = [[make_sample(3000)]]
    peaks = []
    for can_split in (False, True):
        shares = StepShares(2, can_split_samples=can_split)
        packs, _ = PlannedSteps(steps, shares=shares).largest_packs(256, planned.model, 0.0)
        peaks.append(
            compute_peak_memory(
                planned.persistent,
                planned.tracer,
                packs,
                0.0,
                has_multiple_packs=False,
                use_graphs=False,
            )
        )
    whole, split = (peak.activations + peak.workspace for peak in peaks)
    # Keys and values of all tokens are gathered.
    assert whole / 2 < split < whole


def test_steps_have_ranks_without_samples():
    steps = PlannedSteps([[make_sample(10)], []], shares=StepShares(4))
    assert [[pack.num_tokens for pack in packs] for packs in steps.timed_steps(64)] == [[10], []]
    assert steps.single_pack_budget == 10


# Published models


CASES = load_cases("gpu_plans")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_plans_of_published_models(case, shared, tmp_path, task):
    recipe = task.recipe | {
        "model": str(shared / "qwen_assets" / case["model"]),
        "tune": FULL if case["tune"] == "full" else {"language": "lora"},
        "image": {"height": 280, "width": 280},
        "train": {"steps": 2, "batch_size": 16},
        "output_dir": str(tmp_path / "run"),
    }
    path = write_recipe(tmp_path / "recipe.yaml", recipe)
    plan = api.plan(path, gpu=case["gpu"], gpus=case["gpus"])
    estimate = plan.chosen_estimate
    assert estimate.fits == case["fits"]
    assert estimate.settings.parallel in case["modes"]
    assert estimate.phase in case.get("phases", ["step"])
    assert bool(estimate.host_bytes) == ("fsdp_offload" in case["modes"])
    advised = plan.advice and plan.advice.num_gpus
    assert advised == case.get("advised")
    assert not plan.recipe_estimate.fits
