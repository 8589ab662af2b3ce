"""Does `data check` find the faults that a sample shows, and leave sound samples alone?

    python benchmarks/check_faults.py DATA [--count 20] [--seed 0] [--out FILE]

DATA holds real pictures (formulas, captioned photographs, words and receipts with boxes); half of
the 2,000 samples are drawn. `--count` of each fault are planted, each in a sample of its own, and
the files are checked by the command itself, with and without the faults. A fault counts as found
when its line is reported under its own code, and an alarm as false when a line without a fault,
or a whole source, is reported as an error or a warning. Writes results/check_faults.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy
import PIL
from plant import CAPTION, Garden, Planted, Record, parted, plant, samples_of, write

from finesight.data.opening import Request
from finesight.data.sample import Sample
from finesight.model.tiny import make_tiny

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from shape_pictures import LABELS, draw_scenes

OUT = Path(__file__).parent / "results" / "check_faults.json"

MAX_LENGTH = 2000
"""Tokens; the longest sound sample has fewer, with the small model's tokenizer."""

FORMULAS = Request(
    columns={"image": "image", "answer": "latex"}, prompt="Read the formula.", limit=450
)
CAPTIONS = Request(columns={"image": "image", "answer": "captions"}, prompt=CAPTION, limit=50)
WORDS = Request(columns={"image": "image", "question": "question", "box": "bbox_xyxy"}, limit=300)
SCENES = Request(
    columns={"image": "picture", "label": "shapes", "box": "boxes"},
    prompt="Find every shape.",
    box_format="xywh",
)
DRAWN = 1000


def base(data: Path, work: Path, seed: int) -> list[Sample]:
    """2,000 sound samples: 1,000 real ones and as many drawn ones."""
    draw_scenes(work / "scenes", DRAWN, seed)
    sources = (
        (data / "latex_ocr/latex_ocr.jsonl", FORMULAS),
        (data / "captions/captions.jsonl", CAPTIONS),
        (data / "grounding/grounding.jsonl", WORDS),
        (work / "scenes" / LABELS, SCENES),
    )
    return [sample for source, request in sources for sample in samples_of(source, request, work)]


def check(train: Path, held_out: Path, model: Path) -> tuple[list[Record], Record, float]:
    """The findings and the summary that the command prints, and the seconds it took."""
    command = [sys.executable, "-m", "finesight", "data", "check", str(train), "--json"]
    command += ["--against", str(held_out), "--model", str(model)]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--max-length", str(MAX_LENGTH)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    assert done.returncode in (0, 2, 3), f"exit code {done.returncode}: {done.stderr}"
    *findings, summary = map(json.loads, done.stdout.splitlines())
    return findings, summary, seconds


def alarms(findings: list[Record], train: Path, planted: list[Planted]) -> list[Record]:
    """Errors and warnings about lines of `train` without a fault, or about anything else."""
    spoilt = {f"{train}:{line}" for one in planted for line in one.lines}
    grave = [finding for finding in findings if finding["severity"] != "note"]
    return [finding for finding in grave if finding["where"] not in spoilt]


def table(planted: list[Planted], findings: list[Record], train: Path) -> list[dict[str, Any]]:
    """Of each fault how many were planted and found, and which lines were not."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for finding in findings:
        found[finding["code"]].add(finding["where"])
    rows = {}
    for one in planted:
        row = rows.setdefault(
            one.fault,
            {"fault": one.fault, "code": one.code, "planted": 0, "found": 0, "missed": []},
        )
        row["planted"] += 1
        if found[one.code] & {f"{train}:{line}" for line in one.lines}:
            row["found"] += 1
        else:
            row["missed"].append(list(one.lines))
    return list(rows.values())


def main() -> None:
    """Plant, check, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = make_tiny(work / "model")
        samples = base(chosen.data, work, chosen.seed)
        train, held_out = parted(samples, 10)
        eval_file = write(work / "eval.jsonl", held_out)
        clean_file = write(work / "clean.jsonl", train)
        clean, _, clean_s = check(clean_file, eval_file, model)
        garden = Garden(chosen.seed, work / "spoilt", held_out, MAX_LENGTH)
        records, planted = plant(train, garden, chosen.count)
        train_file = write(work / "train.jsonl", records)
        findings, summary, seconds = check(train_file, eval_file, model)
    rows = table(planted, findings, train_file)
    false = alarms(findings, train_file, planted)
    false_when_clean = alarms(clean, clean_file, [])
    result = {
        "samples": len(samples),
        "real": len(samples) - DRAWN,
        "seed": chosen.seed,
        "faults": rows,
        "planted": len(planted),
        "found": sum(row["found"] for row in rows),
        "false_alarms": [[f["code"], f["where"], f["what"]] for f in false],
        "false_alarms_without_faults": [[f["code"], f["where"]] for f in false_when_clean],
        "notes": sum(finding["severity"] == "note" for finding in findings),
        "seconds": round(seconds, 1),
        "seconds_without_faults": round(clean_s, 1),
        "exit_code": summary["exit_code"],
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {"numpy": numpy.__version__, "pillow": PIL.__version__},
    }
    for row in rows:
        print(f"{row['fault']:28} {row['planted']:3} planted {row['found']:3} found")
    print(f"false alarms: {len(false)} of {len(samples) - len(planted)} sound samples,")
    print(f"{len(false_when_clean)} of {len(samples)} without faults; {result['notes']} notes")
    chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if result["found"] == len(planted) else 1)


if __name__ == "__main__":
    main()
