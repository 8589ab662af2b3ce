"""`finesight sample`: several responses to each question, with scores."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import groupby, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Unpack

from finesight.errors import Remedy, Step, UserError, suggest_similar_path
from finesight.operations.model import ModelArgument, get_model_name, load_model
from finesight.operations.next_steps import build_init_step
from finesight.operations.operation import EXIT_SKIPPED, Outcome, Parameter, SkippedInputs, StrPath
from finesight.operations.options import (
    LimitOption,
    LoadingOptions,
    MaxNewTokensOption,
    OutFolderArgument,
    TrustMetricOption,
)
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.evaluate.prediction_file import ScoredPrediction
    from finesight.evaluate.reward_scorer import RewardScorer
    from finesight.infer.model_loader import InferenceModel
    from finesight.reward_components import RewardSettings
    from finesight.samples.sample import ContentPart, LocatedSample
    from finesight.settings.config import DataFileSettings

    Answer = tuple[ContentPart, ...]
    Responses = dict[str, list[tuple[float, Answer | None]]]
    Verdict = tuple[Sequence[Answer], Sequence[Answer]]
    Verdicts = dict[str, Verdict]
    Row = tuple[LocatedSample, Answer, Mapping[str, Any]]

ROUNDING = 1e-6
"""Tolerance of a weighted mean of rewards."""


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

    Writes OUT/responses.jsonl, all responses with their scores, which `finesight pairs` reads, and
    OUT/data.jsonl, samples with their best response, for a training (rejection sampling). The score
    of a response is the mean of its rewards with their weights. A truncated response is not kept.
    Samples with unreadable images are skipped, and the exit code is then 4.

    Example: finesight sample runs/receipts receipts/train.jsonl best --best-of 8

    Args:
        data: JSONL file of samples with answers, which the rewards compare.
        best_of: Number of responses to each question.
        reward: Reward or metric, such as json, latex.rendered or rewards.py:score. Repeatable.
            Default for a run: the rewards of its recipe.
        min_score: Leave out questions whose best response has a lower score.
        temperature: Sampling temperature.
        seed: Random seed.
        batch_size: Responses generated at the same time; halved when GPU memory is exhausted.
    """
    import numpy as np

    from finesight.encode.answer_lengths import describe_truncation
    from finesight.evaluate.reward_scorer import RewardScorer, describe_unscored
    from finesight.files.storage import check_new_path, find_free_path, write_file, write_folder
    from finesight.settings.manifest import RESPONSES_FILE, SAMPLING_FILE, find_run_dir
    from finesight.train.recipe_check import check_rewards

    name = get_model_name(run_or_model)
    data = Path(data)
    out = Path(out)
    run = find_run_dir(Path(name))
    rewards = _select_rewards(run, reward, trust=trust_metric)
    run_dir = None if reward else run
    check_new_path(out)
    samples = _read_questions(data, limit)
    check_rewards(rewards, run_dir, samples[0].sample)
    # Equal inputs have equal responses, which a repeated command uses.
    options = name, _list_weights(name), best_of, temperature, seed, limit, max_new_tokens
    inputs = f"{options, sorted(loading.items())}"
    digest = hashlib.sha256(inputs.encode() + data.read_bytes()).hexdigest()
    generated = Path(f"{out}-{digest[:8]}.jsonl")
    console = ProgressConsole()
    skipped = SkippedInputs("sample")
    if generated.is_file():
        console.log(f"using the responses of {generated}, whose scores are missing")
    else:
        text = _generate_responses(
            load_model(run_or_model, **loading).value.inference_model,
            samples,
            console,
            skipped,
            best_of=best_of,
            temperature=temperature,
            seed=seed,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        write_file(generated, text.encode())
    with RewardScorer(rewards, run_dir) as scorer, write_folder(out) as folder:
        text, scored = _score_responses(scorer, generated)
        write_file(folder / RESPONSES_FILE, text.encode())
        write_file(folder / SAMPLING_FILE, json.dumps({"run_or_model": name}).encode())
        responses = read_responses(folder / RESPONSES_FILE)
        verdicts = grade_responses(responses, min_score)
        num_kept = write_answers(folder / "data.jsonl", _list_best(samples, verdicts), out)
    generated.unlink()
    for warning in describe_unscored(scorer.names, np.array(scored)):
        console.log(warning)
    num_truncated = list_answers(responses).count(None)
    if warning := describe_truncation(
        num_truncated, best_of * len(responses), max_new_tokens, "--max-new-tokens"
    ):
        console.log(warning)
    summary = {
        "num_samples": len(samples),
        "num_skipped": len(samples) - len(responses),
        "num_kept": num_kept,
        **_summarize_scores(responses),
    }
    lines = [f"{name}: {value:.4g}" for name, value in summary.items()]
    steps = []
    if num_kept:
        steps.append(build_init_step(out / "data.jsonl", name))
    if _has_pairs(samples, verdicts):
        file = find_free_path(Path(f"{out}-pairs.jsonl"))
        arguments = {"source": out, "out": file, "data": data, "min_score": min_score}
        steps.append(Step("pairs", arguments))
    exit_code = EXIT_SKIPPED if summary["num_skipped"] else 0
    return Outcome(summary, lines, summary, steps, exit_code, skipped.describe())


def _read_questions(data: Path, limit: int | None) -> list[LocatedSample]:
    """Read samples. Raises UserError for an equal ID of two samples, or one without a reference."""
    from finesight.evaluate.eval_case import get_reference_answer
    from finesight.samples.sample import LocatedSample, count_ids, read_samples

    samples = [LocatedSample(one, data.parent) for one in read_samples(data)[:limit]]
    count_ids("samples", (one.sample.id for one in samples), data)
    for located in samples:
        get_reference_answer(located.sample)
    return samples


def _list_weights(name: str) -> list[tuple[str, int]]:
    """Return the weight files of a model folder, with their times of modification."""
    return sorted(
        (str(file), file.stat().st_mtime_ns) for file in Path(name).rglob("*.safetensors")
    )


def _score_responses(scorer: RewardScorer, generated: Path) -> tuple[str, list[list[float]]]:
    """Score generated responses, those of a sample together.

    Returns:
        The responses with scores as lines of a prediction file, and the scores of each response.
    """
    import numpy as np

    from finesight.evaluate.prediction_file import read_predictions
    from finesight.evaluate.score_function import ScoringError

    text = ""
    scored: list[list[float]] = []
    for _, group in groupby(read_predictions(generated), lambda one: one.case.id):
        found = [*group]
        try:
            scores_by_reward = scorer.score([one.case for one in found])
        except ScoringError as error:
            error.remedy = f"correct it, then repeat the command, which reads {generated}"
            raise
        # numpy converts None, a missing score, to NaN.
        rows = np.array(scores_by_reward, np.float64).T.tolist()
        for n, (one, row) in enumerate(zip(found, rows, strict=True)):
            scores = dict(zip(scorer.names, row, strict=True))
            score = {"scores": scores, "response": n, "score": _weigh(row, scorer.weights)}
            text += f"{json.dumps(one.record | score, ensure_ascii=False)}\n"
        scored += rows
    return text, scored


def _list_best(samples: Sequence[LocatedSample], verdicts: Verdicts) -> list[Row]:
    """Return the best correct response to each sample that has one."""
    best: list[Row] = []
    for located in samples:
        good, _ = verdicts.get(located.sample.id, ((), ()))
        if good:
            best.append((located, good[0], {}))
    return best


def list_answers(responses: Responses) -> list[Answer | None]:
    """Return the contents of all responses; None for truncated ones."""
    contents: list[Answer | None] = []
    for group in responses.values():
        contents += [content for _, content in group]
    return contents


def _summarize_scores(responses: Responses) -> dict[str, float]:
    """Return mean scores of all and of the best responses, and the equal share."""
    all_scores: list[float] = []
    best_scores: list[float] = []
    has_equal_scores: list[bool] = []
    for group in responses.values():
        scores = [score for score, _ in group]
        all_scores += scores
        best_scores.append(max(scores))
        has_equal_scores.append(len(set(scores)) == 1)
    return {
        "mean_score": _mean(all_scores),
        "mean_best_score": _mean(best_scores),
        "share_equal_scores": _mean(has_equal_scores),
    }


def _has_pairs(samples: Sequence[LocatedSample], verdicts: Verdicts) -> bool:
    """Return whether `pairs` would write a pair."""
    from finesight.files.storage import temporary_folder

    rows: list[Row] = []
    for located in samples:
        rows += build_pair(located, verdicts.get(located.sample.id))
    with temporary_folder("pairs") as folder:
        return write_answers(folder / "pairs.jsonl", rows, folder) > 0


def _generate_responses(
    inference_model: InferenceModel,
    samples: Sequence[LocatedSample],
    console: ProgressConsole,
    skipped: SkippedInputs,
    *,
    best_of: int,
    temperature: float,
    seed: int,
    max_new_tokens: int,
    batch_size: int,
) -> str:
    """Return the responses to each sample as lines of a prediction file, without scores."""
    from finesight.encode.answer_lengths import describe_cut_answers, measure_answers
    from finesight.evaluate.eval_case import get_reference_answer
    from finesight.evaluate.prediction_file import create_case, format_prediction_line
    from finesight.infer.prediction import describe_reduced_batch, predict
    from finesight.infer.request import SamplingParams
    from finesight.samples.image_file import CorruptImageError

    renderer = inference_model.renderer
    lengths = measure_answers(renderer, samples)
    if text := describe_cut_answers(lengths, max_new_tokens, "--max-new-tokens", "answer"):
        console.log(text)
    repeated: list[LocatedSample] = []
    for located in samples:
        repeated += [located] * best_of
    sampling_params = SamplingParams(temperature=temperature, banned_ids=renderer.visual_token_ids)
    # One error per sample, which is repeated.
    errors: dict[str, CorruptImageError] = {}
    with console.progress_stage("responses", len(repeated)) as on_progress:
        predictions = predict(
            inference_model.model,
            renderer,
            repeated,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            on_progress=on_progress,
            on_corrupt_image=lambda index, error: errors.update({repeated[index].sample.id: error}),
            on_batch_reduced=lambda size: console.log(describe_reduced_batch(size)),
            get_sampling=lambda index: replace(sampling_params, seed=(seed << 32) + index),
        )
    for error in errors.values():
        skipped.add(error)
    skipped.require_others(len(predictions))
    read_reference = partial(get_reference_answer, has_reasoning=renderer.renders_reasoning)
    references = {one.sample.id: read_reference(one.sample) for one in samples}
    cases = (create_case(one, references[one.id]) for one in predictions)
    return "".join(map(format_prediction_line, predictions, cases, repeat({})))


def _select_rewards(run: Path, names: Sequence[str], *, trust: bool) -> Sequence[RewardSettings]:
    """Return the rewards that the user has named, or those of a run."""
    from finesight.evaluate import custom_metric
    from finesight.metric_components import METRICS
    from finesight.reward_components import REWARDS
    from finesight.settings.config import parse_reward
    from finesight.settings.manifest import RECIPE_FILE
    from finesight.settings.recipe import load_recipe

    rewards: Sequence[RewardSettings] = ()
    file = run / RECIPE_FILE
    if not names and file.is_file():
        # The run may have been moved: its copies are in this folder.
        recipe = load_recipe(file).model_copy(update={"output_dir": run})
        custom_metric.check_recipe_metric(recipe, file, (), trust=trust)
        rewards = recipe.rewards
    for name in names:
        custom_metric.check_metric(name, named=True, trust=trust)
        REWARDS.get(name)  # a plug-in that cannot be imported
    with suppress(ValueError):  # of an unknown name
        rewards = [parse_reward({"name": name}) for name in names] or rewards
    if not rewards:
        problem = "no reward is given"
        if names:
            problem = f"unknown reward: {', '.join(names)}"
        incomplete = [one.name for one in REWARDS.list_available() if one.needs_options]
        if not {*names}.isdisjoint(incomplete):
            problem = f"{', '.join({*names}.intersection(incomplete))} needs options"
        known = ", ".join((*METRICS, *REWARDS))
        known += f" ({' and '.join(incomplete)} only in recipes)"
        raise UserError(
            problem,
            where="--reward",
            expected=f"{known}, rewards.py:FUNCTION, or the run of a recipe with rewards",
            remedy="for example --reward json",
        )
    return rewards


def build_pair(located: LocatedSample, verdict: Verdict | None) -> list[Row]:
    """Return the pair of the best and the worst answer of a sample.

    The answer of the sample is better than an incorrect response. Without a worse answer, there is
    no pair.
    """
    good, bad = verdict or ((), ())
    last = located.sample.messages[-1]
    if not bad or not (good or last.role == "assistant"):
        return []
    return [(located, [*good, last.content][0], {"rejected": bad[-1]})]


def find_response_files(
    source: Path, data: StrPath | None
) -> tuple[Path, Sequence[DataFileSettings], Sequence[float]]:
    """Return the file of responses, the files of their samples, and the weights of the rewards."""
    from finesight.settings.config import DataFileSettings
    from finesight.settings.manifest import PREDICTIONS_FOLDER, RECIPE_FILE, RESPONSES_FILE
    from finesight.settings.recipe import load_recipe

    names = (source / RESPONSES_FILE, source / PREDICTIONS_FOLDER / "after.jsonl", source)
    file = next((one for one in names if one.is_file()), source)
    has_recipe = (source / RECIPE_FILE).is_file()
    if not file.is_file():
        remedy: Remedy = suggest_similar_path(source)
        if has_recipe:  # a run without an evaluation
            arguments = {"run_or_model": source, "data": "DATA", "out": "OUT", "reward": ["NAME"]}
            remedy = Step("sample", arguments, "sample responses")
        raise UserError(
            "no responses",
            where=str(source),
            expected="a folder of `finesight sample`, a run, or a file of `finesight eval --out`",
            remedy=remedy,
        )
    if not (data or has_recipe):
        raise UserError(
            "the samples of the responses are unknown",
            where="--data",
            expected="a folder of `finesight sample`, a run, or a file of `finesight eval --out`",
            remedy="add --data FILE.jsonl",
        )
    files: Sequence[DataFileSettings] = ()
    if data:
        files = [DataFileSettings(path=str(data))]
    if not has_recipe:
        return file, files, [1.0]
    recipe = load_recipe(source / RECIPE_FILE)
    if file.name != RESPONSES_FILE:
        return file, files or recipe.data.eval, [1.0]
    return file, files or recipe.data.train, [one.weight for one in recipe.rewards] or [1.0]


def read_responses(file: Path, weights: Sequence[float] = ()) -> Responses:
    """Read scores and contents of the responses to each sample by its ID, best first.

    The content of a truncated response is None. A response without a score has NaN.

    Args:
        weights: Weights of the scores, for responses without a mean of them.
    """
    from finesight.evaluate.prediction_file import read_predictions

    responses: Responses = {}
    for one in read_predictions(file):
        score = float(one.record.get("score", _weigh(one.scores.values(), weights)))
        content = _build_content(one) if one.case.ended_with_eos else None
        responses.setdefault(one.case.id, []).append((score, content))
    for group in responses.values():
        group.sort(key=lambda row: -math.inf if math.isnan(row[0]) else row[0], reverse=True)
    return responses


def _build_content(response: ScoredPrediction) -> Answer:
    """Return the text of a response, with its boxes as parts if the reference has boxes, too."""
    from finesight.infer.chat_session import split_answer
    from finesight.samples.sample import TextPart

    case = response.case
    record = response.record
    content: Answer = (TextPart(text=case.answer),)
    if case.boxes and case.reference_boxes:
        pieces = [one for one in split_answer(record.get("raw_text", ""), case.answer) if one != ""]
        content = case.boxes  # alone if the text does not show all of them
        if pieces.count(None) == len(case.boxes):
            boxes = iter(case.boxes)
            parts: list[ContentPart] = []
            for piece in pieces:
                parts.append(next(boxes) if piece is None else TextPart(text=piece))
            content = tuple(parts)
    if reasoning := record.get("reasoning"):
        content = (TextPart(text=f"<think>\n{reasoning}\n</think>\n\n"), *content)
    return content


def grade_responses(responses: Responses, min_score: float) -> Verdicts:
    """Return the different correct and other responses by sample, best first.

    A truncated response is neither correct nor a complete error.
    """
    verdicts: Verdicts = {}
    for name, group in responses.items():
        good: list[Answer] = []
        bad: list[Answer] = []
        for score, content in group:
            if content is None or math.isnan(score) or content in (*good, *bad):
                continue
            if score >= min_score - ROUNDING:
                good.append(content)
            else:
                bad.append(content)
        verdicts[name] = (good, bad)
    return verdicts


def write_answers(file: Path, rows: Iterable[Row], folder: Path) -> int:
    """Write samples with other answers and fields, and return their number; none, no file.

    Answers that no sample can have are left out, such as an empty one or a box without area.

    Args:
        folder: Folder to which the paths in the file are relative.
    """
    from finesight.samples.sample import Message, relocate_sample, validate_sample, write_samples

    written = []
    for located, content, update in rows:
        sample = relocate_sample(located, folder)
        turns = sample.messages
        if turns[-1].role == "assistant":
            turns = turns[:-1]
        messages = (*turns, Message(role="assistant", content=content))
        fields = {"rejected": (), "label": None, "references": (), "messages": messages}
        sample = sample.model_copy(update=fields | {**update})
        with suppress(UserError):
            validate_sample(sample, f"sample {sample.id}")
            written.append(sample)
    if written:
        write_samples(file, written, replace=False)
    return len(written)


def _weigh(scores: Iterable[float], weights: Iterable[float]) -> float:
    """Return the weighted mean of scores without NaN; NaN without any score."""
    terms = []
    used_weights = []
    for score, weight in zip(scores, weights, strict=False):
        if not math.isnan(score):
            terms.append(score * weight)
            used_weights.append(weight)
    total = sum(used_weights)
    if not total:
        return math.nan
    return sum(terms) / total


def _mean(values: Iterable[float]) -> float:
    return _weigh(values, repeat(1.0))
