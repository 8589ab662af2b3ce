"""Ten million samples: how long until the first step, how much memory, how fast they are read.

    python benchmarks/big_data.py --work DIR --out FILE [--samples 10000000] [--cores 2]

Draws 400 pictures and writes a JSONL file of so many samples that show them in turn. Then real
`finesight train` runs of finesight-tiny on a CPU, one of which goes on in the middle of the epoch:
seconds from the command to the first step and the most memory, that of the run and its reading
processes (a page that some share counted once), looked at ten times a second. Input alone, nothing
learned: samples/s that come out of the readers, in the run's own order, for pictures of two sizes,
and of the larger ones in tars and Parquet, too. The files that it wrote are removed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import io
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

PICTURES = 400
STEPS = 20
"""After so many a run is asked to stop."""

BATCH = 16
LIMIT_S = 1800.0
INTERRUPTED = 75
SIZES = {"small": (56, 84, 112), "large": (448,)}
"""Sides in pixels of what is drawn."""

READ = {"small": 400, "large": 40}
"""Steps that are read, nothing learned."""

AT_ONCE = 10_000
"""Lines that are written at once, and samples with large pictures."""

SHARD, ROW_GROUP = 2500, 20
"""Samples of a tar, and of a row group of Parquet."""

Row = dict[str, Any]


def draw(folder: Path, kind: str) -> list[str]:
    """Pictures of noise laid over a colour, as JPEG."""
    rng = random.Random(kind)
    (folder / kind).mkdir(parents=True)
    names = []
    for number in range(PICTURES):
        size = rng.choice(SIZES[kind]), rng.choice(SIZES[kind])
        noise = Image.effect_noise(size, 40).convert("RGB")
        plain = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
        names.append(f"{kind}/{number:03d}.jpg")
        Image.blend(noise, plain, 0.5).save(folder / names[-1])
    return names


def write(path: Path, names: list[str], samples: int) -> None:
    """A question about a picture and its answer on each line."""
    answers = "red", "green", "light blue", "white"
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, samples, AT_ONCE):
            numbers = range(start, min(start + AT_ONCE, samples))
            file.writelines(
                f'{{"id": "s{n}", "messages": [{{"role": "user", "content": ['
                f'{{"type": "image", "image": "{names[n * 7919 % len(names)]}"}}, '
                '{"type": "text", "text": "Which colour?"}]}, '
                f'{{"role": "assistant", "content": "{answers[n % 4]}"}}]}}\n'
                for n in numbers
            )


def _below(process: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, new = [], [process]
    while new:
        new = [child for one in new for child in children.get(one, [])]
        found += new
    return found


def _proportional(process: int) -> int:
    """Bytes of its memory, each page divided by the number of processes that share it."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def train(work: Path, data: Path, workers: int, name: str, *more: str) -> Row:
    """A run over all samples, or one that goes on, asked to stop after a few steps: when the first
    of them was over, and the most memory until then."""
    recipe, metrics = work / "recipe.yaml", work / name / "metrics.jsonl"
    recipe.write_text("{}\n", encoding="utf-8")
    words = ["model=finesight-tiny", f"data.train={data}", f"output={work / name}"]
    words += ["tune.language=lora", "picture={min_pixels: 784, max_pixels: 12544}"]
    words += [f"train.batch={BATCH}", f"train.workers={workers}", "train.device=cpu"]
    command = [sys.executable, "-m", "finesight", "train", str(recipe), *words, *more]
    before, first_s, most, asked = _steps(metrics), 0.0, 0, False
    start = time.perf_counter()
    with (work / "screen.txt").open("w", encoding="utf-8") as screen:
        process = subprocess.Popen(command, stdout=screen, stderr=screen)
        while process.poll() is None:
            taken, seconds = _steps(metrics) - before, time.perf_counter() - start
            most = max(most, sum(map(_proportional, _below(os.getpid()))))
            first_s = seconds if taken and not first_s else first_s
            if not asked and (taken >= STEPS or seconds > LIMIT_S):
                asked = True
                process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
    if process.returncode != INTERRUPTED:
        raise SystemExit(f"exit {process.returncode}\n{(work / 'screen.txt').read_text()[-2000:]}")
    return {
        "workers": workers,
        "after_step": before,
        "first_step_s": round(first_s, 1),
        "peak_gb": round(most / 2**30, 2),
    }


