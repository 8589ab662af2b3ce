"""`finesight data show`: what a recipe's samples look like to the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import PageLanguage, echo_json
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.data.jsonl import Located
    from finesight.encode.rendering import Rendering


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
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write a page with pictures, boxes and tokens, in place of lines."
        ),
    ] = None,
    language: PageLanguage = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a sample.")] = False,
) -> None:
    """Print every token of a recipe's samples: its id, whether it is learned (*), its positions.

    The placeholders of a picture share one line. Needs the model's configuration and tokenizer,
    not its weights. The page of --html is one file that opens anywhere: pictures as the model sees
    them, boxes as its tokens say them. It replaces an older page, and nothing else.

    Example: finesight data show recipes/latex_ocr_qwen2_vl_2b.yaml --samples 2
    """
    from finesight.data.sources import load_sources
    from finesight.encode.rendering import renderer_of
    from finesight.hub import locate
    from finesight.recipe import load_recipe
    from finesight.report.language import preferred, say, speaking
    from finesight.report.page import refuse_other_files

    if html is not None:
        refuse_other_files(html)
    settings = load_recipe(recipe, changes or ())
    files = settings.data.eval if held_out else settings.data.train
    if not files:
        raise UserError(
            f"data.eval of {recipe.name} names no file",
            where=str(recipe),
            expected="a file of held-out samples",
            remedy="set data.eval, or leave --eval out to see data.train",
        )
    renderer = renderer_of(locate(settings.model), settings.picture, settings.data.system)
    chosen = load_sources(files).read(samples)
    if html is not None:
        names = ", ".join(str(file.path) for file in files)
        with speaking(language or preferred()):
            _draw(html, renderer, chosen, say("The first {} of {}", len(chosen), names))
    if html is None or as_json:
        _print(renderer, chosen, as_json)


def _draw(page: Path, renderer: Rendering, chosen: Sequence[Located], source: str) -> None:
    """Write the page of these samples, with a bar while it is made."""
    from rich.console import Console

    from finesight.encode.render import Renderer
    from finesight.report.page import write_page
    from finesight.report.sample_page import sample_page
    from finesight.train.progress import Screen

    if not isinstance(renderer, Renderer):
        raise UserError(
            "a page of samples as transformers reads them",
            where=f"--html {page}",
            expected="a model of a native family",
            remedy="leave --html out: tokens and what is learned are printed",
        )
    with Screen(Console(stderr=True)).stage("samples", len(chosen)) as advance:
        content = sample_page(renderer, chosen, source, advance)
    write_page(page, content)
    typer.echo(f"page: {page}", err=True)


def _print(renderer: Rendering, chosen: Sequence[Located], as_json: bool) -> None:
    """A table, or one JSON object, for each sample."""
    from finesight.encode.show import as_lines, as_record

    for located in chosen:
        outline = renderer.outline(located)
        if as_json:
            record = as_record(outline, renderer.tokenizer)
            echo_json(record)
        else:
            typer.echo("\n".join(as_lines(outline, renderer.tokenizer)) + "\n")
