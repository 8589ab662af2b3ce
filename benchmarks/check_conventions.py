"""How often `data check` names a box convention planted across a source, and whether it accuses
sources that have none.

    python benchmarks/check_conventions.py DATA_FOLDER [--trials 100] [--jobs 1] [--seed 0]

DATA_FOLDER holds captions/ and grounding/, real boxes; the other sources are drawn. Each trial
takes 300 samples of a source (all where it has fewer), and each fault is planted in all of them.
Every fault is tried so many times on the main sources, a twentieth as often on the others. Prints a
table and writes results/check_conventions.json beside this file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from scenes import Corners, Gallery, Item, Page, Scene, pages, quickstart, real, scenes

from finesight.check.conventions.judge import conventions
from finesight.check.conventions.readings import PIXEL_CORNERS, Claim, turned
from finesight.data.boxes import BoxForm

SAMPLES = 300
"""Samples of a source in one trial."""

DRAWN = 300
"""Samples of a drawn source."""

Record = dict[str, Any]

MAIN = ("words and receipts", "objects", "objects, mixed sizes")
"""The sources on which every fault is tried most."""

Plant = Callable[[Corners, tuple[int, int], random.Random], Corners]


@dataclass(frozen=True)
class Source:
    """Samples, and what is wrong with them before anything is planted: nothing.

    `tells` is False where neither bounds nor pictures could tell a convention. `form` is how the
    boxes are written, and read. `turns`: the pictures have EXIF turns, and the boxes are right.
    `slips` is the share of boxes that are mistaken.
    """

    name: str
    items: Sequence[Item]
    tells: bool = True
    form: BoxForm = PIXEL_CORNERS
    turns: bool = False
    slips: float = 0.0


@dataclass(frozen=True)
class Fault:
    """A fault, the code that names it, and how a trial plants it: a function of box and picture."""

    name: str
    code: str
    plant: Callable[[random.Random], Plant]
    turns: bool = False


def as_xywh(box: Corners, size: tuple[int, int], rng: random.Random) -> Corners:
    x1, y1, x2, y2 = box
    return x1, y1, x2 - x1, y2 - y1


def in_units(whole: float, digits: int, box: Corners, size: tuple[int, int], _: object) -> Corners:
    sides = (size[1], size[0]) * 2
    return tuple(round(whole * v / side, digits) for v, side in zip(box, sides, strict=True))


def in_copy(rng: random.Random) -> Plant:
    """A copy as scripts make them: a factor, a square, another fixed size, or a longest side."""
    kind = rng.choice(("factor", "square", "fixed", "longest"))
    factor = rng.choice((0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.85, 1.2, 1.5, 2.0))
    square = rng.choice((224, 336, 384, 448, 512, 560, 640, 768, 896, 1120))
    fixed = rng.choice(((600, 450), (800, 600), (1024, 768), (504, 280), (700, 420)))
    longest = rng.choice((336, 512, 600, 800, 1333))

    def plant(box: Corners, size: tuple[int, int], _: random.Random) -> Corners:
        height, width = size
        sides = {
            "factor": (factor * width, factor * height),
            "square": (square, square),
            "fixed": fixed,
            "longest": tuple(longest * side / max(size) for side in (width, height)),
        }[kind]
        shares = in_units(1, 9, box, size, None)
        return tuple(round(share * sides[axis % 2], 1) for axis, share in enumerate(shares))

    return plant


FAULTS = (
    Fault("xywh as xyxy", "boxes-xywh", lambda rng: as_xywh),
    Fault("0-1000 as pixels", "boxes-thousandths", lambda rng: partial(in_units, 1000, 0)),
    Fault("0-1 as pixels", "boxes-shares", lambda rng: partial(in_units, 1, 4)),
    Fault("a resized copy", "boxes-resized", in_copy),
    Fault("before the EXIF turn", "boxes-before-turn", lambda rng: lambda box, *_: box, True),
)


def drawn(gallery: Gallery, seed: int) -> list[Source]:
    """The drawn sources."""

    def size(low: int, high: int, ratio: float = 1.6) -> Callable[[random.Random], tuple[int, int]]:
        def choose(rng: random.Random) -> tuple[int, int]:
            side = rng.randint(low, high)
            other = max(low // 2, round(side * rng.uniform(1 / ratio, ratio)))
            return side, other

        return choose

    def one_of(*sizes: tuple[int, int]) -> Callable[[random.Random], tuple[int, int]]:
        return lambda rng: rng.choice(sizes)

    mixed, page = size(300, 1400), size(500, 1100, 1.4)
    photo = one_of((4032, 3024), (3024, 4032), (3000, 2000), (1920, 1080))
    near = size(980, 1020, 1.02)
    corner, centre = (0.0, 0.0, 0.45, 0.45), (0.3, 0.3, 0.7, 0.7)
    objects = {
        "objects, mixed sizes": Scene(mixed),
        "objects, all 640 x 480": Scene(one_of((640, 480))),
        "objects, photographs above 1000": Scene(photo),
        "objects, few": Scene(mixed, drawn=(1, 1), labelled=1),
        "objects, many": Scene(mixed, drawn=(8, 20), labelled=12, extent=(0.04, 0.2)),
        "objects, small": Scene(mixed, extent=(0.03, 0.08)),
        "objects, large": Scene(mixed, extent=(0.5, 0.95), drawn=(1, 2), labelled=1),
        "objects, central": Scene(mixed, place=centre, extent=(0.1, 0.3)),
        "objects, upper left": Scene(mixed, place=corner, extent=(0.08, 0.25)),
        "photographs, all below 1000": Scene(
            one_of((4000, 3000)), (0, 0, 0.25, 0.33), (0.03, 0.12)
        ),
        "objects, about 1000 x 1000": Scene(near),
        "objects, squares": Scene(one_of(*((s, s) for s in (256, 300, 512, 640, 900)))),
        "objects, panoramas": Scene(one_of((1800, 500), (1500, 400), (2000, 640))),
        "objects on bricks": Scene(mixed, background="bricks"),
        "objects on plain ground": Scene(mixed, background="plain"),
    }
    text = {
        "lines of text": Page(page),
        "words, thin boxes": Page(page, words=True, line=(0.014, 0.02)),
        "receipts, text on the left": Page(page, column=(0.05, 0.5)),
        "lines of text, loose boxes": Page(page, loose=0.25),
    }
    sources = [Source("quickstart's shapes", list(quickstart(gallery, DRAWN, random.Random(seed))))]
    for name, scene in objects.items():
        rng = random.Random(f"{seed} {name}")
        sources.append(Source(name, list(scenes(gallery, name, scene, DRAWN, rng))))
    for name, page_ in text.items():
        rng = random.Random(f"{seed} {name}")
        sources.append(Source(name, list(pages(gallery, name, page_, DRAWN, rng))))
    return sources


def silent(sources: dict[str, Source], seed: int) -> list[Source]:
    """Clean sources in which little or nothing tells, or which look like a fault."""
    rng = random.Random(seed)
    base, text = sources["objects, mixed sizes"].items, sources["lines of text"].items

    def everywhere(item: Item) -> Corners:
        height, width = item.size
        x1, x2 = sorted(rng.sample(range(width), 2))
        y1, y2 = sorted(rng.sample(range(height), 2))
        return x1, y1, x2, y2

    def with_boxes(items: Sequence[Item], box: Callable[[Item], Corners]) -> list[Item]:
        return [Item(item.picture, item.size, (box(item),)) for item in items]

    def part(*shares: float) -> Callable[[Item], Corners]:
        return lambda item: tuple(s * item.size[1 - n % 2] for n, s in enumerate(shares))

    def loose(item: Item) -> Corners:
        x1, y1, x2, y2 = item.boxes[0]
        across, down = 0.15 * (x2 - x1), 0.15 * (y2 - y1)
        height, width = item.size
        return (
            max(x1 - across, 0),
            max(y1 - down, 0),
            min(x2 + across, width),
            min(y2 + down, height),
        )

    few = [Item(i.picture, i.size, (b,)) for i in base[:60] for b in i.boxes] * 3
    return [
        Source("whole pictures", with_boxes(base, part(0, 0, 1, 1)), False),
        Source("nearly whole pictures", with_boxes(base, part(0.04, 0.04, 0.96, 0.96)), False),
        Source("the same box everywhere", with_boxes(base, part(0.3, 0.2, 0.6, 0.5)), False),
        Source("the same box on text", with_boxes(text, part(0.3, 0.2, 0.6, 0.25)), False),
        Source("boxes without a relation", with_boxes(base, everywhere), False),
        Source("boxes without a relation, text", with_boxes(text, everywhere), False),
        Source("12 pictures", [i for i in base[:12] for _ in range(30)], False),
        Source("60 pictures", few),
        Source("one picture", [base[0]] * 300, False),
        Source("loose boxes", with_boxes(base, loose)),
        Source("3 % mistaken boxes", base, slips=0.03),
        Source("EXIF turns, boxes right", base, turns=True),
        Source(
            "EXIF turns, photographs", sources["objects, photographs above 1000"].items, turns=True
        ),
        Source("read as xywh, rightly", base, form=BoxForm("xywh")),
        Source("read as cxcywh of 1, rightly", base, form=BoxForm("cxcywh", "1")),
        Source("read in thousandths, rightly", base, form=BoxForm("xyxy", "1000")),
    ]


def claims(source: Source, fault: Fault | None, rng: random.Random) -> list[Claim]:
    """A trial's claims: samples drawn without replacement, the fault planted in every box."""
    picked = sorted(rng.sample(range(len(source.items)), min(SAMPLES, len(source.items))))
    plant = fault.plant(rng) if fault is not None else None
    all_turned = rng.choice((6, 8, 3, None))
    found = []
    for number in picked:
        item = source.items[number]
        turn = 1
        if source.turns or (fault is not None and fault.turns):
            turn = all_turned or rng.choice((1, 3, 6, 8))
        for box in item.boxes:
            if plant is not None:
                numbers = plant(box, item.size, rng)
                if fault is not None and fault.turns:
                    numbers = before_turn(box, item.size, turn)
            else:
                numbers = written(source.form, box, item.size)
                if rng.random() < source.slips:
                    numbers = slip(numbers, item.size, rng)
            place = f"row {number}"
            claim = Claim(place, place, item.picture, item.size, turn, numbers, source.form)
            found.append(claim)
    return found


