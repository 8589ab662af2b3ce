"""Generated samples as a folder of pictures and the data file that names them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

from finesight import storage
from finesight.data.jsonl import write_samples
from finesight.synth.drawn import Drawn
from finesight.synth.tasks import Task, mixed, of_kind

DATA = "data.jsonl"
PICTURES = "pictures"


def write_task(target: Path, task: Task, samples: int, seed: int, kind: str | None = None) -> Path:
    """Write the first `samples` samples of the task (of one kind of question, if given) into the
    new folder `target`: `data.jsonl` and `pictures/`. Gives the path of the data file.

    Raises UserError when `target` exists or cannot be written, or something to draw with is
    missing; nothing is half-written.
    """
    return _write(target, f"{task.name}-{seed}", islice(of_kind(task, seed, kind), samples), "png")


def write_mixture(target: Path, mixture: Mapping[str, float], seed: int, numbers: range) -> Path:
    """Write the samples with these numbers of a mixture of tasks, as `write_task` does, but with
    pictures that are not compressed: five times as quick to write, and seven times to read."""
    drawn = ((number, mixed(mixture, seed, number)) for number in numbers)
    return _write(target, f"mixture-{seed}", drawn, "bmp")


def _write(target: Path, name: str, samples: Iterable[tuple[int, Drawn]], form: str) -> Path:
    with storage.write_folder(target) as folder:
        (folder / PICTURES).mkdir()
        rows = []
        for index, drawn in samples:
            picture = f"{PICTURES}/{index:06}.{form}"
            drawn.picture.save(folder / picture)
            rows.append(drawn.as_sample(f"{name}-{index}", picture))
        write_samples(folder / DATA, rows)
    return target / DATA
