"""Every importer on thousands of spoilt sources: imported, or refused with a message.

Processes of their own, whose memory is limited, import them; see `fuzzed_sources` for how a case
that fails is made again.
"""

from __future__ import annotations

import json
import os
import random
import selectors
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzzed_sources
import pytest
from fuzz_worker import CASE_S, MEMORY

from finesight.data.import_source import ImportOptions
from finesight.data.importer import import_dataset
from finesight.data.source_fetch import fetch_source

WORKER = Path(__file__).with_name("fuzz_worker.py")
BATCH = 1000
"""Cases of one process."""

SILENCE_S = 15 * CASE_S
"""Seconds without a line from a process after which it is ended: it hangs outside of Python."""

SEED = 32


def results(first: int, stop: int, folder: Path) -> Iterator[dict[str, Any]]:
    """What became of each case; where a process ended early, that of the case it was at."""
    while first < stop:
        started = first
        for line in worker_lines(first, min(stop, first + BATCH), folder):
            output = json.loads(line)
            started = output.get("begun", started)
            if "outcome" in output:
                yield output
                first = output["number"] + 1
        if first == started:
            yield {"number": started, "kind": "?", "outcome": "ended the process"}
            first = started + 1


def worker_lines(first: int, stop: int, folder: Path) -> Iterator[str]:
    """The lines of a process that runs the cases, which ends when it stays silent."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), *map(str, (SEED, first, stop, 1)), str(folder)]
    pipe, stored = subprocess.PIPE, folder / f"stderr-{first}"
    with (
        stored.open("wb") as errors,
        subprocess.Popen(command, stdout=pipe, stderr=errors, env=environment) as process,
        selectors.DefaultSelector() as selector,
    ):
        assert process.stdout is not None, "no pipe"
        selector.register(process.stdout, selectors.EVENT_READ)
        rest = b""
        while selector.select(SILENCE_S):
            content = os.read(process.stdout.fileno(), 2**16)
            if not content:
                break
            *lines, rest = (rest + content).split(b"\n")
            yield from (line.decode() for line in lines)
        process.kill()


def fuzz(count: int, folder: Path) -> None:
    """Run so many cases, and fail with those that ended badly."""
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    failed, longest, most, seconds = [], 0.0, 0, 0.0
    for one in results(0, count, folder):
        outcomes[one["kind"]][one["outcome"]] += 1
        longest = max(longest, one.get("cpu_s", 0.0))
        most = max(most, one.get("peak", 0))
        seconds += one.get("cpu_s", 0.0)
        if one["outcome"] not in ("imported", "refused"):
            failed.append(
                f"case {one['number']} {one['outcome']}: {one.get('problem', '')[-1500:]}"
            )
    total = sum((counts for counts in outcomes.values()), Counter[str]())
    print(
        f"{total.total()} cases {dict(total)}: {seconds:.0f} s of the processor, the longest"
        f" {longest:.1f} s, the most memory {most / 1e9:.2f} GB"
    )
    assert not failed, "\n\n".join([f"{len(failed)} of {count} failed", *failed[:5]])
    assert total.total() == count
    assert longest < CASE_S
    assert most < MEMORY
    for kind, counts in outcomes.items():
        assert min(counts["imported"], counts["refused"]) > 0, f"{kind}: {counts}"


def put_as_it_is(location: bytes, content: bytes, rng: random.Random) -> None:
    Path(os.fsdecode(location)).write_bytes(content)


def test_valid_sources_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is spoilt in the other tests is sound before."""
    monkeypatch.setattr(fuzzed_sources, "spoilt_data", lambda rng, data: data)
    monkeypatch.setattr(fuzzed_sources, "spoilt_text", lambda rng, text: text.encode())
    monkeypatch.setattr(fuzzed_sources, "weird_text", lambda rng: "a house")
    monkeypatch.setattr(fuzzed_sources, "weird_name", lambda rng, name: name)
    monkeypatch.setattr(fuzzed_sources, "rare_column", lambda rng, rows: ["1", "2", "3"])
    monkeypatch.setattr(fuzzed_sources, "_put", put_as_it_is)
    for number, make in enumerate(fuzzed_sources.MAKERS):
        if make in (fuzzed_sources.typed_table, fuzzed_sources.archive):
            continue  # columns of any type in any role
        rng, folder = random.Random(number), tmp_path / str(number)
        (folder / "source").mkdir(parents=True)
        source = make(rng)
        source.request.pop("ask", None)
        path = source.write(folder / "source", rng)
        with fetch_source(str(path), folder / "out", ImportOptions(**source.request)) as found:
            assert import_dataset(found.path, folder / "out", found.options).output_files, (
                source.kind
            )


def test_some_spoilt_sources(tmp_path: Path) -> None:
    fuzz(20 * len(fuzzed_sources.MAKERS), tmp_path)


@pytest.mark.fuzz
def test_many_spoilt_sources(tmp_path: Path) -> None:
    """All importers, some 900 cases each."""
    fuzz(20_000, tmp_path)
