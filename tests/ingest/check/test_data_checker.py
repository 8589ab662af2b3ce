"""A check of many samples: order, counts, what is kept, and who is told."""

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
from case_files import load_cases
from check_fixtures import make_record, write_records
from image_fixtures import write_gray_image

from finesight.ingest.check.check_issues import CheckIssue
from finesight.ingest.check.data_checker import (
    BoxClaimCollector,
    DataChecker,
    inputs_from_files,
    is_recipe,
)
from finesight.ingest.check.image_catalog import MIN_PARALLEL_SAMPLES, ImageCatalog, open_executor
from finesight.ingest.formats.dataset_format import RawBox
from finesight.ingest.import_source import ImportOptions, UnvalidatedRow
from finesight.samples.frames import PIXELS

CASES = load_cases("data_checker")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_gray_image(tmp_path / "a.png", 100, 60)
    return tmp_path


def test_parallel_check_reports_the_same_issues(folder):
    records = [
        make_record("a.png" if n % 10 else f"gone-{n}.png", f"Question {n}?", f"answer {n}")
        for n in range(MIN_PARALLEL_SAMPLES + 30)
    ]
    source = write_records(folder / "data.jsonl", records)
    result: list[CheckIssue] = []
    done: list[int] = []
    (folder / "saved").mkdir()
    check = DataChecker(
        inputs_from_files([source], [], ImportOptions()), folder / "saved", max_issues=5
    )
    found, album = check.run(result.append, done.append)
    gone = range(1, MIN_PARALLEL_SAMPLES + 31, 10)
    assert [finding.where for finding in result] == [f"{source}:{line}" for line in gone]
    assert list(found.issues) == result[:5]
    assert found.issue_counts == {"image-missing": len(gone)} == found.affected_samples
    assert check.num_rows == MIN_PARALLEL_SAMPLES + 30 == sum(done)
    assert len(album) == 1 + len(gone)


def test_unguarded_script_can_run_check(folder):
    source = write_records(
        folder / "data.jsonl",
        [make_record("a.png", f"{n}?") for n in range(MIN_PARALLEL_SAMPLES + 1)],
    )
    script = folder / "script.py"
    script.write_text(
        f"from finesight.api import check_data\nprint(check_data({str(source)!r}).num_samples)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{MIN_PARALLEL_SAMPLES + 1}\n"


def test_excess_boxes_are_subsampled_evenly(folder):
    path = str(folder / "a.png")
    with open_executor(0) as pool:
        album = ImageCatalog(pool)
        list(album.process_groups([[path]], lambda group: group))
        claims = BoxClaimCollector(max_claims=100)
        for row in range(1000):
            box = RawBox((float(row), 0.0, 1.0, 1.0), Path(path), PIXELS)
            claims.add_row(UnvalidatedRow(f"line {row}", (), (box, box)), f"data:{row}", album)
    rows = sorted({int(claim.coordinates[0]) for claim in claims.claims})
    assert 20 <= len(rows) <= 50
    steps = {later - earlier for earlier, later in itertools.pairwise(rows)}
    assert len(steps) == 1, f"the rows that are kept are {rows}"


@pytest.mark.parametrize(("name", "text", "recipe"), CASES["test_is_recipe_detection"])
def test_is_recipe_detection(tmp_path, name, text, recipe):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert is_recipe(tmp_path / name) is recipe
