"""`finesight data plan`: what a recipe's run will take, and settings that make it fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

DOES_NOT_FIT = 2


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings in place of the recipe's."),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="A card by name: T4, 4090, A100-80GB, H200. Else measured.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The plan as one JSON object.")] = False,
) -> None:
    """Count what a run will take, and choose settings that fit: memory and time before they are
    spent.

    Reads the headers of pictures and the model's configuration and tokenizer, no weights. Without
    --gpu, this machine is measured for a second. Prints tokens, operations by part, memory by part
    and time, as the recipe is written and with the largest packs and the fewest recomputed layers
    that fit; at the end the words that set them. The recipe is not changed.

    Ends with 0 when the run fits, with 2 when nothing makes it fit.

    Example: finesight data plan recipes/latex_ocr_qwen2_vl_2b.yaml --gpu "RTX 4090"
    """
    from rich.console import Console

    from finesight.plan.plan import make_plan
    from finesight.plan.told import as_lines, as_record
    from finesight.recipe import load_recipe
    from finesight.train.progress import Screen

    made = make_plan(load_recipe(recipe, changes or ()), gpu, Screen(Console(stderr=True)))
    typer.echo(json.dumps(as_record(made)) if as_json else "\n".join(as_lines(made)))
    if not made.chosen.fits:
        raise typer.Exit(DOES_NOT_FIT)
