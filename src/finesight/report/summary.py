"""Status of a run, and texts and values that summarize it in its report."""

from __future__ import annotations

import fcntl
import os
import shlex
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Literal

from finesight.manifest import MAX_DATA_WAIT_FRACTION, METRICS_FILE
from finesight.report.i18n import translate
from finesight.report.run_reader import JsonObject, RunRecord

NOT_RECORDED = "not recorded"

SummaryItem = tuple[str, str]
"""Pair of name and text in a list of the report."""


@dataclass(frozen=True)
class TimePhase:
    """Phase of a run, such as setup or evaluation, and its duration.

    `fraction` is its share of the total time.
    """

    name: str
    seconds: float
    fraction: float

    @property
    def duration_text(self) -> str:
        """Formatted duration of the phase."""
        return format_duration(self.seconds)


@dataclass(frozen=True)
class SkippedGroup:
    """Skipped samples of a run with the same reason."""

    reason: str
    count: int
    ids: str


def get_last_start(run_record: RunRecord) -> JsonObject:
    """Return the start event of the last training process.

    Returns an empty object for runs of older versions, which have no start events.
    """
    return run_record.starts[-1] if run_record.starts else {}


def get_data_stats(run_record: RunRecord, name: str) -> JsonObject:
    """Return the recorded statistics of a data split (`train` or `eval`)."""
    data = get_last_start(run_record).get("data")
    stats = data.get(name) if isinstance(data, dict) else None
    return stats if isinstance(stats, dict) else {}


def get_last_step(run_record: RunRecord) -> int:
    """Return the number of finished training steps of a run."""
    lines = [*run_record.steps, *run_record.evaluations]
    return max((int(line.get("step") or 0) for line in lines), default=0)


def get_total_steps(run_record: RunRecord) -> int | None:
    """Return the total number of training steps of a run, or None if unknown."""
    if run_record.result is not None and isinstance(run_record.result.get("steps"), int):
        return int(run_record.result["steps"])
    total = get_last_start(run_record).get("total_steps")
    return total if isinstance(total, int) else None


def describe_progress(run_record: RunRecord) -> str:
    """Describe the progress of a run: finished, stopped early, or steps so far."""
    total, current_step = get_total_steps(run_record), get_last_step(run_record)
    if run_record.result is not None:
        weights_step = run_record.result.get("weights_step")
        stopped_early = run_record.result.get("stopped_early")
        text = translate("finished after {:,} steps", current_step)
        text += (
            translate(", stopped early because the score did not improve") if stopped_early else ""
        )
        if weights_step not in (None, current_step):
            text += translate("; the saved weights are from step {:,}, the best", weights_step)
        return text
    if total:
        return translate("not finished: {:,} of {:,} steps so far", current_step, total)
    return translate("not finished: {:,} steps so far", current_step)


def get_model_name(run_record: RunRecord) -> str:
    """Return the name of the base model of a run.

    A local path is reduced to its last folder.
    """
    base = str(
        run_record.manifest.get("base_model")
        or run_record.recipe.get("model")
        or translate(NOT_RECORDED)
    )
    return base if not Path(base).is_absolute() else Path(base).name


def count_training_samples(run_record: RunRecord) -> int | None:
    """Return the number of distinct training samples, or None if unknown."""
    num_samples = get_data_stats(run_record, "train").get("num_samples")
    if isinstance(num_samples, int):
        return num_samples
    # Older runs recorded the epoch of each step only.
    epoch = run_record.steps[-1].get("epoch") if run_record.steps else None
    num_processed = sum(int(line.get("num_samples") or 0) for line in run_record.steps)
    has_epoch = isinstance(epoch, float) and epoch > 0
    return round(num_processed / epoch) if has_epoch and epoch and num_processed else None


