"""How a run ended: whole, still going on, stopped, or broken; and what stands in its way."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from finesight.digests import verify_folder
from finesight.doctor.findings import Finding, fault, fine, hint, typed
from finesight.doctor.machine import largest
from finesight.doctor.run_again import again, lower_rates, recipe_of, resume
from finesight.errors import UserError
from finesight.hub import ModelFolder, named
from finesight.recipe import load_recipe
from finesight.report.facts import done, left_out, remarks, state, training_samples
from finesight.report.record import Record
from finesight.report.standing import standing
from finesight.run_folder import ADAPTER, CHECKPOINTS, MODEL, RECIPE, RESULT

IN_A_ROW = 5
"""Void steps, one after the other, with which a run ends."""

MUCH = 0.05
"""Share of the samples that may be left out before it is a fault."""


def judge(record: Record) -> list[Finding]:
    """Whether the run came to its end, and whether what it wrote is whole."""
    running = _running(record.folder)
    found = [*_void(record), *_base(record), *_weights(record), *_unreadable(record)]
    found += _recipe(record)
    if record.result is not None or running:
        where = f"is running now (process {running})" if running else f"is {state(record)}"
        found.insert(0, fine("end", f"the run {where}"))
    else:
        found = [*_unfinished(record, found), *found]
    return [*found, *_left(record), *_memory(record)]


def _running(folder: Path) -> int | None:
    """The process that holds the run's lock, where the system tells; nothing is locked here."""
    locks = Path("/proc/locks")
    if not locks.is_file():
        return None
    about = folder.stat()
    place = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    for line in locks.read_text().splitlines():
        words = line.split()
        if words[1:2] == ["FLOCK"] and place in words:
            return int(words[4])
    return None


def _void(record: Record) -> Iterator[Finding]:
    """Steps without finite figures, which moved nothing."""
    void = [bool(line.get("void")) for line in record.steps]
    if not any(void):
        return
    last = 0
    for one in reversed(void):
        if not one:
            break
        last += 1
    places = next(line["void"] for line in reversed(record.steps) if line.get("void"))
    lower = again(record, *lower_rates(record), "train.precision=bf16")
    if last >= IN_A_ROW:
        yield fault(
            "not-finite",
            f"the run was ended by {last} steps in a row without a finite loss",
            why="the learning rate is too high, numbers overflow in fp16, or the samples of these"
            f" steps are broken: {', '.join(map(str, places[:4]))}",
            remedy=lower,
        )
        return
    yield hint(
        "not-finite",
        f"{sum(void)} of {len(void)} steps had no finite loss, and moved nothing",
        why=f"look at their samples; the last: {', '.join(map(str, places[:4]))}",
        remedy=typed("finesight", "data", "check", str(record.folder / RECIPE)),
    )


def _unfinished(record: Record, found: list[Finding]) -> Iterator[Finding]:
    """Where it stopped, and how to go on: unless something else explains why it did."""
    if any(one.code == "not-finite" and one.severity == "fault" for one in found):
        return
    steps = _checkpoints(record.folder)
    newest = f"its newest checkpoint is that of step {steps[-1]}" if steps else "it has none"
    yield fault(
        "unfinished",
        f"the run is {state(record)}; {newest}",
        why=_why(record, steps),
        remedy=resume(record),
    )
    if steps:
        yield from _checkpoint(record, steps)


def _why(record: Record, checkpoints: list[int]) -> str:
    """What ended a run, as it noted itself; one that was killed could not."""
    stands = standing(record)
    missing = done(record) - checkpoints[-1] if checkpoints else done(record)
    lost = f"; {missing} steps are done again" if missing > 0 else ""
    if stands.kind in ("interrupted", "failed"):
        how = "it was interrupted" if stands.kind == "interrupted" else "it failed"
        return f"{how}: {stands.why or 'no reason was noted'}{lost}"
    return (
        "its process was killed (by a signal, or by the system for want of memory: journalctl -k"
        f" -g 'out of memory'), or its machine went down{lost}"
    )


def _checkpoints(folder: Path) -> list[int]:
    numbers = [path.name.removeprefix("step-") for path in (folder / CHECKPOINTS).glob("step-*")]
    return sorted(int(number) for number in numbers if number.isdecimal())


