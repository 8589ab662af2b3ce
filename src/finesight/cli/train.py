"""`finesight train`: a recipe becomes a tuned model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file of settings.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY=VALUE]...", help="Settings in place of the recipe's: train.batch=8"
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the newest checkpoint, or begin where there is none."
        ),
    ] = False,
    trust_metric: Annotated[
        bool,
        typer.Option(
            "--trust-metric", help="Execute a metric.py that comes from the folder of a run."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as one JSON object at the end.")
    ] = False,
) -> None:
    """Tune a model as a recipe says, and measure it before and after.

    SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 (sbatch --signal=USR1@300) stop it after writing a
    checkpoint, with exit code 75; the same command with --resume goes on from there as if nothing
    had happened.

    Of several GPUs each has its own process: torchrun --nproc-per-node 4 -m finesight train RECIPE
    learns what one would, and may be resumed with another number of them.

    Example: finesight train recipes/latex_ocr_qwen2_vl_2b.yaml train.epochs=1 output=runs/short
    """
    from finesight.evaluate.metric_trust import check_recipe_metric
    from finesight.recipe import load_recipe

    settings = load_recipe(recipe, overrides or ())
    check_recipe_metric(settings, recipe, overrides or (), trust=trust_metric)
    # Imported now: it takes seconds, and a mistake in the recipe shows at once.
    from finesight.train.loop import train as run

    result = run(settings, resume=resume)
    if as_json and result is not None:
        typer.echo(json.dumps(result.as_json()))