def describe_trained_parts(run_record: RunRecord) -> str:
    """Describe the trained parts of the model and its quantized weights."""
    tune = run_record.manifest.get("tune")
    tune = tune if isinstance(tune, dict) else {}
    parts = ("vision", "merger", "language", "embeddings")
    lora = tune.get("lora")
    rank = lora.get("rank") if isinstance(lora, dict) else "unknown"
    full_parts = [part for part in parts if tune.get(part) == "full"]
    lora_parts = [part for part in parts if tune.get(part) == "lora"]
    phrases = []
    if lora_parts:
        phrases.append(translate("{} with LoRA of rank {}", join_words(lora_parts), rank))
    if full_parts:
        phrases.append(translate("{} with full fine-tuning", join_words(full_parts)))
    quantize = tune.get("quantize")
    quantize = quantize if isinstance(quantize, dict) else {}
    texts = {"nf4": "frozen weights of {} in NF4", "fp8": "frozen weights of {} in FP8"}
    for key, text in texts.items():
        if isinstance(quantize.get(key), list) and quantize[key]:
            phrases.append(translate(text, join_words(quantize[key])))
    return translate("; ").join(phrases) or translate(NOT_RECORDED)


def summarize_run(run_record: RunRecord) -> str:
    """Summarize a run in two sentences: model, data, trained parts and progress."""
    num_samples = count_training_samples(run_record)
    epoch = run_record.steps[-1].get("epoch") if run_record.steps else 0
    samples_text = translate(" on {:,} samples", num_samples) if num_samples else ""
    epochs_text = ""
    if epoch:
        epochs_text = translate(", {:.4g} epoch" if epoch == 1 else ", {:.4g} epochs", epoch)
    return translate(
        "{} fine-tuned{}{}: {}. The run is {}.",
        get_model_name(run_record),
        samples_text,
        epochs_text,
        describe_trained_parts(run_record),
        describe_progress(run_record),
    )


def compute_phases(run_record: RunRecord) -> list[TimePhase]:
    """Return the recorded phases of a run with their durations."""
    seconds = {
        "setup": _sum_field(run_record.starts, "setup_s"),
        "vision cache": _sum_field(run_record.vision_cache_builds, "vision_cache_s"),
        "training steps": _sum_field(run_record.steps, "step_s"),
        "evaluation": _sum_field(run_record.evaluations, "eval_s"),
    }
    durations = {name: value for name, value in seconds.items() if value}
    total = sum(durations.values())
    return [TimePhase(translate(name), value, value / total) for name, value in durations.items()]


def summarize_cost(run_record: RunRecord) -> list[SummaryItem]:
    """Return the throughput, time and memory of a run.

    Throughput includes the time of building the vision cache.
    """
    steps = run_record.steps
    seconds = _sum_field(steps, "step_s")
    if not seconds:
        return [(translate("training steps"), translate("none yet"))]
    mean_mfu = sum(float(line.get("mfu") or 0) * float(line["step_s"]) for line in steps) / seconds
    peak_gb = max(float(line.get("peak_memory_gb") or 0) for line in steps)
    num_samples, num_tokens = _sum_field(steps, "num_samples"), _sum_field(steps, "num_tokens")
    total_seconds = seconds + _sum_field(run_record.vision_cache_builds, "vision_cache_s")
    data_wait_fraction = _compute_data_wait_fraction(run_record)
    missing = translate(NOT_RECORDED)
    texts = {
        "samples/s": f"{num_samples / total_seconds:,.4g}",
        "tokens/s": f"{num_tokens / total_seconds:,.0f}",
        "median step": format_duration(median(float(line["step_s"]) for line in steps)),
        "MFU": f"{100 * mean_mfu:.3g} %" if mean_mfu else missing,
        "data wait": missing if data_wait_fraction is None else f"{100 * data_wait_fraction:.2g} %",
        "peak memory": f"{peak_gb:.3g} GB" if peak_gb else missing,
        "processed samples": f"{num_samples:,.0f}",
        "processed tokens": f"{num_tokens:,.0f}",
        "supervised tokens": f"{_sum_field(steps, 'num_supervised_tokens'):,.0f}",
        "skipped steps": f"{max(int(line.get('skipped_steps') or 0) for line in steps):,}",
        "starts": str(len(run_record.starts)) if run_record.starts else missing,
    }
    return [(translate(name), text) for name, text in texts.items()]


