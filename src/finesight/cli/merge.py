"""`finesight merge`: an adapter added into its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from finesight.config import PixelRange
from finesight.errors import UserError


def merge(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run folder or an adapter folder.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new model folder.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base model's folder or hub name, if it is not where it was."),
    ] = None,
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        typer.Option(help="Type of the weights written; auto: as in the base."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
) -> None:
    """Merge an adapter into its base: a model folder that transformers, vLLM and llama.cpp load.

    Example: finesight merge runs/latex models/latex
    """
    from finesight.infer.load import find_parts
    from finesight.model.merge import merge_folder

    parts = find_parts(source, base)
    if parts.adapter is None:
        raise UserError(
            f"{source} has no adapter",
            where="finesight merge",
            expected="a run that trained with lora, or a folder with an adapter",
            remedy=f"nothing is left to merge: use {parts.folder.path} as it is",
        )
    merged = merge_folder(parts.folder, parts.adapter, out, precision, parts.manifest)
    if as_json:
        result = {"folder": str(out), "layers": merged.layers, "precision": merged.precision}
        typer.echo(json.dumps(result | ({"trained_in_nf4": parts.nf4} if parts.nf4 else {})))
    else:
        typer.echo(f"{merged.layers} layers merged into {merged.folder}, {merged.precision}")
        if parts.nf4:
            typer.echo(
                f"the run had the weights of {' and '.join(parts.nf4)} in NF4, the merged model has"
                f" them as published: answers differ a little, measure them (finesight eval)"
            )
        if parts.manifest is not None and not isinstance(parts.manifest.picture, PixelRange):
            rule = ", ".join(f"{key} {n}" for key, n in parts.manifest.picture)
            typer.echo(f"other programs cannot be told the size of pictures: give them {rule}")
