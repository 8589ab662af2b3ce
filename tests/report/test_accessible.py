"""Accessibility tests of the pages with axe-core."""

from pathlib import Path

import pytest
from run_dir_fixtures import RECIPE, FakeRunDir, make_run, make_sign_answers, start_record
from tiny_task import make_task, write_recipe

from finesight.cli.app import run_command
from finesight.report.compare_page import write_compare_page
from finesight.report.run_page import write_report


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    a = make_run(tmp_path / "a", make_sign_answers(tmp_path, [0.5, 1.0] * 4))
    recipe = RECIPE | {"eval": {"metric": "ocr", "max_new_tokens": 9}}
    b = make_run(
        tmp_path / "b",
        make_sign_answers(tmp_path, [1.0, 0.5] * 4),
        recipe=recipe,
        start=start_record(500),
    )
    (b.folder / "result.json").unlink()
    return [a.folder, b.folder]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_pages_have_no_severe_violations(browser, runs, tmp_path, language):
    page, check, show = (tmp_path / f"{name}.html" for name in ("page", "check", "show"))
    write_compare_page(runs, page, language)
    recipe = write_recipe(tmp_path / "recipe.yaml", make_task(tmp_path) | {"output_dir": "run"})
    chosen = ["--language", language]
    assert run_command(["check", str(tmp_path / "train.jsonl"), "--html", str(check), *chosen]) == 0
    assert run_command(["show", str(recipe), "--html", str(show), *chosen]) == 0
    grpo = FakeRunDir(tmp_path / "grpo")
    responses = make_sign_answers(tmp_path, [0.5, 1.0] * 4)
    grpo.write_rewards([{"rewards/exact/mean": 0.5, "rewards/exact/std": 0.5}] * 9, [responses])
    reports = [write_report(folder, language=language) for folder in (grpo.folder, *runs)]
    for file in (page, check, show, *reports):
        browser.open(file)
        browser.run("for (const at of document.querySelectorAll('details')) at.open = true;")
        assert browser.find_layout_problems() == [], file.name
        assert browser.messages() == [], file.name
    for button in ("[data-view=grid]", "#feed .tile"):
        browser.run(f"document.querySelector('{button}').click();")
        assert browser.find_layout_problems() == [], button
