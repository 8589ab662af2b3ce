"""Status of a run, and texts and values that summarize it in its report."""

from __future__ import annotations

import fcntl
import math
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal, NamedTuple

from pydantic import ValidationError

from finesight.errors import Step, UserError
from finesight.evaluate.score_format import format_score
from finesight.evaluate.verdict import (
    Verdict,
    compute_normal_p_value,
    find_clear_differences,
    judge_difference,
)
from finesight.family_components import FAMILIES
from finesight.metric_components import get_score
from finesight.progress import MAX_DATA_WAIT_FRACTION
from finesight.report.i18n import translate
from finesight.report.metric_rows import (
    IntervalBounds,
    format_change_interval,
    format_metric_name,
    read_interval,
)
from finesight.report.run_reader import (
    JsonObject,
    RunRecord,
    as_object,
    is_finite,
    list_comparable_evaluations,
)
from finesight.reward_components import REWARDS
from finesight.samples.example_question import ExampleQuestion, read_public_example
from finesight.settings.config import DataSettings, Recipe, TrainFileSettings
from finesight.settings.manifest import CHECKPOINTS_FOLDER, METRICS_FILE
from finesight.settings.recipe import recipe_from_run

NOT_RECORDED = "not recorded"

MODEL_PARTS = ("vision", "merger", "language", "embeddings")

TRAINED_PART_TEXTS = {
    "lora": "{} with LoRA of rank {}",
    "full": "{} with full fine-tuning",
    "nf4": "frozen weights of {} in NF4",
    "fp8": "frozen weights of {} in FP8",
}
"""Descriptions of parts of the model by training mode or quantization."""


def get_last_start(run_record: RunRecord) -> JsonObject:
    """Return the start event of the last training process.

    Returns an empty object for a run without readable start events.
    """
    if not run_record.starts:
        return {}
    return run_record.starts[-1]


def load_run_recipe(run_record: RunRecord) -> Recipe:
    """Load the recipe of a run. Default settings are used if it cannot be read."""
    try:
        return recipe_from_run(run_record.recipe, run_record.folder)
    except (ValidationError, UserError):
        unknown = DataSettings(train=(TrainFileSettings(path=Path("unknown")),))
        return Recipe(model="unknown", data=unknown, output_dir=run_record.folder)


def scale_duration(run_record: RunRecord, factor: float) -> list[str]:
    """Return the overrides that multiply the number of steps or epochs by a factor."""
    train = load_run_recipe(run_record).train
    if train.steps is not None:
        return [f"train.steps={max(1, math.ceil(train.steps * factor))}"]
    return [f"train.epochs={math.ceil(100 * (train.epochs or 1) * factor - 1e-9) / 100:g}"]


def get_data_stats(run_record: RunRecord, name: str) -> JsonObject:
    """Return the recorded statistics of a data split (`train` or `eval`)."""
    return as_object(as_object(get_last_start(run_record).get("data")).get(name))


def get_last_step(run_record: RunRecord) -> int:
    """Return the number of finished training steps of a run."""
    lines = [*run_record.steps, *run_record.evaluations]
    return max((int(line.get("step") or 0) for line in lines), default=0)


def get_total_steps(run_record: RunRecord) -> int | None:
    """Return the total number of training steps of a run, or None if unknown."""
    result = run_record.result or {}
    recorded = result.get("steps"), get_last_start(run_record).get("total_steps")
    return next((total for total in recorded if isinstance(total, int)), None)


def describe_progress(run_record: RunRecord) -> str:
    """Describe the progress of a run: finished, stopped early, or steps so far."""
    total = get_total_steps(run_record)
    current_step = get_last_step(run_record)
    if run_record.result is None:
        if total:
            return translate("not finished: {:,} of {:,} steps so far", current_step, total)
        return translate("not finished: {:,} steps so far", current_step)
    text = translate("finished after {:,} steps", current_step)
    if run_record.result.get("stopped_early"):
        text += translate(", stopped early because the score did not improve")
    weights_step = run_record.result.get("weights_step")
    if weights_step not in (None, current_step):
        text += translate("; the saved weights are from step {:,}, the best", weights_step)
    return text


