"""Measure labelling on generated receipts: corrections, order, calibration and label errors.

    python benchmarks/labelling_loop.py loop --steps 40 --out FILE
    python benchmarks/labelling_loop.py errors --out FILE

The annotator is simulated: it corrects each field of a suggestion that differs from the truth. A
fifth of the receipts has fonts that the pretraining did not use, and more camera noise.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "pretraining"))

from synthetic_tasks import receipts
from synthetic_tasks.camera_noise import apply_camera_noise

from finesight.infer.model_loader import load_inference_model, select_cpu_precision
from finesight.label.label_store import Suggestion
from finesight.label.suggestion import (
    compute_label_losses,
    measure_disagreement,
    rank_labels,
    suggest_labels,
)
from finesight.samples.boxes import iou
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    write_samples,
)
from finesight.settings.recipe import recipe_from_dict
from finesight.train.logging import get_device_name
from finesight.train.setup import library_versions
from finesight.train.training_run import train

HARD_FRACTION = 0.2
NUM_POOL, NUM_VALIDATION, NUM_ROUND = 400, 150, 100
SEEDS = (0, 1, 2)
FIELDS = ("merchant", "day", "amount")
PROMPTS = {"fields": "Read the receipt.", "boxes": "Locate merchant, day and amount."}
BASE_MODEL = "finesight-tiny"
MAX_NEW_TOKENS = 120

Kind = Literal["fields", "boxes"]


@dataclass(frozen=True)
class LabeledReceipt:
    """Image of a receipt with its fields, and the box of each field."""

    image: str
    fields: dict[str, str]
    boxes: tuple[BoxPart, ...]
    is_hard: bool

    def build_sample(self, folder: Path, kind: Kind, *, with_answer: bool) -> LocatedSample:
        """Build a sample whose answer is the JSON of the fields, or their boxes."""
        question = (ImagePart(image=self.image), TextPart(text=PROMPTS[kind]))
        messages = [Message(role="user", content=question)]
        if with_answer:
            text = TextPart(text=json.dumps(self.fields))
            content = (text,) if kind == "fields" else self.boxes
            messages.append(Message(role="assistant", content=content))
        return LocatedSample(Sample(id=f"{kind}-{self.image}", messages=tuple(messages)), folder)


def draw_receipts(folder: Path, seed: str, count: int) -> list[LabeledReceipt]:
    """Draw receipts into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for index in range(count):
        rng = random.Random(f"label {seed} {index}")
        is_hard = rng.random() < HARD_FRACTION
        image = None
        while image is None:
            receipt = receipts.sample_receipt(rng)
            image = receipts.draw_receipt(receipt, rng, "unseen" if is_hard else "seen")
        name = f"{seed}-{index:05}.png"
        apply_camera_noise(image, rng, strength=2.0 if is_hard else 0.6).save(folder / name)
        words = [word.box for word in receipt.words]
        assert receipt.total_word is not None, "a receipt without a total"
        num_shop, num_date = len(receipt.shop.split()), len(receipt.date.split())
        groups = (words[:num_shop], words[num_shop : num_shop + num_date], [receipt.total_word.box])
        boxes = []
        for label, group in zip(FIELDS, groups, strict=True):
            x1, y1, x2, y2 = zip(*group, strict=True)
            corners = (float(min(x1)), float(min(y1)), float(max(x2)), float(max(y2)))
            boxes.append(BoxPart(label=label, xyxy=corners))
        values = (receipt.shop, receipt.date, receipt.total)
        fields = dict(zip(FIELDS, values, strict=True))
        found.append(LabeledReceipt(name, fields, tuple(boxes), is_hard))
    return found


