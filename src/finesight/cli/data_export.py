"""`finesight data export`: samples become the files of another program's format."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import AsJson, echo_json

if TYPE_CHECKING:
    from finesight.data.exporting import Exported


def export_data(
    samples: Annotated[
        Path, typer.Argument(metavar="SAMPLES", help="Samples, as `finesight data import` writes.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    to: Annotated[
        str,
        typer.Option(
            metavar="FORMAT",
            help="ms-swift, llama-factory, llava, openai, coco, yolo or another that --format of "
            "`finesight data import` knows.",
        ),
    ],
    copy_pictures: Annotated[
        bool, typer.Option("--copy-pictures", help="Copy the pictures into OUT/pictures.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write samples in the format of another program, so that it can train on them as well.

    What the format has no place for is counted, a sample that it cannot hold is refused: nothing
    is lost without a word. `finesight data import` reads every format back.

    Example: finesight data export latex/train.jsonl latex-swift --to ms-swift
    """
    from finesight.data.exporting import export
    from finesight.data.jsonl import Located, read_samples

    located = [Located(sample, samples.parent) for sample in read_samples(samples)]
    done = export(located, out, to, copy_pictures=copy_pictures)
    if as_json:
        echo_json(dataclasses.asdict(done))
    else:
        typer.echo("\n".join(_lines(out, done)))


def _lines(out: Path, done: Exported) -> list[str]:
    files = [str(file) for file in done.files[:SHOWN]]
    files += [f"and {len(done.files) - SHOWN} more"] if len(done.files) > SHOWN else []
    return [
        f"{out}: {done.samples} samples in the format {done.format}",
        f"  {', '.join(files)}",
        f"  {done.pictures} pictures",
        *(f"  no place for: {count} {what}" for what, count in done.lost.items()),
        *(f"  note: {note}" for note in done.notes),
    ]


SHOWN = 3
"""Files that are named; the others are counted."""