def get_model_name(run_record: RunRecord) -> str:
    """Return the name of the base model of a run.

    A local path is reduced to its last folder.
    """
    name = run_record.manifest.get("base_model") or run_record.recipe.get("model")
    base = str(name or translate(NOT_RECORDED))
    if Path(base).is_absolute():
        return Path(base).name
    return base


def count_training_samples(run_record: RunRecord) -> int | None:
    """Return the number of distinct training samples, or None if unknown."""
    num_samples = get_data_stats(run_record, "train").get("num_samples")
    return num_samples if isinstance(num_samples, int) else None


def describe_trained_parts(run_record: RunRecord) -> str:
    """Describe the trained parts of the model and its quantized weights."""
    tune = as_object(run_record.manifest.get("tune"))
    quantize = as_object(tune.get("quantize"))
    parts_by_mode: dict[str, list[str]] = {}
    for mode in ("lora", "full"):
        parts_by_mode[mode] = [part for part in MODEL_PARTS if tune.get(part) == mode]
    for key in ("nf4", "fp8"):
        parts_by_mode[key] = []
        if isinstance(quantize.get(key), list):
            parts_by_mode[key] = quantize[key]
    rank = as_object(tune.get("lora")).get("rank", "unknown")
    phrases = []
    for mode, text in TRAINED_PART_TEXTS.items():
        if parts_by_mode[mode]:
            phrases.append(translate(text, join_words(parts_by_mode[mode]), rank))
    return translate("; ").join(phrases) or translate(NOT_RECORDED)


def summarize_run(run_record: RunRecord) -> str:
    """Summarize a run in two sentences: model, data, trained parts and progress."""
    num_samples = count_training_samples(run_record)
    samples_text = ""
    if num_samples:
        samples_text = translate(" on {:,} samples", num_samples)
    epochs_text = ""
    if run_record.steps and run_record.steps[-1].get("epoch"):
        epochs_text = translate(", {:.4g} epochs", run_record.steps[-1]["epoch"])
    return translate(
        "{} fine-tuned{}{}: {}. The run is {}.",
        get_model_name(run_record),
        samples_text,
        epochs_text,
        describe_trained_parts(run_record),
        describe_progress(run_record),
    )


def compute_phases(run_record: RunRecord) -> list[tuple[str, float]]:
    """Return the name and the seconds of each recorded phase of a run."""
    seconds = {
        "setup": _sum_field(run_record.starts, "setup_s"),
        "vision cache": _sum_field(run_record.vision_cache_builds, "vision_cache_s"),
        "training steps": _sum_field(run_record.steps, "step_s"),
        "evaluation": _sum_field(run_record.evaluations, "eval_s"),
    }
    return [(translate(name), value) for name, value in seconds.items() if value]


def summarize_cost(run_record: RunRecord) -> list[tuple[str, str]]:
    """Return the throughput, time and memory of a run.

    Throughput includes the time of building the vision cache.
    """
    steps = run_record.steps
    seconds = _sum_field(steps, "step_s")
    if not seconds:
        return [(translate("training steps"), translate("none yet"))]
    durations = []
    mfu_seconds = []
    peaks_gb = []
    skipped_counts = []
    for line in steps:
        step_s = float(line["step_s"])
        durations.append(step_s)
        mfu_seconds.append(float(line.get("mfu") or 0) * step_s)
        peaks_gb.append(float(line.get("peak_memory_gb") or 0))
        skipped_counts.append(int(line.get("skipped_steps") or 0))
    mfu_sum = sum(mfu_seconds)
    peak_gb = max(peaks_gb)
    num_samples = _sum_field(steps, "num_samples")
    num_tokens = _sum_field(steps, "num_tokens")
    total_seconds = seconds + _sum_field(run_record.vision_cache_builds, "vision_cache_s")
    missing = translate(NOT_RECORDED)
    texts = {
        "samples/s": f"{num_samples / total_seconds:,.4g}",
        "tokens/s": f"{num_tokens / total_seconds:,.0f}",
        "median step": format_duration(median(durations)),
        "MFU": f"{100 * mfu_sum / seconds:.3g} %" if mfu_sum else missing,
        "data wait": _format_share(run_record, "data_wait_s") or missing,
        "sampling": _format_share(run_record, "rollout_s"),
        "peak memory": f"{peak_gb:.3g} GB" if peak_gb else missing,
        "processed samples": f"{num_samples:,.0f}",
        "processed tokens": f"{num_tokens:,.0f}",
        "supervised tokens": f"{_sum_field(steps, 'num_supervised_tokens'):,.0f}",
        "skipped steps": f"{max(skipped_counts):,}",
        "starts": str(len(run_record.starts)) if run_record.starts else missing,
    }
    if not texts["sampling"]:  # only objectives that generate responses
        del texts["sampling"]
    return [(translate(name), text) for name, text in texts.items()]


