"""Checks of why a run ended, and whether its files allow inference and resuming."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from finesight.digests import verify_folder
from finesight.doctor.diagnosis import Diagnosis, format_command, make_error, make_ok, make_warning
from finesight.doctor.machine_check import largest_files_command
from finesight.doctor.rerun_commands import (
    load_run_recipe,
    lower_learning_rates,
    rerun_command,
    resume_command,
)
from finesight.errors import UserError
from finesight.model_folder import ModelFolder, resolve_model_path
from finesight.recipe import load_recipe
from finesight.report.run_reader import RunRecord
from finesight.report.summary import (
    count_training_samples,
    describe_progress,
    get_last_step,
    get_run_status,
    list_memory_remarks,
    list_skipped_samples,
)
from finesight.run_files import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    MODEL_FOLDER,
    RECIPE_FILE,
    RESULT_FILE,
)

MAX_NONFINITE_STEPS = 5
"""Number of consecutive steps with a non-finite loss after which a run stops."""

MAX_SKIPPED_FRACTION = 0.05
"""Fraction of skipped samples above which an error is reported."""


def check_run_end(run_record: RunRecord) -> list[Diagnosis]:
    """Check that a run has finished and that its files are complete."""
    process_id = _find_running_process(run_record.folder)
    diagnoses = [
        *_check_nonfinite_steps(run_record),
        *_check_base_model(run_record),
        *_check_weights(run_record),
        *_check_unreadable_files(run_record),
    ]
    diagnoses += _check_recipe(run_record)
    if run_record.result is not None or process_id:
        status_text = (
            f"is running (process {process_id})"
            if process_id
            else f"is {describe_progress(run_record)}"
        )
        diagnoses.insert(0, make_ok("run-end", f"the run {status_text}"))
    else:
        diagnoses = [*_check_unfinished(run_record, diagnoses), *diagnoses]
    return [*diagnoses, *_check_skipped_samples(run_record), *_check_memory(run_record)]


def _find_running_process(folder: Path) -> int | None:
    """Return the ID of the process that holds the lock of a run directory.

    Returns None if there is none or if it is unknown. The function takes no lock itself.
    """
    locks = Path("/proc/locks")
    if not locks.is_file():
        return None
    stat = folder.stat()
    lock_id = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}:{stat.st_ino}"
    for line in locks.read_text().splitlines():
        words = line.split()
        if words[1:2] == ["FLOCK"] and lock_id in words:
            return int(words[4])
    return None


def _check_nonfinite_steps(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Detect steps with a non-finite loss, which the optimizer has not applied."""
    is_nonfinite = [bool(line.get("nonfinite_samples")) for line in run_record.steps]
    if not any(is_nonfinite):
        return
    num_trailing = 0
    for flag in reversed(is_nonfinite):
        if not flag:
            break
        num_trailing += 1
    sample_ids = next(
        line["nonfinite_samples"]
        for line in reversed(run_record.steps)
        if line.get("nonfinite_samples")
    )
    lower_rate_command = rerun_command(
        run_record, *lower_learning_rates(run_record), "train.precision=bf16"
    )
    if num_trailing >= MAX_NONFINITE_STEPS:
        yield make_error(
            "not-finite",
            f"the run stopped after {num_trailing} consecutive steps with a non-finite loss",
            why="the learning rate is too high, fp16 overflows, or samples of these steps are"
            f" corrupt: {', '.join(map(str, sample_ids[:4]))}",
            remedy=lower_rate_command,
        )
        return
    yield make_warning(
        "not-finite",
        f"{sum(is_nonfinite)} of {len(is_nonfinite)} steps had a non-finite loss and were"
        " not applied",
        why=f"check their samples; the last ones: {', '.join(map(str, sample_ids[:4]))}",
        remedy=format_command("finesight", "data", "check", str(run_record.folder / RECIPE_FILE)),
    )


