"""`finesight data import`, `export` and `migrate`: convert datasets between formats."""

from __future__ import annotations

import dataclasses
import json
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
from finesight.errors import UserError, escape_unprintable

if TYPE_CHECKING:
    from finesight.data.exporter import ExportSummary
    from finesight.data.importer import ImportSummary
    from finesight.encode.box_migration import MigrationResult, ResizeSpec


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
    from finesight.data.sample import LocatedSample, read_samples

    located_samples = [LocatedSample(sample, samples.parent) for sample in read_samples(samples)]
    summary = export_dataset(located_samples, out, target_format, copy_images=copy_images)
    if as_json:
        echo_json(dataclasses.asdict(summary))
    else:
        typer.echo("\n".join(_format_export_summary(out, summary)))


def _format_export_summary(out: Path, summary: ExportSummary) -> list[str]:
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


BoxFamily = Literal["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

DEFAULT_SIZE_FACTOR = 28
"""Divisor of resized image sides in pixels, for `--image` without `--model`.

All published Qwen2.5-VL models use this value (patch size 14, merge size 2).
"""

MAX_PRINTED_RECORDS = 3
"""Maximum number of printed locations of texts that were not converted."""


def migrate(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help=".json or .jsonl file in the format of any trainer; only box texts are changed.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to create.")],
    source_family: Annotated[
        BoxFamily, typer.Option("--from", help="Model family whose box format FILE has.")
    ],
    target_family: Annotated[
        BoxFamily, typer.Option("--to", help="Model family whose box format OUT gets.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="Qwen2.5-VL model (folder or hub name) whose pixel limits define the resized "
            "image. For qwen2_5_vl, this or --image is required.",
        ),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Resizing as in `image` of a recipe: min_pixels=N and max_pixels=N, height=N and "
            "width=N, or longest_side=N, each with its own --image. Repeatable.",
        ),
    ] = None,
    as_json: AsJsonOption = False,
) -> None:
    """Rewrite the boxes in answers of a file for another model family.

    For files made for other trainers. Files of `finesight data import` fit every family: change the
    model in the recipe instead.

    qwen_vl and qwen2_vl use special tokens in the text, qwen2_5_vl and qwen3_vl use JSON.
    Coordinates of qwen2_5_vl are pixels of the resized image, which --model or --image defines.
    Other families use thousandths of the image sides. Text outside of box answers is unchanged.

    Example: finesight data migrate old.jsonl new.jsonl --from qwen2_vl --to qwen2_5_vl
    --model Qwen/Qwen2.5-VL-3B-Instruct
    """
    from finesight.encode.box_migration import migrate_box_file

    summary = migrate_box_file(
        file, out, source_family, target_family, _resolve_resize_rule(model, image or [])
    )
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(summary), ensure_ascii=False, default=str))
    else:
        typer.echo("\n".join(_format_migrate_summary(summary)))


def _resolve_resize_rule(model: str | None, pairs: list[str]) -> ResizeSpec | None:
    """Build the resize rule of Qwen2.5-VL images from `--model` and `--image`.

    `--image` has precedence over the rule of the model. Returns None if neither is given.
    """
    from pydantic import TypeAdapter, ValidationError

    from finesight.config import ImageRule
    from finesight.encode.box_migration import ResizeSpec
    from finesight.model_folder import locate_model
    from finesight.vision.image_processing import get_default_image_rule

    if model is None and not pairs:
        return None
    preprocessor_config = {"patch_size": DEFAULT_SIZE_FACTOR, "merge_size": 1}
    if model is not None:
        folder = locate_model(model)
        if folder.family != "qwen2_5_vl":
            raise UserError(
                f"the model family is {folder.family}",
                where="--model",
                expected="a Qwen2.5-VL model, whose boxes are pixels of the resized image",
                remedy="give the model that the boxes are written for",
            )
        preprocessor_config = folder.preprocessor_config
    size_factor = preprocessor_config["patch_size"] * preprocessor_config["merge_size"]
    if not pairs:
        return ResizeSpec(get_default_image_rule(preprocessor_config), size_factor)
    try:
        values = {key: int(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        rule: ImageRule = TypeAdapter(ImageRule).validate_python(values)
    except (ValueError, ValidationError) as error:
        raise UserError(
            f"{' '.join(pairs)} is not an image rule",
            where="--image",
            expected="min_pixels and max_pixels, height and width, or longest_side",
            remedy="for example --image height=112 --image width=504",
        ) from error
    return ResizeSpec(rule, size_factor)


def _format_migrate_summary(summary: MigrationResult) -> list[str]:
    lines = [
        f"{summary.file}: {summary.num_records} records, {summary.num_boxes} boxes rewritten in "
        f"{summary.answers_with_boxes} answers",
        f"  {summary.answers_without_boxes} answers without boxes",
    ]
    if summary.unconverted:
        record_names = ", ".join(summary.unconverted[:MAX_PRINTED_RECORDS])
        ellipsis = ", ..." if len(summary.unconverted) > MAX_PRINTED_RECORDS else ""
        lines.append(
            f"  warning: other texts of {len(summary.unconverted)} records contain points or "
            f"describe the box format ({record_names}{ellipsis}). They are unchanged: check that "
            "they match the answers"
        )
    return lines