def _format_share(run_record: RunRecord, name: str) -> str:
    """Format the share of a duration in the step time; empty if unknown."""
    share = _compute_share(run_record, name)
    if share is None:
        return ""
    return f"{100 * share:.2g} %"


def _compute_share(run_record: RunRecord, name: str) -> float | None:
    """Return the share of a duration in the step time, or None if unknown."""
    timed_steps = [line for line in run_record.steps if line.get(name) is not None]
    seconds = _sum_field(timed_steps, "step_s")
    if not seconds:
        return None
    return _sum_field(timed_steps, name) / seconds


def list_remarks(run_record: RunRecord) -> list[str]:
    """Return advice about data wait, and a note on settings changed to save GPU memory."""
    remarks = []
    fraction = _compute_share(run_record, "data_wait_s")
    if fraction is not None and fraction > MAX_DATA_WAIT_FRACTION:
        num_workers = get_last_start(run_record).get("num_workers")
        workers_text = ""
        if isinstance(num_workers, int):
            workers_text = translate(" (now {})", num_workers)
        text = (
            "Data wait is {:.2g} % of the step time. To reduce it, increase train.num_workers{},"
            " use smaller image files, or reduce the image size of the model (image.max_pixels)."
        )
        remarks.append(translate(text, 100 * fraction, workers_text))
    overfitting = describe_overfitting(run_record.folder, list_lines_of_weights(run_record))
    if overfitting:
        remarks.append(overfitting)
    remarks += list_memory_remarks(run_record)
    return remarks


def list_lines_of_weights(run_record: RunRecord) -> list[JsonObject]:
    """Return the steps and evaluations up to that of the saved weights.

    Early stopping saves the weights of the best step, so that later losses do not matter.
    """
    end = (run_record.result or {}).get("weights_step") or math.inf
    return [line for line in (*run_record.steps, *run_record.evaluations) if line["step"] <= end]


MIN_LOSS_INCREASE = 1.01
"""Ratio of the last validation loss to the lowest one from which it counts as overfitting."""


def describe_overfitting(folder: Path, lines: Sequence[JsonObject]) -> str | None:
    """Describe overfitting in the last three comparable evaluations of a run; None without.

    The validation loss rises twice while the training loss falls and the score of the primary
    metric does not improve, or this score falls twice, below the confidence interval of the best.

    Args:
        lines: Steps and evaluations of `metrics.jsonl`.
    """
    found = find_overfitting(lines)
    if found is None:
        return None
    sign, criterion, points, best_step = found
    (first_step, before), _, (last_step, after) = points
    change = before, first_step, after, last_step, criterion
    if not best_step:
        text = (
            "Overfitting: {}, from {:.4g} after step {:,} to {:.4g} after step {:,}. The model"
            " before training has the best {}. Lower train.learning_rate, or add samples."
        )
        return translate(text, sign, *change)
    text = (
        "Overfitting: {}, from {:.4g} after step {:,} to {:.4g} after step {:,}. The best {} is"
        " that after step {:,}{}. Train fewer steps (train.steps={}), stop early and keep the best"
        " weights (eval.every=0.1 eval.patience=2), lower train.learning_rate, or add samples."
    )
    checkpoint = folder / CHECKPOINTS_FOLDER / f"step-{best_step}"
    location = ""
    if checkpoint.is_dir():
        location = translate(" (checkpoint {})", checkpoint)
    return translate(text, sign, *change, best_step, location, best_step)


