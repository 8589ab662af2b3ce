"""Arguments and options that several commands share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypedDict

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


TrustMetricOption = Annotated[
    bool,
    Parameter(
        "Execute the custom metric, rewards or environment (metric.py, reward_1.py, "
        "environment.py) in a run folder that you received from someone else. They are Python "
        "code: read them first.",
        option="--trust-metric",
    ),
]


def build_environment_parameter() -> Parameter:
    """Build the option of an environment.

    Not an annotation of this module, because help on other commands reads no names of environments.
    """
    from finesight.environment_components import ENVIRONMENTS

    names = ", ".join(one.name for one in ENVIRONMENTS.list_built_in())
    return Parameter(
        f"Environment whose tools the model calls: {names}, FILE.py:CLASS, or none. Default for a "
        "run: that of its recipe.",
        metavar="NAME",
    )


LanguageOption = Annotated[
    Literal["en", "zh"] | None,
    Parameter(
        "Language of the HTML page. Default: of the locale, else English.", option="--language"
    ),
]


def list_overrides(overrides: Sequence[str] | Mapping[str, object] | None) -> Sequence[str]:
    """Return overrides of a recipe as texts, `KEY=VALUE`."""
    if isinstance(overrides, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    return overrides or ()
