"""`finesight merge`: an adapter added into its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finesight.cli.options import Device
from finesight.config import PixelRange
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.export.merging import Proved
    from finesight.infer.load import Parts


def merge(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="A run, an adapter folder or a model in four bits (GPTQ)."
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new model folder.")],
    base: Annotated[
        str | None,
        typer.Option(help="The base model's folder or hub name, if it is not where it was."),
    ] = None,
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        typer.Option(help="Type of the weights written; auto: as in the base, fp32 of several."),
    ] = "auto",
    device: Device = "auto",
    samples: Annotated[
        int, typer.Option(min=1, help="Questions with pictures that the result is compared on.")
    ] = 4,
    shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Largest file of weights, in 10^9 bytes.")
    ] = 5.0,
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
) -> None:
    """Merge an adapter into its base: a model folder that transformers, vLLM and llama.cpp load.

    What was published in four bits (GPTQ) is written in full, and the model/ of a run that trained
    parts whole with its card and other programs' settings. The folder is loaded anew and compared
    with the trained model, on held-out samples of the run or on drawn pictures: what differs by
    more than rounding is refused, and the figures are written into its model card.

    Example: finesight merge runs/latex models/latex
    """
    from finesight.export.merging import merge as merge_and_prove
    from finesight.infer.load import find_parts
    from finesight.model.int4 import published_group

    parts = find_parts(source, base)
    # The model/ of a run that trained parts whole has no card, and other programs' settings.
    whole = parts.manifest is not None and parts.folder.path.resolve() != Path(source).resolve()
    if parts.adapter is None and not whole and published_group(parts.folder) is None:
        raise UserError(
            f"{source} has no adapter",
            where="finesight merge",
            expected="a run, a folder with an adapter, or a model in four bits",
            remedy=f"nothing is left to merge: use {source} as it is",
        )
    merged = merge_and_prove(
        source,
        parts,
        out,
        precision=precision,
        device=device,
        samples=samples,
        shard_bytes=shard_gb * 1e9,
        say=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        typer.echo(json.dumps(_as_json(merged, parts)))
    else:
        _tell(merged, parts)


def _as_json(merged: Proved, parts: Parts) -> dict[str, Any]:
    result = {
        "folder": str(merged.folder),
        "layers": merged.layers,
        "precision": merged.precision,
    }
    more = {
        "trained_in_nf4": parts.nf4,
        "trained_in_fp8": parts.fp8,
        "published_in_int4": merged.thawed,
        "missing": merged.missing,
        "left_out": merged.left_out,
    }
    shown = {key: value for key, value in more.items() if value}
    return result | shown | {"parity": merged.parity.as_json()}


def _tell(merged: Proved, parts: Parts) -> None:
    """What was written, and what a user of it has to know."""
    what = f"{merged.layers} layers merged into" if merged.layers else "written to"
    typer.echo(f"{what} {merged.folder}, {merged.precision}")
    for line in merged.parity.as_lines():
        typer.echo(line)
    if merged.thawed:
        typer.echo(
            f"{merged.thawed} layers were published in four bits and are written in"
            f" {merged.precision}, about four times as large: what they stand for is the same, not"
            " what it was before it was quantised"
        )
    if parts.quantised:
        typer.echo(
            f"the run had the weights of {parts.quantised}, the merged model has"
            " them as published: measure it on more samples (finesight eval)"
        )
    if merged.left_out:
        typer.echo(
            f"left out of generation_config.json, answers are greedy: {json.dumps(merged.left_out)}"
        )
    if merged.missing:
        typer.echo(f"other programs miss {'; '.join(merged.missing)}: the base has none")
    picture = None if parts.manifest is None else parts.manifest.picture
    # The first Qwen-VL knows one size alone.
    known = picture is None or "image_size" in parts.folder.preprocessor
    if not known and not isinstance(picture, PixelRange):
        rule = ", ".join(f"{key} {n}" for key, n in picture or ())
        typer.echo(f"other programs cannot be told the size of pictures: give them {rule}")
