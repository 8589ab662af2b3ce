"""`finesight predict`: answers about pictures."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import Device, Precision, RunOrModel, Weights, echo_json
from finesight.errors import UserError

if TYPE_CHECKING:
    from finesight.data.jsonl import Located


def predict(
    run_or_model: RunOrModel,
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(metavar="PICTURE...", help="Pictures, asked about one by one."),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What to ask about each picture.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A JSONL file of samples to answer, in place of pictures.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer in tokens; longer ones are cut there.")
    ] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Questions that are answered together.")] = 16,
    draw: Annotated[
        Path | None,
        typer.Option(
            file_okay=False, help="Write a copy of each picture, its boxes drawn, into this folder."
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    weights: Weights = "auto",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="One JSON object a line: image, prompt, answer, raw, boxes."),
    ] = False,
) -> None:
    """Answer questions about pictures, greedily: the same question always has the same answer.

    Boxes are in pixels of the original pictures.

    Example: finesight predict runs/latex formula.png --prompt "Write the formula as LaTeX."
    """
    from rich.console import Console

    from finesight.infer.draw import draw as draw_to
    from finesight.infer.load import load_answerer
    from finesight.infer.predict import predict as answer
    from finesight.train.progress import Screen

    asked = _asked(pictures or [], prompt, data)
    answerer = load_answerer(run_or_model, device, precision, weights)
    with Screen(Console(stderr=True)).stage("answers", len(asked)) as advance:
        predictions = answer(
            answerer.model,
            answerer.renderer,
            asked,
            max_new_tokens=max_new_tokens,
            batch=batch,
            advance=advance,
        )
    for prediction in predictions:
        if as_json:
            echo_json(prediction.as_json())
        else:
            typer.echo(prediction.as_text())
    if draw is not None:
        for path in draw_to(predictions, draw):
            typer.echo(f"drawn: {path}", err=True)


def _asked(pictures: list[Path], prompt: str | None, data: Path | None) -> list[Located]:
    from finesight.data.jsonl import Located, read_samples
    from finesight.infer.predict import questions

    if data is not None and prompt is None and not pictures:
        return [Located(sample, data.parent) for sample in read_samples(data, answered=False)]
    if prompt is not None and data is None:
        return questions(pictures, prompt)
    raise UserError(
        f"{len(pictures)} pictures, "
        f"{'no ' if prompt is None else ''}--prompt and {'no ' if data is None else ''}--data",
        where="finesight predict",
        expected="pictures with --prompt TEXT, or --data FILE.jsonl alone",
        remedy='for example: finesight predict runs/latex a.png --prompt "What is this?"',
    )
