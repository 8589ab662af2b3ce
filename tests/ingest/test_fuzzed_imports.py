"""Every importer on thousands of spoilt sources: imported, or refused with a message."""

import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fuzzed_sources
import pytest
from fuzzed_sources import MAKERS, Source
from mutations import mutated_bytes, read_peak_memory

from finesight.errors import UserError
from finesight.files.storage import verify_folder
from finesight.ingest.import_source import ImportOptions, open_unvalidated
from finesight.ingest.importer import import_dataset
from finesight.ingest.source_fetch import fetch_source
from finesight.samples.sample import read_samples

SEED = 32
BATCH = 1000
"""Cases of one process."""

MEMORY = 2 * 10**9
"""Bytes of address space that a case may add to those of the process at its start."""

CASE_S = 20.0
"""CPU seconds that a case may take, and a tenth of the seconds after which it is killed."""

REQUEST_CHANGES: tuple[dict[str, Any], ...] = (
    *({"on_invalid_row": "skip"}, {"train_fraction": 0.5}, {"eval_last": 1}, {"limit": 1}),
    *({"row_range": (0, 1)}, {"copy_images": True}, {"prompt": "{labels}?"}, {"prompt": ""}),
    *({"box_format": "xywh"}, {"box_units": "1000"}),
)


def make_case(number: int) -> tuple[Source, random.Random]:
    """Return the source of a case, and the random numbers to write it with."""
    rng = random.Random(f"{SEED} {number}")
    source = MAKERS[number % len(MAKERS)](rng)
    if rng.random() < 0.4:
        name = rng.choice(list(source.files))
        source.files[name] = mutated_bytes(rng, source.files[name])
    if rng.random() < 0.05:
        name = rng.choice(list(source.files))
        other = rng.choice((f"{name}\udcd6", "\udcd6\udcd0.png", " ", "x" * 250, f"{name}.png"))
        source.files[other] = source.files[name]
    if rng.random() < 0.3:
        source.request = source.request | rng.choice(REQUEST_CHANGES)
    if rng.random() < 0.03:
        names = (*fuzzed_sources.ROWS, "coco", "voc", "yolo")
        source.request = source.request | {"format": rng.choice(names)}
    return source, rng


def _reject_constant(name: str) -> None:
    raise AssertionError(f"{name} was written")


def import_and_verify(source: Path, out: Path, request: ImportOptions) -> str:
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
            json.loads(line, parse_constant=_reject_constant)
        for sample in read_samples(file):
            for part in sample.iter_parts():
                assert part.type != "image" or (out / part.image).is_file(), part
    return "imported"


def check_unvalidated(source: Path, request: ImportOptions, saved: Path) -> None:
    """Read a source as `check` does, with its faults."""
    saved.mkdir()
    try:
        for drafted in open_unvalidated(source, request, saved):
            assert all(sample.messages for sample in drafted.samples)
    except UserError as error:
        str(error).encode()


def run_case(number: int, folder: Path) -> dict[str, Any]:
    """Import and check a source in a new folder, which stays if the case fails."""
    source, rng = make_case(number)
    location = Path(tempfile.mkdtemp(prefix=f"{number}-", dir=folder))
    for name in ("source", "made"):
        (location / name).mkdir()
    started, problem = time.process_time(), ""
    try:
        path = source.write(location / "source", rng)
        request = ImportOptions(**source.request)
        outcome = import_and_verify(path, location / "made" / "out", request)
        if source.kind != "archive":
            check_unvalidated(path, request, location / "saved")
        shutil.rmtree(location, ignore_errors=True)
    except Exception:
        outcome, problem = "crashed", f"{location}\n{traceback.format_exc()[-1500:]}"
    result = {"number": number, "kind": source.kind, "outcome": outcome, "problem": problem}
    return result | {"cpu_s": time.process_time() - started, "peak": read_peak_memory()}


def run_batch(numbers: range, folder: Path, log: Path) -> None:
    """Run cases in this forked process, whose memory is limited; an alarm kills a slow one."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    os.chdir(folder)
    with log.open("w", buffering=1) as file:
        for number in numbers:
            signal.setitimer(signal.ITIMER_REAL, 10 * CASE_S)
            file.write(json.dumps(run_case(number, folder)) + "\n")


def results(count: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the result of each case. A case may end its process; the next one continues."""
    first = 0
    while first < count:
        numbers, log = range(first, min(count, first + BATCH)), folder / f"{first}.jsonl"
        if (child := os.fork()) == 0:
            try:
                run_batch(numbers, folder, log)
            finally:
                os._exit(0)
        os.waitpid(child, 0)
        found = [json.loads(line) for line in log.read_text().splitlines()]
        yield from found
        first += len(found)
        if len(found) < len(numbers):
            yield {"number": first, "kind": "?", "outcome": "ended the process"}
            first += 1


def fuzz(count: int, folder: Path) -> None:
    """Run cases, and fail with those that ended badly."""
    outcomes: defaultdict[str, Counter[str]] = defaultdict(Counter)
    failed, longest, most = [], 0.0, 0
    for one in results(count, folder):
        outcomes[one["kind"]][one["outcome"]] += 1
        longest, most = max(longest, one.get("cpu_s", 0.0)), max(most, one.get("peak", 0))
        if one["outcome"] not in ("imported", "refused"):
            failed.append(f"case {one['number']} {one['outcome']}: {one.get('problem', '')}")
    total = sum((counts for counts in outcomes.values()), Counter[str]())
    print(f"{dict(total)}, at most {longest:.1f} s of CPU time and {most / 1e9:.2f} GB")
    assert not failed, "\n\n".join([f"{len(failed)} of {count} failed", *failed[:5]])
    assert total.total() == count
    assert longest < CASE_S
    assert most < MEMORY
    for kind, counts in outcomes.items():
        assert min(counts["imported"], counts["refused"]) > 0, f"{kind}: {counts}"


def test_valid_sources_are_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is spoilt in the other tests is sound before."""
    monkeypatch.setattr(fuzzed_sources, "spoilt_data", lambda rng, data: data)
    monkeypatch.setattr(fuzzed_sources, "spoilt_text", lambda rng, text: text.encode())
    monkeypatch.setattr(fuzzed_sources, "weird_name", lambda rng, name: name)
    # Columns of any type have any role in a Parquet file, and archives contain such files.
    for number, make in enumerate(MAKERS[:-2]):
        rng, folder = random.Random(number), tmp_path / str(number)
        source = make(rng)
        monkeypatch.setattr(rng, "randrange", lambda *bounds: 299)  # regular files only
        path = source.write(folder / "source", rng)
        # Questions about polygons need an outline of each object of a class.
        request = source.request
        if request.get("box_task") == "polygons":
            request = request | {"box_task": "detection"}
        with fetch_source(str(path), folder / "out", ImportOptions(**request)) as found:
            summary = import_dataset(found.path, folder / "out", found.options)
        assert summary.output_files, source.kind


def test_some_spoilt_sources(tmp_path: Path) -> None:
    fuzz(20 * len(MAKERS), tmp_path)


@pytest.mark.fuzz
def test_many_spoilt_sources(tmp_path: Path) -> None:
    """All importers, some 900 cases each."""
    fuzz(20_000, tmp_path)