def find_better_evaluation(run_record: RunRecord) -> tuple[float, int] | None:
    """Return the best score of the primary metric during training and its step.

    It is None unless this score is better than that of the saved weights, and not worse than
    before training.
    """
    name = str(run_record.primary_metric)
    sign = -1 if get_score(name).lower_is_better else 1
    scores = []
    first = -math.inf
    lines = list_comparable_evaluations(list_lines_of_weights(run_record), "num_samples")
    for line in lines:
        score = as_object(line.get("scores")).get(name)
        if not is_finite(score):
            continue
        if line["step"]:
            scores.append((sign * score, line["step"]))
        else:
            first = sign * score
    if not scores:
        return None
    best, step = max(scores)
    if best == scores[-1][0] or best < first:
        return None
    return sign * best, step


class OverfittingSign(NamedTuple):
    """Sign of overfitting in the last three evaluations.

    Attributes:
        sign: Description of the sign.
        criterion: Name of the value that became worse.
        points: Steps and values of the last three evaluations.
        best_step: Step of the best value; 0 before training.
    """

    sign: str
    criterion: str
    points: list[tuple[int, float]]
    best_step: int


def find_overfitting(lines: Sequence[JsonObject]) -> OverfittingSign | None:
    """Find the overfitting that `describe_overfitting` describes; None without."""
    return _find_rising_loss(lines) or _find_falling_score(lines)


def _find_rising_loss(lines: Sequence[JsonObject]) -> OverfittingSign | None:
    """Find a validation loss that rises twice while the training loss falls."""
    evaluations = list_comparable_evaluations(lines)
    points = [(int(line["step"]), float(line["validation_loss"])) for line in evaluations]
    # The loss of a policy is no measure of its fit.
    if len(points) < 3 or any("reward" in line for line in lines):
        return None
    (start, first), (middle, second), (end, last) = points[-3:]
    best_loss, best_step = min((loss, step) for step, loss in points)
    is_rising = first < second < last > MIN_LOSS_INCREASE * best_loss
    if not is_rising or _mean_loss(lines, middle, end) >= _mean_loss(lines, start, middle):
        return None
    _, scores = _list_primary_scores(lines)
    for step, score in scores:
        if step == best_step and scores[-1][1] > score:
            return None
    sign = translate("the validation loss rose while the training loss fell")
    return OverfittingSign(sign, translate("validation loss"), points[-3:], best_step)


def _mean_loss(lines: Sequence[JsonObject], start: int, end: int) -> float:
    """Return the mean training loss of the steps after `start` up to `end`."""
    losses = _list_values([line for line in lines if start < line["step"] <= end], "loss")
    return mean(losses or [0.0])


def _list_primary_scores(lines: Sequence[JsonObject]) -> tuple[str, list[tuple[int, float]]]:
    """Return the primary metric, and step and score of the comparable evaluations."""
    evaluations = list_comparable_evaluations(lines, "num_samples")
    if not evaluations:
        return "", []
    metric = str(evaluations[-1].get("primary_metric"))
    scores = []
    for line in evaluations:
        step = int(line["step"])
        score = as_object(line.get("scores")).get(metric)
        if is_finite(score):
            scores.append((step, float(score)))
    return metric, scores


def _find_falling_score(lines: Sequence[JsonObject]) -> OverfittingSign | None:
    """Find a primary score that falls twice, below the confidence interval of the best one."""
    evaluations = list_comparable_evaluations(lines, "num_samples")
    metric, points = _list_primary_scores(lines)
    if len(points) < 3:
        return None
    best_step, best_score = max(points, key=lambda point: point[1])
    best = next(line for line in evaluations if int(line["step"]) == best_step)
    limit, _ = read_interval(best, metric) or (best_score, best_score)
    (_, first), (_, second), (_, last) = points[-3:]
    if not first > second > last < limit:
        return None
    return OverfittingSign(translate("{} fell", metric), metric, points[-3:], best_step)


