"""`finesight show`: samples as the model reads them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from finesight.errors import UserError
from finesight.operations.next_steps import propose_plan
from finesight.operations.operation import Outcome, Parameter, StrPath
from finesight.operations.options import (
    LanguageOption,
    OverridesArgument,
    RecipeArgument,
)
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.encode.renderer import Renderer
    from finesight.encode.tokenization import TextTokenizer, TokenizedSample
    from finesight.samples.augmentation import Augmenter
    from finesight.samples.image_file import CorruptImageError
    from finesight.samples.sample import LocatedSample
    from finesight.settings.config import Recipe


def show(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    num_samples: Annotated[int, Parameter(minimum=1)] = 1,
    seed: Annotated[int | None, Parameter(minimum=0)] = None,
    use_eval_split: Annotated[bool, Parameter(option="--eval")] = False,
    augmented: Annotated[int | None, Parameter(minimum=1)] = None,
    html: Annotated[StrPath | None, Parameter(metavar="FILE")] = None,
    language: LanguageOption = None,
) -> Outcome[list[TokenizedSample]]:
    """Print the tokens of samples as the model receives them in training.

    Each line is a token with its id, a * if it counts in the loss (label other than -100), its
    position ids and its text. All placeholder tokens of an image share one line. Reads the
    configuration and tokenizer of the model, but no weights.

    Example: finesight show recipes/latex_ocr_qwen2_vl_2b.yaml --num-samples 2

    Args:
        num_samples: Number of samples, from the start of the data.
        seed: Show random samples, selected with this seed, instead.
        use_eval_split: Show samples of data.eval instead of data.train.
        augmented: Show this number of random variants of each sample, as data.augment of the recipe
            creates them in training.
        html: Write an HTML page with the resized images, boxes and tokens instead of the table. An
            existing page is replaced, but no other file.
    """
    from finesight.operations.model import token_table_to_dict
    from finesight.report.data_pages import render_sample_page
    from finesight.report.html import PageFile
    from finesight.report.i18n import detect_language, translate, use_language
    from finesight.samples.corpus import load_corpus
    from finesight.settings.recipe import load_recipe
    from finesight.train.recipe_check import check_recipe

    recipe = Path(recipe)
    page_file = None
    if html is not None:
        page_file = PageFile(Path(html), "show", [recipe])
        page_file.check()
    settings = load_recipe(recipe, overrides or ())
    files = settings.data.eval if use_eval_split else settings.data.train
    if not files:
        raise UserError(
            f"data.eval of {recipe.name} is empty",
            where=str(recipe),
            expected="a file of validation samples",
            remedy="set data.eval, or remove --eval to show data.train",
        )
    renderer = check_recipe(settings, runs_functions=False, needs_weights=False).renderer
    renderer.accepted_samples = None  # samples that the objective rejects are shown, too
    corpus = load_corpus(files)
    indices = _select_indices(len(corpus), num_samples, seed)
    selected = {index: corpus.read_validated(index) for index in indices}
    augmenter = None
    if augmented:
        can_augment = not use_eval_split and renderer.is_native
        split = "eval" if use_eval_split else "train"
        data_name = f"data.{split} of {recipe.name}"
        augmenter = _build_augmenter(settings, data_name, augmented, can_augment=can_augment)
    console = ProgressConsole()

    def report_skipped(sample_id: str, error: CorruptImageError) -> None:
        if len(selected) == 1:
            raise error
        console.log(f"skipped: {sample_id}: {error.where}: {error.what}")

    valid, tokenized = _tokenize_variants(
        renderer, selected, augmenter, augmented or 1, report_skipped
    )
    data = [token_table_to_dict(one, renderer.tokenizer) for one in tokenized]
    if page_file is None:
        lines = _format_token_tables(renderer.tokenizer, valid, tokenized)
        return Outcome(tokenized, lines, data, [propose_plan(recipe, renderer, overrides)])
    if not renderer.is_native:
        raise UserError(
            "HTML pages do not support the transformers backend",
            where=f"--html {html}",
            expected="a model of a native family",
            remedy="remove --html to print tokens and loss mask",
        )
    names = ", ".join(str(file.path) for file in files)
    text = "The first {} of {}"
    if seed is not None:
        text = "{} random samples of {}"
    with (
        console.progress_stage("samples", len(valid)) as on_progress,
        use_language(language or detect_language()),
    ):
        title = translate(text, len(selected), names)
        page = render_sample_page(renderer.native, valid, title, on_progress, report_skipped)
    page_file.write(page)
    return Outcome(tokenized, [f"page: {html}"], data)


def _select_indices(num_all: int, num_samples: int, seed: int | None) -> list[int]:
    """Return the indices of the first samples, or of random ones with a seed."""
    indices = [*range(num_all)]
    if seed is None:
        return indices[:num_samples]
    return sorted(random.Random(seed).sample(indices, min(num_samples, num_all)))


def _build_augmenter(
    settings: Recipe, data_name: str, num_variants: int, *, can_augment: bool
) -> Augmenter:
    """Return the augmenter of a recipe. Raises UserError for data without variants."""
    from finesight.samples.augmentation import Augmenter

    augmenter = Augmenter.from_recipe(settings)
    if augmenter is not None and can_augment:
        return augmenter
    raise UserError(
        f"{data_name} has no variants",
        where=f"--augmented {num_variants}",
        expected="training data with data.augment, and a native model family",
        remedy="remove --augmented" if augmenter else "add data.augment=light",
    )


def _tokenize_variants(
    renderer: Renderer,
    samples: Mapping[int, LocatedSample],
    augmenter: Augmenter | None,
    num_variants: int,
    on_corrupt_image: Callable[[str, CorruptImageError], None],
) -> tuple[list[LocatedSample], list[TokenizedSample]]:
    """Return the variants of samples by index that training draws, with their tokens.

    Without an augmenter, these are the samples themselves.
    """
    from finesight.samples.image_file import CorruptImageError

    variants: list[LocatedSample] = []
    tokenized: list[TokenizedSample] = []
    for index, located in samples.items():
        try:
            for number in range(num_variants):
                variant = located
                if augmenter is not None:
                    variant = augmenter.augment(located, number, index)
                tokenized.append(renderer.tokenize(variant))
                variants.append(variant)
        except CorruptImageError as error:
            on_corrupt_image(located.sample.id, error)
    return variants, tokenized


def _format_token_tables(
    tokenizer: TextTokenizer, samples: Sequence[LocatedSample], tokenized: Sequence[TokenizedSample]
) -> list[str]:
    """Return the lines of the token tables of samples, each with the label of its answer."""
    from finesight.encode.tokenization import format_token_table

    lines: list[str] = []
    for located, one in zip(samples, tokenized, strict=True):
        lines += format_token_table(one, tokenizer)
        label = located.sample.label
        if label is not None:
            lines.append(f"label: {label}".lower())
        lines.append("")
    return lines
