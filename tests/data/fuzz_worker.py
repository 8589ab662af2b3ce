"""Import fuzzed sources one after the other, and print a line of JSON about each.

A process of its own, whose memory is limited: `python fuzz_worker.py SEED FIRST STOP STEP FOLDER`.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType
from typing import Any

from fuzzed_sources import Source, case

from finesight.data.import_source import ImportOptions, open_unvalidated
from finesight.data.importer import import_dataset
from finesight.data.sample import read_samples
from finesight.data.source_fetch import fetch_source
from finesight.errors import UserError
from finesight.storage import verify_folder

MEMORY = 2 * 10**9
"""Bytes of address space that a case may add to what the process has at its start."""

CASE_S = 20.0
"""Seconds of the processor that a case may take; of the clock, ten times as many."""


class Slow(BaseException):
    """A case took too long."""


def limit() -> None:
    """Limit the memory of this process, and what is written to a file."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def stop(number: int, frame: FrameType | None) -> None:
        raise Slow

    signal.signal(signal.SIGALRM, stop)


def read_peak_memory() -> int:
    """Return the peak resident memory in bytes; `ru_maxrss` would include that of the parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024


def imported(source: Path, out: Path, request: ImportOptions) -> str:
    """Import a source as the command does, and read back what was written."""
    try:
        with fetch_source(str(source), out, request) as found:
            import_dataset(found.path, out, found.options)
    except UserError as error:
        str(error).encode()
        left = sorted(path.name for path in out.parent.iterdir() if path != source)
        assert left == [], f"a refused import left {left}"
        return "refused"
    verify_folder(out)
    files = [file for file in out.glob("*.jsonl") if file.name != "skipped_rows.jsonl"]
    assert files, "nothing was written"
    for file in files:
        for line in file.read_bytes().splitlines():
            json.loads(line, parse_constant=_no_json)
        for sample in read_samples(file):
            for part in sample.iter_parts():
                if part.type == "image":
                    assert (out / part.image).is_file(), part.image
    return "imported"


def _no_json(name: str) -> None:
    raise AssertionError(f"{name} was written")


def checked(source: Path, request: ImportOptions, saved: Path) -> None:
    """Read a source as `check` does, with its faults."""
    saved.mkdir()
    try:
        for drafted in open_unvalidated(source, request, saved):
            assert all(sample.messages for sample in drafted.samples)
    except UserError as error:
        str(error).encode()


def done(source: Source, rng: Any, folder: Path) -> str:
    """What became of a case. Raises whatever an import raises but must not."""
    path = source.write(folder / "source", rng)
    request = ImportOptions(**source.request)
    (folder / "made").mkdir()
    outcome = imported(path, folder / "made" / "out", request)
    if source.kind != "archive":
        checked(path, request, folder / "saved")
    return outcome


def describe_result(seed: int, number: int, folder: Path) -> dict[str, Any]:
    """Run a case in a new folder, which stays where it fails."""
    source, rng = case(seed, number)
    location = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=folder))
    (location / "source").mkdir()
    started, cpu = time.monotonic(), time.process_time()
    problem = ""
    signal.setitimer(signal.ITIMER_REAL, 10 * CASE_S)
    try:
        outcome = done(source, rng, location)
    except Slow:
        outcome = "slow"
    except Exception:
        outcome, problem = "crashed", traceback.format_exc()
    signal.setitimer(signal.ITIMER_REAL, 0)
    spent = time.process_time() - cpu
    if spent > CASE_S:
        outcome = "slow"
    if outcome in ("imported", "refused"):
        shutil.rmtree(location, ignore_errors=True)
    return {
        "number": number,
        "kind": source.kind,
        "outcome": outcome,
        "problem": problem,
        "cpu_s": round(spent, 3),
        "wall_s": round(time.monotonic() - started, 3),
        "peak": read_peak_memory(),
        "folder": str(location),
    }


def main() -> None:
    """Run the cases from FIRST up to STOP, every STEP-th."""
    seed, first, stop, step, folder = *map(int, sys.argv[1:5]), Path(sys.argv[5])
    warnings.simplefilter("ignore")
    limit()
    os.chdir(folder)
    for number in range(first, stop, step):
        print(json.dumps({"begun": number}), flush=True)
        print(json.dumps(describe_result(seed, number, folder)), flush=True)


if __name__ == "__main__":
    main()
