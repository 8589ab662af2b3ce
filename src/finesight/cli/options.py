"""Define arguments and options shared by several commands."""

from __future__ import annotations

import json
import re
from typing import Annotated, Literal

import typer

from finesight.errors import UserError, escape_surrogates

RunOrModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL",
        help="Run folder, model or adapter folder, hub name, or finesight-tiny.",
    ),
]

DeviceOption = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Compute device.")]

PrecisionOption = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option(
        help="Compute precision. auto: bf16 on recent GPUs, fp16 on older ones, fp32 on a CPU."
    ),
]

WeightFormatOption = Annotated[
    Literal["auto", "nf4", "fp8", "int8", "int4"],
    typer.Option(
        help="Weight format of the decoder and a separate output head. auto: as stored, or as in "
        "training. Other formats are quantized while loading. The vision encoder uses 16 bits."
    ),
]

SourceFormatOption = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="samples, openai, ms-swift, llava, llama-factory, qwen-vl, conversations, "
        "query-response, image-path, table, coco, yolo, voc, labelme or folder. Default: detected.",
    ),
]

ColumnsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="ROLE=COLUMN",
        help="Role of a table column: image, answer, question, box or label; or fields=A,B,C for "
        "a JSON answer with these columns. Repeatable.",
    ),
]

PromptOption = Annotated[
    str | None,
    typer.Option(
        help="Question, appended to the question of the row if it has one. For box datasets it "
        "may contain {label} or {labels}."
    ),
]

BoxTaskOption = Annotated[
    Literal["detection", "grounding"],
    typer.Option(help="Box datasets: one question for all boxes, or one for each label."),
]

BoxFormatOption = Annotated[
    Literal["xyxy", "xywh", "cxcywh"] | None,
    typer.Option("--box-format", help="Order of box coordinates."),
]

BoxUnitsOption = Annotated[
    Literal["pixel", "1", "1000"] | None,
    typer.Option(
        help="Box units: pixels of the original image, or image sides scaled to 1 or 1000."
    ),
]

RowRangeOption = Annotated[
    str | None,
    typer.Option("--rows", metavar="A:B", help="Use rows A to B - 1, counted from 0."),
]

LimitOption = Annotated[int | None, typer.Option(min=1, help="Use only the first N rows.")]

AsJsonOption = Annotated[bool, typer.Option("--json", help="Print the summary as one JSON object.")]


def parse_column_map(pairs: list[str]) -> dict[str, str]:
    """Parse ROLE=COLUMN pairs into a mapping. Raises UserError if a pair is invalid."""
    columns: dict[str, str] = {}
    for pair in pairs:
        role, equals, column = pair.partition("=")
        if not equals or not column or role in columns:
            raise UserError(
                f"{pair!r} {'repeats a role' if role in columns else 'is not a mapping'}",
                where="--map",
                expected="ROLE=COLUMN, each role once",
                remedy="for example --map image=path --map answer=caption",
            )
        columns[role] = column
    return columns


def parse_row_range(row_range: str | None) -> tuple[int | None, int | None]:
    """Parse A:B, A: or :B as slice bounds. Raises UserError for other text."""
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", ":" if row_range is None else row_range.strip())
    if not match:
        raise UserError(
            f"{row_range!r} is not a range of rows",
            where="--rows",
            expected="A:B, rows A to B - 1, counted from 0",
            remedy="for example --rows 0:3000",
        )
    start, stop = (None if bound is None else int(bound) for bound in match.groups())
    return start, stop


LanguageOption = Annotated[
    Literal["en", "zh"] | None,
    typer.Option("--language", help="Language of the page. Default: from the locale."),
]


def echo_json(data: object) -> None:
    """Print data as one line of JSON. Invalid UTF-8 in file names is escaped."""
    typer.echo(escape_surrogates(json.dumps(data, ensure_ascii=False, default=str)))
