"""Evaluate, predict, report, compare and guard: results of models and runs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, Unpack

from finesight.errors import Step, UserError, format_count, suggest_similar_path
from finesight.operations.model import ModelArgument, get_model_name, get_prompt_format, load_model
from finesight.operations.operation import Outcome, Parameter, SkippedInputs, StrPath, to_path
from finesight.operations.options import (
    LanguageOption,
    LoadingOptions,
    PagesOption,
    TrustMetricOption,
    build_environment_parameter,
)
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from finesight.environment_components import EpisodeSettings
    from finesight.evaluate.generation_eval import GenerationEvalResult
    from finesight.evaluate.regression_guard import GroupResult, LoadedGroup
    from finesight.infer.model_loader import InferenceModel
    from finesight.infer.prediction import Prediction
    from finesight.report.compare_page import RunComparison
    from finesight.samples.image_file import PageRanges
    from finesight.samples.prompt_format import PromptFormat
    from finesight.samples.sample import LocatedSample

EXIT_REGRESSION = 3


def format_metrics() -> str:
    """Return the names of the built-in metrics, as in a sentence."""
    from finesight.metric_components import METRICS

    *first, last = [one.name for one in METRICS.list_built_in()]
    return f"{', '.join(first)} or {last}"


def evaluate(
    run_or_model: ModelArgument,
    data: StrPath | None = None,
    metric: Annotated[
        str | None,
        Parameter(
            f"{format_metrics()}, or FILE.py:FUNCTION for a custom metric. Default for a run: the "
            "metric of its recipe; required otherwise.",
            plugins="metrics",
        ),
    ] = None,
    limit: Annotated[int | None, Parameter(minimum=1)] = None,
    batch_size: Annotated[int, Parameter(minimum=1)] = 32,
    max_new_tokens: Annotated[int | None, Parameter(minimum=1, maximum=1_048_576)] = None,
    out: Annotated[StrPath | None, Parameter(path="file")] = None,
    environment: Annotated[str | None, build_environment_parameter()] = None,
    trust_metric: TrustMetricOption = False,
    **loading: Unpack[LoadingOptions],
) -> Outcome[GenerationEvalResult]:
    """Generate answers to validation samples and compute metrics.

    A run has a metric and validation data in its recipe. Other models need --metric and --data.
    Samples with unreadable images are skipped, and the exit code is then 4.

    Example: finesight eval runs/latex --out tuned.jsonl

    Example: finesight eval Qwen/Qwen2-VL-2B-Instruct --data latex/eval.jsonl --metric latex
    --out base.jsonl

    Args:
        data: JSONL file of samples with answers. Default for a run: its validation split; required
            otherwise.
        limit: Evaluate N randomly selected samples, always the same. Default for a run: of its
            recipe, else all.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
        max_new_tokens: Maximum number of tokens per answer, or of an episode with an environment.
            Default for a run: of its recipe, else 512, or 4096 for an episode.
        out: Write each answer with its scores to this new JSONL file, for `finesight compare`.
    """
    from finesight.encode.answer_lengths import describe_cut_answers, measure_answers
    from finesight.evaluate.custom_metric import check_metric, parse_metric_path
    from finesight.evaluate.eval_result import select_eval_samples
    from finesight.evaluate.generation_eval import evaluate as run_evaluation
    from finesight.evaluate.generation_eval import load_eval_inputs
    from finesight.files.storage import check_new_path, write_new_file
    from finesight.infer.prediction import describe_reduced_batch
    from finesight.train.run_dir import describe_changed_data

    console = ProgressConsole()
    name = get_model_name(run_or_model)
    write_predictions = None
    if out is not None:
        check_new_path(Path(out))
        write_predictions = partial(write_new_file, Path(out))
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
    episodes = _find_trusted_environment(name, environment, max_new_tokens, trust_metric, console)
    if episodes is not None:
        settings = settings.model_copy(update={"max_new_tokens": episodes.max_tokens})
    if parse_metric_path(settings.metric) is not None:
        console.log(f"custom metric: {settings.metric}")
    model = load_model(run_or_model, **loading).value.inference_model
    limit_name = "--max-new-tokens"
    selected = select_eval_samples(range(len(samples)), settings.limit)
    lengths = measure_answers(model.renderer, [samples[index] for index in selected])
    warning = describe_cut_answers(lengths, settings.max_new_tokens, limit_name, "reference answer")
    if warning:
        console.log(warning)
    with console.progress_stage("answers", len(selected)) as on_progress:
        result = run_evaluation(
            model.model,
            model.renderer,
            samples,
            settings,
            write_predictions,
            on_progress=on_progress,
            on_batch_reduced=lambda size: console.log(describe_reduced_batch(size)),
            batch_size=batch_size,
            episodes=episodes,
        )
    _log_episode_errors(result.predictions, console)
    skipped = SkippedInputs("sample")
    for sample, reason in result.corrupt_samples:
        skipped.add(UserError(reason, where=f"sample {sample}"))
    _warn_truncated(result.predictions, settings.max_new_tokens, console)
    return Outcome(
        result,
        result.as_table().splitlines(),
        result.as_json(),
        exit_code=skipped.exit_code,
        notes=skipped.describe(),
    )


def _find_trusted_environment(
    run_or_model: str,
    environment: str | None,
    max_new_tokens: int | None,
    trust: bool,
    console: ProgressConsole,
) -> EpisodeSettings | None:
    """Return the environment of answers, after a check that its code may be executed.

    Raises:
        UserError: Its file is in a run folder and its content is not trusted.
    """
    from finesight.evaluate.custom_metric import check_metric
    from finesight.evaluate.generation_eval import find_episode_settings

    episodes = find_episode_settings(run_or_model, environment, max_new_tokens)
    if episodes is not None:
        check_metric(
            episodes.environment,
            named=environment is not None,
            trust=trust,
            alternative="answer without its tools: --environment none",
        )
        console.log(f"environment: {episodes.environment}")
    return episodes


def _log_episode_errors(predictions: Sequence[Prediction], console: ProgressConsole) -> None:
    """Print the different errors of environments, at most ten."""
    errors: Counter[str] = Counter()
    for prediction in predictions:
        if prediction.episode is not None and prediction.episode.error:
            errors[prediction.episode.error] += 1
    for text, count in errors.most_common(10):
        console.log(f"warning: {format_count(count, 'episode')} without a reward: {text}")


def _warn_truncated(
    predictions: Sequence[Prediction], max_new_tokens: int, console: ProgressConsole
) -> None:
    """Warn about answers that reached the maximum number of tokens, if there are many."""
    from finesight.encode.answer_lengths import describe_truncation

    num_truncated = sum(one.finish_reason == "length" for one in predictions)
    text = describe_truncation(num_truncated, len(predictions), max_new_tokens, "--max-new-tokens")
    if text:
        console.log(text)


def predict(
    run_or_model: ModelArgument,
    images: Annotated[Sequence[StrPath], Parameter(metavar="IMAGE", is_positional=True)] = (),
    prompt: str | None = None,
    data: StrPath | None = None,
    max_new_tokens: Annotated[int | None, Parameter(minimum=1, maximum=1_048_576)] = None,
    batch_size: Annotated[int, Parameter(minimum=1)] = 16,
    draw: Annotated[StrPath | None, Parameter(path="folder")] = None,
    out: Annotated[StrPath | None, Parameter(metavar="PATH", path="folder")] = None,
    pages: PagesOption = None,
    images_per_question: Annotated[int | None, Parameter(minimum=1)] = None,
    environment: Annotated[str | None, build_environment_parameter()] = None,
    trust_metric: TrustMetricOption = False,
    **loading: Unpack[LoadingOptions],
) -> Outcome[list[Prediction]]:
    """Answer questions about images with greedy decoding, so that answers are deterministic.

    A question to a run has the form of its training samples: the order of images and text, the
    white space around the text, and the system prompt. Boxes are left, top, right, bottom in pixels
    of the original images. --json prints one object per answer, with image, prompt, answer,
    raw_text and boxes. Questions about unreadable images are skipped and named at the end, and the
    exit code is then 4.

    Example: finesight predict runs/latex formula.png --prompt "Write the formula as LaTeX."

    Example: finesight predict runs/changes old.png new.png --images-per-question 2
    --prompt "What has changed?"

    Args:
        images: Image, PDF or video files, or folders of images. Each file is a question, except for
            --images-per-question.
        prompt: Question about every image. Required with IMAGE. <image> sets the position of
            an image.
        data: JSONL file of samples to answer, instead of IMAGE and --prompt.
        max_new_tokens: Maximum number of tokens per answer, or of an episode with an environment.
            Default: 512; for an episode that of the recipe, else 4096.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
        draw: Write a copy of each image with the predicted boxes into this folder.
        out: New file for the answers, whose suffix is .xlsx, .csv or .jsonl, or folder to create
            with all three. The tables have the columns id, image, prompt, answer and the fields of
            answers in JSON, and the Excel workbook has thumbnails. It needs the extra xlsx.
        images_per_question: Number of image files in a question, which follow one another. Default:
            that of the training samples of a run, else 1.
    """
    from finesight.evaluate import answer_tables
    from finesight.evaluate.generation_eval import predict_answers
    from finesight.files.storage import check_new_path, check_writable_folder
    from finesight.infer.prediction import describe_reduced_batch, save_annotated_images

    target = to_path(out)
    if target is not None:
        check_new_path(target)
        if target.suffix.lower() == ".xlsx" and not answer_tables.can_write_workbooks():
            raise answer_tables.build_package_error("--out")
    if draw is not None:
        check_writable_folder(Path(draw))
    console = ProgressConsole()
    name = get_model_name(run_or_model)
    episodes = _find_trusted_environment(name, environment, max_new_tokens, trust_metric, console)
    max_tokens = max_new_tokens or 512
    if episodes is not None:
        max_tokens = episodes.max_tokens
    skipped = SkippedInputs("question")
    samples = _load_samples(
        run_or_model,
        [*map(Path, images)],
        prompt,
        to_path(data),
        pages or (),
        images_per_question,
        console,
        skipped,
    )
    skipped.require_others(len(samples))
    model = load_model(run_or_model, **loading).value.inference_model
    with console.progress_stage("answers", len(samples)) as on_progress:
        predictions = predict_answers(
            model.model,
            model.renderer,
            samples,
            max_new_tokens=max_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
            on_corrupt_image=lambda _, error: skipped.add(error),
            on_batch_reduced=lambda size: console.log(describe_reduced_batch(size)),
            episodes=episodes,
        )
    _log_episode_errors(predictions, console)
    skipped.require_others(len(predictions))
    _warn_truncated(predictions, max_tokens, console)
    lines = [prediction.as_text() for prediction in predictions]
    records = [prediction.as_json() for prediction in predictions]
    if target is not None:
        _write_answers(target, predictions, records, console)
    if draw is not None:
        for path in save_annotated_images(predictions, Path(draw), skipped.add):
            console.log(f"saved: {path}")
    return Outcome(
        predictions, lines, records, exit_code=skipped.exit_code, notes=skipped.describe()
    )


def _write_answers(
    target: Path,
    predictions: Sequence[Prediction],
    records: Sequence[Mapping[str, Any]],
    console: ProgressConsole,
) -> None:
    """Write answers to a file of the format of its suffix, or all formats to a folder."""
    from finesight.evaluate import answer_tables
    from finesight.files.storage import write_file, write_folder, write_new_file

    def note(text: str) -> None:
        console.log(f"note: {text}")

    def format_file(suffix: str) -> bytes:
        return answer_tables.format_answers(predictions, records, suffix, note)

    suffix = target.suffix.lower()
    if suffix in answer_tables.TABLE_SUFFIXES:
        write_new_file(target, format_file(suffix))
        return
    with write_folder(target) as folder:
        for name in answer_tables.ANSWER_FILES:
            if name == answer_tables.XLSX_FILE and not answer_tables.can_write_workbooks():
                note("without answers.xlsx, which needs openpyxl: pip install 'finesight[xlsx]'")
                continue
            write_file(folder / name, format_file(Path(name).suffix))


def _load_samples(
    run_or_model: ModelArgument,
    images: list[Path],
    prompt: str | None,
    data: Path | None,
    pages: PageRanges,
    images_per_question: int | None,
    console: ProgressConsole,
    skipped: SkippedInputs,
) -> list[LocatedSample]:
    """Read the samples of a file, or build questions about images."""
    from finesight.infer.prediction import build_question
    from finesight.samples.image_file import CorruptImageError
    from finesight.samples.sample import LocatedSample, read_samples

    if data is not None and prompt is None and not images and images_per_question is None:
        found = read_samples(data, require_answer=False)
        return [LocatedSample(sample, data.parent) for sample in found]
    files = _find_images(images)
    if prompt is None or data is not None:
        example_image = images[0] if images else "IMAGE"
        arguments = {
            "run_or_model": get_model_name(run_or_model),
            "images": [example_image],
            "prompt": "What is this?",
        }
        given = [format_count(len(images), "image")]
        if images_per_question is not None:
            given.append("--images-per-question")
        given.append("no --prompt" if prompt is None else "--prompt")
        given_data = "no --data" if data is None else "--data"
        raise UserError(
            f"{', '.join(given)} and {given_data}",
            where="predict",
            expected="images with --prompt TEXT, or --data FILE.jsonl alone",
            remedy=Step("predict", arguments, "for example"),
        )
    prompt_format = get_prompt_format(run_or_model)
    groups = _group_images(files, pages, images_per_question, prompt_format)
    for num_images in sorted({len(group.images) for group in groups if group.error is None}):
        for note in prompt_format.describe_difference(prompt, num_images):
            console.log(f"note: {note}")
    samples: list[LocatedSample] = []
    for group in groups:
        if group.error is not None:
            skipped.add(group.error)
            continue
        try:
            sample_id = group.name or prompt
            samples.append(build_question(group.images, prompt, sample_id, prompt_format))
        except CorruptImageError as error:
            skipped.add(error)
    return samples


class _ImageGroup(NamedTuple):
    """Images of one question, and its name; or the error of an unreadable document."""

    name: str
    images: list[Path]
    error: UserError | None = None


def _group_images(
    files: Sequence[Path],
    pages: PageRanges,
    images_per_question: int | None,
    prompt_format: PromptFormat,
) -> list[_ImageGroup]:
    """Divide image files into questions, by default as many per question as in the training.

    By default, the pages of a document are a question of their own.
    """
    from finesight.samples.image_file import CorruptImageError, list_pages

    if not files:
        return [_ImageGroup("", [])]
    size = images_per_question or prompt_format.num_images or 1
    groups: list[_ImageGroup] = []
    num_documents = 0
    names: list[str] = []
    images: list[Path] = []
    error: UserError | None = None
    for file in files:
        own_images: list[Path] = []
        try:
            own_images = list_pages(file, pages)
        except CorruptImageError as page_error:
            if images_per_question is None and size == 1:
                groups.append(_ImageGroup(str(file), [], page_error))
                continue
            error = error or page_error
        if len(own_images) > 1 and images_per_question is None:
            groups.append(_ImageGroup(str(file), own_images))
            num_documents += 1
            continue
        names.append(str(file))
        images += own_images
        if len(names) == size:
            groups.append(_ImageGroup(", ".join(names), images, error))
            names = []
            images = []
            error = None
    if names:
        expected = f"a multiple of {size} image files"
        if images_per_question is None:
            expected += ", as in the training"
        what = format_count(len(files) - num_documents, "image file")
        if num_documents:
            what += f" besides {format_count(num_documents, 'document')} of several pages"
        raise UserError(
            f"{what} for questions about {size} images each",
            where="--images-per-question",
            expected=expected,
            remedy="give the files of a question one after another, or set --images-per-question",
        )
    return groups


def _find_images(paths: Sequence[Path]) -> list[Path]:
    """Return image files, and those in folders. Raises UserError if there are none."""
    from finesight.samples.image_file import get_file, list_images

    files: list[Path] = []
    for path in paths:
        own = [path]
        if path.is_dir():
            own = list_images(path)
        if not own:
            raise UserError(
                "a folder without images",
                where=str(path),
                expected="an image or a folder",
                remedy="give the image files",
            )
        if not get_file(own[0]).exists():
            raise UserError(
                "no such image",
                where=str(path),
                expected="an image or a folder",
                remedy=suggest_similar_path(path),
            )
        files += own
    return files


def report(
    run: Annotated[StrPath, Parameter(metavar="RUN")],
    out: Annotated[StrPath | None, Parameter(metavar="FILE", path="file")] = None,
    incorrect: Annotated[StrPath | None, Parameter(metavar="FILE", path="file")] = None,
    language: LanguageOption = None,
) -> Outcome[Path]:
    """Write the HTML report of a run: one page with metrics, loss curves and answers.

    Training writes the report at the end, and a short one about once a minute and after each
    evaluation. This command writes it again, also for a running or killed run, with the images at
    their current paths. The page needs no network. An unchanged page of the same run is replaced,
    but no other file.

    Example: finesight report runs/latex --out latex.html

    Args:
        run: Run folder.
        out: HTML page. Default: RUN/report.html.
        incorrect: Also write the incorrect answers of the latest evaluation to this new JSONL file.
    """
    from finesight.files.storage import check_separate
    from finesight.report.run_page import get_report_file, write_incorrect_predictions, write_report

    page_file = get_report_file(Path(run), to_path(out))
    page_file.check()
    if incorrect is not None:
        check_separate("--incorrect", Path(incorrect), "--out", page_file.file)
    lines = []
    counts = {}
    if incorrect:
        count = write_incorrect_predictions(Path(run), Path(incorrect))
        lines.append(f"{count} incorrect answers: {incorrect}")
        counts["num_incorrect"] = count
    page = write_report(Path(run), to_path(out), language=language)
    lines.append(f"page: {page}")
    return Outcome(page, lines, {"report": str(page), **counts})


def compare(
    runs: Annotated[Sequence[StrPath], Parameter(metavar="RUN")],
    out: Annotated[StrPath, Parameter(metavar="FILE", path="file")] = Path("comparison.html"),
    language: LanguageOption = None,
) -> Outcome[RunComparison]:
    """Compare runs with a baseline run, on the validation samples that both answered.

    The page contains the differences of recipes and data, metrics with 95 % intervals and a verdict
    on each difference, loss curves, cost, and samples side by side. Unfinished runs
    are allowed. The page needs no network. An unchanged page of the same runs is replaced, but no
    other file.

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

    comparison = write_compare_page([*map(Path, runs)], Path(out), language)
    notes = [f"note: {text}" for text in comparison.warnings]
    lines = [*comparison.format_table().splitlines(), *notes, f"page: {out}"]
    return Outcome(comparison, lines, {"page": str(out), **comparison.as_json()})


