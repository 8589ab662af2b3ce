"""`finesight data migrate`: box answers from one family's way of writing to another's."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.encode.migrate import Migrated, Resizing

Family = Literal["qwen_vl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

PATCHES = 28
"""What the sides of a picture become multiples of in every published Qwen2.5-VL."""

SHOWN = 3


def migrate(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="Conversations of any shape: .json or .jsonl.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A file that does not exist yet.")],
    source: Annotated[
        Family, typer.Option("--from", help="The family that the boxes are written for.")
    ],
    target: Annotated[Family, typer.Option("--to", help="The family to write them for.")],
    model: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="A Qwen2.5-VL model, for its rule of resizing."),
    ] = None,
    picture: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="A recipe's picture rule in its place: min_pixels and max_pixels, height and "
            "width, or longest_side.",
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The summary as one JSON object.")
    ] = False,
) -> None:
    """Rewrite the boxes in a file's answers from one family's convention to another's.

    qwen_vl and qwen2_vl write marks in text, qwen2_5_vl and qwen3_vl JSON. qwen2_5_vl counts pixels
    of the resized picture, which --model or --picture tells; the others count thousandths.
    Everything but the answers with boxes stays as it is, byte for byte.

    Example: finesight data migrate old.jsonl new.jsonl --from qwen2_vl --to qwen2_5_vl
    --model Qwen/Qwen2.5-VL-3B-Instruct
    """
    from finesight.encode.migrate import migrate_file

    migrated = migrate_file(file, out, source, target, _resizing(model, picture or []))
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(migrated), ensure_ascii=False, default=str))
    else:
        typer.echo("\n".join(_lines(migrated)))


def _resizing(model: str | None, pairs: list[str]) -> Resizing | None:
    """The rule of --picture, else of --model; None when neither is given."""
    from pydantic import TypeAdapter, ValidationError

    from finesight.config import PictureRule
    from finesight.encode.migrate import Resizing
    from finesight.hub import locate
    from finesight.vision.resize import native_rule

    if model is None and not pairs:
        return None
    settings = {"patch_size": PATCHES, "merge_size": 1}
    if model is not None:
        folder = locate(model)
        if folder.family != "qwen2_5_vl":
            raise UserError(
                f"a model of the family {folder.family}",
                where="--model",
                expected="a Qwen2.5-VL, whose boxes are pixels of the resized picture",
                remedy="give the model that the boxes belong to",
            )
        settings = folder.preprocessor
    factor = settings["patch_size"] * settings["merge_size"]
    if not pairs:
        return Resizing(native_rule(settings), factor)
    try:
        values = {key: int(value) for key, _, value in (pair.partition("=") for pair in pairs)}
        rule: PictureRule = TypeAdapter(PictureRule).validate_python(values)
    except (ValueError, ValidationError) as error:
        raise UserError(
            f"{' '.join(pairs)} is no rule",
            where="--picture",
            expected="min_pixels and max_pixels, height and width, or longest_side",
            remedy="for example --picture height=112 --picture width=504",
        ) from error
    return Resizing(rule, factor)


def _lines(migrated: Migrated) -> list[str]:
    lines = [
        f"{migrated.file}: {migrated.records} records, {migrated.boxes} boxes rewritten in "
        f"{migrated.answers_with_boxes} answers",
        f"  {migrated.answers_without} answers without boxes",
    ]
    if migrated.left:
        places = ", ".join(migrated.left[:SHOWN])
        more = ", ..." if len(migrated.left) > SHOWN else ""
        lines.append(
            f"  warning: other texts of {len(migrated.left)} records hold points or speak of how "
            f"boxes are written ({places}{more}) and stay as they are: see that they agree with "
            "the answers"
        )
    return lines
