"""`finesight data export`: write samples in the format of another program."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import AsJsonOption, echo_json

if TYPE_CHECKING:
    from finesight.data.exporter import ExportSummary


def export_data(
    samples: Annotated[
        Path,
        typer.Argument(
            metavar="SAMPLES", help="Samples file, as written by `finesight data import`."
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="Folder to create; an existing one is an error."),
    ],
    target_format: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="FORMAT",
            help="ms-swift, llama-factory, llava, openai, coco, yolo or another --format of "
            "`finesight data import`.",
        ),
    ],
    copy_images: Annotated[
        bool,
        typer.Option(
            "--copy-images",
            help="Copy the images into OUT/images. Default: OUT refers to the images in place.",
        ),
    ] = False,
    as_json: AsJsonOption = False,
) -> None:
    """Export samples in the format of another program.

    Features that the format does not support are counted. A sample that the format cannot represent
    is an error. `finesight data import` reads every format.

    Example: finesight data export latex/train.jsonl latex-swift --to ms-swift
    """
    from finesight.data.exporter import export_dataset
    from finesight.data.jsonl import LocatedSample, read_samples

    located_samples = [LocatedSample(sample, samples.parent) for sample in read_samples(samples)]
    summary = export_dataset(located_samples, out, target_format, copy_images=copy_images)
    if as_json:
        echo_json(dataclasses.asdict(summary))
    else:
        typer.echo("\n".join(_format_summary(out, summary)))


def _format_summary(out: Path, summary: ExportSummary) -> list[str]:
    files = [str(file) for file in summary.files[:MAX_PRINTED_FILES]]
    files += (
        [f"and {len(summary.files) - MAX_PRINTED_FILES} more"]
        if len(summary.files) > MAX_PRINTED_FILES
        else []
    )
    return [
        f"{out}: {summary.num_samples} samples in the format {summary.format}",
        f"  {', '.join(files)}",
        f"  {summary.num_images} images",
        *(f"  not supported: {count} {feature}" for feature, count in summary.lost_counts.items()),
        *(f"  note: {note}" for note in summary.notes),
    ]


MAX_PRINTED_FILES = 3
"""Maximum number of printed file names; further files are only counted."""
