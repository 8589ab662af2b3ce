"""`finesight export`: upload to a hub, GGUF files, and serving commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.hub.publisher import FileUpload
    from finesight.infer.model_loader import ModelSource


def export(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="Merged model folder, or a run with model/.")
    ],
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT",
            help="hf:OWNER/NAME, modelscope:OWNER/NAME, or a new folder for GGUF files.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make the hub repository public. Default: private.")
    ] = False,
    confirm: Annotated[
        bool, typer.Option("--yes", help="Upload the listed files. Default: only list them.")
    ] = False,
    converter: Annotated[
        Path | None,
        typer.Option(help="Path of convert_hf_to_gguf.py of llama.cpp. Default: from PATH."),
    ] = None,
    python: Annotated[
        Path | None, typer.Option(help="Python interpreter with the packages of the converter.")
    ] = None,
    outtype: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0"],
        typer.Option(help="Data type of the GGUF weights. auto: 16 bits, as in the model."),
    ] = "auto",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.")
    ] = False,
) -> None:
    """Upload a model to a hub, convert it to GGUF, or print serving commands.

    Without OUT, print vLLM and SGLang commands with the evaluated settings. Hub uploads contain
    only data files, listed first; the token is HF_TOKEN or MODELSCOPE_API_TOKEN. The converter of
    llama.cpp writes two GGUF files: the decoder, and the vision encoder with the merger.

    Example: finesight export models/latex hf:me/latex --yes
    """
    from finesight.hub.address import is_hub_address
    from finesight.infer.model_loader import resolve_model_source

    is_hub = out is not None and is_hub_address(out)
    _check_options(
        out, is_hub, confirm=confirm, public=public, converting=bool(converter or python)
    )
    model_source = resolve_model_source(source)
    if out is None:
        _print_serving_commands(model_source, source, as_json)
    elif is_hub:
        from finesight.export.upload_list import list_uploads

        _upload_to_hub(source, out, list_uploads(model_source, source), public, confirm, as_json)
    else:
        from finesight.export.gguf import find_converter, write_gguf

        gguf_files = write_gguf(model_source, Path(out), find_converter(converter), outtype, python)
        paths = {"model": gguf_files.model, "mmproj": gguf_files.mmproj}
        if as_json:
            typer.echo(json.dumps({key: str(path) for key, path in paths.items()}))
            return
        for path in paths.values():
            typer.echo(f"{path}  {path.stat().st_size:,} bytes")
        typer.echo(
            f"llama-server -m {gguf_files.model} --mmproj {gguf_files.mmproj} --special --temp 0"
        )


def _print_serving_commands(model_source: ModelSource, source: str, as_json: bool) -> None:
    from finesight.export.serving_commands import build_serving_commands

    commands = build_serving_commands(model_source, source)
    if as_json:
        typer.echo(json.dumps(commands.as_json()))
        return
    typer.echo(f"vLLM:\n  {commands.vllm}\nSGLang:\n  {commands.sglang}")
    for note in commands.notes:
        typer.echo(f"- {note}")


def _upload_to_hub(
    source: str, out: str, files: list[FileUpload], public: bool, confirm: bool, as_json: bool
) -> None:
    from finesight.hub.address import parse_address
    from finesight.hub.publisher import publish_model

    address = parse_address(out)
    total = sum(file.size for file in files)
    visibility = "public" if public else "private"
    if not as_json:
        for file in files:
            typer.echo(f"{file.size:>16,}  {file.name}")
        typer.echo(f"{total:>16,}  bytes in {len(files)} files to {address}, {visibility}")
    page_url = None
    if confirm:
        name = Path(source).resolve().name
        page_url = publish_model(
            address, files, public=public, message=f"Upload {name} with finesight"
        )
    if as_json:
        file_sizes = {file.name: file.size for file in files}
        result = {"to": str(address), "public": public, "files": file_sizes, "page": page_url}
        typer.echo(json.dumps(result))
    else:
        typer.echo(page_url or "nothing was uploaded; add --yes to upload")


def _check_options(
    out: str | None, is_hub: bool, *, confirm: bool, public: bool, converting: bool
) -> None:
    """Reject options that do not apply to this OUT."""
    option = "--yes" if confirm else "--public"
    if (confirm or public) and not is_hub:
        raise UserError(
            f"{option} is given, but OUT is {out or 'missing'}",
            where=option,
            expected="hf:OWNER/NAME or modelscope:OWNER/NAME",
            remedy=f"remove {option}, or give a hub address",
        )
    if converting and (is_hub or out is None):
        raise UserError(
            f"a converter is given, but OUT is {out or 'missing'}",
            where="--converter",
            expected="a new folder for GGUF files",
            remedy="remove --converter and --python, or give a folder",
        )
