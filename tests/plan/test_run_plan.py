"""The plan of a recipe compared with its run."""

import io
import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_fixtures import edit_config, make_plan
from rich.console import Console
from tiny_task import TinyTask, write_recipe

from finesight.errors import UserError
from finesight.plan import run_plan
from finesight.plan.plan_format import format_plan, plan_to_dict
from finesight.plan.run_plan import EvaluationEstimate, RunPlan, check_fit
from finesight.plan.step_time import TargetDevice, build_local_target, build_named_target
from finesight.progress import ProgressConsole
from finesight.settings.config import Device, Precision
from finesight.settings.recipe import load_recipe
from finesight.train.checkpoint import CheckpointManager
from finesight.train.dataset_stats import load_training_data
from finesight.train.parallel.distributed import ProcessGroup
from finesight.train.recipe_check import resolve_base_model
from finesight.train.run_dir import RunDir
from finesight.train.sampler import TrainSampler
from finesight.train.state import Hardware, RunContext, RunData


def test_counts_match_the_run(tmp_path: Path) -> None:
    task = TinyTask(tmp_path)
    task.recipe["train"] |= {"batch_size": 11, "pack_tokens": 10_000}
    plan = make_plan(task)
    assert not (task.folder / "run").exists()
    task.run()
    (start, *lines) = task.read_metrics()
    steps = [line for line in lines if "loss" in line]
    assert (plan.total_steps, plan.num_samples) == (len(steps), 22)
    stats = plan.token_stats
    assert stats.num_samples == start["data"]["train"]["num_samples"]
    assert stats.num_tokens == start["data"]["train"]["num_tokens"]
    assert sum(count for _, count in stats.bins) == 11
    last_bin_start = stats.bins[-1][0]
    assert last_bin_start <= stats.max_tokens < last_bin_start + stats.bin_width
    assert plan.num_trainable < plan.num_params
    peak_flops = start["peak_tflops"] * 1e12
    measured_flops = sum(step["mfu"] * peak_flops * step["step_s"] for step in steps)
    assert 22 * sum(plan.flops_per_sample.values()) == pytest.approx(measured_flops, rel=0.02)


def test_plan_of_rewards_checks_them_and_names_the_responses(task: TinyTask) -> None:
    settings = "train.objective=grpo", "train.grpo.num_generations=4"
    text = "\n".join(format_plan(make_plan(task, *settings, "rewards=[exact]")))
    assert "with 4 responses each, times without their sampling" in text
    with pytest.raises(UserError, match="no score 'nothing'"):
        make_plan(task, *settings, "rewards=[json.nothing]")


@pytest.mark.parametrize("part", ["vision", "merger"])
def test_plan_of_a_frozen_language_model(tmp_path: Path, part: str) -> None:
    """Packs of texts alone, which estimate the memory per token, have no gradient."""
    task = TinyTask(tmp_path)
    plan = make_plan(task, tune={"language": "frozen", part: "lora"}, gpu=None)
    assert plan.chosen_estimate.fits
    assert plan.recipe_estimate.peak.gradients > 0


def test_suggested_overrides_are_valid(task: TinyTask) -> None:
    plan = make_plan(task, "train.activation_checkpointing=true", "train.pack_tokens=50")
    assert [override.split("=")[0] for override in plan.overrides] == [
        "train.pack_tokens",
        "train.activation_checkpointing",
        "train.num_workers",
    ]
    second_plan = make_plan(task, *plan.overrides)
    assert second_plan.overrides == ()
    assert second_plan.recipe_estimate.settings == plan.chosen_estimate.settings
    assert second_plan.chosen_estimate == second_plan.recipe_estimate
    assert plan.chosen_estimate.step_time.total < plan.recipe_estimate.step_time.total


def test_precision_is_recommended_for_speed_or_memory(task, monkeypatch):
    edit_config(task, num_hidden_layers=2)

    def recommend(bf16_flops: float, memory_bytes: int = 64 * 10**9) -> RunPlan:
        def build_target(device: Device, precision: Precision) -> TargetDevice:
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            flops = bf16_flops if precision == "bf16" else 1e11
            target = build_local_target(torch.device("cpu"), dtype, flops, 1e10)
            return replace(target, memory_bytes=memory_bytes, num_workers=0)

        monkeypatch.setattr(run_plan, "measure_local_target", build_target)
        plan = make_plan(task, gpu=None)
        assert ("train.precision=bf16" in plan.overrides) == (plan.target.precision == "bf16")
        return plan

    monkeypatch.setattr(run_plan, "select_cpu_precision", lambda: "bf16")
    slower, faster = recommend(1e9), recommend(1e12)
    assert (slower.target.precision, faster.target.precision) == ("fp32", "bf16")
    for plan in (slower, faster):
        assert plan.chosen_estimate.step_time.total <= plan.recipe_estimate.step_time.total
    # Slower, but it fits.
    small = round(0.9 * slower.recipe_estimate.peak.total)
    assert recommend(1e9, small).target.precision == "bf16"


