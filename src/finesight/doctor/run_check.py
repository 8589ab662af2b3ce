"""Check how a run ended, whether its files are complete, its loss curve and its data loading."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import median

from pydantic import ValidationError

from finesight.config import DataSettings, Recipe, TrainFileSettings
from finesight.doctor.diagnosis import (
    Diagnosis,
    describe_error,
    has_errors,
    join_command,
    make_diagnosis,
)
from finesight.doctor.machine_check import GB, largest_files_command
from finesight.errors import UserError
from finesight.manifest import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    MAX_DATA_WAIT_FRACTION,
    MODEL_FOLDER,
    RECIPE_FILE,
    RESULT_FILE,
)
from finesight.model_folder import ModelFolder, resolve_model_path
from finesight.recipe import load_recipe
from finesight.report.run_reader import JsonObject, RunRecord, is_finite
from finesight.report.summary import (
    count_training_samples,
    describe_progress,
    get_last_start,
    get_last_step,
    get_run_status,
    list_comparable_evaluations,
    list_memory_remarks,
    list_skipped_samples,
)
from finesight.storage import verify_folder

MAX_NONFINITE_STEPS = 5
"""Number of consecutive steps with a non-finite loss after which a run stops."""

MAX_SKIPPED_FRACTION = 0.05
"""Fraction of skipped samples above which an error is reported."""

MAX_SAFE_LEARNING_RATE, LOW_LEARNING_RATE, MIN_WEIGHT_CHANGE = 1e-3, 5e-5, 0.05
"""Maximum learning rate that diagnoses suggest, and the learning rate and the relative weight
change below which a flat loss is attributed to small updates."""

MIN_STEPS, NUM_WINDOWS = 12, 10
"""Minimum number of steps for the checks of the loss curve, and its maximum number of windows."""

RISE_RATIO, SPIKE_RATIO, FLAT_FRACTION = 1.25, 1.5, 0.02
"""Ratio of the final loss to the minimum above which it has risen, ratio of the maximum to the
first loss above which it has spiked, and relative decrease below which it is flat."""

VANISHED_GRAD_RATIO, CONVERGED_LOSS_RATIO, MIN_LEARNABLE_LOSS = 0.1, 0.5, 0.05
"""Ratio of final to initial gradient norm of vanished gradients, ratio of final to initial loss of
a converged run, and initial loss in nats per token below which training has little effect."""

MIN_LOSS_SPIKES, OVERFIT_RATIO, MAX_USEFUL_WORKERS = 3, 1.05, 12
"""Number of loss spikes for a warning, ratio of the last to the best validation loss of an
overfitted run, and maximum number of data loader workers that a diagnosis suggests."""


def train_command(run_record: RunRecord, *words: str) -> str:
    """Return the shell command that trains with the recipe of a run, and overrides or options."""
    return join_command("finesight", "train", run_record.folder / RECIPE_FILE, *words)


def rerun_command(run_record: RunRecord, *overrides: str) -> str:
    """Return the shell command that repeats a run in a new folder, such as `run-2` for `run`."""
    folder, suffix = run_record.folder, 2
    while (free := folder.with_name(f"{folder.name}-{suffix}")).exists():
        suffix += 1
    return train_command(run_record, *overrides, f"output_dir={free}")


def load_run_recipe(run_record: RunRecord) -> Recipe:
    """Load the recipe of a run. Default settings are used if it cannot be read."""
    try:
        return Recipe.model_validate(run_record.recipe)
    except ValidationError:
        unknown = DataSettings(train=(TrainFileSettings(path=Path("unknown")),))
        return Recipe(model="unknown", data=unknown, output_dir=run_record.folder)


def scale_duration(run_record: RunRecord, factor: float) -> list[str]:
    """Return the overrides that multiply the number of steps or epochs by a factor."""
    train = load_run_recipe(run_record).train
    if train.steps is not None:
        return [f"train.steps={max(1, math.ceil(train.steps * factor))}"]
    return [f"train.epochs={math.ceil(100 * (train.epochs or 1) * factor - 1e-9) / 100:g}"]


def _get_learning_rates(run_record: RunRecord) -> dict[str, float]:
    """Return the learning rates of a run by part of the model, `default` first."""
    rates_by_part = load_run_recipe(run_record).train.learning_rate.model_dump()
    return {part: value for part, value in rates_by_part.items() if value is not None}


def _scale_learning_rates(run_record: RunRecord, factor: float) -> list[str]:
    """Return the overrides that multiply every learning rate of a run by a factor."""
    overrides = []
    for part, value in _get_learning_rates(run_record).items():
        power = math.floor(math.log10(value * factor))
        rounded = round(value * factor / 10.0**power) * 10.0**power
        overrides.append(f"train.learning_rate.{part}={rounded:g}")
    return overrides


def _lower_learning_rates(run_record: RunRecord) -> list[str]:
    """Return the overrides that divide learning rates by ten or more, to a safe maximum."""
    highest = max(_get_learning_rates(run_record).values())
    return _scale_learning_rates(run_record, min(0.1, MAX_SAFE_LEARNING_RATE / highest))


def check_run_end(run_record: RunRecord) -> list[Diagnosis]:
    """Check that a run has finished and that its files are complete."""
    process_id = _find_running_process(run_record.folder)
    nonfinite = list(_check_nonfinite_steps(run_record))
    diagnoses = [*nonfinite, *_check_base_model(run_record), *_check_files(run_record)]
    if run_record.result is not None or process_id:
        progress = f"is {describe_progress(run_record)}"
        status = f"is running (process {process_id})" if process_id else progress
        diagnoses.insert(0, make_diagnosis("run-end", status=status))
    elif not has_errors(nonfinite):
        diagnoses = [*_check_unfinished(run_record), *diagnoses]
    return [*diagnoses, *_check_skipped_samples(run_record), *_check_memory(run_record)]


def _find_running_process(folder: Path) -> int | None:
    """Return the ID of the process that holds the lock of a run directory, None if unknown."""
    locks = Path("/proc/locks")
    stat = folder.stat()
    lock_id = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    for line in locks.read_text().splitlines() if locks.is_file() else ():
        words = line.split()
        if words[1:2] == ["FLOCK"] and lock_id in words:
            return int(words[4])
    return None


def _check_nonfinite_steps(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Detect steps with a non-finite loss, which the optimizer has not applied."""
    is_nonfinite = [bool(line.get("nonfinite_samples")) for line in run_record.steps]
    if not any(is_nonfinite):
        return
    num_trailing = len(list(takewhile(bool, reversed(is_nonfinite))))
    last = max(index for index, flag in enumerate(is_nonfinite) if flag)
    samples = ", ".join(map(str, run_record.steps[last]["nonfinite_samples"][:4]))
    if num_trailing >= MAX_NONFINITE_STEPS:
        overrides = [*_lower_learning_rates(run_record), "train.precision=bf16"]
        remedy = rerun_command(run_record, *overrides)
        yield make_diagnosis("not-finite", count=num_trailing, samples=samples, remedy=remedy)
        return
    yield make_diagnosis(
        "not-finite.single",
        count=sum(is_nonfinite),
        total=len(is_nonfinite),
        samples=samples,
        remedy=check_data_command(run_record),
    )


