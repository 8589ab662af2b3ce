"""`finesight data plan`: memory and time of a run, and settings that fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

EXIT_DOES_NOT_FIT = 2


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe in YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe settings."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="GPU model: T4, 4090, A100-80GB, H200. Default: measure this machine.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as one JSON object.")
    ] = False,
) -> None:
    """Estimate memory and time of a run and suggest settings that fit.

    Reads image headers and the configuration and tokenizer of the model, but no weights. Without
    --gpu, benchmarks this machine for a second. Prints tokens, FLOPs and memory per part, and the
    time, for the recipe and for the largest packs with the fewest checkpointed layers that fit. The
    last lines contain the overrides. The recipe is not modified.

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