def _checkpoint(record: Record, steps: list[int]) -> Iterator[Finding]:
    """Whether the newest one is whole, and whether another one fits onto the disk."""
    newest = record.folder / CHECKPOINTS / f"step-{steps[-1]}"
    try:
        verify_folder(newest)
    except UserError as error:
        whole = f"; that of step {steps[-2]} comes before it" if len(steps) > 1 else ""
        yield hint(
            "checkpoint-damaged",
            f"{error.where}: {error.what}",
            why=f"--resume sets it aside and goes on from the last whole one{whole}",
            remedy=resume(record),
        )
    size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    free = shutil.disk_usage(record.folder).free
    if free < size:
        yield fault(
            "disk-full",
            f"{record.folder}: {free / 1e9:.3g} GB free, a checkpoint has {size / 1e9:.3g} GB",
            why="the next checkpoint would be refused, and the run would end there again",
            remedy=largest(record.folder.parent),
        )


def _base(record: Record) -> Iterator[Finding]:
    """Whether the model that the run started from is where it was, and the same."""
    base, known = record.manifest.get("base"), record.manifest.get("base_fingerprint")
    path = named(str(base))
    if not isinstance(base, str) or not (path.is_absolute() or path.is_dir()):
        return
    if not path.is_dir():
        yield fault(
            "base-missing",
            f"the model that the run started from is gone: {path}",
            why="neither going on nor answering works without it",
            remedy=typed("find", "/", "-xdev", "-type", "d", "-name", path.name),
        )
        return
    try:
        now = ModelFolder(path).fingerprint()
    except UserError as error:
        now = error.what
    if now != known:
        yield fault(
            "base-changed",
            f"{path} is no longer the model that the run started from",
            why=f"its fingerprint is {now[:40]}, the run has {str(known)[:40]}",
            remedy=typed("finesight", "doctor", str(path)),
        )


def _weights(record: Record) -> Iterator[Finding]:
    for part in (ADAPTER, MODEL):
        if not (record.folder / part).is_dir():
            continue
        try:
            verify_folder(record.folder / part)
        except UserError as error:
            # A run without its result writes its end anew from the last checkpoint.
            away = typed("rm", "-r", str(record.folder / part), str(record.folder / RESULT))
            yield fault(
                "weights-damaged",
                f"{error.where}: {error.what}",
                why="the trained weights cannot be used; the last checkpoint still has them",
                remedy=f"{away} && {resume(record)}",
            )


def _unreadable(record: Record) -> Iterator[Finding]:
    if record.unreadable:
        yield hint(
            "records-damaged",
            f"cannot be read: {', '.join(record.unreadable)}",
            why="what is said here goes by the rest",
            remedy=typed("ls", "-l", str(record.folder)),
        )


def _recipe(record: Record) -> Iterator[Finding]:
    path = record.folder / RECIPE
    try:
        load_recipe(path)
    except UserError as error:
        make = hint if record.result is not None else fault
        yield make(
            "recipe",
            f"{error.where}: {error.what}",
            why="going on, and every command below that trains again, need it; it may be of another"
            f" version of finesight ({error.remedy})",
            remedy=typed("finesight", "doctor", str(path)),
        )


def _left(record: Record) -> Iterator[Finding]:
    groups = left_out(record)
    count = sum(group.count for group in groups)
    kept = training_samples(record) or 0
    if not count:
        return
    first = groups[0]
    make = fault if count > MUCH * (count + kept) else hint
    yield make(
        "left-out",
        f"{count} of {count + kept} samples were left out, {first.count} of them: {first.reason}",
        why=f"the model has not learned from them: {first.ids}",
        remedy=_mended(record, first.reason),
    )


def _mended(record: Record, reason: str) -> str:
    """The command for samples that were left out for that reason."""
    longest = re.fullmatch(r"over (\d+) tokens", reason)
    if longest:
        return again(record, f"data.max_length={2 * int(longest[1])}")
    files = [Path(file.path) for file in recipe_of(record).data.train]
    file = files[0] if len(files) == 1 else Path()
    if file.suffix != ".jsonl":
        return typed("finesight", "data", "check", str(record.folder / RECIPE))
    mended = file.parent.parent / f"{file.parent.name or 'data'}-mended"
    check = typed("finesight", "data", "check", str(file), "--fix", str(mended))
    # The check ends with 2 for what it has mended.
    return f"{check}\n{again(record, f'data.train={mended / file.name}')}"


def _memory(record: Record) -> Iterator[Finding]:
    for text in remarks(record):
        if text.startswith("The GPU's memory"):
            packs = [line["pack_tokens"] for line in record.steps if line.get("pack_tokens")]
            changes = [f"train.pack_tokens={int(number)}" for number in packs[-1:]]
            changes += ["train.recompute=true"] if record.steps[-1].get("recompute") else []
            yield hint(
                "memory-was-full",
                text,
                why="every step that was too much was done twice; the next run can begin so",
                remedy=again(record, *changes),
            )