def _check_unfinished(run_record: RunRecord, diagnoses: list[Diagnosis]) -> Iterator[Diagnosis]:
    """Report the last step of an unfinished run and the command that resumes it.

    A run that stopped because of non-finite steps is omitted, since another diagnosis reports it.
    """
    if any(
        diagnosis.code == "not-finite" and diagnosis.severity == "error" for diagnosis in diagnoses
    ):
        return
    checkpoint_steps = _list_checkpoint_steps(run_record.folder)
    checkpoint_note = (
        f"the newest checkpoint is from step {checkpoint_steps[-1]}"
        if checkpoint_steps
        else "it has no checkpoint"
    )
    yield make_error(
        "unfinished",
        f"the run is {describe_progress(run_record)}; {checkpoint_note}",
        why=_describe_end(run_record, checkpoint_steps),
        remedy=resume_command(run_record),
    )
    if checkpoint_steps:
        yield from _check_newest_checkpoint(run_record, checkpoint_steps)


def _describe_end(run_record: RunRecord, checkpoint_steps: list[int]) -> str:
    """Describe the recorded reason for the end of a run. A killed run has none."""
    status = get_run_status(run_record)
    num_lost_steps = (
        get_last_step(run_record) - checkpoint_steps[-1]
        if checkpoint_steps
        else get_last_step(run_record)
    )
    lost_note = f"; {num_lost_steps} steps will be repeated" if num_lost_steps > 0 else ""
    if status.kind in ("interrupted", "failed"):
        cause = "it was interrupted" if status.kind == "interrupted" else "it failed"
        return f"{cause}: {status.reason or 'no recorded reason'}{lost_note}"
    return (
        "the process was killed (by a signal, or by the system because memory ran out:"
        f" journalctl -k -g 'out of memory'), or the machine stopped{lost_note}"
    )


def _list_checkpoint_steps(folder: Path) -> list[int]:
    step_names = [
        path.name.removeprefix("step-") for path in (folder / CHECKPOINTS_FOLDER).glob("step-*")
    ]
    return sorted(int(step) for step in step_names if step.isdecimal())


def _check_newest_checkpoint(
    run_record: RunRecord, checkpoint_steps: list[int]
) -> Iterator[Diagnosis]:
    """Check that the newest checkpoint is complete and that the disk has space for another."""
    newest = run_record.folder / CHECKPOINTS_FOLDER / f"step-{checkpoint_steps[-1]}"
    try:
        verify_folder(newest)
    except UserError as error:
        fallback_note = (
            f"; the previous checkpoint is from step {checkpoint_steps[-2]}"
            if len(checkpoint_steps) > 1
            else ""
        )
        yield make_warning(
            "checkpoint-damaged",
            f"{error.where}: {error.what}",
            why=f"--resume ignores it and resumes from the last complete one{fallback_note}",
            remedy=resume_command(run_record),
        )
    num_bytes = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    free_bytes = shutil.disk_usage(run_record.folder).free
    if free_bytes < num_bytes:
        yield make_error(
            "disk-full",
            f"{run_record.folder}: {free_bytes / 1e9:.3g} GB free, a checkpoint has"
            f" {num_bytes / 1e9:.3g} GB",
            why="saving the next checkpoint would fail and stop the run again",
            remedy=largest_files_command(run_record.folder.parent),
        )


def _check_base_model(run_record: RunRecord) -> Iterator[Diagnosis]:
    """Check that the base model of a run exists and is unchanged."""
    base_model, expected = (
        run_record.manifest.get("base_model"),
        run_record.manifest.get("base_fingerprint"),
    )
    path = resolve_model_path(str(base_model))
    if not isinstance(base_model, str) or not (path.is_absolute() or path.is_dir()):
        return
    if not path.is_dir():
        yield make_error(
            "base-missing",
            f"the base model of the run is missing: {path}",
            why="resuming and inference require it",
            remedy=format_command("find", "/", "-xdev", "-type", "d", "-name", path.name),
        )
        return
    try:
        fingerprint = ModelFolder(path).fingerprint()
    except UserError as error:
        fingerprint = error.what
    if fingerprint != expected:
        yield make_error(
            "base-changed",
            f"{path} differs from the base model of the run",
            why=f"its fingerprint is {fingerprint[:40]}, expected {str(expected)[:40]}",
            remedy=format_command("finesight", "doctor", str(path)),
        )


