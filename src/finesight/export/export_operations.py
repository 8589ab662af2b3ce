"""`finesight merge` and `finesight export`: models for other programs and hubs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from finesight.errors import Step, UserError, format_count
from finesight.files.hub_address import is_hub_address, parse_address
from finesight.operations.first_guesses import suggest_target
from finesight.operations.operation import Outcome, Parameter, StrPath, to_path
from finesight.operations.options import DeviceOption, TrustMetricOption
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.export.deployment import GgufFiles, ServingCommands
    from finesight.export.model_card import HubUpload, VerifiedMerge
    from finesight.export.quantized_export import QuantizedExport
    from finesight.infer.model_loader import ModelSource

EXIT_UPLOAD_FAILED = 1
"""Exit code of `finesight train --push` if the run is complete, but not uploaded."""


def merge(
    source: Annotated[StrPath, Parameter(path="name")],
    out: StrPath,
    base: Annotated[StrPath | None, Parameter(path="name")] = None,
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    device: DeviceOption = "auto",
    num_samples: Annotated[int, Parameter(minimum=1)] = 4,
    max_shard_gb: Annotated[float, Parameter(minimum=0.001)] = 5.0,
) -> Outcome[VerifiedMerge]:
    """Merge an adapter into its base model, for transformers, vLLM and llama.cpp.

    A fully fine-tuned run is copied, with a model card and the files that other programs need.
    4-bit GPTQ weights are dequantized. The command loads the written folder and compares it with
    the trained model, on validation samples of the run or on generated images. A difference above
    rounding errors is an error. The model card contains the results.

    Example: finesight merge runs/latex models/latex

    Args:
        source: Folder of a run (LoRA, QLoRA or full fine-tuning), of a PEFT adapter, or of a 4-bit
            GPTQ model.
        out: Model folder to create.
        base: Folder or hub name of the base model. Default: as recorded in the run or in the
            adapter.
        precision: Data type of the written weights. auto: that of the base model, or fp32 if it has
            several.
        num_samples: Number of prompts with images on which the written and the trained model are
            compared.
        max_shard_gb: Maximum size of a weight file in GB (10^9 bytes).
    """
    from finesight.export.hf_files import propose_export
    from finesight.export.verified_merge import merge_and_verify
    from finesight.infer.model_loader import resolve_model_source
    from finesight.model.quant.int4 import gptq_group_size

    source = str(source)
    model_source = resolve_model_source(source, None if base is None else str(base))
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
            where="merge",
            expected="a run, an adapter folder, or a 4-bit GPTQ model",
            remedy=f"use {source} directly: there is nothing to merge",
        )
    console = ProgressConsole()
    with console.activity(f"merging {source} and verifying {out}"):
        result = merge_and_verify(
            source,
            model_source,
            Path(out),
            precision=precision,
            device=device,
            num_samples=num_samples,
            max_shard_bytes=max_shard_gb * 1e9,
            log=console.log,
        )
    step = propose_export(result.folder)
    return Outcome(result, [*_format_merge(result)], _merge_to_dict(result), [step])


def _merge_to_dict(merge_result: VerifiedMerge) -> dict[str, Any]:
    optional_values = {
        "nf4_parts": merge_result.model_source.nf4_parts,
        "fp8_parts": merge_result.model_source.fp8_parts,
        "dequantized_layers": merge_result.dequantized_layers,
        "missing_files": merge_result.missing_files,
        "dropped_sampling": merge_result.dropped_sampling,
    }
    return {
        "folder": str(merge_result.folder),
        "merged_layers": merge_result.merged_layers,
        "precision": merge_result.precision,
        **{key: value for key, value in optional_values.items() if value},
        "parity": merge_result.parity.as_json(),
    }


def _format_merge(merge_result: VerifiedMerge) -> Iterator[str]:
    """Yield the output folder, the results of the comparison, and notes about the model."""
    from finesight.export.model_card import MODEL_CARD_FILE
    from finesight.export.resize_code import describe_resizing
    from finesight.vision.image_processing import load_patch_config
    from finesight.vision.processor_limits import has_fixed_image_size

    model_source = merge_result.model_source
    action = "written to"
    if merge_result.merged_layers:
        action = f"{merge_result.merged_layers} layers merged into"
    yield f"{action} {merge_result.folder}, {merge_result.precision}"
    yield from merge_result.parity.format_lines()
    if merge_result.dequantized_layers:
        yield (
            f"{merge_result.dequantized_layers} layers were dequantized from 4 bits to"
            f" {merge_result.precision}, about four times as large. The values equal the 4-bit"
            " model, not the model before quantization"
        )
    if model_source.quantization_summary:
        yield (
            f"the run used quantized weights ({model_source.quantization_summary}), the merged"
            " model uses the published weights: evaluate it on more samples (finesight eval)"
        )
    if merge_result.dropped_sampling:
        sampling = json.dumps(merge_result.dropped_sampling)
        yield f"removed from generation_config.json, for greedy decoding: {sampling}"
    if merge_result.missing_files:
        files = "; ".join(merge_result.missing_files)
        yield f"missing for other programs: {files}; not in the base model"
    if model_source.manifest is not None and not has_fixed_image_size(model_source.folder):
        rule = model_source.manifest.image_rule
        factor = load_patch_config(model_source.folder).resize_factor
        code = f"the code in {merge_result.folder / MODEL_CARD_FILE}"
        if note := describe_resizing(rule, factor, "other programs", code):
            yield note


def export(
    source: Annotated[StrPath, Parameter(metavar="MODEL", path="name")],
    out: Annotated[StrPath | None, Parameter(is_positional=True, path="name")] = None,
    public: bool = False,
    confirm: Annotated[bool, Parameter(option="--yes")] = False,
    converter: StrPath | None = None,
    python: StrPath | None = None,
    outtype: Literal["auto", "f32", "f16", "bf16", "q8_0"] = "auto",
    quantize: Literal["w4a16"] | None = None,
    gpus: Annotated[int, Parameter(minimum=1)] = 1,
    device: DeviceOption = "auto",
    trust_metric: TrustMetricOption = False,
) -> Outcome[ServingCommands | GgufFiles | HubUpload | QuantizedExport]:
    """Export a model: print vLLM and SGLang commands, upload it to a hub, write GGUF, or quantize.

    Without OUT: print the commands that serve MODEL with vLLM and SGLang at the image size of the
    training. vLLM also serves a LoRA run that adapts the language model only.

    OUT is a hub repository: list the weights, configuration and tokenizer files (no code), and
    upload them with --yes. Of a LoRA run, the adapter is uploaded with a model card. The token is
    HF_TOKEN or MODELSCOPE_API_TOKEN.

    OUT is a folder: run the converter of llama.cpp, which writes model.gguf (language model) and
    mmproj.gguf (vision encoder and merger). With --quantize, merge and quantize a run for vLLM and
    SGLang instead, and compare the scores on the validation split.

    Example: finesight export models/latex hf:me/latex --yes

    GGUF: finesight export models/latex gguf/latex --converter llama.cpp/convert_hf_to_gguf.py

    4 bits: finesight export runs/latex models/latex-w4a16 --quantize w4a16

    Args:
        source: Folder written by `finesight merge`, or a fully fine-tuned run. For the upload to a
            hub and vLLM also a LoRA run or an adapter folder.
        out: hf:OWNER/NAME or modelscope:OWNER/NAME to upload, or a folder to create for GGUF files.
            Default: print serving commands.
        public: Make the hub repository public. Default: private.
        confirm: Upload the files. Default: only list them.
        converter: Path of convert_hf_to_gguf.py of llama.cpp. Default: the one in the folders of
            the environment variable PATH.
        python: Python interpreter of the environment with the packages of the converter. Default:
            that of finesight.
        outtype: Data type of the language model in model.gguf; vision weights have at least 16
            bits. auto: 16 bits, as in the model. For smaller types such as Q4_K_M, run
            llama-quantize of llama.cpp on model.gguf.
        quantize: w4a16: 4-bit weights of the language model in GPTQ format, calibrated by
            auto-round on training samples of the run. Requires finesight[quantize].
        gpus: Number of GPUs of the serving commands. Each has a copy of the model.
    """
    name = str(source)
    target = None if out is None else str(out)
    given = {
        **{"--yes": confirm, "--public": public, "--converter": converter, "--python": python},
        **{"--outtype": outtype != "auto", "--quantize": quantize, "--device": device != "auto"},
        **{"--trust-metric": trust_metric, "--gpus": gpus != 1},
    }
    _check_options(target, [option for option, value in given.items() if value])
    if target is not None and is_hub_address(target):
        upload = _upload(name, target, public=public, confirm=confirm)
        arguments = {"source": name, "out": target, "public": public, "confirm": True}
        steps = [] if confirm else [Step("export", arguments)]
        lines = [f"{size:>16,}  {file}" for file, size in upload.files.items()]
        total = sum(upload.files.values())
        visibility = "public" if public else "private"
        num_files = format_count(len(lines), "file")
        lines.append(f"{total:>16,}  bytes in {num_files} to {upload.to}, {visibility}")
        lines.append(upload.page or "nothing was uploaded")
        return Outcome(upload, lines, asdict(upload), steps)
    model_source = _resolve_source(name)
    if target is None:
        from finesight.export.deployment import build_serving_commands

        commands = build_serving_commands(model_source, name, gpus)
        named = {"vLLM": commands.vllm, "SGLang": commands.sglang}
        lines = []
        for engine, text in named.items():
            if text:
                lines += [f"{engine}:", f"  {text}"]
        for note in commands.notes:
            lines.append(f"- {note}")
        lines += commands.resize_code.splitlines()
        return Outcome(commands, lines, commands.as_json())
    if quantize is not None:
        from finesight.export.quantized_export import export_quantized

        quantized = export_quantized(
            name, model_source, Path(target), ProgressConsole(), device, trust_metric
        )
        step = Step("export", {"source": target})
        return Outcome(quantized, quantized.format_lines(), quantized.as_json(), [step])
    from finesight.export.deployment import (
        build_llama_server_command,
        describe_questions,
        find_converter,
        write_gguf,
    )

    try:
        program = find_converter(to_path(converter))
    except UserError as error:
        command = suggest_target(target)
        # Who means GGUF files lacks only the converter.
        if command and "--converter" not in command:
            raise UserError(
                f"{target} is a folder for GGUF files here",
                where="OUT",
                expected="a folder to create, or hf:OWNER/NAME; without it, serving commands",
                remedy=f"use {command}",
            ) from error
        raise
    with ProgressConsole().activity(f"converting {name} to GGUF"):
        files = write_gguf(
            model_source, Path(target), program, outtype, to_path(python), source=name
        )
    lines = []
    for path in (files.model, files.mmproj):
        lines.append(f"{path}  {path.stat().st_size:,} bytes")
    server = build_llama_server_command(model_source, files)
    lines.append(server.command)
    for note in (server.note, *describe_questions(model_source.manifest)):
        lines.append(f"- {note}")
    lines += server.resize_code.splitlines()
    return Outcome(files, lines, asdict(files) | asdict(server))


def _resolve_source(source: str) -> ModelSource:
    """Find a run or model to export. A program or format in its place has a remedy."""
    from finesight.infer.model_loader import resolve_model_source

    try:
        return resolve_model_source(source)
    except UserError as error:
        command = suggest_target(source)
        if command and not Path(source).exists():
            error.remedy = f"use {command}"
        raise


def _upload(source: str, out: str, *, public: bool, confirm: bool) -> HubUpload:
    """List the files of a model, and upload them if confirmed."""
    from finesight.export.model_card import HubUpload, collect_uploads
    from finesight.hub.repository import publish_model
    from finesight.infer.model_loader import get_model_name

    address = parse_address(out)
    page = None
    with collect_uploads(_resolve_source(source), source) as files:
        sizes = {name: path.stat().st_size for name, path in files.items()}
        if confirm:
            message = f"Upload {get_model_name(str(Path(source).resolve()))} with finesight"
            text = f"uploading {format_count(len(files), 'file')} to {address}"
            with ProgressConsole().activity(text):
                page = publish_model(address, files, public=public, message=message)
    return HubUpload(str(address), public, sizes, page)


def upload_run(run_dir: Path, out: str, console: ProgressConsole) -> int:
    """Upload a finished run to a hub, and return the exit code.

    A failure prints the command to repeat.
    """
    try:
        upload = _upload(str(run_dir), out, public=False, confirm=True)
    except Exception as error:  # whatever fails, the run is complete
        console.log(f"the upload failed, but the run is complete: {error}")
        arguments = {"source": run_dir, "out": out, "confirm": True}
        console.log(str(Step("export", arguments, "to upload it again")))
        return EXIT_UPLOAD_FAILED
    console.log(f"uploaded: {upload.page}")
    return 0


_SERVING = "serving commands (OUT is missing)"

_PURPOSES = {
    "--gpus": _SERVING,
    **dict.fromkeys(("--yes", "--public"), "an upload (OUT: hf:OWNER/NAME)"),
    **dict.fromkeys(("--converter", "--python", "--outtype"), "GGUF files (OUT: a folder)"),
    **dict.fromkeys(("--quantize", "--device", "--trust-metric"), "a folder with --quantize"),
}
"""Purpose of each option of `export` that does not apply to all kinds of OUT."""


def _check_options(out: str | None, options: list[str]) -> None:
    """Raise UserError for an option that does not apply to the kind of OUT."""
    purpose = _SERVING
    if out is not None:
        typical_option = "--converter"
        if is_hub_address(out):
            typical_option = "--yes"
        elif "--quantize" in options:
            typical_option = "--quantize"
        purpose = _PURPOSES[typical_option]
    for option in options:
        if _PURPOSES[option] != purpose:
            raise UserError(
                f"does not apply to {purpose}",
                where=option,
                expected=f"{option} for {_PURPOSES[option]}",
                remedy=f"remove {option}, or correct OUT",
            )
