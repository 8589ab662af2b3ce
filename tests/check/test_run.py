"""A check of many samples: order, counts, what is kept, and who is told."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from conversing import lines, sample
from PIL import Image
from scenery import paint

from finesight.check.findings import FAULTS, Finding
from finesight.check.pictures import Album
from finesight.check.processes import WORTH_IT, processes
from finesight.check.run import Check, Claims
from finesight.check.subjects import is_recipe, of_files
from finesight.data.boxes import BoxForm
from finesight.data.formats.format import RawBox
from finesight.data.opening import Drafted, Request


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    paint(tmp_path / "a.png", 100, 60)
    return tmp_path


def test_other_processes_find_the_same_and_all_is_told(folder):
    records = [
        sample("a.png" if n % 10 else f"gone-{n}.png", f"Question {n}?", f"answer {n}")
        for n in range(WORTH_IT + 30)
    ]
    source = lines(folder / "data.jsonl", records)
    told: list[Finding] = []
    done: list[int] = []
    (folder / "saved").mkdir()
    check = Check(
        of_files([source], [], Request()),
        folder / "saved",
        keep=5,
    )
    found, album = check.run(told.append, done.append)
    gone = range(1, WORTH_IT + 31, 10)
    assert [finding.where for finding in told] == [f"{source}:{line}" for line in gone]
    assert list(found.findings) == told[:5]
    assert found.counts == {"picture-missing": len(gone)} == found.affected
    assert check.rows == WORTH_IT + 30 == sum(done)
    assert len(album) == 1 + len(gone)


def test_a_script_that_is_not_guarded_against_other_processes_can_check(folder):
    source = lines(folder / "data.jsonl", [sample("a.png", f"{n}?") for n in range(WORTH_IT + 1)])
    script = folder / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from finesight.check.run import check_sources\n"
        "from finesight.check.subjects import of_files\n"
        "from finesight.data.opening import Request\n"
        f"subjects = of_files([Path({str(source)!r})], [], Request())\n"
        "print(check_sources(subjects).samples)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{WORTH_IT + 1}\n"


def test_the_gravest_faults_come_first(folder):
    records = [
        sample("a.png", "Where?", None, [0, 0, 100, 60]),
        sample("a.png", "One?", "yes"),
        sample("a.png", "One?", "no"),
        sample("gone.png"),
    ]
    (folder / "saved").mkdir()
    source = lines(folder / "data.jsonl", records)
    found, _ = Check(of_files([source], [], Request()), folder / "saved").run()
    assert list(found.counts) == ["picture-missing", "contradiction", "box-of-everything"]
    assert [finding.code for finding in found.findings] == list(found.counts)
    assert found.affected == {"picture-missing": 1, "contradiction": 1, "box-of-everything": 1}
    assert set(found.counts) <= set(FAULTS)


def test_boxes_in_thousandths_are_named_for_the_whole_source(folder):
    records = []
    for number in range(40):
        size = (600 + 7 * number, 300 + 5 * number)
        Image.new("L", size, number).save(folder / f"{number}.png")
        box = [100 + number, 200, 900 + number, 950]
        records.append(sample(f"{number}.png", f"Where is {number}?", None, box))
    (folder / "saved").mkdir()
    source = lines(folder / "data.jsonl", records)
    found, _ = Check(of_files([source], [], Request()), folder / "saved").run()
    first = found.findings[0]
    assert (first.code, first.where, first.sample) == ("boxes-thousandths", str(source), "")
    assert first.evidence, "without a reason"
    assert found.affected["boxes-thousandths"] == 0


def test_boxes_beyond_what_is_kept_are_thinned_out_evenly(folder):
    path = str(folder / "a.png")
    with processes(0) as pool:
        album = Album(pool)
        list(album.look([[path]], lambda group: group))
        claims = Claims(most=100)
        for row in range(1000):
            box = RawBox((float(row), 0.0, 1.0, 1.0), Path(path), BoxForm())
            claims.take(Drafted(f"line {row}", row, (), (box, box)), f"data:{row}", album)
    rows = sorted({int(claim.numbers[0]) for claim in claims.taken})
    assert 20 <= len(rows) <= 50
    steps = {later - earlier for earlier, later in itertools.pairwise(rows)}
    assert len(steps) == 1, f"the rows that are kept are {rows}"


@pytest.mark.parametrize(
    ("name", "text", "recipe"),
    [
        ("recipe.yaml", "model: x\ndata: {train: a.jsonl}\n", True),
        ("broken.yml", "model: [", True),
        ("data.yaml", "train: images\nnames: [cat, dog]\n", False),
        ("rows.jsonl", "{}", False),
        ("mistyped.yaml", None, True),
    ],
)
def test_what_is_a_recipe(tmp_path, name, text, recipe):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert is_recipe(tmp_path / name) is recipe
