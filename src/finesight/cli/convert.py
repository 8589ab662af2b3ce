"""`finesight convert`: convert configurations of other trainers to recipes."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import AsJsonOption
from finesight.errors import escape_unprintable

if TYPE_CHECKING:
    from finesight.convert.external_config import ConversionNote
    from finesight.convert.recipe_converter import ConvertedRecipe


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="LLaMA-Factory YAML or JSON, ms-swift YAML, args.json of an ms-swift run, or a "
            "shell script with `swift sft` or `llamafactory-cli train`.",
        ),
    ],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="Recipe file to create.")],
    as_json: AsJsonOption = False,
) -> None:
    """Convert an ms-swift or LLaMA-Factory configuration to a recipe.

    Writes the recipe, including defaults of the other program that differ. train.batch_size is the
    product of batch size per device, gradient accumulation steps and GPUs. Settings that finesight
    does not have are printed with a recommendation. Then run the printed `finesight data import`
    and `finesight train` commands. Scripts are parsed, not executed.

    Example: finesight convert train_lora.yaml recipe.yaml
    """
    from finesight.convert.recipe_converter import convert_config

    conversion = convert_config(source, recipe)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(conversion), ensure_ascii=False))
    else:
        typer.echo(
            "\n".join(map(escape_unprintable, _format_conversion(source, recipe, conversion)))
        )


def _format_conversion(source: Path, recipe: Path, conversion: ConvertedRecipe) -> Iterator[str]:
    yield f"{recipe}: from {conversion.program}, {source}"
    for note in _notes_of_kind(conversion, "note"):
        yield f"  {note.key} {note.value}: {note.text}"
    differences = [*_notes_of_kind(conversion, "differs"), *_notes_of_kind(conversion, "unknown")]
    if differences:
        yield "different in finesight:"
        for reason, group in groupby(differences, _get_text):
            yield f"  {', '.join(f'{note.key} {note.value}' for note in group)}: {reason}"
    irrelevant = list(_notes_of_kind(conversion, "ignored"))
    if irrelevant:
        yield "not needed:"
        for reason, group in groupby(sorted(irrelevant, key=_get_text), _get_text):
            yield f"  {', '.join(note.key for note in group)}: {reason}"
    yield "next:"
    for command in conversion.import_commands:
        yield f"  {command}"
    yield f"  finesight train {recipe}"


def _notes_of_kind(conversion: ConvertedRecipe, kind: str) -> Iterable[ConversionNote]:
    return (note for note in conversion.notes if note.kind == kind)


def _get_text(note: ConversionNote) -> str:
    return note.text