def train_model(folder: Path, samples: Sequence[LocatedSample], seed: int, steps: int) -> str:
    """Train the base model with LoRA on samples and return the run folder."""
    folder.mkdir(parents=True)
    image_folder = samples[0].folder
    rows = [one.sample.map_paths(lambda name: str(image_folder / name)) for one in samples]
    write_samples(folder / "labels.jsonl", rows)
    settings = {
        "model": BASE_MODEL,
        "data": {"train": str(folder / "labels.jsonl")},
        "tune": {
            "vision": "frozen",
            "merger": "lora",
            "language": "lora",
            "lora": {"rank": 32, "alpha": 32, "dropout": 0.0},
        },
        "train": {
            "steps": steps,
            "batch_size": 16,
            "learning_rate": 2.0e-3,
            "seed": seed,
            "precision": select_cpu_precision(),
            "device": "cpu",
        },
        "output_dir": str(folder / "run"),
    }
    train(recipe_from_dict(settings, {}))
    return str(folder / "run")


def suggest(model: str, samples: Sequence[LocatedSample]) -> list[Suggestion]:
    """Suggest labels with a run or model, least certain first."""
    return suggest_labels(
        load_inference_model(model), samples, max_new_tokens=MAX_NEW_TOKENS, batch_size=32
    )[0]


def find_wrong_fields(suggestion: Suggestion, truth: LabeledReceipt) -> list[str]:
    """Return the fields that the annotator corrects."""
    try:
        values = json.loads(suggestion.content[0].text)
    except ValueError:
        values = {}
    values = values if isinstance(values, dict) else {}
    return [name for name in FIELDS if values.get(name) != truth.fields[name]]


def measure_calibration(confidences: Sequence[float], correct: Sequence[bool]) -> dict[str, float]:
    """Compute the expected calibration error over 10 bins of equal width, and its inputs."""
    values, is_correct = np.array(confidences), np.array(correct, float)
    bins = np.minimum((values * 10).astype(int), 9)
    gaps = [
        abs(values[bins == k].mean() - is_correct[bins == k].mean()) * (bins == k).mean()
        for k in range(10)
        if (bins == k).any()
    ]
    return {
        "ece": round(float(sum(gaps)), 4),
        "accuracy": round(float(is_correct.mean()), 4),
        "mean_confidence": round(float(values.mean()), 4),
        "count": len(values),
    }


# Suggest, correct, train


def measure_loop(work: Path, seed: int, steps: int) -> dict[str, Any]:
    """Label three rounds of images in random order and least certain first, with one seed."""
    pool = draw_receipts(work / "images", f"pool{seed}", NUM_POOL)
    validation = draw_receipts(work / "images", f"validation{seed}", NUM_VALIDATION)
    rng = random.Random(f"order {seed}")
    shuffled = rng.sample(pool, len(pool))
    orders = {}
    calibration: dict[str, list[tuple[float, bool]]] = {"field": [], "image": []}
    first = shuffled[:NUM_ROUND]
    num_first = count_corrections(work, BASE_MODEL, first)
    first_run = train_on(work, "round1", first, seed, steps)
    first_score = score_validation(work, first_run, validation)
    rest_suggestions = suggest_rows(work, first_run, shuffled[NUM_ROUND:])
    record_calibration(calibration, rest_suggestions, pool)
    for order in ("random", "least certain first"):
        labeled, remaining = list(first), shuffled[NUM_ROUND:]
        rounds = [
            {
                "corrected_fields": num_first,
                "labeled": NUM_ROUND,
                "validation_accuracy": first_score,
            }
        ]
        suggestions = rest_suggestions
        run = first_run
        for number in (2, 3):
            if number > 2:
                suggestions = suggest_rows(work, run, remaining)
            by_image = {row.image: row for row in remaining}
            if order == "random":
                chosen = remaining[:NUM_ROUND]
            else:
                chosen = [by_image[get_image(one)] for one in suggestions[:NUM_ROUND]]
            names = {row.image for row in chosen}
            wrong = sum(
                len(find_wrong_fields(one, by_image[get_image(one)]))
                for one in suggestions
                if get_image(one) in names
            )
            labeled += chosen
            remaining = [row for row in remaining if row.image not in names]
            run = train_on(work, f"{order}-{number}".replace(" ", "-"), labeled, seed, steps)
            rounds.append(
                {
                    "corrected_fields": wrong,
                    "labeled": len(labeled),
                    "validation_accuracy": score_validation(work, run, validation),
                }
            )
        orders[order] = rounds
    found = {
        "seed": seed,
        "orders": orders,
        "label_set": measure_label_set(rest_suggestions, pool, seed),
        "calibration": {
            name: measure_calibration(*zip(*pairs, strict=True))
            for name, pairs in calibration.items()
        },
    }
    print(json.dumps(found), flush=True)
    return found


