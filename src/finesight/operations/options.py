"""Arguments and options that several commands share, and parsers of their values."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypedDict

from finesight.data.format_names import list_format_names
from finesight.errors import UserError
from finesight.operations.operation import Parameter, StrPath

RunOrModelArgument = Annotated[
    str,
    Parameter(
        "Run folder, model or adapter folder, hub name, or finesight-tiny.",
        metavar="RUN_OR_MODEL",
        is_positional=True,
        path="name",
    ),
]

RecipeArgument = Annotated[
    StrPath, Parameter("Recipe: YAML file of settings.", metavar="RECIPE", is_positional=True)
]

OverridesArgument = Annotated[
    Sequence[str] | Mapping[str, object] | None,
    Parameter(
        "Override settings of the recipe; values are YAML: train.batch_size=8 "
        '"data.train=[a.jsonl, b.jsonl]".',
        metavar="KEY=VALUE",
        is_positional=True,
    ),
]

OutFolderArgument = Annotated[
    StrPath,
    Parameter("Folder to create; an existing one is an error.", metavar="OUT", is_positional=True),
]

DeviceOption = Annotated[
    Literal["auto", "cpu", "cuda"],
    Parameter("Compute device. auto: the GPU if there is one, else the CPU.", default="auto"),
]


class LoadingOptions(TypedDict, total=False):
    """Options of all operations that load a model for inference."""

    device: DeviceOption
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        Parameter(
            "Data type of activations and of weights that are not quantized. auto: bf16 on GPUs "
            "of compute capability 8.0 (Ampere) or higher, fp16 on older ones, fp32 on a CPU.",
            default="auto",
        ),
    ]
    weight_format: Annotated[
        Literal["auto", "nf4", "fp8", "int8", "int4"],
        Parameter(
            "Quantize the language model while loading, to save GPU memory: compared with bf16, "
            "nf4 and int4 need about a quarter, int8 and fp8 half. The vision encoder is not "
            "quantized. auto: as stored, or as in the training of the run. nf4 requires "
            "finesight[quant].",
            default="auto",
        ),
    ]
    thinking: Annotated[
        bool | None,
        Parameter(
            "Generate reasoning before the answer, with models that have both modes, such as "
            "Qwen3.5. Default: as in the training of the run, else without reasoning.",
            option="--thinking/--no-thinking",
        ),
    ]
    reasoning_effort: Annotated[
        str | None,
        Parameter(
            "Reasoning effort in thinking mode, with models whose chat template defines it: "
            "xhigh, medium or low for Qwen3.8. Implies --thinking.",
            metavar="EFFORT",
        ),
    ]


MaxNewTokensOption = Annotated[
    int, Parameter("Maximum number of tokens per answer.", minimum=1, maximum=1_048_576)
]

PortOption = Annotated[int, Parameter("TCP port; 0 selects a free port.", minimum=0, maximum=65535)]


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


def parse_pages(pages: str) -> tuple[tuple[int, int | None], ...]:
    """Parse the value of `--pages`, such as 1-3,5, into first and last pages."""
    try:
        return tuple(map(_parse_page_range, pages.split(",")))
    except ValueError as error:
        raise UserError(
            f"{pages!r:.80} are not pages",
            where="--pages",
            expected="pages and ranges of pages, counted from 1",
            remedy="for example --pages 1-3,5",
        ) from error


def _parse_page_range(word: str) -> tuple[int, int | None]:
    """Parse a page, such as 3, or a range, such as 1-3 or 2-. Raises ValueError for others."""
    start, dash, end = word.partition("-")
    first = int(start)
    last: int | None = first
    if end:
        last = int(end)
    elif dash:
        last = None
    if first < 1 or (last is not None and last < first):
        raise ValueError(f"{word} is not from 1 upwards")
    return first, last


PagesOption = Annotated[
    tuple[tuple[int, int | None], ...] | None,
    Parameter(
        "Pages of PDF and TIFF files, such as 1, 1-3,5 or 2-. Each is an image of the same sample, "
        "up to 100. FILE#page=3 names a single one. PDF requires finesight[pdf]. Default: all.",
        metavar="PAGES",
        parse=parse_pages,
    ),
]

LimitOption = Annotated[
    int | None, Parameter("Use only the first N rows. Default: all.", minimum=1)
]


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


TrustMetricOption = Annotated[
    bool,
    Parameter(
        "Execute the custom metric, rewards or environment (metric.py, reward_1.py, "
        "environment.py) in a run folder that you received from someone else. They are Python "
        "code: read them first.",
        option="--trust-metric",
    ),
]


EnvironmentOption = Annotated[
    str | None,
    Parameter(
        "Environment whose tools the model calls: image_zoom_in_tool, FILE.py:CLASS, or none. "
        "Default for a run: that of its recipe.",
        metavar="NAME",
    ),
]


LanguageOption = Annotated[
    Literal["en", "zh"] | None,
    Parameter(
        "Language of the HTML page. Default: of the locale, else English.", option="--language"
    ),
]
