"""`finesight data plan`: estimate memory and time of a run, and suggest settings that fit."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from finesight.cli.options import AsJsonOption, OverridesArgument, RecipeArgument

EXIT_DOES_NOT_FIT = 2


def plan(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help='GPU to plan for, such as T4, "RTX 4090", A100-80GB or H200. Default: this '
            "machine, measured in about a second.",
        ),
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Estimate memory and time of a run and suggest settings that fit.

    Prints the tokens per sample, the FLOPs of each model part, and memory and training time in two
    columns: for the recipe as written, and for chosen settings that fit into 90 % of the memory.
    The last lines are overrides for `finesight train`. The recipe is not modified.

    Reads image headers and the configuration and tokenizer of the model, but no weights.

    Exit code: 0 if the run fits, 2 if no setting makes it fit.

    Example: finesight data plan recipes/latex_ocr_qwen2_vl_2b.yaml --gpu "RTX 4090"
    """
    from rich.console import Console

    from finesight.plan.plan_format import format_plan, plan_to_dict
    from finesight.plan.run_plan import plan_run
    from finesight.recipe import load_recipe
    from finesight.train.console import TrainingConsole

    run_plan = plan_run(
        load_recipe(recipe, overrides or ()), gpu, TrainingConsole(Console(stderr=True))
    )
    typer.echo(json.dumps(plan_to_dict(run_plan)) if as_json else "\n".join(format_plan(run_plan)))
    if not run_plan.chosen_estimate.fits:
        raise typer.Exit(EXIT_DOES_NOT_FIT)