def get_image(suggestion: Suggestion) -> str:
    """Return the file name of the image of a suggestion."""
    return suggestion.id.partition("-")[2]


def suggest_rows(work: Path, model: str, rows: Sequence[LabeledReceipt]) -> list[Suggestion]:
    """Suggest the fields of receipts, least certain first."""
    folder = work / "images"
    return suggest(model, [row.build_sample(folder, "fields", with_answer=False) for row in rows])


def count_corrections(work: Path, model: str, rows: Sequence[LabeledReceipt]) -> int:
    """Return the number of fields that the annotator corrects."""
    by_image = {row.image: row for row in rows}
    suggestions = suggest_rows(work, model, rows)
    return sum(len(find_wrong_fields(one, by_image[get_image(one)])) for one in suggestions)


def score_validation(work: Path, model: str, rows: Sequence[LabeledReceipt]) -> float:
    """Return the share of correct fields on validation receipts."""
    return round(1 - count_corrections(work, model, rows) / (len(FIELDS) * len(rows)), 4)


def train_on(work: Path, name: str, rows: Sequence[LabeledReceipt], seed: int, steps: int) -> str:
    """Train on the corrected labels of receipts, and return the run folder."""
    folder = work / "images"
    samples = [row.build_sample(folder, "fields", with_answer=True) for row in rows]
    return train_model(work / name, samples, seed, steps)


def record_calibration(
    calibration: dict[str, list[tuple[float, bool]]],
    suggestions: Sequence[Suggestion],
    rows: Sequence[LabeledReceipt],
) -> None:
    """Add confidence and correctness of each field and each image."""
    by_image = {row.image: row for row in rows}
    for one in suggestions:
        wrong = find_wrong_fields(one, by_image[get_image(one)])
        calibration["image"].append((one.confidence, not wrong))
        calibration["field"] += [
            (part.confidence, part.path[0] not in wrong)
            for part in one.parts
            if len(part.path) == 1 and part.path[0] in FIELDS
        ]


def measure_label_set(
    suggestions: Sequence[Suggestion], rows: Sequence[LabeledReceipt], seed: int
) -> dict[str, Any]:
    """Count the reviewed images until the label set reaches a score.

    Reviewed suggestions are corrected and all others accepted unseen. The random order is the mean
    of 200 shuffles.
    """
    by_image = {row.image: row for row in rows}
    wrong = np.array([len(find_wrong_fields(one, by_image[get_image(one)])) for one in suggestions])
    num_fields = len(FIELDS) * len(wrong)
    rng = np.random.default_rng(seed)
    targets = {}
    for target in (0.97, 0.98, 0.99, 0.995):
        allowed = (1 - target) * num_fields

        def count_reviews(counts: Any, allowed: float = allowed) -> int:
            remaining = counts.sum() - np.concatenate([[0], np.cumsum(counts)])
            return int(np.argmax(remaining <= allowed))

        shuffles = [count_reviews(rng.permutation(wrong)) for _ in range(200)]
        certain, mean = count_reviews(wrong), float(np.mean(shuffles))
        targets[str(target)] = {
            "least_certain_first": certain,
            "random": round(mean, 1),
            "ratio": round(certain / mean, 3) if mean else None,
        }
    accuracy = round(1 - float(wrong.sum()) / num_fields, 4)
    return {"images": len(wrong), "accuracy_without_review": accuracy, "reviews": targets}