def _steps(metrics: Path) -> int:
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def read(data: Path, samples: int | None, kind: str, workers: int) -> Row:
    """Samples a second out of the readers, in the order of a run over all of them, or so many."""
    # Here, when it is settled where indices are kept.
    from finesight.config import Data, DataFile, PixelRange, Train
    from finesight.data.sources import load_sources
    from finesight.encode.rendering import renderer_of
    from finesight.hub import locate
    from finesight.train.course import Course
    from finesight.train.loader import StepData, read_steps

    start = time.perf_counter()
    corpus = load_sources((DataFile(path=data),))
    opened_s = time.perf_counter() - start
    course = Course(corpus, range(samples or len(corpus)), Train(batch=BATCH))
    rule = PixelRange(min_pixels=784, max_pixels=448 * 448)
    renderer = renderer_of(locate("finesight-tiny"), rule, None)
    limit = Data.model_fields["max_length"].default
    steps = StepData(corpus, renderer, course, 4096, "refuse", max_length=limit)
    with closing(read_steps(steps, 0, workers, pin=False)) as coming:
        next(coming)
        start = time.perf_counter()
        number = sum(step.samples for step in islice(coming, READ[kind]))
        seconds = time.perf_counter() - start
    sides = SIZES[kind]
    return {
        "file": data.name,
        "samples": len(course) * BATCH,
        "pixels": f"{sides[0]} to {sides[-1]}" if len(sides) > 1 else str(sides[0]),
        "reading_processes": workers,
        "opened_s": round(opened_s, 2),
        "samples_per_s": round(number / seconds),
    }


def pack(table: Path) -> list[Path]:
    """The samples and their pictures as tars and as Parquet: what to read."""
    import pyarrow
    from pyarrow import parquet

    rows = [json.loads(line) for line in table.read_text(encoding="utf-8").splitlines()]
    packed = []
    for start in range(0, len(rows), SHARD):
        with tarfile.open(table.with_name(f"large-{start // SHARD}.tar"), "w") as tar:
            for row in rows[start : start + SHARD]:
                shown, name = row["messages"][0]["content"][0], f"{row['id']}.jpg"
                picture = (table.parent / shown["image"]).read_bytes()
                shown["image"] = name
                add(tar, f"{row['id']}.json", json.dumps(row).encode())
                add(tar, name, picture)
                images = [{"path": name, "bytes": picture}]
                packed.append(row | {"messages": json.dumps(row["messages"]), "images": images})
    whole = table.with_suffix(".parquet")
    parquet.write_table(pyarrow.Table.from_pylist(packed), whole, row_group_size=ROW_GROUP)
    return [table.with_name("large-*.tar"), whole]


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Put a file into the tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    work, samples, cores = options.work, options.samples, options.cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    work.mkdir(parents=True)
    # Indices of these files go when the files do.
    os.environ["HF_ASSETS_CACHE"] = str(work / "assets")
    try:
        names = {kind: draw(work, kind) for kind in SIZES}
        data = work / "train.jsonl"
        start = time.perf_counter()
        write(data, names["small"], samples)
        report: Row = {
            "command": f"python benchmarks/big_data.py --work DIR --out FILE --samples {samples}",
            "machine": f"CPU, {cores} of {os.cpu_count()} cores",
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pydantic")},
            "load_before": round(os.getloadavg()[0], 1),
            "samples": samples,
            "file_gb": round(data.stat().st_size / 2**30, 2),
            "written_s": round(time.perf_counter() - start, 1),
        }
        report["start"] = [
            train(work, data, 0, "alone"),
            train(work, data, cores, "alone", "--resume"),
            train(work, data, cores, "two"),
        ]
        print(json.dumps(report, indent=1), flush=True)
        write(work / "large.jsonl", names["large"], AT_ONCE)
        report["input"] = [read(data, samples, "small", workers) for workers in (0, cores)]
        for packed in (work / "large.jsonl", *pack(work / "large.jsonl")):
            report["input"] += [read(packed, None, "large", workers) for workers in (0, cores)]
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(report, indent=1))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
