"""`finesight export`: a model handed over: to a hub, as GGUF, or to the engines that serve it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.infer.load import Parts
    from finesight.remote.publishing import Upload


def export(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="A merged model's folder, or a run with model/.")
    ],
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT", help="hf:OWNER/NAME, modelscope:OWNER/NAME, or a new folder for GGUF."
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="On a hub, for everybody to see; else private.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Upload what is listed; without it, list it only.")
    ] = False,
    converter: Annotated[
        Path | None,
        typer.Option(help="convert_hf_to_gguf.py of llama.cpp, if it is not on PATH."),
    ] = None,
    python: Annotated[
        Path | None, typer.Option(help="The Python that has the converter's packages.")
    ] = None,
    outtype: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0"],
        typer.Option(help="Type of the GGUF's weights; auto: as in the model, 16 bits."),
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The result as one JSON object.")] = False,
) -> None:
    """Hand a model over: upload it to a hub, convert it to GGUF, or print how to serve it.

    Without OUT, print the lines by which vLLM and SGLang serve it as it was measured. To a hub go
    data files alone, listed first; the token comes from HF_TOKEN or MODELSCOPE_API_TOKEN. GGUF is
    made by llama.cpp's own converter: the model, and beside it tower and projector.

    Example: finesight export models/latex hf:me/latex --yes
    """
    from finesight.infer.load import find_parts
    from finesight.remote.address import is_on_a_hub

    hub = out is not None and is_on_a_hub(out)
    _check_options(out, hub, yes=yes, public=public, converting=bool(converter or python))
    parts = find_parts(source)
    if out is None:
        _print_lines(parts, source, as_json)
    elif hub:
        from finesight.export.publish import uploads

        _upload(source, out, uploads(parts, source), public, yes, as_json)
    else:
        from finesight.export.gguf import find_converter, write_gguf

        made = write_gguf(parts, Path(out), find_converter(converter), outtype, python)
        sizes = {"model": made.model, "projector": made.projector}
        if as_json:
            typer.echo(json.dumps({key: str(path) for key, path in sizes.items()}))
            return
        for path in sizes.values():
            typer.echo(f"{path}  {path.stat().st_size:,} bytes")
        typer.echo(f"llama-server -m {made.model} --mmproj {made.projector} --special --temp 0")


def _print_lines(parts: Parts, source: str, as_json: bool) -> None:
    from finesight.export.serving import serving_of

    serving = serving_of(parts, source)
    if as_json:
        typer.echo(json.dumps(serving.as_json()))
        return
    typer.echo(f"vLLM:\n  {serving.vllm}\nSGLang:\n  {serving.sglang}")
    for note in serving.notes:
        typer.echo(f"- {note}")


def _upload(
    source: str, out: str, files: list[Upload], public: bool, yes: bool, as_json: bool
) -> None:
    from finesight.remote.address import any_address
    from finesight.remote.publishing import publish

    address = any_address(out)
    total = sum(file.size for file in files)
    who = "everybody may see it" if public else "private"
    if not as_json:
        for file in files:
            typer.echo(f"{file.size:>16,}  {file.name}")
        typer.echo(f"{total:>16,}  bytes in {len(files)} files to {address}, {who}")
    page = None
    if yes:
        name = Path(source).resolve().name
        page = publish(address, files, public=public, message=f"Upload {name} with finesight")
    if as_json:
        listed = {file.name: file.size for file in files}
        told = {"to": str(address), "public": public, "files": listed, "page": page}
        typer.echo(json.dumps(told))
    else:
        typer.echo(page or "nothing was uploaded: start again with --yes")


def _check_options(
    out: str | None, hub: bool, *, yes: bool, public: bool, converting: bool
) -> None:
    """Refuse options that mean nothing for this OUT."""
    given = "--yes" if yes else "--public"
    if (yes or public) and not hub:
        raise UserError(
            f"{given}, and OUT is {out or 'not given'}",
            where=given,
            expected="hf:OWNER/NAME or modelscope:OWNER/NAME",
            remedy=f"leave {given} out, or name a hub",
        )
    if converting and (hub or out is None):
        raise UserError(
            f"a converter, and OUT is {out or 'not given'}",
            where="--converter",
            expected="a new folder for GGUF files",
            remedy="leave it out, or name a folder",
        )