# Planted label errors


PLANTED_KINDS = ("wrong text", "shifted box", "missing box", "swapped boxes")


def plant_error(row: LabeledReceipt, kind: str, rng: random.Random) -> LabeledReceipt:
    """Return a receipt with one wrong label."""
    fields, boxes = dict(row.fields), list(row.boxes)
    if kind == "wrong text":
        name = rng.choice(FIELDS)
        at = rng.choice([i for i, char in enumerate(fields[name]) if char.isalnum()])
        char = fields[name][at]
        others = "0123456789" if char.isdigit() else "abcdefghijklmnopqrstuvwxyz"
        new = rng.choice([other for other in others if other != char.lower()])
        fields[name] = fields[name][:at] + new + fields[name][at + 1 :]
        return LabeledReceipt(row.image, fields, row.boxes, row.is_hard)
    index = rng.randrange(len(boxes))
    x1, y1, x2, y2 = boxes[index].xyxy
    if kind == "shifted box":
        # By half to the whole of the height or width, into the image.
        dy = rng.uniform(0.5, 1.0) * (y2 - y1)
        dx = rng.choice((0, 1)) * rng.uniform(0.25, 0.5) * (x2 - x1)
        dy = -dy if y1 - dy > 0 and rng.random() < 0.5 else dy
        dx = -dx if x1 - dx > 0 else 0.0
        boxes[index] = BoxPart(label=boxes[index].label, xyxy=(x1 + dx, y1 + dy, x2 + dx, y2 + dy))
    elif kind == "missing box":
        del boxes[index]
    else:
        other = (index + 1) % len(boxes)
        first, second = boxes[index], boxes[other]
        boxes[index] = BoxPart(label=first.label, xyxy=second.xyxy)
        boxes[other] = BoxPart(label=second.label, xyxy=first.xyxy)
    return LabeledReceipt(row.image, fields, tuple(boxes), row.is_hard)


