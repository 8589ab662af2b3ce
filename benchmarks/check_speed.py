"""Measure time and memory of `check` for 100,000 samples.

    python benchmarks/check_speed.py [--samples 100000] [--num-images 1000] [--work FOLDER]

Images are JPEGs of 1 megapixel (1216 x 864, quality 85). Each of `--num-images` images has 5
copies, which are read and hashed; hard links give each sample its own path. Each sample has a
question, an answer and a box; a tenth is the validation split. The benchmark runs the command as a
subprocess. It also measures JPEG and PNG decoding on one core. Writes results/check_speed.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import PIL
from PIL import Image

from finesight.ingest.check.image_catalog import inspect_images

DEFAULT_OUTPUT = Path(__file__).parent / "results" / "check_speed.json"
WIDTH, HEIGHT = 1216, 864
FILES_PER_IMAGE = 5


def draw_photo(seed: int) -> Image.Image:
    """Generate an image with coarse shapes and fine grain, like a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-10, 11, (HEIGHT, WIDTH, 1), dtype=np.int16)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def write_dataset(folder: Path, num_samples: int, num_images: int) -> tuple[Path, Path, int]:
    """Write training and validation samples. Returns the files and the mean image size in bytes."""
    size = 0
    for number in range(num_images):
        first = folder / f"{number}-0.jpg"
        draw_photo(number).save(first, quality=85)
        size += first.stat().st_size
        for copy in range(1, FILES_PER_IMAGE):
            (folder / f"{number}-{copy}.jpg").write_bytes(first.read_bytes())
    train, validation = folder / "train.jsonl", folder / "eval.jsonl"
    with train.open("w") as training, validation.open("w") as validating:
        for number in range(num_samples):
            content = number % num_images
            name = f"links/{number % 100}/{number}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(
                folder / f"{content}-{number // num_images % FILES_PER_IMAGE}.jpg", folder / name
            )
            file = validating if content < num_images // 10 else training
            file.write(json.dumps(make_record(number, name)) + "\n")
    return train, validation, size // num_images


def make_record(index: int, image_name: str) -> dict[str, object]:
    """Make a sample with a unique question and a box answer."""
    question = [
        {"type": "image", "image": image_name},
        {"type": "text", "text": f"Where is number {index}?"},
    ]
    x, y = index % 900, index % 700
    box = {"type": "box", "image": 0, "label": f"{index}", "xyxy": [x, y, x + 80, y + 60]}
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": [box]}]
    return {"id": str(index), "messages": turns}


def monitor_memory(command: list[str]) -> tuple[float, list[float], str]:
    """Run a command and measure seconds, peak memory in MB (sampled each second) and output."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        memory = []
        while running.poll() is None:
            memory.append(pss_megabytes(running.pid))
            time.sleep(1)
        seconds = time.perf_counter() - start
        printed = running.stdout.read() if running.stdout else ""
    return seconds, memory, printed


def pss_megabytes(pid: int) -> float:
    """Return the proportional set size (PSS) of a process and its children in MB."""
    total = 0.0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1000
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return total + sum(pss_megabytes(int(child)) for child in children)


def measure_decode_throughput(folder: Path, suffix: str, num_images: int = 100) -> float:
    """Measure the decoding throughput of one core in images/s."""
    paths = []
    for number in range(num_images):
        paths.append(str(folder / f"decode-{number}{suffix}"))
        draw_photo(number).save(paths[-1])
    start = time.process_time()
    assert all(content.issue_code is None for content in inspect_images(paths)), "a damaged image"
    return num_images / (time.process_time() - start)


def main() -> None:
    """Run the benchmark, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--num-images", type=int, default=1000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        folder = Path(name)
        throughput = {
            suffix: measure_decode_throughput(folder, suffix) for suffix in (".jpg", ".png")
        }
        train, validation, size = write_dataset(folder, args.samples, args.num_images)
        command = [sys.executable, "-m", "finesight", "check", str(train), "--json"]
        seconds, memory, printed = monitor_memory([*command, "--against", str(validation)])
    summary = json.loads(printed.splitlines()[-1])
    quarter = max(1, len(memory) // 4)
    result = {
        "samples": summary["num_samples"],
        "images": summary["num_images"],
        "unique_images": summary["num_unique_images"],
        "bytes_per_image": size,
        "seconds": round(seconds, 1),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": [round(load, 1) for load in os.getloadavg()],
        "megabytes_after_a_quarter": round(max(memory[: quarter + 1])),
        "megabytes_most": round(max(memory)),
        "jpegs_a_second_on_a_core": round(throughput[".jpg"]),
        "pngs_a_second_on_a_core": round(throughput[".png"]),
        "issues": summary["issues"],
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {"numpy": np.__version__, "pillow": PIL.__version__},
    }
    print(json.dumps(result, indent=2))
    args.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
