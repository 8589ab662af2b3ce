"""Arguments and options that commands share, each said once."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

import typer

from finesight.errors import UserError, escaped_json

RunOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="A run folder, a model or adapter folder, a hub name, or finesight-tiny.",
    ),
]

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]

Precision = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option(help="auto: bf16 on recent cards, fp16 on older ones, fp32 on a CPU."),
]

Weights = Annotated[
    Literal["auto", "nf4", "fp8", "int8", "int4"],
    typer.Option(
        help="How the decoder's weights and a head of its own are kept: auto: as stored, or as the "
        "run trained with them; the others are made while loading. Pictures are seen in 16 bits."
    ),
]

SourceFormat = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="samples, openai, ms-swift, llava, llama-factory, qwen-vl, conversations, query, "
        "picture-path, table, coco, yolo, voc, labelme or folder; else detected.",
    ),
]

Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="ROLE=COLUMN",
        help="What a table's columns are: image, answer, question, box, label; or fields=A,B,C for "
        "an answer of these columns as JSON.",
    ),
]

Prompt = Annotated[
    str | None,
    typer.Option(
        help="What to ask, after each row's own question if it has one. For box data sets it may "
        "hold {label} or {labels}."
    ),
]

Ask = Annotated[
    Literal["detection", "grounding"],
    typer.Option(help="Of box data sets: one question for all boxes, or one for each label."),
]

BoxNumbers = Annotated[
    Literal["xyxy", "xywh", "cxcywh"] | None,
    typer.Option("--box-format", help="What a box's numbers are."),
]

BoxUnits = Annotated[
    Literal["pixel", "1", "1000"] | None,
    typer.Option(help="Pixels of the original picture, or its sides counted as 1 or 1000."),
]

RowRange = Annotated[
    str | None,
    typer.Option("--rows", metavar="A:B", help="Rows from A up to but not B, the first is 0."),
]

Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N rows.")]

AsJson = Annotated[bool, typer.Option("--json", help="The summary as one JSON object.")]


def column_map(pairs: list[str]) -> dict[str, str]:
    """image=COLUMN, ... as a mapping. Raises UserError for anything else."""
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


def row_bounds(rows: str | None) -> tuple[int | None, int | None]:
    """A:B, A: or :B as the bounds of a slice. Raises UserError for anything else."""
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


PageLanguage = Annotated[
    Literal["en", "zh"] | None,
    typer.Option("--language", help="Of the page: English or Chinese; by default the locale's."),
]


def echo_json(data: object) -> None:
    """Print data as one line of JSON, in UTF-8 also where it names files that are not."""
    typer.echo(escaped_json(json.dumps(data, ensure_ascii=False, default=str)))