REWARD_KEY = re.compile("rewards/(.+)/mean")

MIN_REWARD_STEPS = 8
"""Number of steps with rewards from which their first and last quarter are compared."""

MAX_RATIO = 1.5
"""Maximum ratio of lengths over time, and of boxes to references."""

MAX_TRUNCATION_GAIN = 0.1
"""Maximum share of additional truncated responses."""


def list_reward_names(lines: Sequence[JsonObject]) -> list[str]:
    """Return the names of the rewards in the metrics of the first and last steps."""
    keys: dict[str, None] = {}
    for line in (*lines[:100], *lines[-100:]):
        keys.update(dict.fromkeys(line))
    return [match[1] for match in map(REWARD_KEY.fullmatch, keys) if match]


def estimate_reward(
    run_record: RunRecord, lines: Sequence[JsonObject], name: str
) -> tuple[float, float]:
    """Return the mean of a reward over steps, and half of its 95 % interval.

    Both are NaN without a mean, a standard deviation or a number of prompts. Responses to the same
    prompt are not independent. The number of prompts determines the interval, which is then rather
    too wide than too narrow.
    """
    num_prompts = as_object(run_record.recipe.get("train")).get("batch_size")
    means = _list_values(lines, f"rewards/{name}/mean")
    stds = _list_values(lines, f"rewards/{name}/std")
    if not means or not stds or not isinstance(num_prompts, int) or num_prompts < 1:
        return math.nan, math.nan
    return mean(means), 1.96 * math.hypot(*stds) / math.sqrt(num_prompts) / len(means)


def _list_values(lines: Sequence[JsonObject], key: str) -> list[float]:
    return [float(value) for line in lines if is_finite(value := line.get(key))]