def list_remarks(run_record: RunRecord) -> list[str]:
    """Return advice about data wait, and notes on reduced memory settings."""
    return [*_list_data_wait_remarks(run_record), *list_memory_remarks(run_record)]


def _compute_data_wait_fraction(run_record: RunRecord) -> float | None:
    """Return the fraction of the step time spent on data wait, or None if unknown."""
    timed_steps = [line for line in run_record.steps if line.get("data_wait_s") is not None]
    seconds = _sum_field(timed_steps, "step_s")
    return _sum_field(timed_steps, "data_wait_s") / seconds if seconds else None


def _list_data_wait_remarks(run_record: RunRecord) -> list[str]:
    fraction = _compute_data_wait_fraction(run_record)
    if fraction is None or fraction <= MAX_DATA_WAIT_FRACTION:
        return []
    num_workers = get_last_start(run_record).get("num_workers")
    workers_text = translate(" (now {})", num_workers) if isinstance(num_workers, int) else ""
    text = (
        "Data wait is {:.2g} % of the step time. To reduce it, increase train.num_workers{}, use"
        " smaller image files, or reduce the image size of the model (image.max_pixels)."
    )
    return [translate(text, 100 * fraction, workers_text)]


def list_memory_remarks(run_record: RunRecord) -> list[str]:
    """Return a note on settings that the run changed after running out of GPU memory."""
    settings = run_record.recipe.get("train")
    settings = settings if isinstance(settings, dict) else {}
    pack_tokens = settings.get("pack_tokens")
    activation_checkpointing = settings.get("activation_checkpointing")
    changes = []
    for line in run_record.steps:
        step, new_tokens = line["step"], line.get("pack_tokens")
        if None not in (new_tokens, pack_tokens) and new_tokens != pack_tokens:
            text = "packs of at most {:,} tokens from step {:,}"
            changes.append(translate(text, new_tokens, step))
            pack_tokens = new_tokens
        if float(line.get("activation_checkpointing") or 0) > float(activation_checkpointing or 0):
            changes.append(translate("activation checkpointing from step {:,}", step))
            activation_checkpointing = True
    if not changes:
        return []
    text = "The run ran out of GPU memory and continued with less: {}."
    return [translate(text, join_words(changes))]


def _sum_field(lines: Iterable[JsonObject], name: str) -> float:
    values = (line.get(name) for line in lines)
    return sum(float(value) for value in values if isinstance(value, int | float))


def list_skipped_samples(run_record: RunRecord) -> list[SkippedGroup]:
    """Return the skipped samples of a run by reason, most frequent reason first."""
    ids_by_reason: defaultdict[str, list[str]] = defaultdict(list)
    for line in run_record.skipped_samples:
        reason = str(line.get("reason"))
        # Without the image path at the start, so that equal reasons match.
        ids_by_reason[reason.partition(": ")[2] or reason].append(str(line.get("id")))
    for line in run_record.steps:
        ids_by_reason[translate("images that could not be decoded during training")] += [
            str(name) for name in line.get("skipped_samples") or ()
        ]
    return [
        SkippedGroup(reason, len(ids), ", ".join(ids[:5]) + (", …" if len(ids) > 5 else ""))
        for reason, ids in sorted(ids_by_reason.items(), key=lambda item: -len(item[1]))
        if ids
    ]


def list_versions(run_record: RunRecord) -> list[SummaryItem]:
    """Return the versions of packages, the device, the model family and the start time."""
    start = get_last_start(run_record)
    recorded_versions = start.get("versions") or run_record.manifest.get("versions")
    package_versions: JsonObject = recorded_versions if isinstance(recorded_versions, dict) else {}
    device = f"{start['device']}, {start.get('precision')}" if start.get("device") else ""
    missing = translate(NOT_RECORDED)
    started_at = str(run_record.starts[0]["started_at"]) if run_record.starts else missing
    return [
        *((name, str(value)) for name, value in package_versions.items()),
        (translate("device"), device or missing),
        (translate("model family"), str(run_record.manifest.get("family", missing))),
        (translate("started"), started_at),
    ]


