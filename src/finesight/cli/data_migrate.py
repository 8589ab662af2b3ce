"""`finesight data migrate`: rewrite boxes in answers for another model family."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.cli.options import AsJsonOption
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.encode.box_migration import MigrationResult, ResizeSpec

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
        typer.echo("\n".join(_format_summary(summary)))


def _resolve_resize_rule(model: str | None, pairs: list[str]) -> ResizeSpec | None:
    """Build the resize rule of Qwen2.5-VL images from `--model` and `--image`.

    `--image` has precedence over the rule of the model. Returns None if neither is given.
    """
    from pydantic import TypeAdapter, ValidationError

    from finesight.config import ImageRule
    from finesight.encode.box_migration import ResizeSpec
    from finesight.model_folder import locate_model
    from finesight.vision.resize import get_default_image_rule

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


def _format_summary(summary: MigrationResult) -> list[str]:
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
