"""Measure labels of a teacher: 300 images, of which a person reviews 30, or labels 30 alone.

    python benchmarks/teacher_labels.py --out FILE --seeds 3 --workers 12 [--real grounding.jsonl]

The teacher is a local server that knows the truth of generated train tickets, or of words in photos
with `--real` (rows with `image`, `answer` and `bbox_xyxy` in pixels). In a fifth of the images, one
field of each of its answers is wrong with a probability of 0.7, as one of two values.

| arm | labels |
|---|---|
| least certain | suggestions of the teacher, the 30 least certain corrected |
| random review | suggestions of the teacher, 30 random ones corrected |
| no review | suggestions of the teacher |
| labeled alone | 30 random images, labeled without a teacher |

Each arm trains finesight-tiny with the same number of steps. The score is the share of correct
fields of 150 other images.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import json
import math
import multiprocessing
import random
import shlex
import sys
import tempfile
import threading
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import product
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from labelling_loop import suggest, train_model
from PIL import Image

from finesight.infer.prediction import build_question
from finesight.label.label_session import open_session
from finesight.label.label_store import get_text, read_labels
from finesight.label.teacher import Teacher, TeacherSettings
from finesight.samples.sample import LocatedSample, TextPart
from finesight.synth.tickets import write_tickets
from finesight.train.logging import get_device_name
from finesight.train.setup import library_versions

ARMS = ("least certain", "random review", "no review", "labeled alone")
PROMPT = "Read the text."
ERROR_IMAGES, ERROR_ANSWERS = 0.2, 0.7
NUM_REVIEWED, NUM_VALIDATION = 30, 150

T_QUANTILES = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""97.5 % quantile of the t distribution by the number of values."""

Labels = dict[Path, dict[str, str]]
"""True fields by the files of the images."""


