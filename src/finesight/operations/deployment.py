"""`finesight download`, `finesight merge` and `finesight export`: get and publish models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from finesight.config import PixelRange
from finesight.errors import UserError, escape_unprintable, format_command
from finesight.hub.address import HubAddress, parse_address
from finesight.operations.operation import Parameter
from finesight.operations.options import AsJsonOption, DeviceOption

if TYPE_CHECKING:
    from finesight.export.model_card import VerifiedMerge
    from finesight.infer.model_loader import ModelSource


EXIT_UPLOAD_FAILED = 1
"""Exit code of `finesight train --push` if the run is complete, but not uploaded."""

HubSourceArgument = Annotated[
    str,
    Parameter(
        "OWNER/NAME or modelscope:OWNER/NAME for a model, hf:datasets/OWNER/NAME or "
        "modelscope:datasets/OWNER/NAME for a dataset; optional @REVISION, and :SPLIT for a "
        "dataset. Default hub: Hugging Face (hf:).",
        metavar="SOURCE",
        is_positional=True,
    ),
]
ToFolderOption = Annotated[
    Path | None,
    Parameter(
        "Folder to create for the files. Default: the hub cache (HF_HOME).", metavar="FOLDER"
    ),
]


def download(
    source: HubSourceArgument, to: ToFolderOption = None, as_json: AsJsonOption = False
) -> None:
    """Download a model or dataset from a hub and print its folder.

    Each file is verified with the size and digest from the hub; some ModelScope files have no
    digest. Run the command again to resume an interrupted download. Only data files are downloaded,
    no code. Environment variables: HF_ENDPOINT, MODELSCOPE_ENDPOINT (hub URLs), HF_TOKEN,
    MODELSCOPE_API_TOKEN (tokens), HF_HUB_OFFLINE=1 (use only the cache, for both hubs).

    Example: finesight download modelscope:Qwen/Qwen2-VL-2B-Instruct --to models/qwen
    """
    address = parse_address(source)
    folder = _fetch_repository(address, to)
    result = {"source": str(address), "folder": str(folder)}
    click.echo(json.dumps(result, ensure_ascii=False) if as_json else folder)
    if not as_json:
        # On standard error, since scripts read the folder from standard output.
        words = ["chat", str(folder)]
        if address.repo_type != "model":
            words = ["import", str(folder), address.repo_id.rpartition("/")[2]]
        click.echo(f"next: {format_command(*words)}", err=True)


def _fetch_repository(address: HubAddress, to: Path | None) -> Path:
    from finesight.data.source_fetch import select_repository_files
    from finesight.hub.repository import (
        download_folder,
        fetch_model,
        open_repository,
        select_model_files,
    )
    from finesight.model_folder import DOWNLOAD_PATTERNS

    is_model = address.repo_type == "model"
    if is_model and to is None:
        return fetch_model(address, DOWNLOAD_PATTERNS)
    repository = open_repository(address)
    paths = (
        select_model_files(repository, DOWNLOAD_PATTERNS)
        if is_model
        else select_repository_files(repository)
    )
    if to is None:
        return repository.fetch_files(paths)
    download_folder(repository, paths, to)
    return to


def merge(
    source: Annotated[
        str,
        Parameter(
            "Folder of a run (LoRA, QLoRA or full fine-tuning), of a PEFT adapter, or of a "
            "4-bit GPTQ model.",
            metavar="SOURCE",
            is_positional=True,
        ),
    ],
    out: Annotated[Path, Parameter("Model folder to create.", metavar="OUT", is_positional=True)],
    base: Annotated[
        str | None,
        Parameter(
            "Folder or hub name of the base model. Default: as recorded in the run or in the "
            "adapter."
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        Parameter(
            "Data type of the written weights. auto: that of the base model, or fp32 if it "
            "has several."
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    num_samples: Annotated[
        int,
        Parameter(
            "Number of prompts with images on which the written and the trained model are "
            "compared.",
            minimum=1,
        ),
    ] = 4,
    max_shard_gb: Annotated[
        float, Parameter("Maximum size of a weight file in GB (10^9 bytes).", minimum=0.001)
    ] = 5.0,
    as_json: AsJsonOption = False,
) -> None:
    """Merge an adapter into its base model, for transformers, vLLM and llama.cpp.

    A fully fine-tuned run is copied, with a model card and the files that other programs need.
    4-bit GPTQ weights are dequantized. The command loads the written folder and compares it with
    the trained model, on validation samples of the run or on generated images. A difference above
    rounding errors is an error. The model card contains the results.

    Example: finesight merge runs/latex models/latex
    """

    from finesight.export.verified_merge import merge_and_verify
    from finesight.infer.model_loader import resolve_model_source
    from finesight.model.quant.int4 import gptq_group_size
    from finesight.progress import ProgressConsole

    model_source = resolve_model_source(source, base)
    # The model/ of a full fine-tuning run lacks the model card and settings of other programs.
    is_full_finetune = (
        model_source.manifest is not None
        and model_source.folder.path.resolve() != Path(source).resolve()
    )
    if (
        model_source.adapter is None
        and not is_full_finetune
        and gptq_group_size(model_source.folder) is None
    ):
        raise UserError(
            f"{source} has no adapter",
            where="finesight merge",
            expected="a run, an adapter folder, or a 4-bit GPTQ model",
            remedy=f"use {source} directly: there is nothing to merge",
        )
    console = ProgressConsole()
    with console.activity(f"merging {source} and verifying {out}"):
        result = merge_and_verify(
            source,
            model_source,
            out,
            precision=precision,
            device=device,
            num_samples=num_samples,
            max_shard_bytes=max_shard_gb * 1e9,
            log=console.log,
        )
    if as_json:
        click.echo(json.dumps(_result_to_dict(result, model_source)))
    else:
        _print_result(result, model_source)


def _result_to_dict(merge_result: VerifiedMerge, model_source: ModelSource) -> dict[str, Any]:
    result = {
        "folder": str(merge_result.folder),
        "merged_layers": merge_result.merged_layers,
        "precision": merge_result.precision,
    }
    optional_values = {
        "nf4_parts": model_source.nf4_parts,
        "fp8_parts": model_source.fp8_parts,
        "dequantized_layers": merge_result.dequantized_layers,
        "missing_files": merge_result.missing_files,
        "dropped_sampling": merge_result.dropped_sampling,
    }
    non_empty = {key: value for key, value in optional_values.items() if value}
    return result | non_empty | {"parity": merge_result.parity.as_json()}


def _print_result(merge_result: VerifiedMerge, model_source: ModelSource) -> None:
    """Print the output folder, the results of the comparison, and notes about the model."""
    action = (
        f"{merge_result.merged_layers} layers merged into"
        if merge_result.merged_layers
        else "written to"
    )
    click.echo(f"{action} {merge_result.folder}, {merge_result.precision}")
    for line in merge_result.parity.format_lines():
        click.echo(line)
    if merge_result.dequantized_layers:
        click.echo(
            f"{merge_result.dequantized_layers} layers were dequantized from 4 bits to"
            f" {merge_result.precision}, about four times as large. The values equal the 4-bit"
            " model, not the model before quantization"
        )
    if model_source.quantization_summary:
        click.echo(
            f"the run used quantized weights ({model_source.quantization_summary}), the merged"
            " model uses the published weights: evaluate it on more samples (finesight eval)"
        )
    if merge_result.dropped_sampling:
        click.echo(
            "removed from generation_config.json, for greedy decoding: "
            + json.dumps(merge_result.dropped_sampling)
        )
    if merge_result.missing_files:
        click.echo(
            f"missing for other programs: {'; '.join(merge_result.missing_files)};"
            " not in the base model"
        )
    image_rule = None if model_source.manifest is None else model_source.manifest.image_rule
    # Qwen-VL (2023) supports a single image size.
    has_default_rule = image_rule is None or "image_size" in model_source.folder.preprocessor_config
    if not has_default_rule and not isinstance(image_rule, PixelRange):
        rule_text = ", ".join(f"{key} {n}" for key, n in image_rule or ())
        click.echo(f"other programs cannot store the image size: resize images to {rule_text}")
    click.echo(f"next: {format_command('export', merge_result.folder)}")


def export(
    source: Annotated[
        str,
        Parameter(
            "Folder written by `finesight merge`, or a fully fine-tuned run. For the upload "
            "to a hub also a LoRA run or an adapter folder.",
            metavar="MODEL",
            is_positional=True,
        ),
    ],
    out: Annotated[
        str | None,
        Parameter(
            "hf:OWNER/NAME or modelscope:OWNER/NAME to upload, or a folder to create for GGUF "
            "files. Default: print serving commands.",
            metavar="OUT",
            is_positional=True,
        ),
    ] = None,
    public: Annotated[
        bool, Parameter("Make the hub repository public. Default: private.", option="--public")
    ] = False,
    confirm: Annotated[
        bool, Parameter("Upload the files. Default: only list them.", option="--yes")
    ] = False,
    converter: Annotated[
        Path | None,
        Parameter(
            "Path of convert_hf_to_gguf.py of llama.cpp. Default: the one in the folders of "
            "the environment variable PATH."
        ),
    ] = None,
    python: Annotated[
        Path | None,
        Parameter(
            "Python interpreter of the environment with the packages of the converter. "
            "Default: that of finesight."
        ),
    ] = None,
    outtype: Annotated[
        Literal["auto", "f32", "f16", "bf16", "q8_0"],
        Parameter(
            "Data type of the language model in model.gguf; vision weights have at least 16 "
            "bits. auto: 16 bits, as in the model. For smaller types such as Q4_K_M, run "
            "llama-quantize of llama.cpp on model.gguf."
        ),
    ] = "auto",
    as_json: AsJsonOption = False,
) -> None:
    """Export a model: print vLLM and SGLang commands, upload it to a hub, or write GGUF.

    Without OUT: print the commands that serve MODEL with vLLM and SGLang at the image size of the
    training.

    OUT is a hub repository: list the weights, configuration and tokenizer files (no code), and
    upload them with --yes. Of a LoRA run, the adapter is uploaded with a model card. The token is
    HF_TOKEN or MODELSCOPE_API_TOKEN.

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
        from finesight.export.model_card import collect_uploads

        with collect_uploads(model_source, source) as files:
            _upload_to_hub(source, out, files, public, confirm, as_json)
    else:
        from finesight.export.deployment import (
            find_converter,
            format_llama_server_command,
            write_gguf,
        )
        from finesight.progress import ProgressConsole

        program = find_converter(converter)
        with ProgressConsole().activity(f"converting {source} to GGUF"):
            gguf_files = write_gguf(model_source, Path(out), program, outtype, python)
        paths = {"model": gguf_files.model, "mmproj": gguf_files.mmproj}
        if as_json:
            click.echo(json.dumps({key: str(path) for key, path in paths.items()}))
            return
        for path in paths.values():
            click.echo(f"{path}  {path.stat().st_size:,} bytes")
        manifest = model_source.manifest
        thinking = None if manifest is None else manifest.enable_thinking
        click.echo(format_llama_server_command(model_source.folder, gguf_files, thinking))


