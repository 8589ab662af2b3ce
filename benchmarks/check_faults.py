"""Measure detection rate and false alarms of `check` for injected faults.

    python benchmarks/check_faults.py DATA [--count 20] [--seed 0] [--out FILE]

DATA contains real images: formulas, captioned photographs, words and receipts with boxes. Half of
the 2,000 samples are generated. `--count` instances of each fault are injected into different
samples. The command checks the files with and without faults. A fault is detected if its line is
reported with its issue code. An error or warning for a line without a fault, or for a whole source,
is a false alarm. Writes results/check_faults.json.
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
from fault_injection import (
    CAPTION_PROMPT,
    FaultContext,
    InjectedFault,
    Record,
    inject_faults,
    load_external_samples,
    split_by_image,
    write_records,
)

from finesight.ingest.import_source import ImportOptions
from finesight.samples.sample import Sample

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "pretraining"))
from shape_images import LABELS_FILE, write_shape_images
from tiny_model import create_tiny_model

DEFAULT_OUTPUT = Path(__file__).parent / "results" / "check_faults.json"

MAX_LENGTH = 2000
"""Maximum tokens of a sample; all valid samples are shorter with the small tokenizer."""

FORMULAS = ImportOptions(
    columns={"image": "image", "answer": "latex"}, prompt="Read the formula.", limit=450
)
CAPTIONS = ImportOptions(
    columns={"image": "image", "answer": "captions"}, prompt=CAPTION_PROMPT, limit=50
)
TEXT_BOXES = ImportOptions(
    columns={"image": "image", "question": "question", "box": "bbox_xyxy"}, limit=300
)
SCENES = ImportOptions(
    columns={"image": "image", "label": "shapes", "box": "boxes"},
    prompt="Find every shape.",
    box_format="xywh",
)
DRAWN_SAMPLES = 1000


def build_clean_samples(data: Path, work: Path, seed: int) -> list[Sample]:
    """Build 2,000 valid samples: 1,000 real and 1,000 generated."""
    write_shape_images(work / "scenes", DRAWN_SAMPLES, seed)
    sources = (
        (data / "latex_ocr/latex_ocr.jsonl", FORMULAS),
        (data / "captions/captions.jsonl", CAPTIONS),
        (data / "grounding/grounding.jsonl", TEXT_BOXES),
        (work / "scenes" / LABELS_FILE, SCENES),
    )
    return [
        sample
        for source, request in sources
        for sample in load_external_samples(source, request, work)
    ]


def run_check(train: Path, validation: Path, model: Path) -> tuple[list[Record], Record, float]:
    """Run `check` and return findings, summary and seconds."""
    command = [sys.executable, "-m", "finesight", "check", str(train), "--json"]
    command += ["--against", str(validation), "--model", str(model)]
    start = time.perf_counter()
    done = subprocess.run(
        [*command, "--max-length", str(MAX_LENGTH)], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    assert done.returncode in (0, 2, 3), f"exit code {done.returncode}: {done.stderr}"
    *findings, summary = map(json.loads, done.stdout.splitlines())
    return findings, summary, seconds


def false_alarms(
    findings: list[Record], train: Path, injected: list[InjectedFault]
) -> list[Record]:
    """Return errors and warnings without a matching fault."""
    spoilt = {f"{train}:{line}" for one in injected for line in one.lines}
    problems = [finding for finding in findings if finding["severity"] != "note"]
    return [finding for finding in problems if finding["where"] not in spoilt]


def count_detections(
    injected: list[InjectedFault], findings: list[Record], train: Path
) -> list[dict[str, Any]]:
    """Count injected and detected faults per type, and list the missed lines."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for finding in findings:
        found[finding["code"]].add(finding["where"])
    rows = {}
    for one in injected:
        row = rows.setdefault(
            one.fault_type,
            {"fault": one.fault_type, "code": one.code, "planted": 0, "found": 0, "missed": []},
        )
        row["planted"] += 1
        if found[one.code] & {f"{train}:{line}" for line in one.lines}:
            row["found"] += 1
        else:
            row["missed"].append(list(one.lines))
    return list(rows.values())


def main() -> None:
    """Run the benchmark, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUTPUT)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        model = create_tiny_model(work / "model")
        samples = build_clean_samples(chosen.data, work, chosen.seed)
        train, validation = split_by_image(samples, 10)
        eval_file = write_records(work / "eval.jsonl", validation)
        clean_file = write_records(work / "clean.jsonl", train)
        clean, _, clean_s = run_check(clean_file, eval_file, model)
        garden = FaultContext(chosen.seed, work / "spoilt", validation, MAX_LENGTH)
        records, injected = inject_faults(train, garden, chosen.count)
        train_file = write_records(work / "train.jsonl", records)
        findings, summary, seconds = run_check(train_file, eval_file, model)
    rows = count_detections(injected, findings, train_file)
    false = false_alarms(findings, train_file, injected)
    false_when_clean = false_alarms(clean, clean_file, [])
    result = {
        "samples": len(samples),
        "real": len(samples) - DRAWN_SAMPLES,
        "seed": chosen.seed,
        "faults": rows,
        "planted": len(injected),
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
    print(f"false alarms: {len(false)} of {len(samples) - len(injected)} valid samples,")
    print(f"{len(false_when_clean)} of {len(samples)} without faults; {result['notes']} notes")
    chosen.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(0 if result["found"] == len(injected) else 1)


if __name__ == "__main__":
    main()
