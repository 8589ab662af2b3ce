"""`finesight predict`: answer questions about images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import (
    JSON_OUTPUT,
    DeviceOption,
    MaxNewTokensOption,
    PrecisionOption,
    RunOrModelArgument,
    WeightFormatOption,
    echo_json,
)
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.data.jsonl import LocatedSample


def predict(
    run_or_model: RunOrModelArgument,
    images: Annotated[
        list[Path] | None,
        typer.Argument(metavar="IMAGE", help="Image files; each gets its own answer."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Question about every image. Required with IMAGE.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="JSONL file of samples to answer, instead of IMAGE and --prompt."),
    ] = None,
    max_new_tokens: MaxNewTokensOption = 512,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Answers generated at the same time; halved when GPU memory is exhausted."
        ),
    ] = 16,
    annotated_dir: Annotated[
        Path | None,
        typer.Option(
            "--draw",
            file_okay=False,
            help="Write a copy of each image with the predicted boxes into this folder.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    weight_format: WeightFormatOption = "auto",
    as_json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object per answer (image, prompt, answer, raw_text, boxes) "
            f"{JSON_OUTPUT}",
        ),
    ] = False,
) -> None:
    """Answer questions about images with greedy decoding, so that answers are deterministic.

    Boxes are left, top, right, bottom in pixels of the original images.

    Example: finesight predict runs/latex formula.png --prompt "Write the formula as LaTeX."
    """
    from rich.console import Console

    from finesight.infer.model_loader import load_inference_model
    from finesight.infer.prediction import predict as run_prediction
    from finesight.infer.prediction import save_annotated_images
    from finesight.train.console import TrainingConsole

    samples = _load_samples(images or [], prompt, data)
    inference_model = load_inference_model(run_or_model, device, precision, weight_format)
    with TrainingConsole(Console(stderr=True)).progress_stage(
        "answers", len(samples)
    ) as on_progress:
        predictions = run_prediction(
            inference_model.model,
            inference_model.renderer,
            samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    for prediction in predictions:
        if as_json:
            echo_json(prediction.as_json())
        else:
            typer.echo(prediction.as_text())
    if annotated_dir is not None:
        for path in save_annotated_images(predictions, annotated_dir):
            typer.echo(f"saved: {path}", err=True)


def _load_samples(images: list[Path], prompt: str | None, data: Path | None) -> list[LocatedSample]:
    from finesight.data.jsonl import LocatedSample, read_samples
    from finesight.infer.prediction import build_questions

    if data is not None and prompt is None and not images:
        return [
            LocatedSample(sample, data.parent)
            for sample in read_samples(data, require_answer=False)
        ]
    if prompt is not None and data is None:
        return build_questions(images, prompt)
    raise UserError(
        f"{len(images)} images, "
        f"{'no ' if prompt is None else ''}--prompt and {'no ' if data is None else ''}--data",
        where="finesight predict",
        expected="images with --prompt TEXT, or --data FILE.jsonl alone",
        remedy='for example: finesight predict runs/latex a.png --prompt "What is this?"',
    )
