"""`finesight data import`: convert a dataset to samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.cli.options import (
    AsJsonOption,
    BoxFormatOption,
    BoxTaskOption,
    BoxUnitsOption,
    ColumnsOption,
    LimitOption,
    PromptOption,
    RowRangeOption,
    SourceFormatOption,
    echo_json,
    parse_column_map,
    parse_row_range,
)
from finesight.errors import escape_unprintable

if TYPE_CHECKING:
    from finesight.data.importer import ImportSummary


EvalLastOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Use the last N rows for validation, and leave out training rows with the same "
        "images. Not with --train-fraction.",
    ),
]
TrainFractionOption = Annotated[
    float | None,
    typer.Option(
        metavar="FRACTION",
        help="Fraction of the rows for training, between 0 and 1, such as 0.9; the others are for "
        "validation. Rows with the same image stay together. Not with --eval-last. Default: no "
        "split.",
    ),
]
SplitSeedOption = Annotated[int, typer.Option(min=0, help="Random seed of --train-fraction.")]
CopyImagesOption = Annotated[
    bool,
    typer.Option(
        "--copy-images",
        help="Copy the images into OUT/images. Default: OUT refers to the images in place; those "
        "from hubs, the web and archives are always copied.",
    ),
]
OnInvalidRowOption = Annotated[
    Literal["fail", "skip"],
    typer.Option(
        help="Invalid rows, such as a missing image or an impossible box: fail and write nothing, "
        "or skip them and list them in OUT/skipped_rows.jsonl."
    ),
]
SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A .json, .jsonl, .csv, .tsv or .parquet file, a WebDataset (.tar), a zip or tar "
        "archive, a folder, hf:OWNER/NAME or modelscope:OWNER/NAME (optional @REVISION and "
        ":SPLIT), or https://HOST/FILE.",
    ),
]
AllowHostOption = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host",
        metavar="HOST",
        help="Allow downloads of https:// sources and images from this host. Repeatable.",
    ),
]
OutFolderArgument = Annotated[
    Path, typer.Argument(metavar="OUT", help="Folder to create; an existing one is an error.")
]


def import_data(
    source: SourceArgument,
    out: OutFolderArgument,
    format_name: SourceFormatOption = None,
    columns: ColumnsOption = None,
    prompt: PromptOption = None,
    box_task: BoxTaskOption = "detection",
    box_format: BoxFormatOption = None,
    box_units: BoxUnitsOption = None,
    row_range: RowRangeOption = None,
    limit: LimitOption = None,
    eval_last: EvalLastOption = None,
    train_fraction: TrainFractionOption = None,
    seed: SplitSeedOption = 0,
    on_invalid_row: OnInvalidRowOption = "fail",
    copy_images: CopyImagesOption = False,
    allow_host: AllowHostOption = None,
    as_json: AsJsonOption = False,
) -> None:
    """Import a dataset as samples: OUT/data.jsonl, or OUT/train.jsonl and OUT/eval.jsonl.

    Image paths are relative to the folder of SOURCE, or to the working directory if the file does
    not exist there. Sources from a hub, the web or an archive contain their own images, which are
    copied.

    A row with several answers becomes one training sample per answer, or one validation sample that
    accepts all of them. Downloads resume and use the cache (HF_HOME). For hub datasets, only the
    files required by --rows and --limit are downloaded.

    Example: finesight data import latex.csv latex --map image=image_path --map answer=text
    --prompt "Read the formula." --train-fraction 0.9
    """
    from finesight.data.import_source import ImportOptions
    from finesight.data.importer import import_dataset
    from finesight.data.source_fetch import fetch_source

    options = ImportOptions(
        format=format_name,
        columns=parse_column_map(columns or []),
        prompt=prompt,
        box_format=box_format,
        box_units=box_units,
        row_range=parse_row_range(row_range),
        limit=limit,
        eval_last=eval_last,
        train_fraction=train_fraction,
        seed=seed,
        copy_images=copy_images,
        box_task=box_task,
        on_invalid_row=on_invalid_row,
    )
    with fetch_source(source, out, options, allow_host or ()) as fetched:
        summary = import_dataset(fetched.path, out, fetched.options)
    for note in fetched.notes:
        typer.echo(escape_unprintable(f"{source}: {note}"), err=True)
    if as_json:
        echo_json(dataclasses.asdict(summary))
    else:
        typer.echo("\n".join(map(escape_unprintable, _format_summary(source, summary))))


def _format_summary(source: str, summary: ImportSummary) -> list[str]:
    lines = [
        f"{source}: {summary.num_rows} rows, read as {summary.format} ({summary.detected_by})",
        *(
            f"  {file.file}: {file.num_samples} samples from {file.num_rows} rows"
            for file in summary.output_files
        ),
        *(f"  skipped: {count} rows, {reason}" for reason, count in summary.skipped_rows.items()),
        f"  {summary.num_images} images",
    ]
    if summary.skipped_rows_file is not None:
        lines.append(f"  {summary.skipped_rows_file}: invalid rows with reasons")
    if summary.num_clipped_boxes:
        lines.append(f"  {summary.num_clipped_boxes} boxes clipped by at most 1 pixel")
    lines += [f"  {count} {source_note}" for source_note, count in summary.source_notes.items()]
    if summary.unused_columns:
        lines.append(f"  unused columns: {', '.join(summary.unused_columns)}")
    return lines
