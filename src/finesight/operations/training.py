"""Train a recipe, and propose what to do with the run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from finesight.errors import Step, UserError
from finesight.files.hub_address import parse_address
from finesight.operations.operation import Outcome, Parameter, StrPath
from finesight.operations.options import (
    OverridesArgument,
    TrustMetricOption,
)
from finesight.progress import ProgressConsole
from finesight.satellites import find_satellite, load_satellite

if TYPE_CHECKING:
    from finesight.settings.config import Recipe
    from finesight.settings.recipe import Overrides
    from finesight.train.callbacks import Callback
    from finesight.train.finalize import RunResult
else:
    Callback = Any

    class Recipe:
        """Settings, in signatures that are read without the packages of the recipe."""


PushOption = Annotated[
    str | None,
    Parameter(
        "Upload the adapter or model to a private hub repository when the run is finished "
        "(also modelscope:OWNER/NAME). Token, connection and repository are checked before "
        "training. If the upload fails, the run is kept, and the exit code is 1.",
        option="--push",
        metavar="hf:OWNER/NAME",
    ),
]
ForceOption = Annotated[
    bool,
    Parameter(
        "Start even if the predicted peak memory exceeds that of the device.", option="--force"
    ),
]


def train(
    recipe: StrPath | Recipe | Mapping[str, Any],
    overrides: OverridesArgument = None,
    resume: bool = False,
    push: PushOption = None,
    force: ForceOption = False,
    trust_metric: TrustMetricOption = False,
    stop_after: Annotated[float | None, Parameter(metavar="STEPS", minimum=1e-9)] = None,
    callbacks: Sequence[Callback] = (),
) -> Outcome[RunResult]:
    """Fine-tune a model with a recipe, and evaluate it before and after training.

    All settings are described on the page "Recipe reference" of the documentation. The recipe.yaml
    of a run lists all of them with their values.

    SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 (sbatch --signal=USR1@300) stop the run
    after writing a checkpoint, with exit code 75. The same command with --resume continues the run
    as if it had not been stopped.

    Before the weights are loaded, the peak memory is predicted as by `finesight plan`. A run that
    cannot fit is rejected with exit code 2. A run of more than an hour on a CPU prints a warning
    with the estimated time.

    For several GPUs, run torchrun --nproc-per-node 4 -m finesight train RECIPE. train.batch_size
    counts the samples of all GPUs, so the result equals that of one GPU up to rounding. A run can
    resume on another number of GPUs.

    Example: finesight train recipes/latex_ocr_qwen2_vl_2b.yaml train.epochs=1 output_dir=runs/short

    Example: finesight train runs/short --resume

    Args:
        recipe: Recipe: YAML file of settings; or the folder of a run, for its recipe.yaml.
        resume: Continue the run in output_dir from its newest checkpoint, or start it if there is
            none. Repeat the same recipe and overrides, or give the run folder.
        stop_after: Evaluate the model and stop after this number of steps, with a checkpoint and
            exit code 75, or 0 under torchrun, which reports others as failures. Below 1: fraction
            of all steps. A run resumed there continues with another value, or without one. Default:
            all steps.
    """
    from finesight.evaluate.custom_metric import check_recipe_metric

    if stop_after is not None and not math.isfinite(stop_after):
        raise UserError(
            f"{stop_after}",
            where="--stop-after",
            expected="a number of steps, or a fraction below 1",
            remedy="for example --stop-after 0.3",
        )
    overrides = overrides or ()
    console = ProgressConsole()
    is_main = os.environ.get("RANK", "0") == "0"
    if push is not None:
        check_publish_address = load_satellite("finesight.hub.repository:check_publish_address")
        check_publish_address(parse_address(push))
    settings, file = _load_recipe(recipe, overrides)
    if push is not None and settings.tune.has_mode("full") and settings.tune.has_mode("lora"):
        merge = {"source": str(settings.output_dir), "out": "OUT"}
        export = Step("export", {"source": "OUT", "out": push, "confirm": True}, "then")
        raise UserError(
            "the run trains an adapter and complete parts, which must be merged first",
            where="--push",
            expected="tune with lora only, or with full only",
            remedy=Step("merge", merge, "remove --push; after training", export),
        )
    check_recipe_metric(settings, file, overrides, trust=trust_metric)
    if push is not None and is_main:
        check_publish = load_satellite("finesight.hub.repository:check_publish")
        check_publish(parse_address(push))
    upload_run = None
    if push is not None:
        upload_run = load_satellite("finesight.export.export_operations:upload_run")
    # These imports take seconds. They follow the recipe checks so that errors appear at once.
    from finesight.train.finalize import load_result
    from finesight.train.run_dir import RunDir
    from finesight.train.training_run import train as run_training

    if stop_after is not None and stop_after >= 1:
        stop_after = int(stop_after)
    check_fit = find_satellite("finesight.plan.run_plan:check_fit")
    main_result = run_training(
        settings,
        resume=resume,
        console=console.rich_console,
        check_inputs=None if check_fit is None else partial(check_fit, force=force),
        stop_after=stop_after,
        callbacks=callbacks,
    )
    result = main_result or load_result(RunDir(settings.output_dir))
    if result is None:
        raise UserError(
            "no result after the end of the run",
            where=str(settings.output_dir),
            expected="an output folder shared by all ranks",
            remedy="check the log of rank 0",
        )
    if main_result is None:
        return Outcome(result, data=[])  # The main process prints the result.
    exit_code = 0
    if upload_run is not None:
        exit_code = upload_run(settings.output_dir, push, console)
    next_steps = list_next_steps(settings)
    return Outcome(result, (), result.as_json(), next_steps, exit_code)


def list_next_steps(settings: Recipe) -> list[Step]:
    """Return the operations that use a finished run, with the reason for the proposed one."""
    from finesight.report.run_reader import read_run
    from finesight.report.run_verdict import judge_run
    from finesight.report.summary import is_native_run
    from finesight.samples.example_question import read_example

    run = str(settings.output_dir)
    run_record = read_run(settings.output_dir, with_plugins=False)
    proposed = judge_run(run_record).next_step
    next_steps = [read_example(settings.output_dir).build_step(run)]
    if is_native_run(run_record):
        next_steps.append(Step("serve", {"run_or_model": run}))
        label_step = find_label_step(settings)
        if label_step is not None:
            next_steps.append(label_step)
    else:
        next_steps.append(Step("web", {"run_or_model": run}))
    if proposed is None:
        return next_steps
    for index, step in enumerate(next_steps):
        if step.operation == proposed.operation:
            next_steps[index] = replace(step, purpose=proposed.purpose)
            return next_steps
    return [proposed, *next_steps]


def _load_recipe(
    recipe: StrPath | Recipe | Mapping[str, Any], overrides: Overrides
) -> tuple[Recipe, Path | None]:
    """Return settings and their file."""
    from finesight.settings.recipe import load_recipe, recipe_from_dict

    if isinstance(recipe, str | Path):
        file = Path(recipe)
        if os.path.isdir(file):  # False for an invalid path, which load_recipe reports
            file = _find_run_recipe(file, overrides)
        return load_recipe(file, overrides), file
    content = recipe if isinstance(recipe, Mapping) else recipe.model_dump(mode="json")
    return recipe_from_dict(content, overrides), None


def find_label_step(recipe: Recipe) -> Step | None:
    """Return the step that labels further images with a run; None if it trained no labels."""
    find_label_sources = find_satellite("finesight.label.label_store:find_label_sources")
    sources = None if find_label_sources is None else find_label_sources(recipe)
    if sources is None:
        return None
    arguments = {"run_or_model": str(recipe.output_dir), "sources": sources or ["IMAGES"]}
    return Step("label", arguments)


def _find_run_recipe(folder: Path, overrides: Overrides) -> Path:
    """Return the recipe file of a run folder.

    Raises UserError if the folder has no recipe, or if the recipe writes to another folder: a run
    that was moved or copied would continue elsewhere.
    """
    from finesight.settings.manifest import RECIPE_FILE
    from finesight.settings.recipe import load_recipe

    file = folder / RECIPE_FILE
    if not file.is_file():
        raise UserError(
            f"a folder without {RECIPE_FILE}",
            where=str(folder),
            expected="a recipe, or the folder of a run",
            remedy="give the YAML file of a recipe",
        )
    output_dir = load_recipe(file, overrides).output_dir
    if output_dir.resolve() != folder.resolve():
        raise UserError(
            f"output_dir is {output_dir}, another folder",
            where=str(file),
            expected=f"the folder of the run, {folder}, relative to the working directory",
            remedy=f"change to the working directory of the run, add output_dir={folder}, or give"
            f" {file} to use its output_dir",
        )
    return file
