"""Evaluate, predict, report, compare and diagnose: results and problems of models and runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from finesight.errors import Step, UserError, format_count, suggest_similar_path
from finesight.operations.model import ModelArgument, get_model_name, load_model
from finesight.operations.operation import Outcome, Parameter, StrPath, to_path
from finesight.operations.options import (
    LanguageOption,
    LoadingOptions,
    MaxNewTokensOption,
    PagesOption,
    TrustMetricOption,
)
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.data.image_header import PageRanges
    from finesight.data.sample import LocatedSample
    from finesight.doctor.diagnosis import DiagnosisSections
    from finesight.evaluate.generation_eval import GenerationEvalResult
    from finesight.infer.prediction import Prediction
    from finesight.report.compare_page import RunComparison

EXIT_ERROR_FOUND = 2


def evaluate(
    run_or_model: ModelArgument,
    data: StrPath | None = None,
    metric: Annotated[
        str | None,
        Parameter(
            "captions, latex, ocr, qa, classification, json, grounding, detection or pointing, or "
            "FILE.py:FUNCTION for a custom metric. Default for a run: the metric of its recipe; "
            "required otherwise.",
            plugins="metrics",
        ),
    ] = None,
    limit: Annotated[int | None, Parameter(minimum=1)] = None,
    batch_size: Annotated[int, Parameter(minimum=1)] = 32,
    max_new_tokens: Annotated[int | None, Parameter(minimum=1)] = None,
    out: Annotated[StrPath | None, Parameter(path="file")] = None,
    trust_metric: TrustMetricOption = False,
    **loading: Unpack[LoadingOptions],
) -> Outcome[GenerationEvalResult]:
    """Generate answers to validation samples and compute metrics.

    A run has a metric and validation data in its recipe. Other models need --metric and --data.

    Example: finesight eval runs/latex --out tuned.jsonl

    Example: finesight eval Qwen/Qwen2-VL-2B-Instruct --data latex/eval.jsonl --metric latex
    --out base.jsonl

    Args:
        data: JSONL file of samples with answers. Default for a run: its validation split; required
            otherwise.
        limit: Evaluate N randomly selected samples, always the same. Default for a run: of its
            recipe, else all.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
        max_new_tokens: Maximum number of tokens per answer. Default for a run: of its recipe, else
            512.
        out: Write each answer with its scores to this JSONL file, for `finesight compare`.
    """
    from finesight.evaluate.custom_metric import check_metric, parse_metric_path
    from finesight.evaluate.generation_eval import evaluate as run_evaluation
    from finesight.evaluate.generation_eval import load_eval_inputs
    from finesight.train.run_dir import describe_changed_data

    console, name = ProgressConsole(), get_model_name(run_or_model)
    samples, settings = load_eval_inputs(
        name,
        data=to_path(data),
        metric=metric,
        limit=limit,
        max_new_tokens=max_new_tokens,
    )
    if data is None and (changed := describe_changed_data(name)):
        console.log(f"note: {changed}")
    check_metric(settings.metric, named=metric is not None, trust=trust_metric)
    if parse_metric_path(settings.metric) is not None:
        console.log(f"custom metric: {settings.metric}")
    model = load_model(run_or_model, **loading).value.inference_model
    total = min(len(samples), settings.limit or len(samples))
    with console.progress_stage("answers", total) as on_progress:
        source = model.model, model.renderer, samples, settings, to_path(out), on_progress
        result = run_evaluation(*source, on_progress, batch_size=batch_size)
    for sample, reason in result.corrupt_samples:
        console.log(f"skipped: sample {sample}: {reason}")
    return Outcome(result, result.as_table().splitlines(), result.as_json())


def predict(
    run_or_model: ModelArgument,
    images: Annotated[Sequence[StrPath], Parameter(metavar="IMAGE", is_positional=True)] = (),
    prompt: str | None = None,
    data: StrPath | None = None,
    max_new_tokens: MaxNewTokensOption = 512,
    batch_size: Annotated[int, Parameter(minimum=1)] = 16,
    draw: Annotated[StrPath | None, Parameter(path="folder")] = None,
    pages: PagesOption = None,
    **loading: Unpack[LoadingOptions],
) -> Outcome[list[Prediction]]:
    """Answer questions about images with greedy decoding, so that answers are deterministic.

    Boxes are left, top, right, bottom in pixels of the original images. --json prints one object
    per answer, with image, prompt, answer, raw_text and boxes.

    Example: finesight predict runs/latex formula.png --prompt "Write the formula as LaTeX."

    Args:
        images: Image, PDF or video files; each gets its own answer.
        prompt: Question about every image. Required with IMAGE.
        data: JSONL file of samples to answer, instead of IMAGE and --prompt.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
        draw: Write a copy of each image with the predicted boxes into this folder.
    """
    from finesight.infer.prediction import predict as run_prediction
    from finesight.infer.prediction import save_annotated_images

    samples = _load_samples(
        get_model_name(run_or_model), [*map(Path, images)], prompt, to_path(data), pages or ()
    )
    model = load_model(run_or_model, **loading).value.inference_model
    console = ProgressConsole()
    with console.progress_stage("answers", len(samples)) as on_progress:
        predictions = run_prediction(
            model.model,
            model.renderer,
            samples,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    if draw is not None:
        for path in save_annotated_images(predictions, Path(draw)):
            console.log(f"saved: {path}")
    lines = [prediction.as_text() for prediction in predictions]
    return Outcome(predictions, lines, [prediction.as_json() for prediction in predictions])


def _load_samples(
    run_or_model: str,
    images: list[Path],
    prompt: str | None,
    data: Path | None,
    pages: PageRanges,
) -> list[LocatedSample]:
    from finesight.data.image_header import get_file, list_pages
    from finesight.data.sample import LocatedSample, read_samples
    from finesight.infer.prediction import build_question

    if data is not None and prompt is None and not images:
        found = read_samples(data, require_answer=False)
        return [LocatedSample(sample, data.parent) for sample in found]
    for image in map(get_file, images):
        if not image.exists() or image.is_dir():
            is_folder, what = image.is_dir(), "a folder" if image.is_dir() else "no such image"
            remedy = f"give its images: {image}/*" if is_folder else suggest_similar_path(image)
            raise UserError(what, where=str(image), expected="an image file", remedy=remedy)
    if prompt is not None and data is None:
        if not images:
            return [build_question((), prompt, prompt)]
        return [build_question(list_pages(one, pages), prompt, str(one)) for one in images]
    example = {"run_or_model": run_or_model, "images": [[*images, "IMAGE"][0]]}
    raise UserError(
        f"{format_count(len(images), 'image')}, "
        f"{'no ' if prompt is None else ''}--prompt and {'no ' if data is None else ''}--data",
        where="predict",
        expected="images with --prompt TEXT, or --data FILE.jsonl alone",
        remedy=Step("predict", example | {"prompt": "What is this?"}, "for example"),
    )


def report(
    run: Annotated[StrPath, Parameter(metavar="RUN")],
    out: Annotated[StrPath | None, Parameter(metavar="FILE", path="file")] = None,
    incorrect: Annotated[StrPath | None, Parameter(metavar="FILE", path="file")] = None,
    language: LanguageOption = None,
) -> Outcome[Path]:
    """Write the HTML report of a run: one page with metrics, loss curves and answers.

    Training writes the report at the end, and a short one about once a minute and after each
    evaluation. This command writes it again, also for a running or killed run, with the images at
    their current paths. The page needs no network. An existing page is replaced, but no other file.

    Example: finesight report runs/latex --out latex.html

    Args:
        run: Run folder.
        out: HTML page. Default: RUN/report.html.
        incorrect: Also write the incorrect answers of the latest evaluation to this JSONL file.
    """
    from finesight.report.run_page import write_incorrect_predictions, write_report

    count = write_incorrect_predictions(Path(run), Path(incorrect)) if incorrect else None
    page = write_report(Path(run), to_path(out), language=language)
    counts = {} if count is None else {"num_incorrect": count}
    lines = [] if count is None else [f"{count} incorrect answers: {incorrect}"]
    return Outcome(page, [*lines, f"page: {page}"], {"report": str(page), **counts})


def compare(
    runs: Annotated[Sequence[StrPath], Parameter(metavar="RUN")],
    out: Annotated[StrPath, Parameter(metavar="FILE", path="file")] = Path("comparison.html"),
    language: LanguageOption = None,
) -> Outcome[RunComparison]:
    """Compare runs with a baseline run, on the validation samples that both answered.

    The page contains the differences of recipes and data, metrics with 95 % intervals and the
    significance of each difference, loss curves, cost, and samples side by side. Unfinished runs
    are allowed. The page needs no network. An existing page is replaced, but no other file.

    To compare a base model with a tuned one, evaluate both with `finesight eval --out` and compare
    the two files.

    Example: finesight compare runs/rank8 runs/rank64 --out ranks.html

    Example: finesight compare base.jsonl tuned.jsonl

    Args:
        runs: 2 to 8 run folders or prediction files of `finesight eval --out`. The first one is the
            baseline.
        out: HTML page.
    """
    from finesight.report.compare_page import write_compare_page
    from finesight.report.html import raise_if_not_generated

    raise_if_not_generated(Path(out))
    comparison = write_compare_page([*map(Path, runs)], Path(out), language)
    notes = [f"note: {text}" for text in comparison.warnings]
    lines = [*comparison.format_table().splitlines(), *notes, f"page: {out}"]
    return Outcome(comparison, lines, {"page": str(out), **comparison.as_json()})


def doctor(
    subject: Annotated[StrPath | None, Parameter(metavar="RUN|MODEL", is_positional=True)] = None,
) -> Outcome[DiagnosisSections]:
    """Diagnose a machine, a model or a run: problems, effects, and commands that fix them.

    Without an argument, this machine: memory, disks, package conflicts, torch and driver,
    environment variables, and optional packages.

    Run, from its records: why it ended, flat or rising loss, lower metrics, answers without end,
    boxes in wrong coordinates.

    Model or adapter folder: missing or corrupt files.

    The command changes nothing and does not use the network. Exit code: 0 without errors, 2 with
    errors.

    Example: finesight doctor runs/latex

    Args:
        subject: Run folder, or model or adapter folder. Default: this machine.
    """
    from finesight.doctor import diagnose, diagnose_machine
    from finesight.doctor.diagnosis import count_severity, diagnoses_to_dict, format_diagnoses

    diagnosis = diagnose_machine(os.environ) if subject is None else diagnose(str(subject))
    exit_code = EXIT_ERROR_FOUND if count_severity(diagnosis, "error") else 0
    data, lines = diagnoses_to_dict(diagnosis), [*format_diagnoses(diagnosis)]
    return Outcome(diagnosis, lines, data, exit_code=exit_code)
