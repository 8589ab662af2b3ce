"""Plans of objectives with a second model or pass."""

from pathlib import Path

import pytest
from preference_task import labeled_task as labeled_task
from preference_task import pair_task as pair_task
from rich.console import Console
from tiny_task import TinyTask

from finesight.plan.plan_format import format_plan
from finesight.plan.run_plan import plan_run
from finesight.progress import ProgressConsole
from finesight.settings.recipe import recipe_from_dict

KTO = "train.objective=kto", "train.kto.beta=0.5"
DPO = "train.objective=dpo", "train.dpo.beta=0.5"


@pytest.fixture
def distilled_task(tmp_path: Path) -> TinyTask:
    """Task whose teacher is a run of the same model."""
    task = TinyTask(tmp_path)
    task.run("train.steps=1", "train.epochs=null", name="teacher")
    return task


def test_plan_counts_the_teacher(distilled_task):
    """A teacher in 4 bits is smaller. Its forward pass takes time, and its steps have images."""
    task = distilled_task
    console, weights, plans = ProgressConsole(Console(quiet=True)), [], []
    teacher = f"train.distill.teacher={task.folder / 'teacher'}"
    limits = "train.distill.max_completion_length=6", "train.distill.lmbda=0.5"
    distill = "train.objective=distill", teacher, *limits
    for overrides in (
        ("train.objective=sft",),
        distill,
        (*distill, "train.distill.weight_format=nf4"),
    ):
        overrides = *overrides, "train.precision=fp32", "tune.vision=frozen", "tune.merger=frozen"
        recipe = recipe_from_dict({**task.recipe, "output_dir": "r"}, overrides)
        plans.append(plan_run(recipe, "A10", console))
        weights.append(plans[-1].chosen_estimate.peak.weights)
    plain, distilled = (one.recipe_estimate.step_time for one in plans[:2])
    assert 1.1 * plain.matmul_s < distilled.matmul_s < 2.5 * plain.matmul_s
    assert distilled.host_s > plain.host_s
    assert plans[0].recipe_estimate.cached_step_s is not None
    assert plans[1].recipe_estimate.cached_step_s is None
    assert "with 0.5 responses each, times without their sampling" in format_plan(plans[1])[3]
    assert "responses" not in format_plan(plans[0])[3]
    assert 1.8 * weights[0] < weights[1] < 2.2 * weights[0]
    assert weights[0] < weights[2] < weights[1]


def test_planned_step_of_kto_includes_the_baseline(labeled_task):
    """The step runs one more forward pass than without a baseline, over the same packs."""
    steps = []
    for loss_type in ("kto", "apo_zero_unpaired"):
        recipe = labeled_task.recipe | {"output_dir": str(labeled_task.folder / "run")}
        recipe = recipe_from_dict(recipe, [*KTO, f"train.kto.loss_type={loss_type}"])
        plan = plan_run(recipe, "A10", ProgressConsole(Console(quiet=True)))
        steps.append(plan.recipe_estimate.step_time.host_s)
    assert steps[0] == pytest.approx(4 / 3 * steps[1])


def test_planned_start_includes_the_reference_model(pair_task):
    """The reference pass is a third of the training steps of an epoch, and of validation."""
    console = ProgressConsole(Console(quiet=True))
    plans = [
        plan_run(
            recipe_from_dict({**pair_task.recipe, "output_dir": "r"}, overrides), None, console
        )
        for overrides in (["train.objective=sft"], [*DPO])
    ]
    added_s = plans[1].startup_s - plans[0].startup_s
    step_s = plans[1].chosen_estimate.step_time.total
    assert added_s > plans[1].total_steps / pair_task.recipe["train"]["epochs"] * step_s / 3 * 0.9
