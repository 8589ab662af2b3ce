"""`finesight data import`: foreign files become samples."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.cli.options import (
    AsJson,
    Ask,
    BoxNumbers,
    BoxUnits,
    Columns,
    Limit,
    Prompt,
    RowRange,
    SourceFormat,
    column_map,
    echo_json,
    row_bounds,
)
from finesight.errors import printable

if TYPE_CHECKING:
    from finesight.data.importing import Summary


EvalLast = Annotated[
    int | None,
    typer.Option(
        min=1, help="Hold out the last N rows; other rows that show their pictures are left out."
    ),
]
Split = Annotated[
    float | None,
    typer.Option(metavar="SHARE", help="Train on this share of the rows, split by picture."),
]
Seed = Annotated[int, typer.Option(min=0, help="Decides which rows --split holds out.")]
Copy = Annotated[bool, typer.Option("--copy-pictures", help="Copy the pictures into OUT/pictures.")]
Unusable = Annotated[
    Literal["refuse", "drop"],
    typer.Option(help="Rows that cannot be used: stop, or leave them out and list them in OUT."),
]
SourceName = Annotated[
    str,
    typer.Argument(
        metavar="SOURCE",
        help="A .json, .jsonl, .csv, .tsv or .parquet file, a WebDataset (.tar), a zip or tar "
        "archive, or the folder of a data set; hf:OWNER/NAME or modelscope:OWNER/NAME, with "
        "@REVISION and :SPLIT as needed; https://HOST/FILE.",
    ),
]
AllowHost = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-host", metavar="HOST", help="Fetch https:// sources and pictures from this host."
    ),
]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")]


def import_data(
    source: SourceName,
    out: Out,
    format_name: SourceFormat = None,
    columns: Columns = None,
    prompt: Prompt = None,
    ask: Ask = "detection",
    box_format: BoxNumbers = None,
    box_units: BoxUnits = None,
    rows: RowRange = None,
    limit: Limit = None,
    eval_last: EvalLast = None,
    split: Split = None,
    seed: Seed = 0,
    unusable: Unusable = "refuse",
    copy_pictures: Copy = False,
    allow_host: AllowHost = None,
    as_json: AsJson = False,
) -> None:
    """Turn pictures with labels into samples: OUT/data.jsonl, or train.jsonl and eval.jsonl.

    Paths of pictures in SOURCE start at its folder or, if there is no such file, where you are.
    What comes from a hub, the web or an archive has no pictures but those that came with it, and
    these are copied.

    A list of answers becomes one training sample each, and one evaluation sample with the others
    as references. Downloads go on where they stopped, and stay in the cache (HF_HOME). Of a hub's
    data set only the files that --rows and --limit need are fetched.

    Example: finesight data import latex.csv latex --map image=image_path --map answer=text
    --prompt "Read the formula." --split 0.9
    """
    from finesight.data.importing import import_file
    from finesight.data.opening import Request
    from finesight.data.origins import brought

    request = Request(
        format=format_name,
        columns=column_map(columns or []),
        prompt=prompt,
        box_format=box_format,
        box_units=box_units,
        rows=row_bounds(rows),
        limit=limit,
        eval_last=eval_last,
        split=split,
        seed=seed,
        copy_pictures=copy_pictures,
        ask=ask,
        unusable=unusable,
    )
    with brought(source, out, request, allow_host or ()) as found:
        summary = import_file(found.path, out, found.request)
    for note in found.notes:
        typer.echo(printable(f"{source}: {note}"), err=True)
    if as_json:
        echo_json(dataclasses.asdict(summary))
    else:
        typer.echo("\n".join(map(printable, _lines(source, summary))))


def _lines(source: str, summary: Summary) -> list[str]:
    lines = [
        f"{source}: {summary.rows} rows, read as {summary.format} ({summary.known_by})",
        *(f"  {w.file}: {w.samples} samples from {w.rows} rows" for w in summary.written),
        *(f"  left out: {count} rows, {reason}" for reason, count in summary.left_out.items()),
        f"  {summary.pictures} pictures",
    ]
    if summary.listed is not None:
        lines.append(f"  {summary.listed}: each row that cannot be used, and why")
    if summary.clipped_boxes:
        lines.append(f"  {summary.clipped_boxes} boxes clipped by at most a pixel")
    lines += [f"  {count} {what}" for what, count in summary.noted.items()]
    if summary.unused_columns:
        lines.append(f"  columns not used: {', '.join(summary.unused_columns)}")
    return lines
