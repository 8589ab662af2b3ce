"""`finesight data show`: tokenized samples of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import LanguageOption, echo_json
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.data.jsonl import LocatedSample
    from finesight.encode.renderer import Renderer


def show(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe in YAML.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of recipe settings."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Number of samples, from the first.")] = 1,
    use_eval_split: Annotated[
        bool, typer.Option("--eval", help="Show samples of data.eval instead of data.train.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write an HTML page with images, boxes and tokens instead."
        ),
    ] = None,
    language: LanguageOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per sample.")
    ] = False,
) -> None:
    """Print the tokens of samples with id, loss mask (*) and position ids.

    The placeholders of an image share one line. The command reads the configuration and tokenizer
    of the model, but no weights. --html writes a self-contained page with the resized images and
    the decoded boxes. It replaces an existing page, but no other file.

    Example: finesight data show recipes/latex_ocr_qwen2_vl_2b.yaml --num-samples 2
    """
    from finesight.data.corpus import load_corpus
    from finesight.encode.renderer import build_renderer
    from finesight.model_folder import locate_model
    from finesight.recipe import load_recipe
    from finesight.report.html import raise_if_not_generated
    from finesight.report.i18n import detect_language, translate, use_language

    if html is not None:
        raise_if_not_generated(html)
    settings = load_recipe(recipe, overrides or ())
    files = settings.data.eval if use_eval_split else settings.data.train
    if not files:
        raise UserError(
            f"data.eval of {recipe.name} is empty",
            where=str(recipe),
            expected="a file of validation samples",
            remedy="set data.eval, or remove --eval to show data.train",
        )
    renderer = build_renderer(
        locate_model(settings.model), settings.image, settings.data.system_prompt
    )
    selected = load_corpus(files).read_samples(num_samples)
    if html is not None:
        names = ", ".join(str(file.path) for file in files)
        with use_language(language or detect_language()):
            _write_sample_page(
                html, renderer, selected, translate("The first {} of {}", len(selected), names)
            )
    if html is None or as_json:
        _print_samples(renderer, selected, as_json)


def _write_sample_page(
    page: Path, renderer: Renderer, selected: Sequence[LocatedSample], source: str
) -> None:
    """Write the HTML page of these samples with a progress bar."""
    from rich.console import Console

    from finesight.encode.native_renderer import NativeRenderer
    from finesight.report.html import write_page
    from finesight.report.sample_page import render_sample_page
    from finesight.train.console import TrainingConsole

    if not isinstance(renderer, NativeRenderer):
        raise UserError(
            "HTML pages do not support the transformers backend",
            where=f"--html {page}",
            expected="a model of a native family",
            remedy="remove --html to print tokens and loss mask",
        )
    with TrainingConsole(Console(stderr=True)).progress_stage(
        "samples", len(selected)
    ) as on_progress:
        content = render_sample_page(renderer, selected, source, on_progress)
    write_page(page, content)
    typer.echo(f"page: {page}", err=True)


def _print_samples(renderer: Renderer, selected: Sequence[LocatedSample], as_json: bool) -> None:
    """Print a table or a JSON object per sample."""
    from finesight.encode.token_table import format_token_table, token_table_to_dict

    for located_sample in selected:
        tokenized = renderer.tokenize(located_sample)
        if as_json:
            record = token_table_to_dict(tokenized, renderer.tokenizer)
            echo_json(record)
        else:
            typer.echo("\n".join(format_token_table(tokenized, renderer.tokenizer)) + "\n")
