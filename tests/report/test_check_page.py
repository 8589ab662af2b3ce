"""Tests of the data check page."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from browser import (
    DESKTOP_WIDTH,
    PHONE_WIDTH,
    XSS_PAYLOADS,
    Browser,
    assert_nothing_executed,
    click,
    count,
    open_page,
    read_texts,
)
from check_fixtures import make_record, run_check, write_records
from html_text import read_script_data, read_visible_text
from image_fixtures import write_gray_image

from finesight.ingest.check.check_issues import ISSUE_TYPES, CheckIssue, IssueImage
from finesight.ingest.check.check_page import CHECKS, MAX_IMAGES_PER_ISSUE, render_check_page
from finesight.ingest.check.check_result import (
    CheckResult,
    DatasetProfile,
    SamplePreview,
    SourceStats,
)


def make_result(findings: list[CheckIssue], **more: int) -> CheckResult:
    counts = Counter(finding.code for finding in findings) + Counter(more)
    source = SourceStats("labels.jsonl", False, "samples", "each line has `messages`", 60, 50)
    return CheckResult((source,), dict(counts), tuple(findings), 40, 30, {"box-outside": 7})


def make_issue(number, code, *shown, text="what is wrong"):
    location = f"labels.jsonl:{number}"
    return CheckIssue(code, location, text, "fix it", sample_id=f"s{number}", images=shown)


@pytest.fixture
def mixed_result(tmp_path: Path) -> CheckResult:
    image = write_gray_image(tmp_path / "a.png", 200, 100, gray_level=90)
    gone = tmp_path / "gone.png"
    boxes = ((10.0, 20.0, 60.0, 80.0), (150.0, 50.0, 240.0, 90.0))
    return make_result(
        [
            make_issue(1, "image-missing", IssueImage(gone)),
            make_issue(2, "box-outside", IssueImage(image, 0, boxes, ("cat", "dog"))),
            make_issue(3, "box-inverted", IssueImage(image, 0, ((60.0, 80.0, 10.0, 20.0),))),
            *(make_issue(number, "contradictory-answers") for number in range(4, 50)),
            make_issue(50, "box-tiny", IssueImage(image, 0, ((5.0, 5.0, float("nan"), 6.0),))),
        ]
    )


def test_every_issue_is_on_the_page(mixed_result: CheckResult) -> None:
    data = read_script_data(render_check_page(mixed_result))
    assert [record["where"] for record in data["issues"]] == [f.where for f in mixed_result.issues]
    for record, found in zip(data["issues"], mixed_result.issues, strict=True):
        assert record["severity"] == found.severity
        assert record["description"] == ISSUE_TYPES[found.code][1]
        assert (record["what"], record["remedy"]) == (found.what, found.remedy)
    missing, outside, *_, tiny = data["issues"]
    assert data["images"][missing["images"][0]["image_index"]] == "no such image"
    labels = [box["label"] for box in outside["images"][0]["boxes"]]
    assert labels == ["cat", "dog"]
    assert tiny["images"][0]["boxes"] == [], "boxes with non-finite corners are not drawn"


def test_images_are_distributed_over_issue_kinds(tmp_path: Path) -> None:
    images = [
        write_gray_image(tmp_path / f"{number}.png", gray_level=number) for number in range(40)
    ]
    many = [make_issue(n, "box-outside", IssueImage(images[n])) for n in range(38)]
    few = [make_issue(n, "box-tiny", IssueImage(images[n])) for n in (38, 39)]
    page = render_check_page(make_result([*many, *few]), max_images=10)
    data = read_script_data(page)
    drawn = Counter(record["code"] for record in data["issues"] if record["images"])
    assert drawn == {"box-outside": 8, "box-tiny": 2}
    assert len(data["images"]) == 10
    assert "30 further issues are listed without images" in page


def test_images_are_embedded_once_per_page(tmp_path: Path) -> None:
    image = write_gray_image(tmp_path / "a.png")
    same = make_issue(1, "leaked-image", *[IssueImage(image)] * 9)
    other = make_issue(2, "box-tiny", IssueImage(image))
    data = read_script_data(render_check_page(make_result([same, other])))
    assert len(data["images"]) == 1
    assert len(data["issues"][0]["images"]) == MAX_IMAGES_PER_ISSUE
    assert data["issues"][0]["num_more"] == 9 - MAX_IMAGES_PER_ISSUE
    page = render_check_page(make_result([]))
    assert "No issues were found." in page
    assert read_script_data(page) == {"issues": [], "previews": [], "images": [], "charts": []}


def test_page_without_issues_shows_checks_and_statistics(tmp_path: Path) -> None:
    for number in range(30):
        write_gray_image(tmp_path / f"{number}.png", 200, 100, gray_level=number)
    box = {"type": "box", "image": 0, "label": "cat", "xyxy": [10, 20, 60, 80]}
    records = [make_record(f"{n}.png", answer="yes" if n % 2 else "no") for n in range(60)]
    records[3]["messages"][1]["content"].append(box)
    records[5] = make_record("5.png", answer="perhaps")
    train = write_records(tmp_path / "train.jsonl", records[:24])
    validation = write_records(tmp_path / "eval.jsonl", records[24:30])
    page = render_check_page(run_check(train, validation))
    text, data = read_visible_text(page), read_script_data(page)
    assert "Checks of 30 samples, 30 images (30 unique) and 1 boxes" in text
    assert "Validation images in the training data no issues" in text
    assert "skipped: no source has enough samples with boxes" in text
    assert "Most frequent answers, training (3 different values)" in text
    assert "perhaps 1 4.2" in text
    assert "no 12 50.0" in text
    assert [[one["name"] for one in chart["series"]] for chart in data["charts"]] == [
        ["training", "validation"],
        ["training", "validation"],
        ["training"],
    ]
    assert len(data["previews"]) == len(data["images"]) == 30
    boxes = [box for one in data["previews"] for box in one["images"][0]["boxes"]]
    assert boxes == [{"xyxy": [10, 20, 60, 80], "label": "cat"}]


def test_every_issue_belongs_to_one_check() -> None:
    assert sorted(code for codes in CHECKS.values() for code in codes) == sorted(ISSUE_TYPES)


@pytest.fixture
def file(tmp_path: Path, mixed_result: CheckResult) -> Path:
    (tmp_path / "check.html").write_text(render_check_page(mixed_result))
    return tmp_path / "check.html"


@pytest.mark.parametrize("width", [PHONE_WIDTH, DESKTOP_WIDTH])
def test_page_in_browser(browser: Browser, file: Path, width: int) -> None:
    open_page(browser, file, width)
    assert count(browser, ".feed > li") == 30
    locations = browser.run(
        """return [...document.querySelectorAll('.image')].slice(0, 2).map((figure) => {
          const frame = figure.querySelector('img').getBoundingClientRect();
          const scale = 200 / frame.width;
          return [...figure.querySelectorAll('.box')].map((box) => {
            const at = box.getBoundingClientRect();
            return [at.left - frame.left, at.top - frame.top, at.right - frame.left,
              at.bottom - frame.top].map((value) => value * scale);
          });
        });"""
    )
    # In pixels of the original image.
    outside, inverted = locations
    np.testing.assert_allclose(outside, [[10, 20, 60, 80], [150, 50, 240, 90]], atol=1)
    np.testing.assert_allclose(inverted, [[10, 20, 60, 80]], atol=1)
    click(browser, ".more")
    assert count(browser, ".feed > li") == 50
    assert browser.run("return document.querySelector('.more').hidden;")
    click(browser, "[data-severity=error]")
    assert count(browser, ".feed > li") == 3
    click(browser, "[data-code=box-tiny]")
    assert count(browser, ".feed > li") == 1
    assert read_texts(browser, "#num-shown") == ["1 of 50 issues"]
    assert browser.run("return byId('issue-code').value;") == "box-tiny"
    click(browser, '[data-severity=""]')
    search = "byId('search').value = {!r}; byId('search').dispatchEvent(new Event('input'));"
    browser.run(search.format("CAT.jsonl"))
    assert count(browser, ".feed > li") == 0
    browser.run(search.format(":4"))
    assert read_texts(browser, "#num-shown") == ["11 of 50 issues"]
    assert browser.overflow_width() == 0


def test_html_payloads_are_escaped(browser: Browser, tmp_path: Path) -> None:
    findings, previews = [], []
    for payload in XSS_PAYLOADS:
        image = write_gray_image(tmp_path / f"{payload.replace('/', '|')}.png")
        shown = (IssueImage(image, 0, ((1, 2, 9, 9),), (payload,)), IssueImage(Path(payload)))
        texts = [payload] * 5
        findings.append(CheckIssue("box-tiny", *texts, shown, (payload,), "clipped"))
        previews.append(SamplePreview(payload, payload, False, payload, payload, shown))
    source = SourceStats(XSS_PAYLOADS[0], True, XSS_PAYLOADS[1], XSS_PAYLOADS[2], 1, 1)
    values = tuple((payload, 2) for payload in XSS_PAYLOADS)
    profiles = {False: DatasetProfile(9, 9, {"num_boxes": {"0": 1}}, values, 9, values, 9)}
    counts = {"box-tiny": 32}
    found = CheckResult(
        (source,), counts, tuple(findings), 1, 1, profiles=profiles, previews=tuple(previews)
    )
    file = tmp_path / "check.html"
    file.write_text(render_check_page(found))
    browser.open(file)
    click(browser, ".more")
    browser.run("document.querySelector('details').open = true;")
    assert read_texts(browser, ".previews .reference") == list(XSS_PAYLOADS[:12])
    click(browser, "#other-samples")
    assert read_texts(browser, ".previews .reference") == list(XSS_PAYLOADS[12:24])
    assert_nothing_executed(browser, file)
    assert read_texts(browser, ".feed .mono") == list(XSS_PAYLOADS)
