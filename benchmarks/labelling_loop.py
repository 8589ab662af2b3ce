"""Measure labelling on generated receipts: corrections per round, order, calibration, label errors.

    python benchmarks/labelling_loop.py --out benchmarks/results/labelling_cpu.json

The annotator is simulated: it corrects each field of a suggestion that differs from the label.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

from finesight.data.sample import BoxPart, ImagePart, LocatedSample, Message, Sample, TextPart
from synthetic_tasks import receipts
from synthetic_tasks.camera_noise import apply_camera_noise

PROMPT = "Read the receipt."
BOX_PROMPT = "Find shop, date and total."


def draw_receipts(folder: Path, seed: int, count: int, hard_fraction: float = 0.0) -> list[dict]:
    """Write images of receipts, and return their fields, boxes and file names."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(count):
        rng = random.Random(f"label {seed} {index}")
        is_hard = rng.random() < hard_fraction
        while True:
            receipt = receipts.sample_receipt(rng)
            image = receipts.draw_receipt(receipt, rng, "unseen" if is_hard else "seen")
            if image is not None:
                break
        image = apply_camera_noise(image, rng, strength=2.0 if is_hard else 0.6)
        name = f"{index:05}.png"
        image.save(folder / name)
        rows.append({"image": name, "receipt": receipt, "is_hard": is_hard, "size": image.size})
    return rows


def make_fields(row) -> str:
    r = row["receipt"]
    return json.dumps({"merchant": r.shop, "day": r.date, "amount": r.total, "items": len(r.prices)})


def make_boxes(row) -> list[BoxPart]:
    r = row["receipt"]
    words = r.words
    n_shop = len(r.shop.split())
    n_date = len(r.date.split())
    groups = [("shop", words[:n_shop]), ("date", words[n_shop : n_shop + n_date]), ("total", [r.total_word])]
    boxes = []
    for label, ws in groups:
        xs1, ys1, xs2, ys2 = zip(*(w.box for w in ws))
        boxes.append(BoxPart(label=label, xyxy=(float(min(xs1)), float(min(ys1)), float(max(xs2)), float(max(ys2)))))
    return boxes