def check_data_command(run_record: RunRecord) -> str:
    """Return the shell command that checks the data of a run."""
    return join_command("finesight", "check", run_record.folder / RECIPE_FILE)


def _check_unfinished(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Report the last step of an unfinished run and the command that resumes it."""
    folders = (run_record.folder / CHECKPOINTS_FOLDER).glob("step-*")
    names = [path.name.removeprefix("step-") for path in folders]
    checkpoint_steps = sorted(int(name) for name in names if name.isdecimal())
    last_step = get_last_step(run_record)
    checkpoint, num_lost_steps = "it has no checkpoint", last_step
    if checkpoint_steps:
        checkpoint = f"the newest checkpoint is from step {checkpoint_steps[-1]}"
        num_lost_steps = last_step - checkpoint_steps[-1]
    status = get_run_status(run_record)
    cause = (
        "the process was killed (by a signal, or by the system because memory ran out:"
        " journalctl -k -g 'out of memory'), or the machine stopped"
    )
    if status.kind in ("interrupted", "failed"):
        cause = "it was interrupted" if status.kind == "interrupted" else "it failed"
        cause = f"{cause}: {status.reason or 'no recorded reason'}"
    if num_lost_steps > 0:
        cause += f"; {num_lost_steps} steps will be repeated"
    yield make_diagnosis(
        "unfinished",
        progress=describe_progress(run_record),
        checkpoint=checkpoint,
        cause=cause,
        resume=train_command(run_record, "--resume"),
    )
    if checkpoint_steps:
        yield from _check_newest_checkpoint(run_record, checkpoint_steps)


def _check_newest_checkpoint(
    run_record: RunRecord, checkpoint_steps: list[int]
) -> Iterator[Diagnosis]:
    """Check that the newest checkpoint is complete and that the disk has space for another."""
    newest = run_record.folder / CHECKPOINTS_FOLDER / f"step-{checkpoint_steps[-1]}"
    try:
        verify_folder(newest)
    except UserError as error:
        has_fallback = len(checkpoint_steps) > 1
        fallback = f"; the previous checkpoint is from step {checkpoint_steps[-2:][0]}"
        yield make_diagnosis(
            "checkpoint-damaged",
            problem=describe_error(error),
            fallback=fallback * has_fallback,
            resume=train_command(run_record, "--resume"),
        )
    num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    free_bytes = shutil.disk_usage(run_record.folder).free
    if free_bytes < num_bytes:
        yield make_diagnosis(
            "disk-full.checkpoint",
            folder=run_record.folder,
            free=free_bytes / GB,
            needed=num_bytes / GB,
            remedy=largest_files_command(run_record.folder.parent),
        )


def _check_base_model(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Check that the base model of a run exists and is unchanged."""
    base_model, expected = map(run_record.manifest.get, ("base_model", "base_fingerprint"))
    path = resolve_model_path(str(base_model))
    if not isinstance(base_model, str) or not (path.is_absolute() or path.is_dir()):
        return
    if not path.is_dir():
        remedy = join_command("find", "/", "-xdev", "-type", "d", "-name", path.name)
        yield make_diagnosis("base-missing", path=path, remedy=remedy)
        return
    try:
        fingerprint = ModelFolder(path).fingerprint()
    except UserError as error:
        fingerprint = error.what
    if fingerprint != expected:
        values = {"path": path, "fingerprint": fingerprint, "expected": str(expected)}
        remedy = join_command("finesight", "doctor", path)
        yield make_diagnosis("base-changed", **values, remedy=remedy)


def _check_files(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Check trained weights, records and recipe."""
    folder = run_record.folder
    for part in (ADAPTER_FOLDER, MODEL_FOLDER):
        try:
            if (folder / part).is_dir():
                verify_folder(folder / part)
        except UserError as error:
            # A run without a result writes the final files again from the last checkpoint.
            remove = join_command("rm", "-r", folder / part, folder / RESULT_FILE)
            remedy = f"{remove} && {train_command(run_record, '--resume')}"
            problem = describe_error(error)
            yield make_diagnosis("weights-damaged", problem=problem, remedy=remedy)
    if run_record.unreadable_files:
        files, remedy = ", ".join(run_record.unreadable_files), join_command("ls", "-l", folder)
        yield make_diagnosis("records-damaged", files=files, remedy=remedy)
    try:
        load_recipe(folder / RECIPE_FILE)
    except UserError as error:
        yield make_diagnosis(
            "recipe.run",
            "error" if run_record.result is None else "warning",
            problem=describe_error(error),
            advice=error.remedy,
            remedy=join_command("finesight", "doctor", folder / RECIPE_FILE),
        )


def _check_skipped_samples(run_record: RunRecord) -> Iterator[Diagnosis]:
    groups = list_skipped_samples(run_record)
    num_skipped = sum(group.count for group in groups)
    num_samples = num_skipped + (count_training_samples(run_record) or 0)
    if num_skipped:
        yield make_diagnosis(
            "samples-skipped",
            "error" if num_skipped > MAX_SKIPPED_FRACTION * num_samples else "warning",
            count=num_skipped,
            total=num_samples,
            largest=groups[0].count,
            reason=groups[0].reason,
            samples=groups[0].ids,
            remedy=_fix_samples_command(run_record, groups[0].reason),
        )


def _fix_samples_command(run_record: RunRecord, reason: str) -> str:
    """Return the shell command that fixes samples skipped for the given reason."""
    if match := re.fullmatch(r"over (\d+) tokens", reason):
        return rerun_command(run_record, f"data.max_length={2 * int(match[1])}")
    files = [Path(file.path) for file in load_run_recipe(run_record).data.train]
    if len(files) != 1 or files[0].suffix != ".jsonl":
        return check_data_command(run_record)
    parent = files[0].parent
    fixed = parent.parent / f"{parent.name or 'data'}-fixed"
    check = join_command("finesight", "check", files[0], "--fix", fixed)
    # The check exits with 2 after fixing issues.
    return f"{check}\n{rerun_command(run_record, f'data.train={fixed / files[0].name}')}"


def _check_memory(run_record: RunRecord) -> Iterator[Diagnosis]:
    for remark in list_memory_remarks(run_record):
        pack_tokens = [line["pack_tokens"] for line in run_record.steps if line.get("pack_tokens")]
        overrides = [f"train.pack_tokens={int(num_tokens)}" for num_tokens in pack_tokens[-1:]]
        if run_record.steps[-1].get("activation_checkpointing"):
            overrides.append("train.activation_checkpointing=true")
        remedy = rerun_command(run_record, *overrides)
        yield make_diagnosis("gpu-out-of-memory", remark=remark, remedy=remedy)


@dataclass(frozen=True, slots=True)
class LossCurve:
    """Training loss as medians of windows of steps, with its noise, and gradient norms.

    The noise is the standard deviation within windows, estimated from the median deviation. The
    gradient norms are medians at the start and at the end of training.
    """

    first_loss: float
    window_medians: tuple[float, ...]
    noise: float
    initial_grad_norm: float
    final_grad_norm: float

    @classmethod
    def from_steps(cls, steps: Sequence[JsonObject]) -> LossCurve | None:
        """Build the loss curve. Returns None for fewer than `MIN_STEPS` finite values."""
        losses = [line["loss"] for line in steps if is_finite(line.get("loss"))]
        norms = [line["grad_norm"] for line in steps if is_finite(line.get("grad_norm"))]
        if len(losses) < MIN_STEPS or len(norms) < MIN_STEPS:
            return None
        count = min(NUM_WINDOWS, len(losses) // 3)
        ends = [round(len(losses) * index / count) for index in range(count + 1)]
        windows = [losses[start:end] for start, end in pairwise(ends)]
        medians = tuple(median(window) for window in windows)
        pairs = zip(windows, medians, strict=True)
        deviations = [abs(loss - center) for window, center in pairs for loss in window]
        edge = max(2, len(norms) // NUM_WINDOWS)
        noise = 1.4826 * median(deviations)
        return cls(losses[0], medians, noise, median(norms[:edge]), median(norms[-edge:]))

    @property
    def is_flat(self) -> bool:
        """True if the loss decreased by less than its noise."""
        initial, final = self.window_medians[0], self.window_medians[-1]
        return initial - final < max(FLAT_FRACTION * initial, self.noise)

    def find_instability(self) -> str | None:
        """Return the symptom of a high learning rate: `rising`, `spike` or `vanished`, or None."""
        medians = self.window_medians
        initial, final, low, high = medians[0], medians[-1], min(medians), max(medians)
        if final > RISE_RATIO * low and final - low > 4 * self.noise:
            return "rising"
        if high > SPIKE_RATIO * self.first_loss and high - self.first_loss > 6 * self.noise:
            return "spike"
        is_constant = abs(medians[len(medians) // 2] - final) < FLAT_FRACTION * initial
        has_vanished = self.final_grad_norm < VANISHED_GRAD_RATIO * self.initial_grad_norm
        if has_vanished and is_constant and final > CONVERGED_LOSS_RATIO * initial:
            return "vanished"
        return None


def check_training(run_record: RunRecord) -> list[Diagnosis]:
    """Check the recorded metrics of training steps and evaluations."""
    curve = LossCurve.from_steps(run_record.steps)
    diagnoses = [
        *_check_loss(run_record, curve),
        *_check_loss_spikes(run_record),
        *_check_overfitting(run_record),
        *_check_data_wait(run_record),
    ]
    if curve is not None and not has_errors(diagnoses):
        values = {"first": curve.first_loss, "last": curve.window_medians[-1]}
        diagnoses.insert(0, make_diagnosis("loss.low" if curve.is_flat else "loss", **values))
    return diagnoses


def _check_loss(run_record: RunRecord, curve: LossCurve | None) -> Iterator[Diagnosis]:
    if curve is None:
        count = len(run_record.steps)
        overrides = scale_duration(run_record, MIN_STEPS / max(1, count))
        remedy = rerun_command(run_record, *overrides)
        yield make_diagnosis("too-short", count=count, minimum=MIN_STEPS, remedy=remedy)
        return
    medians = curve.window_medians
    learning_rates = _get_learning_rates(run_record).values()
    values = {"last": medians[-1], "rates": ", ".join(f"{value:g}" for value in learning_rates)}
    if symptom := curve.find_instability():
        has_recovered = medians[-1] < CONVERGED_LOSS_RATIO * curve.first_loss
        yield make_diagnosis(
            f"learning-rate-too-high.{symptom}",
            "warning" if symptom == "spike" and has_recovered else "error",
            first=curve.first_loss,
            low=min(medians),
            high=max(medians),
            initial_norm=curve.initial_grad_norm,
            final_norm=curve.final_grad_norm,
            remedy=rerun_command(run_record, *_lower_learning_rates(run_record)),
            **values,
        )
    elif curve.is_flat:
        show = join_command("finesight", "show", run_record.folder / RECIPE_FILE)
        if medians[0] < MIN_LEARNABLE_LOSS:
            yield make_diagnosis("low-initial-loss", first=medians[0], remedy=show, **values)
            return
        highest, remedy = max(learning_rates), show
        weight_change = _max_weight_change(run_record)
        cause = (
            "the learning rate is not too low: the answers may be unrelated to the images, or"
            " the loss mask may exclude all tokens"
        )
        if highest < LOW_LEARNING_RATE or weight_change < MIN_WEIGHT_CHANGE:
            factor = 1e-4 / highest if highest < LOW_LEARNING_RATE else 10.0
            remedy = rerun_command(run_record, *_scale_learning_rates(run_record, factor))
            change_note = f"; the trained weights changed by {weight_change:.1%}"
            has_changed = weight_change >= MIN_WEIGHT_CHANGE
            cause = f"the learning rate is too low{'' if has_changed else change_note}"
        yield make_diagnosis("loss-flat", first=medians[0], cause=cause, remedy=remedy, **values)


def _max_weight_change(run_record: RunRecord) -> float:
    """Return the largest relative weight change of a trained part; infinity if unknown."""
    rows = [row for row in run_record.param_changes or () if row.get("is_trained")]
    changes = [row["relative_change"] for row in rows if is_finite(row.get("relative_change"))]
    return max(changes, default=math.inf)


def _check_loss_spikes(run_record: RunRecord) -> Iterator[Diagnosis]:
    spikes = [line for line in run_record.steps if line.get("loss_spike_samples")]
    if len(spikes) >= MIN_LOSS_SPIKES:
        sample_ids = [str(sample) for line in spikes for sample in line["loss_spike_samples"]]
        overrides = [*_scale_learning_rates(run_record, 1 / 3), "train.warmup=0.1"]
        yield make_diagnosis(
            "loss-spikes",
            count=len(spikes),
            steps=", ".join(str(line["step"]) for line in spikes[:6]),
            samples=", ".join(sample_ids[:4]),
            remedy=rerun_command(run_record, *overrides),
        )


def _check_overfitting(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Detect overfitting: the validation loss rises while the training loss falls."""
    evaluations = list_comparable_evaluations(run_record.evaluations)
    if len(evaluations) < 2:
        return
    best = min(evaluations, key=lambda line: float(line["validation_loss"]))
    best_loss, last_loss = (float(line["validation_loss"]) for line in (best, evaluations[-1]))
    losses = [line["loss"] for line in run_record.steps if line["step"] > best["step"]]
    losses = [loss for loss in losses if is_finite(loss)]
    is_falling = len(losses) >= 6 and median(losses[-3:]) < median(losses[:3])
    if last_loss <= OVERFIT_RATIO * best_loss or not is_falling:
        return
    if run_record.recipe.get("eval"):
        overrides = ["eval.every=0.1", "eval.patience=2"]
    elif best["step"]:
        factor = int(best["step"]) / int(run_record.steps[-1]["step"])
        overrides = scale_duration(run_record, factor)
    else:
        overrides = _scale_learning_rates(run_record, 0.3)
    yield make_diagnosis(
        "overfitted",
        best=best_loss,
        step=best["step"],
        last=last_loss,
        train_loss=median(losses[-3:]),
        remedy=rerun_command(run_record, *overrides),
    )


def _check_data_wait(run_record: RunRecord) -> Iterator[Diagnosis]:
    timed_steps = [line for line in run_record.steps if line.get("data_wait_s") is not None]
    seconds = sum(float(line["step_s"]) for line in timed_steps)
    waited_s = sum(float(line["data_wait_s"]) for line in timed_steps)
    fraction = waited_s / seconds if seconds else 0.0
    if fraction <= MAX_DATA_WAIT_FRACTION:
        return
    recorded = get_last_start(run_record).get("num_workers")
    num_workers = recorded if isinstance(recorded, int) else None
    suggested = max((num_workers or 0) + 1, min(MAX_USEFUL_WORKERS, (os.cpu_count() or 4) - 2))
    override = f"train.num_workers={suggested}"
    build_command = rerun_command if run_record.result is not None else train_command
    resume = () if run_record.result is not None else ("--resume",)
    yield make_diagnosis(
        "data-wait",
        fraction=fraction,
        workers="the" if num_workers is None else num_workers,
        remedy=build_command(run_record, override, *resume),
    )
