"""`finesight export`: upload a model, convert it to GGUF, or print serving commands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from finesight.cli.options import AsJsonOption
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.infer.model_loader import ModelSource


def export(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="Folder written by `finesight merge`, or a fully fine-tuned run. Merge a LoRA run "
            "first.",
        ),
    ],
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT",
            help="hf:OWNER/NAME or modelscope:OWNER/NAME to upload, or a folder to create for GGUF "
            "files. Default: print serving commands.",
        ),
    ] = None,
    public: Annotated[
        bool, typer.Option("--public", help="Make the hub repository public. Default: private.")
    ] = False,
    confirm: Annotated[
        bool, typer.Option("--yes", help="Upload the files. Default: only list them.")
    ] = False,
    converter: Annotated[
        Path | None,
        typer.Option(
            help="Path of convert_hf_to_gguf.py of llama.cpp. Default: the one in the folders of "
            "the environment variable PATH."
        ),
    ] = None,
    python: Annotated[
        Path | None,
        typer.Option(
            help="Python interpreter of the environment with the packages of the converter. "
            "Default: that of finesight."
        ),
    ] = None,
    outtype: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0"],
        typer.Option(
            help="Data type of the language model in model.gguf; vision weights have at least 16 "
            "bits. auto: 16 bits, as in the model. For smaller types such as Q4_K_M, run "
            "llama-quantize of llama.cpp on model.gguf."
        ),
    ] = "auto",
    as_json: AsJsonOption = False,
) -> None:
    """Export a merged model: print vLLM and SGLang commands, upload to a hub, or write GGUF.

    Without OUT: print the commands that serve MODEL with vLLM and SGLang at the image size of the
    training.

    OUT is a hub repository: list the weights, configuration and tokenizer files (no code), and
    upload them with --yes. The token is HF_TOKEN or MODELSCOPE_API_TOKEN.

    OUT is a folder: run the converter of llama.cpp, which writes model.gguf (language model) and
    mmproj.gguf (vision encoder and merger).

    Example: finesight export models/latex hf:me/latex --yes

    GGUF: finesight export models/latex gguf/latex --converter llama.cpp/convert_hf_to_gguf.py
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
    source: str, out: str, files: dict[str, Path], public: bool, confirm: bool, as_json: bool
) -> None:
    from finesight.hub.address import parse_address
    from finesight.hub.repository import publish_model

    address = parse_address(out)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    visibility = "public" if public else "private"
    if not as_json:
        for name, size in sizes.items():
            typer.echo(f"{size:>16,}  {name}")
        typer.echo(f"{total:>16,}  bytes in {len(files)} files to {address}, {visibility}")
    page_url = None
    if confirm:
        name = Path(source).resolve().name
        page_url = publish_model(
            address, files, public=public, message=f"Upload {name} with finesight"
        )
    if as_json:
        result = {"to": str(address), "public": public, "files": sizes, "page": page_url}
        typer.echo(json.dumps(result))
    else:
        typer.echo(page_url or "nothing was uploaded; add --yes to upload")


def _check_options(
    out: str | None, is_hub: bool, *, confirm: bool, public: bool, converting: bool
) -> None:
    """Raise UserError for options that do not apply to the kind of OUT."""
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