def before_turn(box: Corners, size: tuple[int, int], turn: int) -> Corners:
    """A box of the upright picture as it lies in the stored one."""
    shares = np.array([in_units(1, 9, box, size, None)])
    back = {6: 8, 8: 6}.get(turn, turn)
    height, width = size if turn < 5 else size[::-1]
    stored = turned(shares, np.array([back]))[0]
    return tuple(round(v * (width, height)[axis % 2], 1) for axis, v in enumerate(stored))


def written(form: BoxForm, box: Corners, size: tuple[int, int]) -> Corners:
    """A box as a file of such a form has it."""
    x1, y1, x2, y2 = box
    if form.units != "pixel":
        x1, y1, x2, y2 = in_units(float(form.units), 4, box, size, None)
    if form.format == "xywh":
        return x1, y1, x2 - x1, y2 - y1
    if form.format == "cxcywh":
        return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    return x1, y1, x2, y2


def slip(box: Corners, size: tuple[int, int], rng: random.Random) -> Corners:
    """A mistaken box: reversed, or moved out of the picture."""
    x1, y1, x2, y2 = box
    return (x2, y2, x1, y1) if rng.random() < 0.5 else (x1 + size[1], y1, x2 + size[1], y2)


def trial(source: Source, fault: Fault | None, look: Gallery, seed: str) -> str:
    """The code that a trial names, several joined, "" for none."""
    found = conventions(claims(source, fault, random.Random(seed)), look.look)
    return "+".join(verdict.code for verdict in found)


