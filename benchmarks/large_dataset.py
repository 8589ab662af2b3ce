"""Measure startup time, memory and read speed with ten million samples.

    python benchmarks/large_dataset.py --work DIR --out FILE [--samples 10000000] [--cores 2]

Generates 400 images and a JSONL file whose samples use them in turn. Then runs `finesight train`
with finesight-tiny on a CPU, once resumed within the epoch. Measures the seconds to the first step
and the peak memory of the run with its workers (PSS, sampled ten times per second). Data loading
alone: samples/s in training order for two image sizes, and for large images in tar files and
Parquet; `cpu_ms` is the CPU time per sample, nearly independent of other programs. The script
removes its files.
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

NUM_IMAGES = 400
STEPS_BEFORE_STOP = 20
"""Steps before the run is stopped."""

BATCH_SIZE = 16
LIMIT_S = 1800.0
EXIT_CHECKPOINTED = 75
IMAGE_SIDES = {"small": (56, 84, 112), "large": (448,)}
"""Image sides in pixels."""

NUM_READ_STEPS = {"small": 400, "large": 40}
"""Steps of the data loading benchmark."""

CHUNK_SIZE = 10_000
"""Lines per write, and number of samples with large images."""

SAMPLES_PER_SHARD, ROW_GROUP_SIZE = 2500, 20
"""Samples per tar file and per Parquet row group."""

ResultRow = dict[str, Any]


def write_images(folder: Path, size_name: str) -> list[str]:
    """Write JPEG images of noise on a color."""
    rng = random.Random(size_name)
    (folder / size_name).mkdir(parents=True)
    names = []
    for number in range(NUM_IMAGES):
        size = rng.choice(IMAGE_SIDES[size_name]), rng.choice(IMAGE_SIDES[size_name])
        noise = Image.effect_noise(size, 40).convert("RGB")
        solid = Image.new("RGB", size, tuple(rng.randrange(256) for _ in range(3)))
        names.append(f"{size_name}/{number:03d}.jpg")
        Image.blend(noise, solid, 0.5).save(folder / names[-1])
    return names


def write_dataset(path: Path, image_names: list[str], num_samples: int) -> None:
    """Write one sample per line with a question about an image."""
    answers = "red", "green", "light blue", "white"
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, num_samples, CHUNK_SIZE):
            indices = range(start, min(start + CHUNK_SIZE, num_samples))
            file.writelines(
                f'{{"id": "s{n}", "messages": [{{"role": "user", "content": ['
                f'{{"type": "image", "image": "{image_names[n * 7919 % len(image_names)]}"}}, '
                '{"type": "text", "text": "Which colour?"}]}, '
                f'{{"role": "assistant", "content": "{answers[n % 4]}"}}]}}\n'
                for n in indices
            )


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(entry.name))
    descendants, frontier = [], [pid]
    while frontier:
        frontier = [child for one in frontier for child in children.get(one, [])]
        descendants += frontier
    return descendants


def _pss_bytes(pid: int) -> int:
    """Return the proportional set size (PSS) of a process in bytes."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def time_first_step(work: Path, data: Path, num_workers: int, name: str, *more: str) -> ResultRow:
    """Start or resume a run and stop it after a few steps. Returns first step time and peak
    memory."""
    recipe, metrics = work / "recipe.yaml", work / name / "metrics.jsonl"
    recipe.write_text("{}\n", encoding="utf-8")
    overrides = ["model=finesight-tiny", f"data.train={data}", f"output_dir={work / name}"]
    overrides += ["tune.language=lora", "image={min_pixels: 784, max_pixels: 12544}"]
    overrides += [
        f"train.batch_size={BATCH_SIZE}",
        f"train.num_workers={num_workers}",
        "train.device=cpu",
    ]
    command = [sys.executable, "-m", "finesight", "train", str(recipe), *overrides, *more]
    before, first_s, peak_bytes, stop_sent = _count_steps(metrics), 0.0, 0, False
    start = time.perf_counter()
    with (work / "screen.txt").open("w", encoding="utf-8") as screen:
        process = subprocess.Popen(command, stdout=screen, stderr=screen)
        while process.poll() is None:
            new_steps, seconds = _count_steps(metrics) - before, time.perf_counter() - start
            peak_bytes = max(peak_bytes, sum(map(_pss_bytes, _descendants(os.getpid()))))
            first_s = seconds if new_steps and not first_s else first_s
            if not stop_sent and (new_steps >= STEPS_BEFORE_STOP or seconds > LIMIT_S):
                stop_sent = True
                process.send_signal(signal.SIGTERM)
            time.sleep(0.1)
    if process.returncode != EXIT_CHECKPOINTED:
        raise SystemExit(f"exit {process.returncode}\n{(work / 'screen.txt').read_text()[-2000:]}")
    return {
        "workers": num_workers,
        "after_step": before,
        "first_step_s": round(first_s, 1),
        "peak_gb": round(peak_bytes / 2**30, 2),
    }


def _count_steps(metrics: Path) -> int:
    return metrics.read_text().count('"loss"') if metrics.exists() else 0