def push_run(run_dir: Path, out: str) -> None:
    """Upload a finished run to a hub; a failure prints the command to repeat, and exits with 1."""
    from finesight.export.model_card import collect_uploads
    from finesight.hub.repository import publish_model
    from finesight.infer.model_loader import resolve_model_source

    try:
        with collect_uploads(resolve_model_source(str(run_dir)), str(run_dir)) as files:
            message = f"Upload {run_dir.resolve().name} with finesight"
            page = publish_model(parse_address(out), files, public=False, message=message)
            click.echo(f"uploaded: {page}", err=True)
    except Exception as error:  # whatever fails, the run is complete
        command = format_command("export", run_dir, out, "--yes")
        click.echo(
            f"the upload failed, but the run is complete: {escape_unprintable(str(error))}\n"
            f"to upload it again: {command}",
            err=True,
        )
        raise click.exceptions.Exit(EXIT_UPLOAD_FAILED) from error


def _print_serving_commands(model_source: ModelSource, source: str, as_json: bool) -> None:
    from finesight.export.deployment import build_serving_commands

    commands = build_serving_commands(model_source, source)
    if as_json:
        click.echo(json.dumps(commands.as_json()))
        return
    click.echo(f"vLLM:\n  {commands.vllm}\nSGLang:\n  {commands.sglang}")
    for note in commands.notes:
        click.echo(f"- {note}")