def test_evaluation_count_follows_the_recipe(task: TinyTask) -> None:
    def evaluate(*overrides: str, **settings: Any) -> EvaluationEstimate:
        groups = {"eval": {"metric": "qa", **settings}} if settings else {}
        return make_plan(task, *overrides, **groups).evaluation

    without_metric = evaluate()
    assert (without_metric.num_evaluations, without_metric.num_samples) == (2, 3)
    # Six steps: evaluations before, after, and after the second and fourth step.
    often = evaluate(every=2, max_new_tokens=20, limit=2)
    assert (often.num_evaluations, often.num_samples) == (4, 2)
    assert often.total_s > without_metric.total_s
    assert often.generation_bytes > 0
    # By default, evaluations during the 55 steps are at least 10 steps apart.
    assert evaluate("train.epochs=20", max_new_tokens=20).num_evaluations == 6
    assert evaluate("train.epochs=20", every=0).num_evaluations == 2


def test_vision_cache_size_is_estimated(task: TinyTask) -> None:
    assert make_plan(task).feature_bytes is None
    memory = "train.vision_cache=memory"
    plan = make_plan(task, memory, tune={"language": "lora"})
    hidden_size, element_size = 64, 2
    assert plan.feature_bytes == plan.token_stats.num_patches // 4 * hidden_size * element_size
    assert plan.chosen_estimate.cached_step_s is not None
    assert plan.chosen_estimate.cached_step_s < plan.chosen_estimate.step_time.total
    for epochs, has_cache in ((1.3, True), (1.1, False)):
        few_uses = make_plan(task, memory, f"train.epochs={epochs}", tune={"language": "lora"})
        assert (few_uses.feature_bytes is not None) == has_cache
    # Encoding these images again takes a GPU less time than building a cache.
    assert make_plan(task, tune={"language": "lora"}).feature_bytes is None


def test_lines_and_record_are_consistent(task: TinyTask) -> None:
    plan = make_plan(task, "train.pack_tokens=50", tune={"language": "lora"})
    text, record = "\n".join(format_plan(plan)), json.loads(json.dumps(plan_to_dict(plan)))
    assert "A10 (data sheet): 24 GB" in text
    assert f"the longest is {plan.token_stats.longest_sample_id}" in text
    assert text.endswith(f"to use the chosen settings: {' '.join(record['overrides'])}")
    assert "train.precision" not in text
    target = replace(plan.target, dtype=torch.bfloat16)
    lines = format_plan(replace(plan, overrides=("train.precision=bf16",), target=target))
    (row,) = [line.split() for line in lines if line.startswith("  train.precision ")]
    assert row == ["train.precision", "auto", "(fp32)", "bf16"]
    assert record["chosen"]["pack_tokens"] == plan.chosen_estimate.settings.pack_tokens
    assert sum(record["recipe"]["memory"].values()) == record["recipe"]["total_bytes"]
    assert (record["recipe"]["fits"], record["precision"]) == (True, plan.target.precision)


