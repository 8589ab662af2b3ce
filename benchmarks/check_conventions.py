"""Measure how reliably `check` detects box conventions in a source.

    python benchmarks/check_conventions.py DATA_FOLDER [--trials 100] [--jobs 1] [--seed 0]

DATA_FOLDER contains captions/ and grounding/ with real boxes; other sources are generated. Each
trial uses 300 samples of a source (or all, if fewer) and injects one fault into all of them. The
found size of a resized copy is right within 5 % of the true size. The main sources run `--trials`
trials per fault, the others a twentieth. Clean sources measure false alarms. Prints a table and
writes results/check_conventions.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from box_sources import (
    BoxCorners,
    BoxSample,
    ImageGallery,
    PageStyle,
    SceneStyle,
    draw_pages,
    draw_quickstart_scenes,
    draw_scenes,
    load_real_sources,
)

from finesight.ingest.check.box_hypothesis import BoxClaim
from finesight.ingest.check.convention_detector import find_convention_issues
from finesight.samples.frames import PIXELS, BoxFrame, apply_exif_orientation, get_frame

SAMPLES_PER_TRIAL = 300
"""Samples of a source per trial."""

DRAWN_SAMPLES = 300
"""Samples of a generated source."""

MAX_SIZE_ERROR = 0.05
"""Largest relative error of a side with which the found size of a copy is right."""

Record = dict[str, Any]

MAIN_SOURCES = ("words and receipts", "objects", "objects, mixed sizes")
"""Sources with the full number of trials."""

BoxTransform = Callable[[BoxCorners, tuple[int, int], random.Random], BoxCorners]


@dataclass(frozen=True)
class BoxSource:
    """Samples of a clean source.

    `is_detectable` is False if neither bounds nor images determine the convention. `box_form` is
    the box format. `has_rotation`: the images have EXIF orientations, and the boxes are correct.
    `error_rate` is the fraction of incorrect boxes.
    """

    name: str
    items: Sequence[BoxSample]
    is_detectable: bool = True
    box_form: BoxFrame = PIXELS
    has_rotation: bool = False
    error_rate: float = 0.0


@dataclass(frozen=True)
class ConventionFault:
    """A fault with its issue code and the function that injects it."""

    name: str
    code: str
    make_transform: Callable[[random.Random], BoxTransform]
    has_rotation: bool = False


def to_xywh(box: BoxCorners, size: tuple[int, int], rng: random.Random) -> BoxCorners:
    x1, y1, x2, y2 = box
    return x1, y1, x2 - x1, y2 - y1


def to_units(
    full_range: float, digits: int, box: BoxCorners, size: tuple[int, int], _: object
) -> BoxCorners:
    sides = (size[1], size[0]) * 2
    return tuple(round(full_range * v / side, digits) for v, side in zip(box, sides, strict=True))


@dataclass(frozen=True)
class ResizedCopy:
    """Boxes in pixels of a copy of the image.

    `kind` is what `width` and `height` are: the size of all copies, or the factor, longest or
    shortest side of copies with the aspect ratio of their image, both times the same number.
    """

    kind: str
    width: float
    height: float

    def compute_size(self, size: tuple[int, int]) -> tuple[float, float]:
        """Return the height and width of the copy of an image."""
        if self.kind == "fixed":
            return self.height, self.width
        reference = {"factor": 1, "longest": max(size), "shortest": min(size)}[self.kind]
        height, width = size
        return height * self.height / reference, width * self.width / reference

    def __call__(self, box: BoxCorners, size: tuple[int, int], _: random.Random) -> BoxCorners:
        height, width = self.compute_size(size)
        fractions = to_units(1, 9, box, size, None)
        sides = (width, height)
        return tuple(round(share * sides[axis % 2], 1) for axis, share in enumerate(fractions))

    def has_size_of(self, frame: BoxFrame, sizes: Iterable[tuple[int, int]]) -> bool:
        """Return whether a frame has the sides of the copies of all images within 5 %."""
        for size in sizes:
            for side, found in zip(self.compute_size(size), frame.compute_size(*size), strict=True):
                if abs(found / side - 1) > MAX_SIZE_ERROR:
                    return False
        return True


def make_resized_copy(rng: random.Random) -> ResizedCopy:
    """Sample a size that tools write: a factor, a square, another fixed size, or a longest side."""
    kind = rng.choice(("factor", "square", "fixed", "longest"))
    factor = rng.choice((0.25, 0.3, 0.4, 0.5, 0.6, 0.75, 0.85, 1.2, 1.5, 2.0))
    square = rng.choice((224, 336, 384, 448, 512, 560, 640, 768, 896, 1120))
    fixed = rng.choice(((600, 450), (800, 600), (1024, 768), (504, 280), (700, 420)))
    longest = rng.choice((336, 512, 600, 800, 1333))
    if kind == "fixed":
        return ResizedCopy("fixed", *fixed)
    if kind == "square":
        return ResizedCopy("fixed", square, square)
    side = factor if kind == "factor" else longest
    return ResizedCopy(kind, side, side)


def make_odd_copy(rng: random.Random) -> ResizedCopy:
    """Sample any size from a range."""
    kind = rng.choice(("factor", "fixed", "fixed", "longest", "shortest"))
    if kind == "fixed":
        return ResizedCopy("fixed", rng.randint(211, 1499), rng.randint(211, 1499))
    side: float = rng.randint(211, 1499)
    if kind == "factor":
        side = rng.choice((rng.uniform(0.25, 0.88), rng.uniform(1.12, 2.2)))
    return ResizedCopy(kind, side, side)


def to_yxyx(box: BoxCorners, size: tuple[int, int], rng: random.Random) -> BoxCorners:
    x1, y1, x2, y2 = box
    return y1, x1, y2, x2


FAULTS = (
    ConventionFault("xywh as xyxy", "boxes-xywh", lambda rng: to_xywh),
    ConventionFault("yxyx as xyxy", "boxes-yxyx", lambda rng: to_yxyx),
    ConventionFault(
        "0-1000 as pixels", "boxes-thousandths", lambda rng: partial(to_units, 1000, 0)
    ),
    ConventionFault("0-1 as pixels", "boxes-normalized", lambda rng: partial(to_units, 1, 4)),
    ConventionFault("a resized copy", "boxes-resized", make_resized_copy),
    ConventionFault("a copy of an odd size", "boxes-resized", make_odd_copy),
    ConventionFault(
        "before the EXIF turn", "boxes-before-exif-rotation", lambda rng: lambda box, *_: box, True
    ),
)


def draw_sources(gallery: ImageGallery, seed: int) -> list[BoxSource]:
    """Generate the synthetic sources."""

    def random_size(
        low: int, high: int, ratio: float = 1.6
    ) -> Callable[[random.Random], tuple[int, int]]:
        def choose(rng: random.Random) -> tuple[int, int]:
            side = rng.randint(low, high)
            other = max(low // 2, round(side * rng.uniform(1 / ratio, ratio)))
            return side, other

        return choose

    def choose_size(*sizes: tuple[int, int]) -> Callable[[random.Random], tuple[int, int]]:
        return lambda rng: rng.choice(sizes)

    mixed, page = random_size(300, 1400), random_size(500, 1100, 1.4)
    photo = choose_size((4032, 3024), (3024, 4032), (3000, 2000), (1920, 1080))
    near = random_size(980, 1020, 1.02)
    corner, centre = (0.0, 0.0, 0.45, 0.45), (0.3, 0.3, 0.7, 0.7)
    objects = {
        "objects, mixed sizes": SceneStyle(mixed),
        "objects, all 640 x 480": SceneStyle(choose_size((640, 480))),
        "objects, photographs above 1000": SceneStyle(photo),
        "objects, few": SceneStyle(mixed, num_objects=(1, 1), num_labelled=1),
        "objects, many": SceneStyle(
            mixed, num_objects=(8, 20), num_labelled=12, box_extent=(0.04, 0.2)
        ),
        "objects, small": SceneStyle(mixed, box_extent=(0.03, 0.08)),
        "objects, large": SceneStyle(
            mixed, box_extent=(0.5, 0.95), num_objects=(1, 2), num_labelled=1
        ),
        "objects, central": SceneStyle(mixed, region=centre, box_extent=(0.1, 0.3)),
        "objects, upper left": SceneStyle(mixed, region=corner, box_extent=(0.08, 0.25)),
        "photographs, all below 1000": SceneStyle(
            choose_size((4000, 3000)), (0, 0, 0.25, 0.33), (0.03, 0.12)
        ),
        "objects, about 1000 x 1000": SceneStyle(near),
        "objects, squares": SceneStyle(choose_size(*((s, s) for s in (256, 300, 512, 640, 900)))),
        "objects, panoramas": SceneStyle(choose_size((1800, 500), (1500, 400), (2000, 640))),
        "objects on bricks": SceneStyle(mixed, background="bricks"),
        "objects on uniform background": SceneStyle(mixed, background="plain"),
    }
    text = {
        "lines of text": PageStyle(page),
        "words, thin boxes": PageStyle(page, label_words=True, line_height=(0.014, 0.02)),
        "receipts, text on the left": PageStyle(page, column_extent=(0.05, 0.5)),
        "lines of text, loose boxes": PageStyle(page, box_padding=0.25),
    }
    sources = [
        BoxSource(
            "quickstart's shapes",
            list(draw_quickstart_scenes(gallery, DRAWN_SAMPLES, random.Random(seed))),
        )
    ]
    for name, scene in objects.items():
        rng = random.Random(f"{seed} {name}")
        sources.append(BoxSource(name, list(draw_scenes(gallery, name, scene, DRAWN_SAMPLES, rng))))
    for name, page_ in text.items():
        rng = random.Random(f"{seed} {name}")
        sources.append(BoxSource(name, list(draw_pages(gallery, name, page_, DRAWN_SAMPLES, rng))))
    return sources


def ambiguous_sources(sources: dict[str, BoxSource], seed: int) -> list[BoxSource]:
    """Build clean sources that are ambiguous or resemble a fault."""
    rng = random.Random(seed)
    base, text = sources["objects, mixed sizes"].items, sources["lines of text"].items

    def random_box(item: BoxSample) -> BoxCorners:
        height, width = item.size
        x1, x2 = sorted(rng.sample(range(width), 2))
        y1, y2 = sorted(rng.sample(range(height), 2))
        return x1, y1, x2, y2

    def replace_boxes(
        items: Sequence[BoxSample], box: Callable[[BoxSample], BoxCorners]
    ) -> list[BoxSample]:
        return [BoxSample(item.image, item.size, (box(item),)) for item in items]

    def fractional_box(*fractions: float) -> Callable[[BoxSample], BoxCorners]:
        return lambda item: tuple(s * item.size[1 - n % 2] for n, s in enumerate(fractions))

    def expand_box(item: BoxSample) -> BoxCorners:
        x1, y1, x2, y2 = item.boxes[0]
        across, down = 0.15 * (x2 - x1), 0.15 * (y2 - y1)
        height, width = item.size
        return (
            max(x1 - across, 0),
            max(y1 - down, 0),
            min(x2 + across, width),
            min(y2 + down, height),
        )

    few = [BoxSample(i.image, i.size, (b,)) for i in base[:60] for b in i.boxes] * 3
    return [
        BoxSource("full-image boxes", replace_boxes(base, fractional_box(0, 0, 1, 1)), False),
        BoxSource(
            "nearly full-image boxes",
            replace_boxes(base, fractional_box(0.04, 0.04, 0.96, 0.96)),
            False,
        ),
        BoxSource(
            "the same box everywhere",
            replace_boxes(base, fractional_box(0.3, 0.2, 0.6, 0.5)),
            False,
        ),
        BoxSource(
            "the same box on text", replace_boxes(text, fractional_box(0.3, 0.2, 0.6, 0.25)), False
        ),
        BoxSource("boxes without a relation", replace_boxes(base, random_box), False),
        BoxSource("boxes without a relation, text", replace_boxes(text, random_box), False),
        BoxSource("12 images", [i for i in base[:12] for _ in range(30)], False),
        BoxSource("60 images", few),
        BoxSource("one image", [base[0]] * 300, False),
        BoxSource("loose boxes", replace_boxes(base, expand_box)),
        BoxSource("3 % incorrect boxes", base, error_rate=0.03),
        BoxSource("EXIF orientations, correct boxes", base, has_rotation=True),
        BoxSource(
            "EXIF turns, photographs",
            sources["objects, photographs above 1000"].items,
            has_rotation=True,
        ),
        BoxSource("read as xywh, rightly", base, box_form=BoxFrame("xywh")),
        BoxSource("read as cxcywh of 1, rightly", base, box_form=get_frame("cxcywh", "1")),
        BoxSource("read in thousandths, rightly", base, box_form=get_frame("xyxy", "1000")),
    ]


def make_claims(
    source: BoxSource,
    fault: ConventionFault | None,
    transform: BoxTransform | None,
    rng: random.Random,
) -> list[BoxClaim]:
    """Build the box claims of a trial: samples without replacement, with the fault in every box."""
    indices = sorted(
        rng.sample(range(len(source.items)), min(SAMPLES_PER_TRIAL, len(source.items)))
    )
    shared_orientation = rng.choice((6, 8, 3, None))
    result = []
    for number in indices:
        item = source.items[number]
        orientation = 1
        if source.has_rotation or (fault is not None and fault.has_rotation):
            orientation = shared_orientation or rng.choice((1, 3, 6, 8))
        for box in item.boxes:
            if transform is not None:
                coordinates = transform(box, item.size, rng)
                if fault is not None and fault.has_rotation:
                    coordinates = to_stored_orientation(box, item.size, orientation)
            else:
                coordinates = format_box(source.box_form, box, item.size)
                if rng.random() < source.error_rate:
                    coordinates = corrupt_box(coordinates, item.size, rng)
            row_name = f"row {number}"
            claim = BoxClaim(
                row_name, row_name, item.image, item.size, orientation, coordinates, source.box_form
            )
            result.append(claim)
    return result


def to_stored_orientation(box: BoxCorners, size: tuple[int, int], orientation: int) -> BoxCorners:
    """Convert a box of the upright image to the stored orientation."""
    fractions = np.array([to_units(1, 9, box, size, None)])
    inverse = {6: 8, 8: 6}.get(orientation, orientation)
    height, width = size if orientation < 5 else size[::-1]
    stored = apply_exif_orientation(fractions, np.array([inverse]))[0]
    return tuple(round(v * (width, height)[axis % 2], 1) for axis, v in enumerate(stored))


def format_box(box_form: BoxFrame, box: BoxCorners, size: tuple[int, int]) -> BoxCorners:
    """Format a box as a file of this form contains it."""
    x1, y1, x2, y2 = box
    if box_form.base == "fixed":
        x1, y1, x2, y2 = to_units(box_form.width, 4, box, size, None)
    if box_form.order == "xywh":
        return x1, y1, x2 - x1, y2 - y1
    if box_form.order == "cxcywh":
        return (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1
    return x1, y1, x2, y2


def corrupt_box(box: BoxCorners, size: tuple[int, int], rng: random.Random) -> BoxCorners:
    """Corrupt a box: reverse its corners or move it out of the image."""
    x1, y1, x2, y2 = box
    return (x2, y2, x1, y1) if rng.random() < 0.5 else (x1 + size[1], y1, x2 + size[1], y2)


def run_trial(
    source: BoxSource, fault: ConventionFault | None, gallery: ImageGallery, seed: str
) -> str:
    """Return the reported issue codes of a trial, joined; "" if none.

    " of another size" follows if the size of the copy is wrong.
    """
    rng = random.Random(seed)
    transform = None
    if fault is not None:
        transform = fault.make_transform(rng)
    claims = make_claims(source, fault, transform, rng)
    verdicts = find_convention_issues(claims, gallery.edge_sums)
    codes = "+".join(verdict.code for verdict in verdicts)
    if verdicts and isinstance(transform, ResizedCopy):
        sizes = {claim.image_size for claim in claims}
        if not transform.has_size_of(verdicts[0].hypothesis, sizes):
            return f"{codes} of another size"
    return codes


@dataclass(frozen=True)
class TrialTask:
    """Trials of every fault on a source or, if `clean`, of no fault."""

    source: BoxSource
    is_clean: bool
    num_trials: int
    seed: int

    def run(self, gallery: ImageGallery) -> list[Record]:
        """Run the trials and return one record per fault."""
        gallery.clear_edge_sums()
        return [
            self._run_trials(fault, gallery) for fault in ((None,) if self.is_clean else FAULTS)
        ]

    def _run_trials(self, fault: ConventionFault | None, gallery: ImageGallery) -> Record:
        start = time.process_time()
        label, code = (fault.name, fault.code) if fault else ("clean", "")
        names = Counter(
            run_trial(
                self.source, fault, gallery, f"{self.seed} {label} {self.source.name} {number}"
            )
            for number in range(self.num_trials)
        )
        correct = names[code]
        print(
            f"{label:22} {self.source.name:34} {correct:4} of {self.num_trials}  {dict(names)}",
            flush=True,
        )
        return {
            "fault": label,
            "source": self.source.name,
            "trials": self.num_trials,
            "right": correct,
            "silent": names[""] if fault else 0,
            "wrong": {name: count for name, count in names.items() if name not in ("", code)},
            "seconds": round(time.process_time() - start, 2),
        }


GALLERY = ImageGallery()
"""Generated before processes fork, so that they share it."""


def run_task(task: TrialTask) -> list[Record]:
    """Run a task in a worker process."""
    return task.run(GALLERY)


def main() -> None:
    """Generate sources, run all trials, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    start = time.process_time()
    sources = [BoxSource(name, items) for name, items in load_real_sources(args.data).items()]
    sources += draw_sources(GALLERY, args.seed)
    print(f"drawn in {time.process_time() - start:.0f} s", flush=True)
    ambiguous = ambiguous_sources({source.name: source for source in sources}, args.seed)
    num_clean_trials = max(1, args.trials // 20)
    tasks = [
        TrialTask(
            source,
            False,
            args.trials if source.name in MAIN_SOURCES else num_clean_trials,
            args.seed,
        )
        for source in sorted(sources, key=lambda source: source.name not in MAIN_SOURCES)
    ]
    tasks += [
        TrialTask(source, True, num_clean_trials, args.seed) for source in [*sources, *ambiguous]
    ]
    with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
        records = [record for records in pool.map(run_task, tasks, 1) for record in records]
    result = {
        "command": f"benchmarks/check_conventions.py DATA_FOLDER --trials {args.trials}",
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "trials": args.trials,
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
