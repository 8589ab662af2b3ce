"""`finesight convert`: another program's training configuration becomes a recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import AsJson
from finesight.errors import printable

if TYPE_CHECKING:
    from finesight.convert.converting import Converted
    from finesight.convert.rules import Remark


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE",
            help="LLaMA-Factory's YAML or JSON; a shell script with `swift sft` or "
            "`llamafactory-cli train`; ms-swift's YAML, or the args.json of a run of it.",
        ),
    ],
    recipe: Annotated[
        Path, typer.Argument(metavar="RECIPE", help="A file that does not exist yet.")
    ],
    as_json: AsJson = False,
) -> None:
    """Write the recipe of a training that was set up for ms-swift or LLaMA-Factory.

    Their defaults are written out where they differ, batches are counted over all GPUs, and every
    setting that has no counterpart is named with its value and what to do. Scripts are read, never
    run. The data are imported by the commands that are printed.

    Example: finesight convert train_lora.yaml recipe.yaml
    """
    from finesight.convert.converting import convert as converted_file

    done = converted_file(source, recipe)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(done), ensure_ascii=False))
    else:
        typer.echo("\n".join(map(printable, _lines(source, recipe, done))))


def _lines(source: Path, recipe: Path, done: Converted) -> Iterator[str]:
    yield f"{recipe}: from {done.program}, {source}"
    for remark in _of(done, "note"):
        yield f"  {remark.key} {remark.value}: {remark.text}"
    differing = [*_of(done, "differs"), *_of(done, "unknown")]
    if differing:
        yield "not the same here:"
        for why, group in groupby(differing, _why):
            yield f"  {', '.join(f'{remark.key} {remark.value}' for remark in group)}: {why}"
    needless = list(_of(done, "needless"))
    if needless:
        yield "nothing to be done about:"
        for why, group in groupby(sorted(needless, key=_why), _why):
            yield f"  {', '.join(remark.key for remark in group)}: {why}"
    yield "next:"
    for command in done.imports:
        yield f"  {command}"
    yield f"  finesight train {recipe}"


def _of(done: Converted, kind: str) -> Iterable[Remark]:
    return (remark for remark in done.remarks if remark.kind == kind)


def _why(remark: Remark) -> str:
    return remark.text
