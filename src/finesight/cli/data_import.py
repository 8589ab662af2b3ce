"""`finesight data import`: foreign files become samples."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.data.importing import Summary


def import_data(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="A .json, .jsonl, .csv, .tsv or .parquet file.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A folder that does not exist yet.")],
    format_name: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help="samples, qwen-vl, picture-path, query, conversations or table; else detected.",
        ),
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option(
            "--map",
            metavar="ROLE=COLUMN",
            help="What a table's columns are: image, answer, question, box, label.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="What to ask, after each row's own question if it has one.")
    ] = None,
    box_format: Annotated[
        Literal["xyxy", "xywh", "cxcywh"] | None, typer.Option(help="What a box's numbers are.")
    ] = None,
    box_units: Annotated[
        Literal["pixel", "1", "1000"] | None,
        typer.Option(help="Pixels of the original picture, or its sides counted as 1 or 1000."),
    ] = None,
    rows: Annotated[
        str | None, typer.Option(metavar="A:B", help="Rows from A up to but not B, the first is 0.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")] = None,
    eval_last: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Hold out the last N rows; other rows that show their pictures are left out.",
        ),
    ] = None,
    split: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Train on this share of the rows, split by picture."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which rows --split holds out.")] = 0,
    copy_pictures: Annotated[
        bool, typer.Option("--copy-pictures", help="Copy the pictures into OUT/pictures.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="The summary as one JSON object.")
    ] = False,
) -> None:
    """Turn pictures with labels into samples: OUT/data.jsonl, or train.jsonl and eval.jsonl.

    Paths of pictures in SOURCE start at its folder or, if there is no such file, where you are.

    A list of answers becomes one training sample each, and one evaluation sample with the others
    as references.

    Example: finesight data import latex.csv latex --map image=image_path --map answer=text
    --prompt "Read the formula." --split 0.9
    """
    from finesight.data.importing import Request, import_file

    request = Request(
        format=format_name,
        columns=_columns(columns or []),
        prompt=prompt,
        box_format=box_format,
        box_units=box_units,
        rows=_bounds(rows),
        limit=limit,
        eval_last=eval_last,
        split=split,
        seed=seed,
        copy_pictures=copy_pictures,
    )
    summary = import_file(source, out, request)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary), ensure_ascii=False, default=str))
    else:
        typer.echo("\n".join(_lines(source, summary)))


def _columns(pairs: list[str]) -> dict[str, str]:
    """image=COLUMN, ... as a mapping."""
    columns: dict[str, str] = {}
    for pair in pairs:
        role, equals, column = pair.partition("=")
        if not equals or not column or role in columns:
            raise UserError(
                f"{pair!r} {'comes after another column' if role in columns else 'is no mapping'}",
                where="--map",
                expected="ROLE=COLUMN, each role once",
                remedy="for example --map image=path --map answer=caption",
            )
        columns[role] = column
    return columns


def _bounds(rows: str | None) -> tuple[int | None, int | None]:
    """A:B, A: or :B as the bounds of a slice."""
    found = re.fullmatch(r"(-?\d+)?:(-?\d+)?", ":" if rows is None else rows.strip())
    if not found:
        raise UserError(
            f"{rows!r} is no range of rows",
            where="--rows",
            expected="A:B, from row A up to but not row B, counted from 0",
            remedy="for example --rows 0:3000",
        )
    start, stop = (None if number is None else int(number) for number in found.groups())
    return start, stop


def _lines(source: Path, summary: Summary) -> list[str]:
    lines = [
        f"{source}: {summary.rows} rows, read as {summary.format} ({summary.known_by})",
        *(f"  {w.file}: {w.samples} samples from {w.rows} rows" for w in summary.written),
        *(f"  left out: {count} rows, {reason}" for reason, count in summary.left_out.items()),
        f"  {summary.pictures} pictures",
    ]
    if summary.clipped_boxes:
        lines.append(f"  {summary.clipped_boxes} boxes clipped by at most a pixel")
    if summary.unused_columns:
        lines.append(f"  columns not used: {', '.join(summary.unused_columns)}")
    return lines
