"""`finesight train`: fine-tune a model with a recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import AsJsonOption, OverridesArgument, TrustMetricOption
from finesight.errors import UserError


def train(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="Recipe: YAML file of settings; or the folder of a run, for its recipe.yaml.",
        ),
    ],
    overrides: OverridesArgument = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in output_dir from its newest checkpoint, or start it if there "
            "is none. Repeat the same recipe and overrides, or give the run folder.",
        ),
    ] = False,
    trust_metric: TrustMetricOption = False,
    as_json: AsJsonOption = False,
) -> None:
    """Fine-tune a model with a recipe, and evaluate it before and after training.

    All settings are described on the page "Recipe reference" of the documentation. The recipe.yaml
    of a run lists all of them with their values.

    SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 (sbatch --signal=USR1@300) stop the run after
    writing a checkpoint, with exit code 75. The same command with --resume continues the run as if
    it had not been stopped.

    For several GPUs, run torchrun --nproc-per-node 4 -m finesight train RECIPE. train.batch_size
    counts the samples of all GPUs, so the result equals that of one GPU up to rounding. A run can
    resume on another number of GPUs.

    Example: finesight train recipes/latex_ocr_qwen2_vl_2b.yaml train.epochs=1 output_dir=runs/short

    Example: finesight train runs/short --resume
    """
    from finesight.evaluate.custom_metric import check_recipe_metric
    from finesight.recipe import load_recipe

    if os.path.isdir(recipe):  # False for an invalid path, which load_recipe reports
        recipe = _find_run_recipe(recipe, overrides or ())
    settings = load_recipe(recipe, overrides or ())
    check_recipe_metric(settings, recipe, overrides or (), trust=trust_metric)
    # This import takes seconds. It follows the recipe checks so that errors appear at once.
    from finesight.train.trainer import train as run_training

    result = run_training(settings, resume=resume)
    if as_json and result is not None:
        typer.echo(json.dumps(result.as_json()))


def _find_run_recipe(folder: Path, overrides: Sequence[str]) -> Path:
    """Return the recipe file of a run folder.

    Raises UserError if the folder has no recipe, or if the recipe writes to another folder: a run
    that was moved or copied would continue elsewhere.
    """
    from finesight.recipe import load_recipe
    from finesight.run_files import RECIPE_FILE

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