def guard(
    run: Annotated[StrPath, Parameter(metavar="RUN")],
    suite: Annotated[StrPath | None, Parameter(metavar="FILE", path="existing file")] = None,
    update: Annotated[bool, Parameter(option="--update")] = False,
    batch_size: Annotated[int, Parameter(minimum=1)] = 32,
    language: LanguageOption = None,
    **loading: Unpack[LoadingOptions],
) -> Outcome[list[GroupResult]]:
    """Compare a run with its base model on fixed questions, to find what it has forgotten.

    Writes RUN/guard.json and a section of the report. Exit code: 0 without a regression, 3 if the
    metric of a group has dropped by more than its allowed_drop beyond chance, or is below its
    min_score. Chance fails an unchanged model in at most 5 %, for all groups together.

    Example: finesight guard runs/latex

    Example: finesight guard runs/latex --suite suite.yaml --json

    Args:
        run: Run folder, or one of its LoRA checkpoints.
        suite: YAML file of groups of questions with metrics and bounds. Default: generated
            questions on reading, counting, boxes and chat.
        update: Write the scores of the run, minus allowed_drop, as min_score into the suite.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
    """
    from finesight.evaluate import regression_guard
    from finesight.files.storage import write_file
    from finesight.report.run_page import get_report_file, write_report
    from finesight.settings.manifest import GUARD_FILE, RECIPE_FILE, find_run_dir
    from finesight.train.finalize import format_differences

    run_dir = find_run_dir(Path(run))
    file = Path(suite or regression_guard.BUILT_IN_SUITE)
    if not (run_dir / RECIPE_FILE).is_file():
        raise UserError(
            f"{run_dir} is not a run",
            where="guard",
            expected="a run, whose base model and recipe are recorded",
            remedy=suggest_similar_path(run_dir, "give the output_dir of a run"),
        )
    if update and suite is None:
        raise UserError(
            f"the built-in suite, {file}, does not change",
            where="--update",
            expected="a suite of your own",
            remedy="copy the folder of the suite, and give --suite",
        )
    get_report_file(run_dir).check()
    groups = regression_guard.load_suite(file)
    console = ProgressConsole()
    regression_guard.check_images(groups)
    answers: list[list[list[Prediction]]] = []
    for name, model in _iter_tuned_and_base(str(run), loading):
        answers.append(_answer_groups(model, groups, name, batch_size, console))
        del model  # The base model may need the memory.
    tuned, base = answers
    results = regression_guard.compare_answers(groups, base, tuned)
    if update:
        groups = regression_guard.update_suite(file, groups, results)
        results = regression_guard.compare_answers(groups, base, tuned)
        console.log(f"updated: {file}")
    data = {"suite": str(file), "groups": [asdict(one) for one in results]}
    write_file(run_dir / GUARD_FILE, json.dumps(data, ensure_ascii=False, indent=1).encode())
    page = write_report(run_dir, language=language)
    differences = []
    for one in results:
        name = f"{one.group} {one.difference.name}"
        differences.append(replace(one.difference, name=name))
    lines = format_differences(differences).splitlines()
    failed = [one for one in results if one.problems]
    for one in failed:
        lines.append(f"FAILED: {one.group}: {', '.join(one.problems)}")
        for lost in one.lost_answers:
            lines.append(f"  lost: {json.dumps(lost, ensure_ascii=False)}")
    if not failed:
        return Outcome(results, [*lines, "no regression", f"page: {page}"], data)
    lines.append(f"page: {page}")
    step = _propose_replay(run_dir / RECIPE_FILE)
    return Outcome(results, lines, data, [step], EXIT_REGRESSION)