def _check_weights(run_record: RunRecord) -> Iterator[Diagnosis]:
    for part in (ADAPTER_FOLDER, MODEL_FOLDER):
        if not (run_record.folder / part).is_dir():
            continue
        try:
            verify_folder(run_record.folder / part)
        except UserError as error:
            # A run without a result writes the final files again from the last checkpoint.
            remove_command = format_command(
                "rm", "-r", str(run_record.folder / part), str(run_record.folder / RESULT_FILE)
            )
            yield make_error(
                "weights-damaged",
                f"{error.where}: {error.what}",
                why="the trained weights are corrupt; the last checkpoint contains them",
                remedy=f"{remove_command} && {resume_command(run_record)}",
            )


def _check_unreadable_files(run_record: RunRecord) -> Iterator[Diagnosis]:
    if run_record.unreadable_files:
        yield make_warning(
            "records-damaged",
            f"cannot be read: {', '.join(run_record.unreadable_files)}",
            why="this diagnosis uses the other files only",
            remedy=format_command("ls", "-l", str(run_record.folder)),
        )


def _check_recipe(run_record: RunRecord) -> Iterator[Diagnosis]:
    path = run_record.folder / RECIPE_FILE
    try:
        load_recipe(path)
    except UserError as error:
        make_diagnosis = make_warning if run_record.result is not None else make_error
        yield make_diagnosis(
            "recipe",
            f"{error.where}: {error.what}",
            why="resuming and repeating the run require the recipe; it may be from another"
            f" version of finesight ({error.remedy})",
            remedy=format_command("finesight", "doctor", str(path)),
        )


def _check_skipped_samples(run_record: RunRecord) -> Iterator[Diagnosis]:
    groups = list_skipped_samples(run_record)
    num_skipped = sum(group.count for group in groups)
    num_used = count_training_samples(run_record) or 0
    if not num_skipped:
        return
    largest_group = groups[0]
    make_diagnosis = (
        make_error
        if num_skipped > MAX_SKIPPED_FRACTION * (num_skipped + num_used)
        else make_warning
    )
    yield make_diagnosis(
        "samples-skipped",
        f"{num_skipped} of {num_skipped + num_used} samples were skipped,"
        f" {largest_group.count} of them: {largest_group.reason}",
        why=f"the run did not use them: {largest_group.ids}",
        remedy=_fix_command(run_record, largest_group.reason),
    )


def _fix_command(run_record: RunRecord, reason: str) -> str:
    """Return the shell command that fixes samples skipped for the given reason."""
    length_match = re.fullmatch(r"over (\d+) tokens", reason)
    if length_match:
        return rerun_command(run_record, f"data.max_length={2 * int(length_match[1])}")
    files = [Path(file.path) for file in load_run_recipe(run_record).data.train]
    file = files[0] if len(files) == 1 else Path()
    if file.suffix != ".jsonl":
        return format_command("finesight", "data", "check", str(run_record.folder / RECIPE_FILE))
    fixed_folder = file.parent.parent / f"{file.parent.name or 'data'}-fixed"
    check_command = format_command(
        "finesight", "data", "check", str(file), "--fix", str(fixed_folder)
    )
    # The check exits with 2 after fixing issues.
    return f"{check_command}\n{rerun_command(run_record, f'data.train={fixed_folder / file.name}')}"


def _check_memory(run_record: RunRecord) -> Iterator[Diagnosis]:
    for remark in list_memory_remarks(run_record):
        pack_tokens = [line["pack_tokens"] for line in run_record.steps if line.get("pack_tokens")]
        overrides = [f"train.pack_tokens={int(num_tokens)}" for num_tokens in pack_tokens[-1:]]
        if run_record.steps[-1].get("activation_checkpointing"):
            overrides.append("train.activation_checkpointing=true")
        yield make_warning(
            "gpu-out-of-memory",
            remark,
            why="each step that ran out of memory was repeated; start the next run with these"
            " settings",
            remedy=rerun_command(run_record, *overrides),
        )
