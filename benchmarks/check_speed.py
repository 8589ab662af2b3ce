"""How long does `data check` take for 100,000 samples, and does its memory stay flat?

    python benchmarks/check_speed.py [--samples 100000] [--contents 1000] [--work FOLDER]

Pictures are JPEGs of 1 megapixel (1216 x 864, quality 85): `--contents` different ones, each in 5
files of its own that are read and hashed, all files under as many names (hard links) as give each
sample a path of its own. Every sample has a question, an answer and a box; a tenth is held out.
The command itself is run and watched from outside. Rates of decoding for JPEG and PNG are
measured on one core: one second of them is what so many different pictures cost. Writes
results/check_speed.json.
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

from finesight.check.pictures import describe

OUT = Path(__file__).parent / "results" / "check_speed.json"
WIDTH, HEIGHT = 1216, 864
COPIES = 5


def paint(number: int) -> Image.Image:
    """A picture with the coarse shapes and the fine grain of a photograph."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)).astype(np.int16)
    grain = rng.integers(-10, 11, (HEIGHT, WIDTH, 1), dtype=np.int16)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))


def lay_out(folder: Path, samples: int, contents: int) -> tuple[Path, Path, int]:
    """The files of samples to train on and held out, and the bytes of a picture on average."""
    size = 0
    for number in range(contents):
        first = folder / f"{number}-0.jpg"
        paint(number).save(first, quality=85)
        size += first.stat().st_size
        for copy in range(1, COPIES):
            (folder / f"{number}-{copy}.jpg").write_bytes(first.read_bytes())
    train, held_out = folder / "train.jsonl", folder / "eval.jsonl"
    with train.open("w") as training, held_out.open("w") as holding:
        for number in range(samples):
            content = number % contents
            name = f"links/{number % 100}/{number}.jpg"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / f"{content}-{number // contents % COPIES}.jpg", folder / name)
            file = holding if content < contents // 10 else training
            file.write(json.dumps(record(number, name)) + "\n")
    return train, held_out, size // contents


def record(number: int, name: str) -> dict[str, object]:
    """A sample about a picture, with a question of its own and a box in the answer."""
    asked = [
        {"type": "image", "image": name},
        {"type": "text", "text": f"Where is number {number}?"},
    ]
    x, y = number % 900, number % 700
    box = {"type": "box", "image": 0, "label": f"{number}", "xyxy": [x, y, x + 80, y + 60]}
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": [box]}]
    return {"id": str(number), "messages": turns}


def watched(command: list[str]) -> tuple[float, list[float], str]:
    """Run a command: its seconds, the megabytes that it and its processes held together (a reading
    each second), and what it printed."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        memory = []
        while running.poll() is None:
            memory.append(held(running.pid))
            time.sleep(1)
        seconds = time.perf_counter() - start
        printed = running.stdout.read() if running.stdout else ""
    return seconds, memory, printed


def held(pid: int) -> float:
    """Megabytes of memory, proportionally shared, of a process and those it started."""
    total = 0.0
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) / 1000
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return total + sum(held(int(child)) for child in children)


def rate(folder: Path, suffix: str, pictures: int = 100) -> float:
    """Different pictures a second that one core decodes and sums up."""
    paths = []
    for number in range(pictures):
        paths.append(str(folder / f"rate-{number}{suffix}"))
        paint(number).save(paths[-1])
    start = time.process_time()
    assert all(content.fault is None for content in describe(paths)), "a damaged picture"
    return pictures / (time.process_time() - start)


def main() -> None:
    """Lay out, run, watch, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--contents", type=int, default=1000)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.work) as name:
        folder = Path(name)
        rates = {suffix: rate(folder, suffix) for suffix in (".jpg", ".png")}
        train, held_out, size = lay_out(folder, chosen.samples, chosen.contents)
        command = [sys.executable, "-m", "finesight", "data", "check", str(train), "--json"]
        seconds, memory, printed = watched([*command, "--against", str(held_out)])
    summary = json.loads(printed.splitlines()[-1])
    quarter = max(1, len(memory) // 4)
    result = {
        "samples": summary["samples"],
        "paths": summary["pictures"],
        "contents": summary["contents"],
        "bytes_of_a_picture": size,
        "seconds": round(seconds, 1),
        "cores": len(os.sched_getaffinity(0)),
        "load_before": [round(load, 1) for load in os.getloadavg()],
        "megabytes_after_a_quarter": round(max(memory[: quarter + 1])),
        "megabytes_most": round(max(memory)),
        "jpegs_a_second_on_a_core": round(rates[".jpg"]),
        "pngs_a_second_on_a_core": round(rates[".png"]),
        "faults": summary["faults"],
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {"numpy": np.__version__, "pillow": PIL.__version__},
    }
    print(json.dumps(result, indent=2))
    chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
