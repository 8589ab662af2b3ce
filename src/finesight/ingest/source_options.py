"""Options of the operations that read a dataset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypedDict

from finesight.errors import UserError
from finesight.ingest.format_names import list_format_names
from finesight.operations.operation import Parameter, StrPath
from finesight.operations.options import LimitOption, PagesOption


def parse_column_map(pairs: Sequence[str]) -> dict[str, str]:
    """Parse ROLE=COLUMN pairs of `--map` into a dict from role to column.

    Raises UserError for a pair without column and for a repeated role.
    """
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


class TableOptions(TypedDict, total=False):
    """Options of all operations that read a dataset, whose records have roles."""

    mapping: Annotated[
        StrPath | None,
        Parameter(
            "Mapping file (YAML) that states the role of every key of the records, instead of "
            "--map (page Mapping files of the documentation).",
            metavar="FILE",
        ),
    ]

    columns: Annotated[
        Mapping[str, str] | None,
        Parameter(
            "Role of a table column: image=COLUMN, video=COLUMN, answer=COLUMN, question=COLUMN, "
            "box=COLUMN or label=COLUMN. fields=A,B,C combines columns into a JSON answer. Repeat "
            "for each role.",
            option="--map",
            metavar="ROLE=COLUMN",
            parse=parse_column_map,
        ),
    ]
    prompt: Annotated[
        str | None,
        Parameter(
            "Question about every image, appended to the question of the row if it has one. In "
            "box datasets, {label} (grounding) or {labels} (others) inserts the class names."
        ),
    ]
    no_header: Annotated[
        bool,
        Parameter(
            "The first row of a .csv, .tsv or .xlsx file contains values: name the columns 1, 2 "
            "and so on. Detected if the row contains an image or its file name.",
            option="--no-header",
            default=False,
        ),
    ]


class SourceOptions(TableOptions, total=False):
    """Options of all operations that read a dataset of any format."""

    format: Annotated[
        str | None,
        Parameter(
            f"Format of SOURCE: {', '.join(list_format_names())}. Default: detected from the "
            "content. With table, --map names the columns.",
            metavar="NAME",
            plugins="formats",
        ),
    ]
    box_task: Annotated[
        Literal["detection", "grounding", "points", "polygons"],
        Parameter(
            "For datasets of boxes: one question per image about all boxes (detection), one per "
            "image and label (grounding), or one per image about its points (points) or outlines "
            "(polygons).",
            default="detection",
        ),
    ]
    box_format: Annotated[
        Literal["xyxy", "xywh", "cxcywh", "yxyx"] | None,
        Parameter(
            "Box coordinates in SOURCE: xyxy (left, top, right, bottom), xywh (left, top, width, "
            "height), cxcywh (center x, center y, width, height) or yxyx (top, left, bottom, "
            "right). Default: of the format "
            "(page Bounding boxes of the documentation) or the column names of a table (x,y,w,h: "
            "xywh), else xyxy.",
        ),
    ]
    box_units: Annotated[
        Literal["pixel", "1", "100", "1000", "resized"] | None,
        Parameter(
            "Unit of box coordinates in SOURCE: pixel (of the original image), 1 (fractions of "
            "width and height), 100 (percent), 1000 (thousandths) or resized (pixels of the image "
            "as Qwen2.5-VL resizes it with its published limits; for other limits, scale the boxes "
            "first). Default: of the format (page Bounding boxes of the documentation), else pixel."
        ),
    ]
    pages: PagesOption
    limit: LimitOption


def parse_row_range(row_range: str) -> tuple[int | None, int | None]:
    """Parse the value of `--rows` (A:B, A: or :B) into slice bounds.

    A missing bound is None. Raises UserError for any other text.
    """
    match = re.fullmatch(r"(-?\d+)?:(-?\d+)?", row_range.strip())
    if not match:
        raise UserError(
            f"{row_range!r} is not a range of rows",
            where="--rows",
            expected="A:B, rows A to B - 1, counted from 0",
            remedy="for example --rows 0:3000",
        )
    start, stop = (None if bound is None else int(bound) for bound in match.groups())
    return start, stop
