"""`finesight eval`: evaluate a model or run on validation samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import (
    AsJsonOption,
    DeviceOption,
    PrecisionOption,
    RunOrModelArgument,
    TrustMetricOption,
    WeightFormatOption,
)


def evaluate(
    run_or_model: RunOrModelArgument,
    data: Annotated[
        Path | None,
        typer.Option(
            help="JSONL file of samples with answers. Default for a run: its validation split; "
            "required otherwise."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="captions, latex, ocr, qa, classification, json, grounding or detection, or "
            "FILE.py:FUNCTION for a custom metric. Default for a run: the metric of its recipe; "
            "required otherwise."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Evaluate only the first N samples. Default for a run: of its recipe, else all.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Answers generated at the same time; halved when GPU memory is exhausted. Default "
            "for a run: of its recipe, else 32.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Maximum number of tokens per answer. Default for a run: of its recipe, else 512.",
        ),
    ] = None,
    predictions_file: Annotated[
        Path | None,
        typer.Option(
            "--out",
            dir_okay=False,
            help="Write each answer with its scores to this JSONL file, for `finesight compare`.",
        ),
    ] = None,
    trust_metric: TrustMetricOption = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    weight_format: WeightFormatOption = "auto",
    as_json: AsJsonOption = False,
) -> None:
    """Generate answers to validation samples and compute metrics.

    A run has a metric and validation data in its recipe. Other models need --metric and --data.

    Example: finesight eval runs/latex --out tuned.jsonl

    Example: finesight eval Qwen/Qwen2-VL-2B-Instruct --data latex/eval.jsonl --metric latex
    --out base.jsonl
    """
    from rich.console import Console

    from finesight.evaluate.custom_metric import check_metric, parse_metric_path
    from finesight.evaluate.generation_eval import evaluate as run_evaluation
    from finesight.evaluate.generation_eval import load_eval_inputs
    from finesight.infer.model_loader import load_inference_model
    from finesight.train.console import TrainingConsole

    samples, settings = load_eval_inputs(
        run_or_model,
        data=data,
        metric=metric,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    check_metric(settings.metric, named=metric is not None, trust=trust_metric)
    if parse_metric_path(settings.metric) is not None:
        typer.echo(f"custom metric: {settings.metric}", err=True)
    inference_model = load_inference_model(run_or_model, device, precision, weight_format)
    total = min(len(samples), settings.limit or len(samples))
    with TrainingConsole(Console(stderr=True)).progress_stage("answers", total) as on_progress:
        result = run_evaluation(
            inference_model.model,
            inference_model.renderer,
            samples,
            settings,
            predictions_file,
            on_progress,
        )
    for sample, reason in result.corrupt_samples:
        typer.echo(f"skipped: sample {sample}: {reason}", err=True)
    typer.echo(json.dumps(result.as_json()) if as_json else result.as_table())