@dataclass(frozen=True)
class Task:
    """Trials of every fault on a source or, if `clean`, of none."""

    source: Source
    clean: bool
    trials: int
    seed: int

    def run(self, gallery: Gallery) -> list[Record]:
        """A record for each fault."""
        gallery.forget()
        return [self._of(fault, gallery) for fault in ((None,) if self.clean else FAULTS)]

    def _of(self, fault: Fault | None, gallery: Gallery) -> Record:
        start = time.process_time()
        label, code = (fault.name, fault.code) if fault else ("clean", "")
        names = Counter(
            trial(self.source, fault, gallery, f"{self.seed} {label} {self.source.name} {number}")
            for number in range(self.trials)
        )
        right = names[code]
        print(
            f"{label:22} {self.source.name:34} {right:4} of {self.trials}  {dict(names)}",
            flush=True,
        )
        return {
            "fault": label,
            "source": self.source.name,
            "trials": self.trials,
            "right": right,
            "silent": names[""] if fault else 0,
            "wrong": {name: count for name, count in names.items() if name not in ("", code)},
            "seconds": round(time.process_time() - start, 2),
        }


GALLERY = Gallery()
"""Drawn before the processes are forked, so that they share it."""


def work(task: Task) -> list[Record]:
    """A task's records, in whichever process."""
    return task.run(GALLERY)


def main() -> None:
    """Draw, plant, count, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    start = time.process_time()
    telling = [Source(name, items) for name, items in real(chosen.data).items()]
    telling += drawn(GALLERY, chosen.seed)
    print(f"drawn in {time.process_time() - start:.0f} s", flush=True)
    quiet = silent({source.name: source for source in telling}, chosen.seed)
    few = max(1, chosen.trials // 20)
    tasks = [
        Task(source, False, chosen.trials if source.name in MAIN else few, chosen.seed)
        for source in sorted(telling, key=lambda source: source.name not in MAIN)
    ]
    tasks += [Task(source, True, few, chosen.seed) for source in [*telling, *quiet]]
    with multiprocessing.get_context("fork").Pool(chosen.jobs) as pool:
        records = [record for records in pool.map(work, tasks, 1) for record in records]
    result = {
        "command": "benchmarks/check_conventions.py DATA_FOLDER",
        "trials": chosen.trials,
        "cpu_seconds": round(time.process_time() - start + sum(r["seconds"] for r in records)),
        "records": records,
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
        },
    }
    target = Path(__file__).parent / "results" / "check_conventions.json"
    target.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{result['cpu_seconds']} s of processor time")


if __name__ == "__main__":
    main()
