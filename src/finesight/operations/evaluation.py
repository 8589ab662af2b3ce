"""Evaluate, predict, report, compare and diagnose: results and problems of models and runs."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import repeat
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

from finesight.errors import Step, UserError, format_count, suggest_similar_path
from finesight.operations.model import ModelArgument, get_model_name, load_model
from finesight.operations.operation import Outcome, Parameter, StrPath, to_path
from finesight.operations.options import (
    LanguageOption,
    LimitOption,
    LoadingOptions,
    MaxNewTokensOption,
    OutFolderArgument,
    TrustMetricOption,
)

if TYPE_CHECKING:
    from finesight.config import RewardSettings
    from finesight.data.sample import ContentPart, LocatedSample, Sample
    from finesight.doctor.diagnosis import DiagnosisSections
    from finesight.evaluate.eval_case import EvalCase
    from finesight.evaluate.generation_eval import GenerationEvalResult
    from finesight.infer.prediction import Prediction
    from finesight.report.compare_page import RunComparison

    Answer = tuple[ContentPart, ...]
    Verdicts = dict[str, tuple[Sequence[Answer], Sequence[Answer]]]

EXIT_ERROR_FOUND = 2


def evaluate(
    run_or_model: ModelArgument,
    data: StrPath | None = None,
    metric: Annotated[
        str | None,
        Parameter(
            "captions, latex, ocr, qa, classification, json, grounding or detection, or "
            "FILE.py:FUNCTION for a custom metric. Default for a run: the metric of its recipe; "
            "required otherwise.",
            plugins="metrics",
        ),
    ] = None,
    limit: Annotated[int | None, Parameter(minimum=1)] = None,
    batch_size: Annotated[int | None, Parameter(minimum=1)] = None,
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
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted. Default
            for a run: of its recipe, else 32.
        max_new_tokens: Maximum number of tokens per answer. Default for a run: of its recipe, else
            512.
        out: Write each answer with its scores to this JSONL file, for `finesight compare`.
    """
    from finesight.evaluate.custom_metric import check_metric, parse_metric_path
    from finesight.evaluate.generation_eval import evaluate as run_evaluation
    from finesight.evaluate.generation_eval import load_eval_inputs
    from finesight.progress import ProgressConsole
    from finesight.train.run_dir import describe_changed_data

    console, name = ProgressConsole(), get_model_name(run_or_model)
    samples, settings = load_eval_inputs(
        name,
        data=to_path(data),
        metric=metric,
        limit=limit,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
    )
    if data is None and (changed := describe_changed_data(name)):
        console.log(f"note: {changed}")
    check_metric(settings.metric, named=metric is not None, trust=trust_metric)
    if parse_metric_path(settings.metric) is not None:
        console.log(f"custom metric: {settings.metric}")
    loaded = load_model(run_or_model, **loading)
    model = loaded.value.inference_model
    total = min(len(samples), settings.limit or len(samples))
    with console.progress_stage("answers", total) as on_progress:
        result = run_evaluation(
            model.model, model.renderer, samples, settings, to_path(out), on_progress
        )
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
    **loading: Unpack[LoadingOptions],
) -> Outcome[list[Prediction]]:
    """Answer questions about images with greedy decoding, so that answers are deterministic.

    Boxes are left, top, right, bottom in pixels of the original images.

    Example: finesight predict runs/latex formula.png --prompt "Write the formula as LaTeX."

    Args:
        images: Image or video files; each gets its own answer.
        prompt: Question about every image. Required with IMAGE.
        data: JSONL file of samples to answer, instead of IMAGE and --prompt.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
        draw: Write a copy of each image with the predicted boxes into this folder.
    """
    from finesight.infer.prediction import predict as run_prediction
    from finesight.infer.prediction import save_annotated_images
    from finesight.progress import ProgressConsole

    samples = _load_samples(
        get_model_name(run_or_model), [*map(Path, images)], prompt, to_path(data)
    )
    loaded = load_model(run_or_model, **loading)
    model, console = loaded.value.inference_model, ProgressConsole()
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
    run_or_model: str, images: list[Path], prompt: str | None, data: Path | None
) -> list[LocatedSample]:
    from finesight.data.sample import LocatedSample, read_samples
    from finesight.infer.prediction import build_questions

    if data is not None and prompt is None and not images:
        return [
            LocatedSample(sample, data.parent)
            for sample in read_samples(data, require_answer=False)
        ]
    for image in images:
        if not image.exists() or image.is_dir():
            is_folder, what = image.is_dir(), "a folder" if image.is_dir() else "no such image"
            remedy = f"give its images: {image}/*" if is_folder else suggest_similar_path(image)
            raise UserError(what, where=str(image), expected="an image file", remedy=remedy)
    if prompt is not None and data is None:
        return build_questions(images, prompt)
    example = {"run_or_model": run_or_model, "images": [[*images, "IMAGE"][0]]}
    raise UserError(
        f"{format_count(len(images), 'image')}, "
        f"{'no ' if prompt is None else ''}--prompt and {'no ' if data is None else ''}--data",
        where="predict",
        expected="images with --prompt TEXT, or --data FILE.jsonl alone",
        remedy=Step("predict", example | {"prompt": "What is this?"}, "for example"),
    )


