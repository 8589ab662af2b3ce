"""`finesight merge`: merge an adapter into its base model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from finesight.cli.options import AsJsonOption, DeviceOption
from finesight.config import PixelRange
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.export.verified_merge import VerifiedMerge
    from finesight.infer.model_loader import ModelSource


def merge(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder of a run (LoRA, QLoRA or full fine-tuning), of a PEFT adapter, or of a "
            "4-bit GPTQ model.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Model folder to create.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of the base model. Default: as recorded in the run or in the "
            "adapter."
        ),
    ] = None,
    precision: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        typer.Option(
            help="Data type of the written weights. auto: that of the base model, or fp32 if it "
            "has several."
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    num_samples: Annotated[
        int,
        typer.Option(
            min=1,
            help="Number of prompts with images on which the written and the trained model are "
            "compared.",
        ),
    ] = 4,
    max_shard_gb: Annotated[
        float, typer.Option(min=0.001, help="Maximum size of a weight file in GB (10^9 bytes).")
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
    result = merge_and_verify(
        source,
        model_source,
        out,
        precision=precision,
        device=device,
        num_samples=num_samples,
        max_shard_bytes=max_shard_gb * 1e9,
        log=lambda line: typer.echo(line, err=True),
    )
    if as_json:
        typer.echo(json.dumps(_result_to_dict(result, model_source)))
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
    typer.echo(f"{action} {merge_result.folder}, {merge_result.precision}")
    for line in merge_result.parity.format_lines():
        typer.echo(line)
    if merge_result.dequantized_layers:
        typer.echo(
            f"{merge_result.dequantized_layers} layers were dequantized from 4 bits to"
            f" {merge_result.precision}, about four times as large. The values equal the 4-bit"
            " model, not the model before quantization"
        )
    if model_source.quantization_summary:
        typer.echo(
            f"the run used quantized weights ({model_source.quantization_summary}), the merged"
            " model uses the published weights: evaluate it on more samples (finesight eval)"
        )
    if merge_result.dropped_sampling:
        typer.echo(
            "removed from generation_config.json, for greedy decoding: "
            + json.dumps(merge_result.dropped_sampling)
        )
    if merge_result.missing_files:
        typer.echo(
            f"missing for other programs: {'; '.join(merge_result.missing_files)};"
            " not in the base model"
        )
    image_rule = None if model_source.manifest is None else model_source.manifest.image_rule
    # Qwen-VL (2023) supports a single image size.
    has_default_rule = image_rule is None or "image_size" in model_source.folder.preprocessor_config
    if not has_default_rule and not isinstance(image_rule, PixelRange):
        rule_text = ", ".join(f"{key} {n}" for key, n in image_rule or ())
        typer.echo(f"other programs cannot store the image size: resize images to {rule_text}")