def list_checksums(run_record: RunRecord) -> list[SummaryItem]:
    """Return the SHA-256 digests of base model, data and trained weights."""
    missing = translate(NOT_RECORDED)
    base_digest = str(run_record.manifest.get("base_fingerprint") or missing)
    items = [(translate("base model"), base_digest)]
    for name, title in (("train", "training data"), ("eval", "validation data")):
        digest = get_data_stats(run_record, name).get("fingerprint")
        digest = digest or run_record.checkpoint_identity.get(f"data.{name}")
        if digest or name == "train":
            items.append((translate(title), str(digest or missing)))
    empty_items = [(translate("trained weights"), translate("not written yet"))]
    return [*items, *(run_record.weight_digests.items() or empty_items)]


def list_commands(run_record: RunRecord, prompt: str) -> list[SummaryItem]:
    """Return shell commands that use, resume or repeat a run.

    Args:
        prompt: Prompt of a validation sample, used as an example.
    """
    folder = str(run_record.folder)
    example_prompt = prompt if prompt and len(prompt) <= 200 else "TEXT"
    items = []
    if run_record.weight_digests:
        predict_command = format_command("predict", folder, "IMAGE", "--prompt", example_prompt)
        items = [
            (translate("Predict"), predict_command),
            (translate("Evaluate again"), format_command("eval", folder)),
        ]
        if any(name.startswith("adapter/") for name in run_record.weight_digests):
            merge_command = format_command("merge", folder, f"{folder}-merged")
            items.append((translate("Merge for other inference engines"), merge_command))
    elif run_record.result is None:
        items = [
            (translate("Resume"), format_command("train", f"{folder}/recipe.yaml", "--resume"))
        ]
    rerun_command = format_command("train", f"{folder}/recipe.yaml", f"output_dir={folder}-again")
    return [*items, (translate("Train again"), rerun_command)]


def format_command(*arguments: str) -> str:
    """Format a finesight command for the shell."""
    return shlex.join(["finesight", *arguments])


def format_duration(seconds: float) -> str:
    """Format a duration, such as 250 ms, 12.5 s or 2 h 10 min."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def join_words(words: Sequence[str]) -> str:
    """Join words as a translated enumeration with commas and "and"."""
    return translate(" and ").join(
        [translate(", ").join(words[:-1]), words[-1]] if len(words) > 1 else words
    )


StatusKind = Literal["finished", "running", "interrupted", "failed", "killed"]
"""Kind of status of a run.

A run is `killed` if its process ended without a message, for example because its machine did.
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
            remaining = _format_remaining(self.remaining_s)
            return translate("The run is in progress: {}, about {} remaining.", steps, remaining)
        texts = {
            "finished": "The run is finished: {}.",
            "running": "The run is in progress: {}.",
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
    if run_record.result is not None:
        kind = "finished"
    elif end_event:
        kind = "interrupted" if end_event.get("status") == "interrupted" else "failed"
    elif is_training or _is_training_in(run_record.folder):
        kind = "running"
    return RunStatus(
        kind=kind,
        step=get_last_step(run_record),
        total_steps=get_total_steps(run_record),
        remaining_s=_estimate_remaining_s(run_record) if kind == "running" else None,
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
    total_steps, current_step = get_total_steps(run_record), get_last_step(run_record)
    recent = run_record.steps[-NUM_RECENT_STEPS:]
    if not total_steps or not current_step or not recent:
        return None
    steps_left = total_steps - current_step
    interim_evaluations = [line for line in run_record.evaluations if line.get("step")]
    evaluations = interim_evaluations or run_record.evaluations
    durations = [float(line["eval_s"]) for line in evaluations if line.get("eval_s") is not None]
    # At the same frequency as before, and once at the end.
    num_evaluations_left = len(interim_evaluations) * steps_left / current_step + 1
    step_s = mean(float(line["step_s"]) for line in recent)
    return steps_left * step_s + num_evaluations_left * (mean(durations) if durations else 0.0)


def _format_remaining(seconds: float) -> str:
    if seconds < 60:
        return translate("a minute")
    minutes = round(seconds / 60)
    if minutes < 60:
        return translate("{} min", minutes)
    return translate("{} h {:02d} min", *divmod(minutes, 60))
