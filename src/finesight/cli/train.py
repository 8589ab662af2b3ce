"""`finesight train`: fine-tuning with a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe in YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of settings: train.batch_size=8"),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume from the newest checkpoint; start if there is none."),
    ] = False,
    trust_metric: Annotated[
        bool,
        typer.Option(
            "--trust-metric", help="Execute metric.py of a run folder from another source."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object at the end.")
    ] = False,
) -> None:
    """Fine-tune a model with a recipe, and evaluate it before and after training.

    SIGINT (Ctrl-C), SIGTERM, SIGUSR1 and SIGUSR2 (sbatch --signal=USR1@300) stop the run after
    writing a checkpoint, with exit code 75. The same command with --resume continues the run
    exactly.

    For several GPUs, run torchrun --nproc-per-node 4 -m finesight train RECIPE. Training is
    numerically equivalent to a single GPU. A run can resume with another world size.

    Example: finesight train recipes/latex_ocr_qwen2_vl_2b.yaml train.epochs=1 output_dir=runs/short
    """
    from finesight.evaluate.metric_trust import check_recipe_metric
    from finesight.recipe import load_recipe

    settings = load_recipe(recipe, overrides or ())
    check_recipe_metric(settings, recipe, overrides or (), trust=trust_metric)
    # This import takes seconds. It follows the recipe checks so that errors appear at once.
    from finesight.train.trainer import train as run_training

    result = run_training(settings, resume=resume)
    if as_json and result is not None:
        typer.echo(json.dumps(result.as_json()))
