"""Pages as people with other eyes, hands and ears meet them, judged by axe-core."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe import Axe
from browser import DESK, PHONE, Browser
from compared_runs import RECIPE, begun, run_with, signs
from small_run import make_task, write_recipe

from finesight.cli.app import run
from finesight.report.compare_page import write_comparison
from finesight.report.language import Language
from finesight.report.run_page import write_report


@pytest.fixture(scope="module")
def axe() -> Axe:
    return Axe()


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    a = run_with(tmp_path / "a", signs(tmp_path, [0.5, 1.0] * 4))
    recipe = RECIPE | {"eval": {"metric": "ocr", "max_new_tokens": 9}}
    b = run_with(tmp_path / "b", signs(tmp_path, [1.0, 0.5] * 4), recipe=recipe, start=begun(500))
    (b.folder / "result.json").unlink()
    return [a.folder, b.folder]


def test_the_checker_finds_what_is_wrong(browser: Browser, axe: Axe, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    style = "<p style='color: #999; background: #fff'>pale words</p>"
    file.write_text(f"<!doctype html><title>x</title><img src='data:,'><button></button>{style}")
    browser.open(file)
    found = {one.partition(":")[0] for one in axe.grave(browser)}
    assert {"image-alt", "button-name", "color-contrast", "html-has-lang"} <= found


@pytest.mark.parametrize(("width", "dark", "language"), [(PHONE, True, "en"), (DESK, False, "zh")])
def test_nothing_serious(
    browser: Browser,
    axe: Axe,
    runs: list[Path],
    tmp_path: Path,
    width: int,
    dark: bool,
    language: Language,
) -> None:
    page, check, show = (tmp_path / f"{name}.html" for name in ("page", "check", "show"))
    write_comparison(runs, page, language)
    recipe = write_recipe(tmp_path / "recipe.yaml", make_task(tmp_path) | {"output": "run"})
    chosen = ["--language", language]
    assert run(["data", "check", str(tmp_path / "train.jsonl"), "--html", str(check), *chosen]) == 0
    assert run(["data", "show", str(recipe), "--html", str(show), *chosen]) == 0
    reports = [write_report(folder, language=language) for folder in runs]
    for file in (page, check, show, *reports):
        browser.open(file, width, dark=dark)
        assert browser.messages() == [], file.name
        assert browser.overflow() == 0, file.name
        assert axe.grave(browser) == [], file.name
