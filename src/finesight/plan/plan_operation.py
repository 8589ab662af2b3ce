"""`finesight plan`: memory and time of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from finesight.errors import Step, UserError
from finesight.operations.operation import Outcome, Parameter, StrPath
from finesight.operations.options import (
    OverridesArgument,
    RecipeArgument,
    TrustMetricOption,
    list_overrides,
)
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.plan.run_plan import RunPlan
    from finesight.settings.config import Recipe

GpusOption = Annotated[
    int | None,
    Parameter(
        "Number of GPUs, with one process on each. Default: of the launcher that started this "
        "command; otherwise one GPU of the name of --gpu, or all GPUs of this machine.",
        option="--gpus",
        minimum=1,
        maximum=10_000,
    ),
]


EXIT_DOES_NOT_FIT = 2


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[str | None, Parameter(metavar="NAME")] = None,
    gpus: GpusOption = None,
    trust_metric: TrustMetricOption = False,
) -> Outcome[RunPlan]:
    """Estimate memory and time of a run and suggest settings that fit.

    Prints the tokens per sample, the FLOPs of each model part, and memory and training time in two
    columns: for the recipe as written, and for chosen settings that fit into 90 % of the memory.
    The last lines are the command that trains with the chosen settings and, for an unfinished run
    that can continue with them, the one that resumes it. The recipe is not modified.

    With several GPUs, memory is that of each GPU, and train.parallel is one of the chosen settings.
    If a run does not fit, the plan names the number of GPUs that it needs.

    Reads image headers and the configuration and tokenizer of the model, but no weights.

    Exit code: 0 if the run fits, 2 if no setting makes it fit.

    Example: finesight plan recipes/latex_ocr_qwen2_vl_2b.yaml --gpu "RTX 4090" --gpus 2

    Args:
        gpu: GPU to plan for, such as T4, "RTX 4090", A100-80GB or H200. Default: this machine,
            measured in about a second.
    """
    from finesight.evaluate.custom_metric import check_recipe_metric
    from finesight.plan.plan_format import format_plan, plan_to_dict
    from finesight.plan.run_plan import plan_run
    from finesight.settings.recipe import load_recipe
    from finesight.train.run_dir import RunDir

    settings = load_recipe(Path(recipe), overrides or ())
    given = list_overrides(overrides)
    check_recipe_metric(settings, Path(recipe), given, trust=trust_metric)
    run_plan = plan_run(settings, gpu, ProgressConsole(), gpus)
    lines = format_plan(run_plan)
    new_folder: list[str] = []
    run_dir = RunDir(settings.output_dir)
    try:
        run_dir.check_available(resume=False)
    except UserError as error:
        if not os.path.lexists(settings.output_dir):
            raise
        lines = [*lines, f"note: {error.where} {error.what}: the training starts in a new one"]
        new_folder = [f"output_dir={run_dir.next_path}"]

    def list_train_steps(changes: Sequence[str], num_gpus: int) -> list[Step]:
        combined = _combine_overrides([*given, *changes])
        in_new_folder = _combine_overrides([*combined, *new_folder])
        steps = [build_train_step(recipe, in_new_folder, num_gpus)]
        if new_folder and _can_resume(settings, changes, run_plan.target.precision):
            step = build_train_step(recipe, combined, num_gpus, resume=True)
            steps.append(replace(step, purpose="to continue the unfinished run instead"))
        return steps

    fits = run_plan.chosen_estimate.fits
    advice = run_plan.advice
    steps: list[Step] = []
    if fits:
        steps = list_train_steps(run_plan.overrides, run_plan.target.num_gpus)
    elif advice is not None:
        arguments = {"recipe": recipe, "overrides": given, "gpu": gpu, "gpus": advice.num_gpus}
        steps = [Step("plan", arguments), *list_train_steps(advice.overrides, advice.num_gpus)]
    return Outcome(
        run_plan,
        lines,
        plan_to_dict(run_plan),
        steps,
        exit_code=0 if fits else EXIT_DOES_NOT_FIT,
    )


def _combine_overrides(overrides: Sequence[str]) -> list[str]:
    """Return overrides without those of settings that a later one sets again."""
    by_setting: dict[str, str] = {}
    for override in overrides:
        setting = override.partition("=")[0]
        # The last one must also be the last in order.
        by_setting.pop(setting, None)
        by_setting[setting] = override
    return [*by_setting.values()]


def _can_resume(settings: Recipe, changes: Sequence[str], precision: str) -> bool:
    """Return whether the folder of a recipe has an unfinished run that allows the changes.

    Args:
        changes: Overrides of a plan.
        precision: Precision of the plan, which must be that of the run.
    """
    from finesight.settings.manifest import RECIPE_FILE
    from finesight.settings.recipe import load_recipe
    from finesight.train.run_dir import RunDir
    from finesight.train.setup import MUTABLE_SETTINGS

    run_dir = RunDir(settings.output_dir)
    if not run_dir.is_started or run_dir.is_finished:
        return False
    for change in changes:
        section, _, name = change.partition("=")[0].partition(".")
        if section != "train" or name not in MUTABLE_SETTINGS - {"precision"}:
            return False
    try:
        starts = (line for line in run_dir.iter_metrics() if "precision" in line)
        start = next(starts, None)
        if start is None or start["precision"] != precision:
            return False
        saved_recipe = load_recipe(run_dir.path / RECIPE_FILE)
    except UserError:
        return False

    def dump_results(recipe: Recipe) -> dict[str, Any]:
        return recipe.model_dump(exclude={"output_dir": True, "train": MUTABLE_SETTINGS})

    return dump_results(saved_recipe) == dump_results(settings)


def build_train_step(
    recipe: StrPath, overrides: Sequence[str], num_gpus: int, *, resume: bool = False
) -> Step:
    """Return the step that trains on one GPU, or writes a job for several.

    Args:
        resume: Whether to continue the run on one GPU, as a job always does.
    """
    from finesight.plan.sharded_memory import GPUS_PER_MACHINE

    arguments: dict[str, object] = {"recipe": recipe, "overrides": overrides}
    if num_gpus == 1:
        if resume:
            arguments["resume"] = True
        return Step("train", arguments)
    sizes = range(min(num_gpus, GPUS_PER_MACHINE), 0, -1)
    gpus_per_node = next(size for size in sizes if num_gpus % size == 0)
    purpose = ""
    if num_gpus <= GPUS_PER_MACHINE:
        command = Step("train", arguments)
        purpose = f"or: torchrun --nproc-per-node {num_gpus} -m {command}"
    sizes_of_job = {"gpus_per_node": gpus_per_node, "nodes": str(num_gpus // gpus_per_node)}
    return Step("launch", arguments | sizes_of_job, purpose)