def measure_read_speed(
    data: Path, num_samples: int | None, size_name: str, num_workers: int
) -> ResultRow:
    """Measure data loading in samples/s, in training order."""
    # Imported here, after the cache folder of indices is set.
    from finesight.encode.renderer_builder import build_renderer
    from finesight.model_folder import locate_model
    from finesight.samples.corpus import load_corpus
    from finesight.settings.config import DataSettings, PixelRange, TrainFileSettings, TrainSettings
    from finesight.train.sampler import TrainSampler
    from finesight.train.step_dataset import StepDataset, read_steps

    start = time.perf_counter()
    corpus = load_corpus((TrainFileSettings(path=data),))
    opened_s = time.perf_counter() - start
    sampler = TrainSampler(
        corpus, range(num_samples or len(corpus)), TrainSettings(batch_size=BATCH_SIZE)
    )
    rule = PixelRange(min_pixels=784, max_pixels=448 * 448)
    renderer = build_renderer(locate_model("finesight-tiny"), rule, None)
    limit = DataSettings.model_fields["max_length"].default
    steps = StepDataset(corpus, renderer, sampler, 4096, "fail", max_length=limit)
    with closing(read_steps(steps, 0, num_workers, pin_memory=False)) as batches:
        next(batches)
        start, before = time.perf_counter(), time.process_time()
        number = sum(step.num_samples for step in islice(batches, NUM_READ_STEPS[size_name]))
        seconds, busy = time.perf_counter() - start, time.process_time() - before
    sides = IMAGE_SIDES[size_name]
    return {
        "file": data.name,
        "samples": len(sampler) * BATCH_SIZE,
        "pixels": f"{sides[0]} to {sides[-1]}" if len(sides) > 1 else str(sides[0]),
        "reading_processes": num_workers,
        "opened_s": round(opened_s, 2),
        "samples_per_s": round(number / seconds),
        "cpu_ms": None if num_workers else round(1000 * busy / number, 2),
    }


def write_shards(dataset: Path) -> list[Path]:
    """Write samples and images as tar files and as Parquet."""
    import pyarrow
    from pyarrow import parquet

    rows = [json.loads(line) for line in dataset.read_text(encoding="utf-8").splitlines()]
    packed = []
    for start in range(0, len(rows), SAMPLES_PER_SHARD):
        with tarfile.open(dataset.with_name(f"large-{start // SAMPLES_PER_SHARD}.tar"), "w") as tar:
            for row in rows[start : start + SAMPLES_PER_SHARD]:
                image_part, name = row["messages"][0]["content"][0], f"{row['id']}.jpg"
                image_bytes = (dataset.parent / image_part["image"]).read_bytes()
                image_part["image"] = name
                add_to_tar(tar, f"{row['id']}.json", json.dumps(row).encode())
                add_to_tar(tar, name, image_bytes)
                images = [{"path": name, "bytes": image_bytes}]
                packed.append(row | {"messages": json.dumps(row["messages"]), "images": images})
    parquet_path = dataset.with_suffix(".parquet")
    parquet.write_table(
        pyarrow.Table.from_pylist(packed), parquet_path, row_group_size=ROW_GROUP_SIZE
    )
    return [dataset.with_name("large-*.tar"), parquet_path]


def add_to_tar(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Add a file to a tar archive."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def main() -> None:
    """Run the benchmark, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--cores", type=int, default=2)
    options = parser.parse_args()
    work, samples, cores = options.work, options.samples, options.cores
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    work.mkdir(parents=True)
    # Index files are removed with the data.
    os.environ["HF_ASSETS_CACHE"] = str(work / "assets")
    try:
        names = {kind: write_images(work, kind) for kind in IMAGE_SIDES}
        data = work / "train.jsonl"
        start = time.perf_counter()
        write_dataset(data, names["small"], samples)
        report: ResultRow = {
            "command": "python benchmarks/large_dataset.py --work DIR --out FILE"
            f" --samples {samples}",
            "machine": f"CPU, {cores} of {os.cpu_count()} cores",
            "versions": {"python": platform.python_version()}
            | {name: importlib.metadata.version(name) for name in ("torch", "numpy", "pydantic")},
            "load_before": round(os.getloadavg()[0], 1),
            "samples": samples,
            "file_gb": round(data.stat().st_size / 2**30, 2),
            "written_s": round(time.perf_counter() - start, 1),
        }
        report["start"] = [
            time_first_step(work, data, 0, "alone"),
            time_first_step(work, data, cores, "alone", "--resume"),
            time_first_step(work, data, cores, "two"),
        ]
        print(json.dumps(report, indent=1), flush=True)
        write_dataset(work / "large.jsonl", names["large"], CHUNK_SIZE)
        report["input"] = [
            measure_read_speed(data, samples, "small", workers) for workers in (0, cores)
        ]
        for packed in (work / "large.jsonl", *write_shards(work / "large.jsonl")):
            report["input"] += [
                measure_read_speed(packed, None, "large", workers) for workers in (0, cores)
            ]
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(report, indent=1))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
