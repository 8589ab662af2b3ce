"""Measure how fast reports are written, and how fast Chromium opens them.

    python benchmarks/report_speed.py [RUN...] [--examples 2000] [--times 3]

Without RUN, the script generates two runs: formulas (wide images with few colors, answers as
MathML) and boxes (unique photographs of 1024 x 768). Requires chromium, chromedriver and selenium.
`ready_ms` is the time from the request to the load event, after which the first examples are drawn;
`filter_ms` and `search_ms` process all examples. The slowest of several repetitions is reported.
Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageFilter

from finesight.report.run_page import write_report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from browser import DESKTOP_WIDTH, PHONE_WIDTH, Browser, launch_chromium
from run_dir_fixtures import FakeRunDir, JsonLine, make_prediction_line

FORMULA_TERMS = (
    r"\frac { %d } { x _ { %d } }",
    r"\sum _ { i = %d } ^ { %d } a _ i",
    r"\sqrt { %d y ^ { %d } }",
)

PAGE_TIMING_SCRIPT = """
const times = performance.getEntriesByType("navigation")[0];
const paint = performance.getEntriesByName("first-contentful-paint")[0];
const clock = (act) => {
  const start = performance.now();
  act();
  return performance.now() - start;
};
const filter = clock(() => document.querySelector("[data-kind=better]").click());
const search = clock(() => {
  byId("search").value = "a text that nobody has written";
  byId("search").dispatchEvent(new Event("input"));
});
return {
  ready_ms: times.loadEventEnd, painted_ms: paint ? paint.startTime : 0,
  filter_ms: filter, search_ms: search,
};
"""


def make_formula_examples(folder: Path, count: int) -> tuple[list[JsonLine], list[JsonLine]]:
    """Generate answers before and after training about images of formulas."""
    chance = random.Random(0)
    before, after = [], []
    for i in range(count):
        truth, wrong = (
            " + ".join(
                term % (chance.randint(1, 99), chance.randint(1, 9))
                for term in chance.choices(FORMULA_TERMS, k=4)
            )
            for _ in range(2)
        )
        image = Image.new("L", (360, 50), 255)
        ImageDraw.Draw(image).text((4, 18), truth[:55], fill=0)
        image.save(folder / f"{i}.png")
        for lines, text in ((before, wrong), (after, truth if i % 5 else wrong)):
            path = str(folder / f"{i}.png")
            lines.append(
                make_prediction_line(f"s{i}", text, truth, float(text == truth), image=path)
            )
    return before, after


def make_box_examples(folder: Path, count: int) -> tuple[list[JsonLine], list[JsonLine]]:
    """Generate answers before and after training about smooth-noise photographs."""
    chance = np.random.default_rng(0)
    before, after = [], []
    for i in range(count):
        small = chance.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        photograph = Image.fromarray(small).resize((1024, 768), Image.Resampling.BICUBIC)
        photograph.filter(ImageFilter.GaussianBlur(1)).save(folder / f"{i}.jpg", quality=90)
        truth = {"image": 0, "label": "a thing", "xyxy": [100, 100, 400 + i % 300, 500]}
        other = {"image": 0, "label": "a thing", "xyxy": [300, 200, 700, 600 + i % 100]}
        for lines, found in ((before, other), (after, truth if i % 5 else other)):
            scores = {"hit": float(found is truth), "iou": 1.0 if found is truth else 0.2}
            line = make_prediction_line(f"s{i}", json.dumps(found["xyxy"]), "", 0.0, scores=scores)
            more = {"image": str(folder / f"{i}.jpg"), "boxes": [found], "gold_boxes": [truth]}
            lines.append(line | more)
    return before, after


def make_run_dir(folder: Path, task: str, count: int) -> Path:
    """Write a run folder with the given number of examples."""
    run = FakeRunDir(folder / task, metric="latex" if task == "formulas" else "grounding")
    run.write_metrics()
    run.write_finished(differences=[])
    (folder / f"{task}_images").mkdir()
    make = make_formula_examples if task == "formulas" else make_box_examples
    before, after = make(folder / f"{task}_images", count)
    run.write_predictions("before", before)
    run.write_predictions("after", after)
    return run.folder


def measure_report(run: Path, page: Path, browser: Browser, repeats: int) -> dict[str, Any]:
    """Measure seconds and size of one report."""
    start = time.perf_counter()
    write_report(run, page)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "write_s": round(seconds, 2),
        "page_mb": round(page.stat().st_size / 1e6, 2),
    }
    for width in (PHONE_WIDTH, DESKTOP_WIDTH):
        found = []
        for _ in range(repeats):
            browser.open(page, width)
            browser_log = {"messages": browser.messages(), "requests": browser.requests()}
            assert browser_log == {"messages": [], "requests": [page.as_uri()]}, browser_log
            result["examples"] = browser.run("return DATA.examples.length;")
            found.append(browser.run(PAGE_TIMING_SCRIPT))
        slowest = {name: max(one[name] for one in found) for name in found[0]}
        result[f"{width}_pixels"] = {name: round(value, 1) for name, value in slowest.items()}
    return result


def main() -> None:
    """Run the benchmark and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="*", type=Path)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--times", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp_dir, launch_chromium() as browser:
        folder = Path(temp_dir)
        runs = chosen.run or [
            make_run_dir(folder, kind, chosen.examples) for kind in ("formulas", "boxes")
        ]
        results = {
            run.name: measure_report(run, folder / f"{number}.html", browser, chosen.times)
            for number, run in enumerate(runs)
        }
        version = browser.driver.capabilities["browserVersion"]
    result = {
        "command": " ".join(["benchmarks/report_speed.py", *sys.argv[1:]]),
        "reports": results,
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "pillow": PIL.__version__,
            "chromium": version,
        },
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