def compare_rewards(
    run_record: RunRecord,
) -> tuple[tuple[list[JsonObject], list[JsonObject]], dict[str, tuple[IntervalBounds, Verdict]]]:
    """Return the first and last quarter of steps, and 95 % intervals and verdicts of gains.

    All rewards are one family: the interval of a gain that is not clear in it contains 0. A reward
    without a standard deviation has no gain.
    """
    steps = [line for line in run_record.steps if is_finite(line.get("reward"))]
    size = max(1, len(steps) // 4)
    first = steps[:size]
    last = steps[-size:]
    intervals = {}
    p_values = {}
    for name in list_reward_names(steps):
        before, before_margin = estimate_reward(run_record, first, name)
        after, after_margin = estimate_reward(run_record, last, name)
        change = after - before
        margin = math.hypot(before_margin, after_margin)
        if not math.isnan(change):
            intervals[name] = change - margin, change + margin
            p_values[name] = compute_normal_p_value(change, margin)
    gains: dict[str, tuple[IntervalBounds, Verdict]] = {}
    (clear,) = find_clear_differences([p_values])
    for name, interval in intervals.items():
        gains[name] = judge_difference(interval, is_clear=name in clear)
    return (first, last), gains


def describe_rewards(run_record: RunRecord) -> str:
    """Describe the change of the rewards between the quarters; empty without two such steps."""
    (first, last), gains = compare_rewards(run_record)
    if not first or first == last:
        return ""
    num_prompts = as_object(run_record.recipe.get("train")).get("batch_size")
    count = None
    if isinstance(num_prompts, int):
        count = num_prompts * len(first)
    before = format_score(mean(_list_values(first, "reward")), count)
    after = format_score(mean(_list_values(last, "reward")), count)
    text = "Reward of the first and last {:,} steps: {} → {}"
    texts = [translate(text, len(first), before, after)]
    for name, (interval, verdict) in gains.items():
        change = format_change_interval(interval, count)
        texts.append(f"{format_metric_name(name)} {change}: {translate(verdict)}")
    return translate("; ").join(texts)


def list_reward_signs(
    run_record: RunRecord, groups: Sequence[JsonObject]
) -> list[tuple[str, bool, str]]:
    """Return signs of reward hacking, whether they were found, and the figures.

    The first and the last quarter of the steps are compared. Empty for few steps with rewards.

    Args:
        groups: Page data of the recorded groups of responses, the newest first.
    """
    parts, gains = compare_rewards(run_record)
    if 4 * len(parts[0]) < MIN_REWARD_STEPS:
        return []
    increased = {name for name, (_, verdict) in gains.items() if verdict == "better"}
    form = set(filter(_is_form_reward, gains))
    is_found = bool(increased) and increased <= form < {*gains}
    form_sign = translate("Gains of the format only"), is_found, describe_rewards(run_record)
    return [_find_length_drift(*parts), form_sign, *_find_box_spam(groups)]


def _is_form_reward(name: str) -> bool:
    """Return whether a reward does not depend on the references, as far as its name shows."""
    for component in REWARDS.list_built_in():
        if not component.compares_references and name.startswith(component.name):
            return True
    plugin = REWARDS.get(name)
    return plugin is not None and not plugin.compares_references


def _find_length_drift(
    first: Sequence[JsonObject], last: Sequence[JsonObject]
) -> tuple[str, bool, str]:
    before, after = _average_first_and_last(first, last, "completions/mean_length")
    truncated_before, truncated_after = _average_first_and_last(
        first, last, "completions/clipped_ratio"
    )
    low, high = sorted((before, after))
    is_longer_or_shorter = 0 < MAX_RATIO * low < high
    is_found = is_longer_or_shorter or truncated_after - truncated_before > MAX_TRUNCATION_GAIN
    text = (
        "{:.1f} tokens per response in the first {:,} steps and {:.1f} in the last;"
        " {:.0f} % and {:.0f} % of the responses are truncated"
    )
    figures = before, len(first), after, 100 * truncated_before, 100 * truncated_after
    return translate("Length drift"), is_found, translate(text, *figures)


def _average_first_and_last(
    first: Sequence[JsonObject], last: Sequence[JsonObject], key: str
) -> tuple[float, float]:
    """Return the means of a value over the first and the last steps."""
    return mean(_list_values(first, key) or [0.0]), mean(_list_values(last, key) or [0.0])


def _find_box_spam(groups: Sequence[JsonObject]) -> Iterator[tuple[str, bool, str]]:
    """Compare the boxes of the first and last groups with the references."""
    box_means = []
    reference_counts = []
    for group in groups:
        box_means.append(mean(len(one["boxes"]) for one in group["predictions"]))
        reference_counts.append(len(group["boxes"]))
    if not any(box_means) and not any(reference_counts):
        return
    size = math.ceil(len(groups) / 4)
    before = mean(box_means[-size:])
    after = mean(box_means[:size])
    reference = mean(reference_counts[:size])
    text = "{:.1f} boxes per response in the first groups, {:.1f} in the last; reference: {:.1f}"
    is_found = after > MAX_RATIO * max(1, reference)
    yield translate("Box spam"), is_found, translate(text, before, after, reference)


def list_memory_remarks(run_record: RunRecord) -> list[str]:
    """Return a note on settings that the run changed after running out of GPU memory."""
    settings = as_object(run_record.recipe.get("train"))
    pack_tokens = settings.get("pack_tokens")
    is_checkpointing = float(settings.get("activation_checkpointing") or 0) > 0
    changes = []
    for line in run_record.steps:
        step = line["step"]
        new_tokens = line.get("pack_tokens")
        if None not in (new_tokens, pack_tokens) and new_tokens != pack_tokens:
            text = "packs of at most {:,} tokens from step {:,}"
            changes.append(translate(text, new_tokens, step))
            pack_tokens = new_tokens
        if line.get("activation_checkpointing") and not is_checkpointing:
            changes.append(translate("activation checkpointing from step {:,}", step))
            is_checkpointing = True
    if not changes:
        return []
    text = "The run ran out of GPU memory and continued with less: {}."
    return [translate(text, join_words(changes))]


def _sum_field(lines: Iterable[JsonObject], name: str) -> float:
    return sum(float(line[name]) for line in lines if isinstance(line.get(name), int | float))


def list_skipped_samples(run_record: RunRecord) -> list[tuple[str, str, str]]:
    """Return the count, reason and IDs of skipped samples, most frequent reason first."""
    ids_by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for line in run_record.skipped_samples:
        reason = str(line.get("reason"))
        # Without the image path at the start, so that equal reasons match.
        ids_by_reason[reason.partition(": ")[2] or reason].append(str(line.get("id")))
    rows = []
    for reason, ids in sorted(ids_by_reason.items(), key=lambda item: -len(item[1])):
        shown_ids = ", ".join(ids[:5])
        if len(ids) > 5:
            shown_ids += ", …"
        rows.append((f"{len(ids):,}", reason, shown_ids))
    return rows


def list_versions(run_record: RunRecord) -> list[tuple[str, str]]:
    """Return the versions of packages, the device, the model family and the start time."""
    missing = translate(NOT_RECORDED)
    start = get_last_start(run_record)
    versions = as_object(start.get("versions") or run_record.manifest.get("versions"))
    rows = [(name, str(value)) for name, value in versions.items()]
    device = missing
    if start.get("device"):
        device = f"{start['device']}, {start.get('precision')}"
    started_at = missing
    if run_record.starts:
        started_at = str(run_record.starts[0]["started_at"])
    rows.append((translate("device"), device))
    rows.append((translate("model family"), str(run_record.manifest.get("family", missing))))
    rows.append((translate("started"), started_at))
    return rows


def list_checksums(run_record: RunRecord) -> list[tuple[str, str]]:
    """Return the SHA-256 digests of base model, data and trained weights."""
    missing = translate(NOT_RECORDED)
    base_digest = str(run_record.manifest.get("base_fingerprint") or missing)
    items = [(translate("base model"), base_digest)]
    for name, title in (("train", "training data"), ("eval", "validation data")):
        digest = get_data_stats(run_record, name).get("fingerprint")
        digest = digest or run_record.checkpoint_identity.get(f"data.{name}")
        if digest or name == "train":
            items.append((translate(title), str(digest or missing)))
    items += run_record.weight_digests.items()
    if not run_record.weight_digests:
        items.append((translate("trained weights"), translate("not written yet")))
    return items


MAX_EXAMPLE_CHARS = 200
"""Maximum number of characters of the prompt in an example command."""


def is_native_run(run_record: RunRecord) -> bool:
    """Return whether the model of a run is of a native family."""
    return str(run_record.manifest.get("family")) in FAMILIES


def list_commands(run_record: RunRecord) -> list[tuple[str, str]]:
    """Return the operations that use, resume or repeat a run, in the format of messages."""
    folder = str(run_record.folder)
    recipe = f"{folder}/recipe.yaml"
    steps = dict[str, Step]()
    if run_record.weight_digests:
        example = read_public_example(run_record.folder)
        prompt = example.prompt
        if len(prompt) > MAX_EXAMPLE_CHARS:
            prompt = "TEXT"
        example = ExampleQuestion(("IMAGE",) * len(example.images), prompt)
        steps["Predict"] = example.build_step(folder)
        steps["Evaluate again"] = Step("eval", {"run_or_model": folder})
        has_adapter = any(name.startswith("adapter/") for name in run_record.weight_digests)
        if has_adapter and is_native_run(run_record):
            merge = Step("merge", {"source": folder, "out": f"{folder}-merged"})
            steps["Merge for other inference engines"] = merge
    elif run_record.result is None:
        steps["Resume"] = Step("train", {"recipe": recipe, "resume": True})
    overrides = [f"output_dir={folder}-again"]
    steps["Train again"] = Step("train", {"recipe": recipe, "overrides": overrides})
    return [(translate(name), str(step)) for name, step in steps.items()]


def format_duration(seconds: float) -> str:
    """Format a duration, such as 250 ms, 12.5 s or 2 h 10 min."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return translate("{} h {:02d} min", hours, minutes)
    return translate("{} min {:02d} s", minutes, rest)


def join_words(words: Sequence[str]) -> str:
    """Join words as a translated enumeration with commas and "and"."""
    if len(words) > 1:
        words = [translate(", ").join(words[:-1]), words[-1]]
    return translate(" and ").join(words)


StatusKind = Literal["finished", "running", "resuming", "interrupted", "failed", "killed"]
"""Kind of status of a run.

It is `killed` if its process ended without a message, and `resuming` before the next one trains.
"""

NUM_RECENT_STEPS = 50
"""Number of recent steps whose mean time determines the remaining time."""

LIVENESS_TIMEOUT_S = 900.0
"""Seconds after its last metric for which a run counts as active without file locks.

This applies to file systems that do not support locks.
"""


@dataclass(frozen=True)
class RunStatus:
    """Status and progress of a run.

    Attributes:
        total_steps: Total number of steps. None if unknown.
        remaining_s: Estimated remaining seconds of an active run. None if unknown.
        reason: Recorded reason of an interruption or failure. None if unknown.
    """

    kind: StatusKind
    step: int
    total_steps: int | None
    remaining_s: float | None
    reason: str | None

    @property
    def description(self) -> str:
        """Status of the run as a translated sentence."""
        steps = translate("step {:,}", self.step)
        if self.total_steps:
            steps = translate("step {:,} of {:,}", self.step, self.total_steps)
        if self.kind == "running" and not self.step:
            return translate("The run is in progress, before its first step.")
        if self.kind == "running" and self.remaining_s is not None:
            minutes = max(1, round(self.remaining_s / 60))
            remaining = translate("{} h {:02d} min", *divmod(minutes, 60))
            return translate("The run is in progress: {}, about {} remaining.", steps, remaining)
        texts = {
            "finished": "The run is finished: {}.",
            "running": "The run is in progress: {}.",
            "resuming": "The run resumes after {}.",
            "interrupted": "The run was interrupted after {}.",
            "failed": "The run failed after {}.",
            "killed": "The run was killed after {}: its process or machine ended without a"
            " message.",
        }
        return translate(texts[self.kind], steps)


def get_run_status(run_record: RunRecord, is_training: bool = False) -> RunStatus:
    """Return the status of a run.

    Args:
        is_training: True if the calling process is training this run.
    """
    end_event = run_record.end_event or {}
    kind: StatusKind = "killed"
    remaining_s = None
    if run_record.result is not None:
        kind = "finished"
    elif end_event:
        kind = "interrupted" if end_event.get("status") == "interrupted" else "failed"
    elif is_training or _is_training_in(run_record.folder):
        kind = "running"
        remaining_s = _estimate_remaining_s(run_record)
    return RunStatus(
        kind=kind,
        step=get_last_step(run_record),
        total_steps=get_total_steps(run_record),
        remaining_s=remaining_s,
        reason=str(end_event["reason"]) if end_event.get("reason") else None,
    )


def _is_training_in(folder: Path) -> bool:
    """Return whether a training process holds the lock of a run directory."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        metrics_file = folder / METRICS_FILE
        return (
            metrics_file.is_file()
            and time.time() - metrics_file.stat().st_mtime < LIVENESS_TIMEOUT_S
        )
    finally:
        os.close(fd)
    return False


def _estimate_remaining_s(run_record: RunRecord) -> float | None:
    """Estimate the seconds of the remaining steps and evaluations; None if unknown."""
    total_steps = get_total_steps(run_record)
    current_step = get_last_step(run_record)
    recent = run_record.steps[-NUM_RECENT_STEPS:]
    if not total_steps or not current_step or not recent:
        return None
    steps_left = total_steps - current_step
    interim_evaluations = [line for line in run_record.evaluations if line.get("step")]
    durations = []
    for line in interim_evaluations or run_record.evaluations:
        if line.get("eval_s") is not None:
            durations.append(float(line["eval_s"]))
    # At the same frequency as before, and once at the end.
    num_evaluations_left = len(interim_evaluations) * steps_left / current_step + 1
    step_s = mean(float(line["step_s"]) for line in recent)
    return steps_left * step_s + num_evaluations_left * mean(durations or [0.0])
