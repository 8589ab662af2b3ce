"""`finesight data show`: what a recipe's samples look like to the model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def show(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, as YAML.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings in place of the recipe's."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="How many, from the first.")] = 1,
    held_out: Annotated[
        bool, typer.Option("--eval", help="Samples of data.eval in place of data.train.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sample.")] = False,
) -> None:
    """Print every token of a recipe's samples: its id, whether it is learned (*), its positions.

    The placeholders of a picture share one line. Needs the model's configuration and tokenizer,
    not its weights.

    Example: finesight data show recipes/latex_ocr_qwen2_vl_2b.yaml --samples 2
    """
    from finesight.data.sources import load_sources
    from finesight.encode.render import Renderer
    from finesight.encode.show import as_lines, as_record
    from finesight.errors import UserError
    from finesight.hub import locate
    from finesight.recipe import load_recipe

    settings = load_recipe(recipe, changes or ())
    files = settings.data.eval if held_out else settings.data.train
    if not files:
        raise UserError(
            f"data.eval of {recipe.name} names no file",
            where=str(recipe),
            expected="a file of held-out samples",
            remedy="set data.eval, or leave --eval out to see data.train",
        )
    renderer = Renderer(locate(settings.model), settings.picture, settings.data.system)
    for located in load_sources(files).samples[:samples]:
        outline = renderer.outline(located)
        if as_json:
            record = as_record(outline, renderer.tokenizer)
            typer.echo(json.dumps(record, ensure_ascii=False))
        else:
            typer.echo("\n".join(as_lines(outline, renderer.tokenizer)) + "\n")