def test_plan_warns_about_answers_longer_than_max_new_tokens(task: TinyTask) -> None:
    """Only the last answer of a conversation counts."""

    def plan_with(max_new_tokens: int) -> RunPlan:
        return make_plan(task, eval={"metric": "ocr", "max_new_tokens": max_new_tokens})

    longest = plan_with(64).evaluation.max_answer_tokens
    for max_new_tokens, is_cut in ((longest, False), (longest - 1, True)):
        text = "\n".join(format_plan(plan_with(max_new_tokens)))
        assert (f"up to {longest} tokens" in text) == is_cut
    lines = [json.loads(line) for line in (task.folder / "eval.jsonl").read_text().splitlines()]
    for line in lines:
        earlier = {"role": "assistant", "content": "red " * 100}
        line["messages"][1:1] = [earlier, {"role": "user", "content": "And in one word?"}]
    (task.folder / "eval.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    evaluation = plan_with(64).evaluation
    assert (evaluation.max_answer_tokens, evaluation.num_cut_answers) == (longest, 0)


def test_invalid_recipe_is_rejected(task: TinyTask) -> None:
    with pytest.raises(UserError, match=r"none\.jsonl"):
        make_plan(task, "data.train=none.jsonl")
    with pytest.raises(UserError, match=r"tune\.lora\.target_modules"):
        make_plan(task, "tune.lora.target_modules=[nose]")
    (task.folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match="unknown GPU 'H20000'"):
        make_plan(task, gpu="H20000")


@pytest.mark.parametrize(
    ("override", "gpu", "package", "is_hint"),
    [
        ("tune.language=lora", "T4", None, True),
        ("tune.language=lora", "T4", "installed", False),
        ("tune.language=full", "T4", None, False),
        ("tune.language=lora", None, None, False),
    ],
)
def test_missing_package_of_4_bits_is_a_hint(task, monkeypatch, override, gpu, package, is_hint):
    monkeypatch.setattr(run_plan, "find_spec", lambda name: package)
    hints = make_plan(task, override, gpu=gpu).memory_hints
    assert ("4 bits (pip install 'finesight[quant]')" in hints) == is_hint


@pytest.mark.parametrize(
    ("name", "size", "memory_bytes", "words"),
    [
        ("vocab_size", 10**9, 16e9, r"remedy: try smaller images[^;]*; start anyway with --force"),
        ("intermediate_size", 4_000_000, 6e9, r"add .*tune.quantize.nf4=\[language\] \("),
        ("intermediate_size", 4_000_000, 16e9, None),
    ],
    ids=["no-settings-fit", "other-settings-fit", "trainer-reduces-packs"],
)
def test_run_that_cannot_fit_a_gpu_is_rejected(task, monkeypatch, name, size, memory_bytes, words):
    edit_config(task, **{"num_hidden_layers": 2, name: size})
    run, data, _ = prepare_run(task, monkeypatch, memory_bytes)
    with pytest.raises(UserError, match=words) if words else nullcontext():
        check_fit(run, data, force=False)


def prepare_run(
    task: TinyTask,
    monkeypatch: pytest.MonkeyPatch,
    memory_bytes: float,
    *overrides: str,
    num_ranks: int = 1,
    **groups: Any,
) -> tuple[RunContext, RunData, io.StringIO]:
    """Prepare a run on GPUs with this memory up to its check, and return its console output."""
    target = replace(build_named_target("T4", "auto"), memory_bytes=round(memory_bytes))
    monkeypatch.setattr(run_plan, "build_local_target", lambda *arguments: target)
    monkeypatch.setattr(run_plan, "find_min_memory", lambda target, number: round(memory_bytes))
    monkeypatch.setattr(run_plan, "MIN_CHECKED_PARAMS", 0)
    recipe = task.recipe | groups | {"output_dir": str(task.folder / "run")}
    settings = load_recipe(write_recipe(task.folder / "recipe.yaml", recipe), overrides)
    output = io.StringIO()
    console = ProgressConsole(Console(file=output, width=1000))
    base_model = resolve_base_model(settings)
    renderer = base_model.build_renderer(settings)
    train_data, _ = load_training_data(settings, renderer, 0, console)
    sampler = TrainSampler(train_data.corpus, train_data.stats.sample_indices, settings.train)
    process_group = ProcessGroup(0, num_ranks, 0, num_ranks)
    hardware = Hardware(torch.device("cuda"), target.dtype, 0, 1e12, process_group)
    run_dir = RunDir(settings.output_dir)
    manager = CheckpointManager(run_dir.checkpoint_dir, 1)
    run = RunContext(settings, run_dir, manager, hardware, base_model, {}, console)
    return run, RunData(renderer, train_data, None, sampler), output


def test_runs_of_several_ranks_are_checked(task, monkeypatch):
    """DDP cannot fit, and the remedy is a mode of sharding, with which the run then starts."""
    edit_config(task, num_hidden_layers=4, intermediate_size=400_000)
    tune = dict.fromkeys(("language", "embeddings", "vision", "merger"), "full")
    run, data, _ = prepare_run(task, monkeypatch, 3.6e9, num_ranks=8, tune=tune)
    with pytest.raises(UserError, match="the predicted peak memory is") as error:
        check_fit(run, data, force=False)
    added = str(error.value.remedy).removeprefix("add ").partition(" (")[0].split()
    assert added[0].startswith("train.parallel=")
    run, data, output = prepare_run(task, monkeypatch, 3.6e9, *added, num_ranks=8, tune=tune)
    check_fit(run, data, force=False)
    assert "warning" not in output.getvalue()
    # One GPU is advised to become several.
    run, data, _ = prepare_run(task, monkeypatch, 3.6e9, tune=tune)
    with pytest.raises(UserError, match=r"such GPUs with train\.parallel=") as error:
        check_fit(run, data, force=False)
    assert error.value.remedy.index("such GPUs") < error.value.remedy.index("smaller images")


def test_sharded_run_with_large_packs_is_warned_about(task, monkeypatch):
    """It cannot reduce its packs when memory runs out."""
    edit_config(task, num_hidden_layers=2, intermediate_size=100_000)
    settings = "train.parallel=fsdp", "train.pack_tokens=4096", "train.batch_size=8"
    run, data, _ = prepare_run(task, monkeypatch, 1e12, *settings, num_ranks=2)
    plan = make_plan(task, *settings, gpu="T4", gpus=2)
    peak = plan.recipe_estimate.peak.total
    run, data, output = prepare_run(task, monkeypatch, 0.98 * peak, *settings, num_ranks=2)
    check_fit(run, data, force=False)
    assert "a sharded run cannot reduce its packs: add train." in output.getvalue()


def test_ranks_on_cpus_are_not_checked(task, monkeypatch):
    run, data, _ = prepare_run(task, monkeypatch, 1, num_ranks=2)
    hardware = replace(run.hardware, device=torch.device("cpu"))
    check_fit(replace(run, hardware=hardware), data, force=False)
    with pytest.raises(UserError):
        check_fit(run, data, force=False)
