"""`finesight data plan` and `finesight data show`: estimates and tokenized samples of a recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import (
    JSON_OUTPUT,
    AsJsonOption,
    LanguageOption,
    OverridesArgument,
    RecipeArgument,
    echo_json,
)
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.data.sample import LocatedSample
    from finesight.encode.renderer import Renderer


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


def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    num_samples: Annotated[
        int, typer.Option(min=1, help="Number of samples, from the start of the data.")
    ] = 1,
    use_eval_split: Annotated[
        bool, typer.Option("--eval", help="Show samples of data.eval instead of data.train.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write an HTML page with the resized images, boxes and tokens instead of the "
            "table. An existing page is replaced, but no other file.",
        ),
    ] = None,
    language: LanguageOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help=f"Print one JSON object per sample {JSON_OUTPUT}")
    ] = False,
) -> None:
    """Print the tokens of samples as the model receives them in training.

    Each line is a token with its id, a * if it counts in the loss (label other than -100), its
    position ids and its text. All placeholder tokens of an image share one line. Reads the
    configuration and tokenizer of the model, but no weights.

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
    """Write an HTML page of the selected samples while showing a progress bar.

    `source` is the title of the page: the number of samples and their files.
    """
    from rich.console import Console

    from finesight.encode.renderer import NativeRenderer
    from finesight.report.data_pages import render_sample_page
    from finesight.report.html import write_page
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
    """Print one token table, or one JSON object, per sample."""
    from finesight.encode.tokenization import format_token_table, token_table_to_dict

    for located_sample in selected:
        tokenized = renderer.tokenize(located_sample)
        if as_json:
            record = token_table_to_dict(tokenized, renderer.tokenizer)
            echo_json(record)
        else:
            typer.echo("\n".join(format_token_table(tokenized, renderer.tokenizer)) + "\n")
