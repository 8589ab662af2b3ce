"""Generated samples as a folder of pictures and the data file that names them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from finesight import storage
from finesight.data.jsonl import write_samples
from finesight.synth.tasks import Task, of_kind

DATA = "data.jsonl"
PICTURES = "pictures"


def write_task(target: Path, task: Task, samples: int, seed: int, kind: str | None = None) -> Path:
    """Write the first `samples` samples of the task (of one kind of question, if given) into the
    new folder `target`: `data.jsonl` and `pictures/`. Gives the path of the data file.

    Raises UserError when `target` exists or cannot be written, or something to draw with is
    missing; nothing is half-written.
    """
    with storage.write_folder(target) as folder:
        (folder / PICTURES).mkdir()
        rows = []
        for index, drawn in islice(of_kind(task, seed, kind), samples):
            name = f"{PICTURES}/{index:06}.png"
            drawn.picture.save(folder / name)
            rows.append(drawn.as_sample(f"{task.name}-{seed}-{index}", name))
        write_samples(folder / DATA, rows)
    return target / DATA