def _answer_groups(
    model: InferenceModel,
    groups: Sequence[LoadedGroup],
    title: str,
    batch_size: int,
    console: ProgressConsole,
) -> list[list[Prediction]]:
    """Return the answers of a model to the questions of each group."""
    from finesight.infer.prediction import describe_reduced_batch
    from finesight.infer.prediction import predict as run_prediction

    answers: list[list[Prediction]] = []
    num_samples = sum(len(group.samples) for group in groups)
    with console.progress_stage(title, num_samples) as on_progress:
        for group in groups:
            predictions = run_prediction(
                model.model,
                model.renderer,
                group.samples,
                max_new_tokens=group.settings.max_new_tokens,
                batch_size=batch_size,
                on_progress=on_progress,
                on_batch_reduced=lambda size: console.log(describe_reduced_batch(size)),
            )
            answers.append(predictions)
    return answers


def _iter_tuned_and_base(run: str, loading: LoadingOptions) -> Iterator[tuple[str, InferenceModel]]:
    """Yield the tuned model of a run and its base model, with the renderer of the run.

    The base model of a LoRA adapter is the same model without the adapter.
    """
    from finesight.model.lora.multi import detach_adapter
    from finesight.model_folder import locate_model
    from finesight.settings.manifest import MANIFEST_FILE, find_run_dir, load_manifest

    manifest = load_manifest(find_run_dir(Path(run)) / MANIFEST_FILE)
    model = load_model(run, **loading).value.inference_model
    renderer = model.renderer
    yield "answers of the tuned model", model
    if not manifest.tune.has_mode("full"):
        detach_adapter(model.model)
    elif locate_model(manifest.base_model).fingerprint() == manifest.base_fingerprint:
        del model
        model = load_model(manifest.base_model, **loading).value.inference_model
    else:
        raise UserError(
            f"the weights of {manifest.base_model} have changed since the run",
            where=run,
            expected=f"the fingerprint {manifest.base_fingerprint}",
            remedy="restore the base model",
        )
    yield "answers of the base model", replace(model, renderer=renderer)


def _propose_replay(recipe: Path) -> Step:
    """Return the training of a run with general samples among its own."""
    from finesight.settings.recipe import load_recipe

    files = load_recipe(recipe).data.train
    entries = [one.model_dump(mode="json", exclude_defaults=True) for one in files]
    data = json.dumps([*entries, {"path": "GENERAL.jsonl", "weight": 0.1}], ensure_ascii=False)
    overrides = [f"data.train={data}", f"output_dir={recipe.parent}-replay"]
    purpose = "replay a tenth of general samples in each epoch of a new training"
    return Step("train", {"recipe": recipe, "overrides": overrides}, purpose)