def measure_errors(work: Path, seed: int, num_samples: int, steps: int) -> dict[str, Any]:
    """Plant errors in 5 % of the labels, train on all of them, and rank them."""
    rng = random.Random(f"errors {seed}")
    rows = draw_receipts(work / "images", f"errors{seed}", num_samples // 2)
    items: list[tuple[LabeledReceipt, Kind]] = [(row, "fields") for row in rows]
    items += [(row, "boxes") for row in rows]
    planted: dict[int, str] = {}
    num_planted = num_samples // 20
    for number in range(num_planted):
        kind = PLANTED_KINDS[number % len(PLANTED_KINDS)]
        is_text = kind == "wrong text"
        while True:
            index = rng.randrange(num_samples)
            if index not in planted and (items[index][1] == "fields") == is_text:
                break
        planted[index] = kind
        items[index] = (plant_error(items[index][0], kind, rng), items[index][1])
    samples = [row.build_sample(work / "images", kind, with_answer=True) for row, kind in items]
    started = time.monotonic()
    run = train_model(work / "noisy", samples, seed, steps)
    train_s = time.monotonic() - started
    started = time.monotonic()
    model = load_inference_model(run)
    ranked, _ = rank_labels(model, samples, max_new_tokens=MAX_NEW_TOKENS, batch_size=32)
    rank_s = time.monotonic() - started
    loss_by_id = dict(
        zip(
            (sample.sample.id for sample in samples),
            compute_label_losses(model, samples, 32),
            strict=True,
        )
    )
    answer_by_id = {sample.sample.id: sample.sample.messages[-1].content for sample in samples}
    planted_ids = {samples[index].sample.id: kind for index, kind in planted.items()}
    found = {
        "seed": seed,
        "num_samples": num_samples,
        "num_planted": num_planted,
        "steps": steps,
        "epochs": round(steps * 16 / num_samples, 2),
        "train_s": round(train_s, 1),
        "rank_s": round(rank_s, 1),
        "in_top_10_percent": {},
    }
    raw = [
        describe_label(
            one,
            loss_by_id[one.id],
            measure_disagreement(answer_by_id[one.id], one.content),
            planted_ids.get(one.id, ""),
        )
        for one in ranked
    ]
    for name in ("score", "loss", "excess_loss", "disagreement"):
        top = sorted(raw, key=itemgetter(name), reverse=True)[: num_samples // 10]
        hits = [one["planted"] for one in top if one["planted"]]
        totals = {kind: list(planted_ids.values()).count(kind) for kind in PLANTED_KINDS}
        found["in_top_10_percent"][name] = {
            "all": round(len(hits) / num_planted, 3),
            **{kind: round(hits.count(kind) / totals[kind], 3) for kind in PLANTED_KINDS},
        }
    (work / f"ranked-{seed}-{steps}.json").write_text(json.dumps(raw))
    found["calibration"] = measure_part_calibration(raw, rows)
    print(json.dumps(found), flush=True)
    return found


def describe_label(
    suggestion: Suggestion, loss: float, disagreement: float, planted: str
) -> dict[str, Any]:
    """Return the values and the suggestion of a label as JSON data."""
    return {
        "id": suggestion.id,
        "loss": round(loss, 6),
        "excess_loss": round(max(0.0, loss - suggestion.loss), 6),
        "disagreement": round(disagreement, 6),
        "score": round(suggestion.score or 0.0, 6),
        "suggestion": {
            "content": [part.model_dump(mode="json") for part in suggestion.content],
            "parts": [
                {"path": list(part.path), "confidence": round(part.confidence, 6)}
                for part in suggestion.parts
            ],
        },
        "planted": planted,
    }


def measure_part_calibration(
    ranked: Sequence[dict[str, Any]], rows: Sequence[LabeledReceipt]
) -> dict[str, Any]:
    """Compute the calibration of fields (exact) and boxes (label, IoU of at least 0.5).

    The model was trained on these images, so that most of its answers are correct.
    """
    by_image = {row.image: row for row in rows}
    pairs: dict[str, list[tuple[float, bool]]] = {"field": [], "box": []}
    for one in ranked:
        suggestion = one["suggestion"]
        kind, _, image = one["id"].partition("-")
        truth = by_image[image]
        if kind == "fields":
            try:
                values = json.loads(suggestion["content"][0].get("text", ""))
            except ValueError:
                continue
            pairs["field"] += [
                (part["confidence"], values.get(part["path"][0]) == truth.fields[part["path"][0]])
                for part in suggestion["parts"]
                if part["path"] and part["path"][0] in FIELDS
            ]
            continue
        true_boxes = {box.label: box.xyxy for box in truth.boxes}
        boxes = [part for part in suggestion["content"] if part["type"] == "box"]
        for part, box in zip(suggestion["parts"], boxes, strict=False):
            true_box = true_boxes.get(box["label"])
            is_correct = true_box is not None and iou(tuple(box["xyxy"]), true_box) >= 0.5
            pairs["box"].append((part["confidence"], is_correct))
    return {name: measure_calibration(*zip(*values, strict=True)) for name, values in pairs.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("loop", "errors"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, nargs="+", default=[125])
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in args.seeds:
            for steps in args.steps:
                work = (args.work or Path(temporary)) / f"{args.part}-{seed}-{steps}"
                if args.part == "loop":
                    results.append(measure_loop(work, seed, steps))
                else:
                    results.append(measure_errors(work, seed, args.samples, steps))
    figures = {
        "command": f"python {shlex.join(sys.argv)}",
        "machine": get_device_name(torch.device("cpu")),
        "versions": library_versions(),
        "results": results,
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
