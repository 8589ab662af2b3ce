"""`finesight eval`: a model or run measured on held-out samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from finesight.cli.options import Device, Precision, RunOrModel, Weights


def evaluate(
    run_or_model: RunOrModel,
    data: Annotated[
        Path | None, typer.Option(help="A JSONL file of held-out samples; for a run, its own.")
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="How answers are scored: captions, latex, ocr, qa, classification, json,"
            " grounding, detection, or FILE.py:FUNCTION of your own; for a run, as its recipe says."
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N samples.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Samples that are answered together.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer in tokens.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="Write every answer with its scores here, as JSONL."),
    ] = None,
    trust_metric: Annotated[
        bool,
        typer.Option(
            "--trust-metric", help="Execute the metric.py of a run folder that you did not make."
        ),
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    weights: Weights = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="The scores as one JSON object.")] = False,
) -> None:
    """Answer held-out samples and score the answers.

    Example: finesight eval runs/latex --out answers.jsonl
    """
    from rich.console import Console

    from finesight.evaluate.evaluate import evaluate as measure
    from finesight.evaluate.held_out import held_out
    from finesight.evaluate.metric_trust import check_metric
    from finesight.evaluate.own import split
    from finesight.infer.load import load_answerer
    from finesight.train.progress import Screen

    samples, settings = held_out(
        run_or_model,
        data=data,
        metric=metric,
        limit=limit,
        batch=batch,
        max_new_tokens=max_new_tokens,
    )
    check_metric(settings.metric, named=metric is not None, trust=trust_metric)
    if split(settings.metric) is not None:
        typer.echo(f"scored by the program {settings.metric}", err=True)
    answerer = load_answerer(run_or_model, device, precision, weights)
    total = min(len(samples), settings.limit or len(samples))
    with Screen(Console(stderr=True)).stage("answers", total) as advance:
        result = measure(answerer.model, answerer.renderer, samples, settings, out, advance)
    for sample, reason in result.unreadable:
        typer.echo(f"left out: sample {sample}: {reason}", err=True)
    typer.echo(json.dumps(result.as_json()) if as_json else result.as_table())