def draw_tickets(folder: Path, count: int, seed: int) -> Labels:
    """Write tickets into a folder."""
    with write_tickets(folder, count, seed).open(newline="", encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    return {folder / row.pop("image"): row for row in rows}


def crop_word(row: dict[str, Any], folder: Path) -> Image.Image:
    """Return the box of a row of a photo, with a margin."""
    x1, y1, x2, y2 = row["bbox_xyxy"]
    margin = (y2 - y1) // 4
    corners = (x1 - margin, y1 - margin, x2 + margin, y2 + margin)
    return Image.open(folder / row["image"]).convert("RGB").crop(corners)


def crop_words(file: Path, folder: Path, seed: int) -> Labels:
    """Write the box of each row of a file with a margin, in random order."""
    folder.mkdir()
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    random.Random(f"words {seed}").shuffle(rows)
    found: Labels = {}
    for index, row in enumerate(rows):
        path = folder / f"{index:04}.png"
        crop_word(row, file.parent).save(path)
        found[path] = {"text": row["answer"]}
    return found


def hash_pixels(image: Image.Image) -> str:
    """Return a key of the pixels of an image."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


class TeacherServer(ThreadingHTTPServer):
    """Server that answers with the true fields, of which some are wrong."""

    def __init__(self, truth: Labels, seed: int) -> None:
        super().__init__(("127.0.0.1", 0), TeacherHandler)
        self._fields = {hash_pixels(Image.open(file)): row for file, row in truth.items()}
        self._seed = seed

    def answer(self, image: Image.Image, number: int) -> str:
        """Return an answer to the question about an image."""
        key = hash_pixels(image)
        fields, rng = dict(self._fields[key]), random.Random(f"teacher {self._seed} {key}")
        is_hard, name = rng.random() < ERROR_IMAGES, rng.choice([*fields])
        wrong = [self._change(fields[name], rng) for _ in range(2)]
        own = random.Random(f"answer {self._seed} {key} {number}")
        if is_hard and own.random() < ERROR_ANSWERS:
            fields[name] = own.choice(wrong)
        return json.dumps(fields)

    @staticmethod
    def _change(text: str, rng: random.Random) -> str:
        at = rng.choice([index for index, char in enumerate(text) if char.isalnum()])
        others = "0123456789" if text[at].isdigit() else "abcdefghijklmnopqrstuvwxyz"
        return text[:at] + rng.choice(others.replace(text[at].lower(), "")) + text[at + 1 :]


class TeacherHandler(BaseHTTPRequestHandler):
    """Handler of chat completions."""

    def do_POST(self) -> None:
        assert isinstance(self.server, TeacherServer), f"{self.server} is no teacher"
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        (url,) = [
            part["image_url"]["url"]
            for part in body["messages"][-1]["content"]
            if part["type"] == "image_url"
        ]
        image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
        texts = [self.server.answer(image, number) for number in range(body["n"])]
        choices = [{"message": {"content": text}, "finish_reason": "stop"} for text in texts]
        content = json.dumps({"choices": choices}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *values: object) -> None:
        """Write no log."""


def label_images(folder: Path, truth: Labels, arm: str, seed: int) -> list[LocatedSample]:
    """Label the images of an arm, and return the labeled samples."""
    names = [*next(iter(truth.values()))]
    options: dict[str, Any] = {"kind": "fields", "field_names": names, "prompt": PROMPT}
    session = open_session(folder, "finesight-tiny", [*truth], **options)
    answers = {str(file): json.dumps(row) for file, row in truth.items()}
    shuffled = random.Random(f"review {seed}").sample(sorted(answers), NUM_REVIEWED)
    with session.store as store, TeacherServer(truth, seed) as server:
        if arm != "labeled alone":
            threading.Thread(target=server.serve_forever, daemon=True).start()
            settings = TeacherSettings(f"http://127.0.0.1:{server.server_port}/v1", "teacher")
            reasons = session.add_suggestions(Teacher(settings, session, print).suggest)
            assert not reasons, f"images without a suggestion: {reasons}"
            server.shutdown()
        order = [item.sample.sample.id for item in store.items]
        reviewed = order[:NUM_REVIEWED] if arm == "least certain" else shuffled
        with store.write_once():
            for item in store.items:
                name = item.sample.sample.id
                if name in reviewed and arm != "no review":
                    store.save_label(name, (TextPart(text=answers[name]),))
                elif item.suggestion is not None:
                    store.save_label(name, item.suggestion.content)
    return read_labels(folder)


def measure_arm(
    case: tuple[int, str], num_images: int, steps: int, real: Path | None
) -> dict[str, Any]:
    """Label, train and score with one seed."""
    seed, arm = case
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if real is None:
            unlabeled = draw_tickets(work / "tickets", num_images, 100 + seed)
            validation = draw_tickets(work / "validation", NUM_VALIDATION, 200 + seed)
        else:
            words = [*crop_words(real, work / "words", seed).items()]
            assert len(words) >= num_images + NUM_VALIDATION, f"only {len(words)} words"
            unlabeled = dict(words[:num_images])
            validation = dict(words[num_images : num_images + NUM_VALIDATION])
        labels = label_images(work / "labels", unlabeled, arm, seed)
        truth = {str(file): row for file, row in (unlabeled | validation).items()}
        wrong = sum(
            json.loads(get_text(one.sample.messages[-1].content)) != truth[one.sample.id]
            for one in labels
        )
        run = train_model(work / "trained", labels, seed, steps)
        answers = suggest(run, [build_question([one], PROMPT, str(one)) for one in validation])
        correct = [count_correct(get_text(one.content), truth[one.id]) for one in answers]
    score = sum(correct) / sum(map(len, validation.values()))
    found = {"seed": seed, "arm": arm, "labels": len(labels), "wrong_labels": wrong}
    found["score"] = round(score, 4)
    print(json.dumps(found), flush=True)
    return found


def count_correct(text: str, fields: dict[str, str]) -> int:
    """Return the number of correct fields of an answer."""
    try:
        values = json.loads(text)
    except ValueError:
        return 0
    is_object = isinstance(values, dict)
    return sum(values.get(name) == value for name, value in fields.items()) if is_object else 0


def describe(values: list[float]) -> str:
    """Return the mean with its 95 % interval."""
    half = T_QUANTILES.get(len(values), math.inf) * stdev(values) / math.sqrt(len(values))
    return f"{100 * fmean(values):.1f} % +- {100 * half:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--real", type=Path, help="JSONL file of boxes in photos")
    args = parser.parse_args()
    cases = [*product(range(args.seeds), ARMS)]
    measure = partial(measure_arm, num_images=args.images, steps=args.steps, real=args.real)
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        results = [*pool.map(measure, cases)]
    scores = {arm: [one["score"] for one in results if one["arm"] == arm] for arm in ARMS}
    gains = {
        arm: [a - b for a, b in zip(scores[ARMS[0]], scores[arm], strict=True)] for arm in ARMS
    }
    table = ["arm            wrong labels  correct fields    gain of least certain"]
    for arm in ARMS if args.seeds > 1 else ():
        wrong = fmean(one["wrong_labels"] for one in results if one["arm"] == arm)
        table.append(f"{arm:15}{wrong:12.1f}  {describe(scores[arm]):16}  {describe(gains[arm])}")
    print("\n".join(table))
    figures = {
        "command": f"python {shlex.join(sys.argv)}",
        "machine": get_device_name(torch.device("cpu")),
        "versions": library_versions(),
        "results": results,
        "table": table,
    }
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
