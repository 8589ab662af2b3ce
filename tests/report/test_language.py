"""Pages in Chinese: the table knows all that they say, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from compared_runs import RECIPE, begun, run_with, signs
from run_folders import MadeRun

from finesight.report import language, record, standing
from finesight.report.compare_page import compare_page, compared
from finesight.report.language import preferred, say, say_in_page, speaking, table
from finesight.report.page import render
from finesight.report.run_page import run_page

SOURCES = Path(language.__file__).parent
SAYS = re.compile(r'\bsay\(\s*"((?:[^"\\]|\\.)*)"')
SAME = {"", "CER", "WER", "F1", "AP", "BLEU", "ANLS", "CIDEr-D", "ROUGE-L"}
"""Texts that are the same in both."""

PUT_TOGETHER = {
    *("errors", "warnings", "notes"),
    *("tokens in all", "learned in all", "patches in all"),
}
"""Texts that no source has as a whole."""


def places(text: str) -> list[str]:
    return re.findall(r"\{[^}]*\}", text)


def test_every_text_of_a_template_or_module_is_in_the_table() -> None:
    with speaking("zh"):
        known = table()
    show = SOURCES.parent / "cli" / "data_show.py"
    files = [*SOURCES.glob("*.py"), *(SOURCES / "templates").iterdir(), show]
    found = {
        text.replace('\\"', '"')
        for file in files
        if file.suffix in (".py", ".html", ".js")
        for text in SAYS.findall(file.read_text(encoding="utf-8"))
    }
    assert len(found) > 150
    assert found - SAME - set(known) == set()


def test_the_table_has_no_text_that_nobody_says() -> None:
    notes = (f"evaluate/{name}.py" for name in ("bootstrap", "compare", "detection"))
    names = ("check/findings.py", "cli/data_show.py", *notes)
    beside = [SOURCES.parent / name for name in names]
    files = [*SOURCES.glob("*.py"), *(SOURCES / "templates").iterdir(), *beside]
    joined = "".join(
        # Strings that are broken over lines are one.
        re.sub(r'"\s*\n\s*"', "", file.read_text(encoding="utf-8"))
        for file in files
        if file.suffix in (".py", ".html", ".js")
    )
    with speaking("zh"):
        for text, said in table().items():
            assert text in joined or text in PUT_TOGETHER, text
            assert places(text) == places(said), text


def test_what_pages_say_at_work_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tables of words, too, which the sources do not show beside `say`."""
    missed = set()

    class Watched(dict[str, str]):
        def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
            missed.update({key} - set(self))
            return super().get(key, default)

    with speaking("zh"):
        known = Watched(table())
        monkeypatch.setattr(language, "table", lambda: known)
        first = run_with(tmp_path / "first", signs(tmp_path, [0.5, 1.0] * 4)).folder
        recipe = RECIPE | {"eval": {"metric": "qa", "max_new_tokens": 9}}
        other = run_with(
            tmp_path / "other",
            signs(tmp_path, [1.0] * 8),
            recipe=recipe,
            start=begun(500, "x" * 64) | {"processes": 2},
        )
        compare_page(compared([first, other.folder]))
        run_page(first)
        for name in ("result.json", "moved.json"):
            (other.folder / name).unlink()
        for going in (False, True):
            assert standing.standing(record.read_record(other.folder), going).words
        run_page(other.folder)
        run_page(MadeRun(tmp_path / "new").folder)
    assert missed - SAME == set()


def test_the_language_of_a_page(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", signs(tmp_path, [0.5] * 8)).folder
    with speaking("zh"):
        page = run_page(run)
    assert '<html lang="zh-Hans">' in page
    assert ">结果</h2>" in page
    assert '<html lang="en">' in run_page(run)


def test_values_are_escaped_and_never_places() -> None:
    with speaking("zh"):
        assert say_in_page("{} only", "<b>{}</b>") == "仅有&lt;b&gt;{}&lt;/b&gt;"
        assert say("{} only", "{}{0}") == "仅有{}{0}"
    assert say("a text that no table has") == "a text that no table has"
    assert json.dumps(dict(table())) == "{}"
    with speaking("zh"):
        page = render("base", title="x")
    assert "跳到正文" in page


@pytest.mark.parametrize(
    ("variables", "chosen"),
    [
        ({"LANG": "zh_CN.UTF-8"}, "zh"),
        ({"LC_ALL": "", "LANG": "zh_TW"}, "zh"),
        ({"LC_ALL": "C.UTF-8", "LANG": "zh_CN.UTF-8"}, "en"),
        ({"LC_MESSAGES": "zh", "LANG": "de_DE.UTF-8"}, "zh"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({}, "en"),
    ],
)
def test_the_locale_chooses(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], chosen: str
) -> None:
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert preferred() == chosen
