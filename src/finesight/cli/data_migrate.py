"""`finesight data migrate`: box answers in the format of another model family."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.encode.box_migration import MigrationResult, ResizeSpec

BoxFamily = Literal["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

DEFAULT_SIZE_FACTOR = 28
"""Resize factor of every published Qwen2.5-VL: image sides are multiples of it."""

MAX_PRINTED_RECORDS = 3


def migrate(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="Conversations in any structure: .json or .jsonl."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="New file.")],
    source_family: Annotated[BoxFamily, typer.Option("--from", help="Model family of the boxes.")],
    target_family: Annotated[BoxFamily, typer.Option("--to", help="Target model family.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Qwen2.5-VL model whose image rule applies."),
    ] = None,
    image: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Image rule of the recipe instead: min_pixels and max_pixels, height and width, "
            "or longest_side.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as one JSON object.")
    ] = False,
) -> None:
    """Convert the boxes in answers from one model family to another.

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
    """Build the resize rule of --image or --model. Returns None without both."""
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
