"""How fast the report of a run is made, and how fast Chromium opens it. Prints one JSON object.

    python benchmarks/report_speed.py [RUN...] [--examples 2000] [--times 3]

Without RUN, two runs are made up: formulas (wide pictures of few colours, answers drawn as MathML)
and boxes (photographs of 1024 x 768, each another one). Needs chromium, chromedriver and selenium.
`ready_ms` is from the request of the file until its load event, when the script has drawn the first
examples; `filter_ms` and `search_ms` go over all examples. The slowest of several times is given.
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
from browser import DESK, PHONE, Browser, chromium
from run_folders import Line, MadeRun, answer_line

TERMS = (
    r"\frac { %d } { x _ { %d } }",
    r"\sum _ { i = %d } ^ { %d } a _ i",
    r"\sqrt { %d y ^ { %d } }",
)

TIMED = """
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


def formulas(folder: Path, count: int) -> tuple[list[Line], list[Line]]:
    """Answers before and after about pictures of formulas."""
    chance = random.Random(0)
    before, after = [], []
    for i in range(count):
        truth, wrong = (
            " + ".join(
                term % (chance.randint(1, 99), chance.randint(1, 9))
                for term in chance.choices(TERMS, k=4)
            )
            for _ in range(2)
        )
        picture = Image.new("L", (360, 50), 255)
        ImageDraw.Draw(picture).text((4, 18), truth[:55], fill=0)
        picture.save(folder / f"{i}.png")
        for lines, text in ((before, wrong), (after, truth if i % 5 else wrong)):
            path = str(folder / f"{i}.png")
            lines.append(answer_line(f"s{i}", text, truth, float(text == truth), image=path))
    return before, after


def boxes(folder: Path, count: int) -> tuple[list[Line], list[Line]]:
    """Answers before and after about photographs: noise that is smooth enough to look like one."""
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
            line = answer_line(f"s{i}", json.dumps(found["xyxy"]), "", 0.0, scores=scores)
            more = {"image": str(folder / f"{i}.jpg"), "boxes": [found], "gold_boxes": [truth]}
            lines.append(line | more)
    return before, after


def made(folder: Path, kind: str, count: int) -> Path:
    """A run folder of so many examples."""
    run = MadeRun(folder / kind, metric="latex" if kind == "formulas" else "grounding")
    run.trained()
    run.finished(differences=[])
    (folder / f"{kind}_pictures").mkdir()
    make = formulas if kind == "formulas" else boxes
    before, after = make(folder / f"{kind}_pictures", count)
    run.answered("before", before)
    run.answered("after", after)
    return run.folder


def measured(run: Path, page: Path, browser: Browser, times: int) -> dict[str, Any]:
    """Seconds and megabytes of one report."""
    start = time.perf_counter()
    write_report(run, page)
    seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "write_s": round(seconds, 2),
        "page_mb": round(page.stat().st_size / 1e6, 2),
    }
    for width in (PHONE, DESK):
        found = []
        for _ in range(times):
            browser.open(page, width)
            told = {"messages": browser.messages(), "requests": browser.requests()}
            assert told == {"messages": [], "requests": [page.as_uri()]}, told
            result["examples"] = browser.run("return DATA.examples.length;")
            found.append(browser.run(TIMED))
        slowest = {name: max(one[name] for one in found) for name in found[0]}
        result[f"{width}_pixels"] = {name: round(value, 1) for name, value in slowest.items()}
    return result


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="*", type=Path)
    parser.add_argument("--examples", type=int, default=2000)
    parser.add_argument("--times", type=int, default=3)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as place, chromium() as browser:
        folder = Path(place)
        runs = chosen.run or [made(folder, kind, chosen.examples) for kind in ("formulas", "boxes")]
        results = {
            run.name: measured(run, folder / f"{number}.html", browser, chosen.times)
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