def _upload_to_hub(
    source: str, out: str, files: dict[str, Path], public: bool, confirm: bool, as_json: bool
) -> None:
    from finesight.hub.address import parse_address
    from finesight.hub.repository import publish_model
    from finesight.infer.model_loader import get_model_name

    address = parse_address(out)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    total = sum(sizes.values())
    visibility = "public" if public else "private"
    if not as_json:
        for name, size in sizes.items():
            click.echo(f"{size:>16,}  {name}")
        click.echo(f"{total:>16,}  bytes in {len(files)} files to {address}, {visibility}")
    page_url = None
    if confirm:
        name = get_model_name(str(Path(source).resolve()))
        page_url = publish_model(
            address, files, public=public, message=f"Upload {name} with finesight"
        )
    if as_json:
        result = {"to": str(address), "public": public, "files": sizes, "page": page_url}
        click.echo(json.dumps(result))
    else:
        command = format_command("export", source, out, *["--public"] * public, "--yes")
        click.echo(page_url or f"nothing was uploaded; next: {command}")


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
            remedy=f"remove {option}, or give a hub address: hf:{out or 'OWNER/NAME'}",
        )
    if converting and (is_hub or out is None):
        raise UserError(
            f"a converter is given, but OUT is {out or 'missing'}",
            where="--converter",
            expected="a new folder for GGUF files",
            remedy="remove --converter and --python, or give a folder",
        )