def sample(
    run_or_model: ModelArgument,
    data: StrPath,
    out: OutFolderArgument,
    best_of: Annotated[int, Parameter(minimum=2)] = 8,
    reward: Annotated[Sequence[str], Parameter(metavar="NAME")] = (),
    min_score: float = 1.0,
    temperature: Annotated[float, Parameter(minimum=0.0, maximum=100.0)] = 1.0,
    seed: Annotated[int, Parameter(minimum=0, maximum=2**31)] = 0,
    limit: LimitOption = None,
    max_new_tokens: MaxNewTokensOption = 512,
    batch_size: Annotated[int, Parameter(minimum=1)] = 64,
    trust_metric: TrustMetricOption = False,
    **loading: Unpack[LoadingOptions],
) -> Outcome[Mapping[str, float]]:
    """Sample several responses to each question, and keep the best one as its answer.

    Writes OUT/data.jsonl, samples with their best response, for a training (rejection sampling),
    and OUT/responses.jsonl, all responses with their scores, which `finesight pairs` reads. The
    score of a response is the mean of its rewards with their weights. A truncated response is not
    kept.

    Example: finesight sample runs/receipts receipts/train.jsonl best --best-of 8

    Args:
        data: JSONL file of samples with answers, which the rewards compare.
        best_of: Number of responses to each question.
        reward: Reward or metric, such as json, latex.rendered or rewards.py:score. Repeatable.
            Default for a run: the rewards of its recipe, or its metric.
        min_score: Leave out questions whose best response has a lower score.
        temperature: Sampling temperature.
        seed: Random seed.
        batch_size: Responses generated at the same time; halved when GPU memory is exhausted.
    """
    from finesight.data.sample import LocatedSample, read_samples, write_samples
    from finesight.evaluate.eval_case import EvalCase, get_reference_answer
    from finesight.evaluate.metric_difference import format_prediction_line
    from finesight.evaluate.rewards import RewardScorer
    from finesight.infer.prediction import predict as run_prediction
    from finesight.infer.request import SamplingParams
    from finesight.manifest import RESPONSES_FILE, find_run_dir
    from finesight.progress import ProgressConsole
    from finesight.storage import write_file, write_folder

    run = find_run_dir(Path(get_model_name(run_or_model)))
    rewards = _select_rewards(run, reward, trust=trust_metric)
    samples = [LocatedSample(one, Path(data).parent) for one in read_samples(Path(data))[:limit]]
    console, errors, text = ProgressConsole(), dict[int, Exception](), ""
    best: list[Sample] = []
    scores: list[list[float]] = []
    with RewardScorer(rewards, run) as scorer, write_folder(Path(out)) as folder:
        model = load_model(run_or_model, **loading).value.inference_model
        banned_ids = model.renderer.visual_token_ids

        def get_sampling(index: int) -> SamplingParams:
            own_seed = (seed << 32) + index
            return SamplingParams(temperature=temperature, seed=own_seed, banned_ids=banned_ids)

        with console.progress_stage("responses", len(samples) * best_of) as on_progress:
            found = run_prediction(
                model.model,
                model.renderer,
                [one for one in samples for _ in range(best_of)],
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                on_progress=on_progress,
                on_corrupt_image=errors.__setitem__,
                get_sampling=get_sampling,
            )
        skipped = {index // best_of for index in errors}
        for located in (one for i, one in enumerate(samples) if i not in skipped):
            group, found = found[:best_of], found[best_of:]
            reference = get_reference_answer(
                located.sample, has_reasoning=model.renderer.renders_reasoning
            )
            cases = [
                EvalCase(one.answer, one.boxes, *reference, one.id, one.finish_reason == "stop")
                for one in group
            ]
            columns = [[math.nan if x is None else x for x in row] for row in scorer.score(cases)]
            rows = [*zip(*columns, strict=True)]
            scores.append([_weigh(row, scorer.weights) for row in rows])
            for n, (one, case, row) in enumerate(zip(group, cases, rows, strict=True)):
                further = {"response": n, "score": scores[-1][n]}
                named = dict(zip(scorer.names, row, strict=True))
                text += format_prediction_line(one, case, named, **further)
            complete = [n for n in range(best_of) if cases[n].ended_with_eos]
            n = max(complete, key=scores[-1].__getitem__, default=0)
            if complete and scores[-1][n] >= min_score - ROUNDING:
                content = _build_content(cases[n], group[n].reasoning)
                best.append(_replace_answer(located, content, Path(out)))
        if best:
            write_samples(folder / "data.jsonl", best)
        write_file(folder / RESPONSES_FILE, text.encode())
    for error in {str(error).splitlines()[0] for error in errors.values()}:
        console.log(f"skipped: {error}")
    summary = {
        "num_samples": len(samples),
        "num_skipped": len(skipped),
        "num_kept": len(best),
        "mean_score": _mean(score for row in scores for score in row),
        "mean_best_score": _mean(map(max, scores)),
        "share_equal_scores": _mean(float(len({*row}) == 1) for row in scores),
    }
    lines = [f"{name}: {value:.4g}" for name, value in summary.items()]
    steps = [Step("check", {"sources": [Path(out) / "data.jsonl"]})] if best else []
    steps.append(Step("pairs", {"source": out, "out": f"{out}-pairs.jsonl", "data": data}))
    return Outcome(summary, lines, summary, steps)


ROUNDING = 1e-6
"""Tolerance of a weighted mean of rewards."""


def _weigh(scores: Iterable[float], weights: Iterable[float]) -> float:
    """Return the weighted mean of scores without NaN; NaN without any score."""
    terms = [(score, w) for score, w in zip(scores, weights, strict=False) if score == score]
    total = sum(w for _, w in terms)
    return sum(score * w for score, w in terms) / total if total else math.nan


def _mean(values: Iterable[float]) -> float:
    return _weigh(values, repeat(1.0))


def _select_rewards(run: Path, names: Sequence[str], *, trust: bool) -> Sequence[RewardSettings]:
    """Return the rewards that the user has named, or those or the metric of a run."""
    from finesight.config import METRIC_NAMES, REWARD_NAMES, RewardSettings
    from finesight.evaluate.custom_metric import check_metric, check_recipe_metric
    from finesight.manifest import RECIPE_FILE
    from finesight.recipe import load_recipe

    rewards: Sequence[RewardSettings] = ()
    if not names and (run / RECIPE_FILE).is_file():
        recipe = load_recipe(run / RECIPE_FILE)
        check_recipe_metric(recipe, run / RECIPE_FILE, (), trust=trust)
        rewards = recipe.rewards
        names = [recipe.eval.metric] if recipe.eval and not rewards else ()
    for name in names:
        check_metric(name, named=True, trust=trust)
    with suppress(ValueError):  # of an unknown name
        rewards = [RewardSettings(name=name) for name in names] or rewards
    if not rewards:
        known = ", ".join((*METRIC_NAMES, *REWARD_NAMES))
        raise UserError(
            f"unknown reward: {', '.join(names)}" if names else "no reward is given",
            where="--reward",
            expected=f"{known}, rewards.py:FUNCTION, or the run of a recipe with rewards",
            remedy="for example --reward json",
        )
    return rewards


def _build_content(case: EvalCase, reasoning: str | None) -> Answer:
    """Return the content of a response."""
    from finesight.data.sample import TextPart

    thoughts = (TextPart(text=f"<think>\n{reasoning}\n</think>\n\n"),) if reasoning else ()
    return (*thoughts, *(case.boxes or (TextPart(text=case.answer),)))


def _replace_answer(
    located: LocatedSample, content: Answer, folder: Path, **update: object
) -> Sample:
    """Return a sample of a folder with another answer. Raises UserError for an invalid one."""
    from finesight.data.sample import Message, validate_sample
    from finesight.label.label_store import relocate_sample

    changed = relocate_sample(located, folder)
    turns = changed.messages[: -1 if changed.messages[-1].role == "assistant" else None]
    update |= {"messages": (*turns, Message(role="assistant", content=content))}
    unused = {"rejected": (), "label": None, "references": ()}
    changed = changed.model_copy(update=unused | update)
    validate_sample(changed, f"sample {changed.id}")
    return changed


def pairs(
    source: StrPath,
    out: StrPath,
    data: StrPath | None = None,
    labels: Annotated[bool, Parameter(option="--labels")] = False,
    min_score: float = 1.0,
) -> Outcome[Mapping[str, int]]:
    """Write preference pairs from responses with scores, or from corrections of suggestions.

    SOURCE is a folder of `finesight sample`, a run (the responses of a GRPO run, else its
    validation answers), a file of `finesight eval --out`, or a folder of `finesight label`.

    The chosen answer is the best response with at least --min-score, else the answer of the sample,
    and the rejected one the worst response below it. A correction is chosen over its suggestion.

    Example: finesight pairs best pairs.jsonl --data receipts/train.jsonl

    Args:
        source: Folder or file of responses or labels.
        out: File to create.
        data: Samples of the responses. Default: those of the recipe of a run, or of the labels.
        labels: Write one sample per response, with the label true or false, for KTO.
        min_score: Lowest score of a correct response.
    """
    from finesight.data.sample import write_samples
    from finesight.label.label_store import JOURNAL_FILE, read_labels, read_verdicts
    from finesight.storage import raise_if_exists

    source, out = Path(source), Path(out)
    raise_if_exists(out)
    verdicts: Verdicts
    if (source / JOURNAL_FILE).is_file():
        samples, verdicts = read_labels(source), {**read_verdicts(source)}
    else:
        samples, verdicts = _read_graded(source, to_path(data), min_score)
    written: list[Sample] = []
    num_unused = 0
    for located in samples:
        name, last = located.sample.id, located.sample.messages[-1]
        good, bad = verdicts.pop(name, ((), ()))
        rows: list[tuple[Answer, dict[str, object]]] = []
        if labels:
            values = [*((one, True) for one in good), *((one, False) for one in bad)]
            updates = ({"label": x, "id": f"{name}-{n}"} for n, (_, x) in enumerate(values))
            rows = [*zip((one for one, _ in values), updates, strict=True)]
        elif bad:
            chosen = [*good, *([last.content] if last.role == "assistant" else [])]
            rows = [(one, {"rejected": bad[-1]}) for one in chosen[:1]]
        num_unused += bool(good or bad) and not rows
        for content, update in rows:
            try:
                written.append(_replace_answer(located, content, out.parent, **update))
            except UserError:  # an empty answer, or a box without area
                num_unused += 1
    num_unused += len(verdicts)
    if not written:
        raise UserError(
            f"{num_unused} samples have no better and worse answer",
            where=str(source),
            expected="answers on both sides of --min-score, and their samples in --data",
            remedy="sample more responses, or change --min-score",
        )
    write_samples(out, written)
    counts = {"num_written": len(written), "num_unused": num_unused}
    noun = "label" if labels else "pair"
    lines = [f"{out}: {format_count(len(written), noun)}, {num_unused} not used"]
    step = Step("check", {"sources": [out]}) if labels else Step("init", {"data": out})
    return Outcome(counts, lines, counts, [step])


def _read_graded(
    source: Path, data: Path | None, min_score: float
) -> tuple[list[LocatedSample], Verdicts]:
    """Read responses; return samples, and correct and other responses by ID, best first."""
    from finesight.config import DataFileSettings
    from finesight.data.corpus import load_corpus
    from finesight.evaluate.metric_difference import read_predictions
    from finesight.manifest import PREDICTIONS_FOLDER, RECIPE_FILE, RESPONSES_FILE
    from finesight.recipe import load_recipe

    has_recipe = (source / RECIPE_FILE).is_file()
    recipe = load_recipe(source / RECIPE_FILE) if has_recipe else None
    names = (source / RESPONSES_FILE, source / PREDICTIONS_FOLDER / "after.jsonl", source)
    file = next((one for one in names if one.is_file()), None)
    if file is None or (data is None and recipe is None):
        raise UserError(
            "no responses" if file is None else "the samples of the responses are unknown",
            where=str(source) if file is None else "--data",
            expected="a folder of `finesight sample`, a run, or a file of `finesight eval --out`",
            remedy=suggest_similar_path(source) if file is None else "add --data FILE.jsonl",
        )
    files: Sequence[DataFileSettings] = [DataFileSettings(path=data)] if data else ()
    weights = [1.0]
    if recipe is not None and file.name == RESPONSES_FILE:
        weights = [one.weight for one in recipe.rewards] or weights
        files = files or recipe.data.train
    elif recipe is not None:
        files = files or recipe.data.eval
    by_id: dict[str, list[tuple[float, Answer]]] = {}
    for one in read_predictions(file):
        rows = by_id.setdefault(one.case.id, [])
        score = float(one.record.get("score", _weigh(one.scores.values(), weights)))
        content = _build_content(one.case, one.record.get("reasoning"))
        # A truncated response is neither correct nor a complete error.
        if one.case.ended_with_eos and score == score and (score, content) not in rows:
            rows.append((score, content))
    verdicts: Verdicts = {}
    for name, rows in by_id.items():
        rows.sort(key=itemgetter(0), reverse=True)
        num_good = sum(score >= min_score - ROUNDING for score, _ in rows)
        contents = [content for _, content in rows]
        verdicts[name] = contents[:num_good], contents[num_good:]
    return load_corpus(files).read_samples(), verdicts


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
    """Report problems with their effect and a command that fixes them.

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
