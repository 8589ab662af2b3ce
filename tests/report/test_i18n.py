"""Tests that the Chinese table covers all page texts, and contains no others."""

import json
import re
from pathlib import Path

import pytest
from case_files import load_cases
from run_dir_fixtures import RECIPE, FakeRunDir, make_run, make_sign_answers, start_record

from finesight.app.studio_view import FORMS, build_form
from finesight.report import i18n, run_reader, summary
from finesight.report.compare_page import compare_runs, render_compare_page
from finesight.report.html import render_page
from finesight.report.i18n import (
    detect_language,
    get_translations,
    translate,
    translate_markup,
    use_language,
)
from finesight.report.run_page import render_run_page

CASES = load_cases("i18n")

PACKAGE = Path(i18n.__file__).parents[1]
SOURCES = [
    file
    for file in (
        *PACKAGE.rglob("*.py"),
        *PACKAGE.glob("*/templates/*"),
        *PACKAGE.glob("app/static/*"),
    )
    if file.suffix in (".py", ".html", ".js")
]
TRANSLATE_CALL = re.compile(r'\btranslate\(\s*"((?:[^"\\]|\\.)*)"')
SAME = {"Studio", "", "CER", "WER", "F1", "AP", "BLEU", "ANLS", "CIDEr-D", "ROUGE-L"}
"""Texts that are equal in both languages."""

HINTS = {one.hint for form in FORMS for one in build_form(form) if one.hint}
"""Descriptions of options that the studio shows. In the sources, they are broken over lines."""

COMPOSED_TEXTS = {
    *("errors", "warnings", "notes"),
}
"""Texts that are composed at run time."""


def read_source(file: Path) -> str:
    """Read a file in which strings that are broken over lines are one."""
    return re.sub(r'"\s*\n\s*"', "", file.read_text(encoding="utf-8"))


def list_placeholders(text: str) -> list[str]:
    return re.findall(r"\{[^}]*\}", text)


def test_every_page_text_is_translated() -> None:
    with use_language("zh"):
        known = get_translations()
    found = {
        text.replace('\\"', '"')
        for file in SOURCES
        for text in TRANSLATE_CALL.findall(read_source(file))
    }
    assert len(found) > 150
    assert (found | HINTS) - SAME - set(known) == set()


def test_translation_table_has_no_unused_text() -> None:
    joined = "".join(map(read_source, SOURCES))
    with use_language("zh"):
        for text, output in get_translations().items():
            assert text in joined or text in COMPOSED_TEXTS | HINTS, text
            assert list_placeholders(text) == list_placeholders(output), text


def test_dynamic_page_texts_are_translated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Covers texts of tables, which are not arguments of `translate` in the sources."""
    missed = set()

    class Watched(dict[str, str]):
        def get(self, key: str, default: object = None) -> object:  # type: ignore[override]
            missed.update({key} - set(self))
            return super().get(key, default)

    with use_language("zh"):
        known = Watched(get_translations())
        monkeypatch.setattr(i18n, "get_translations", lambda: known)
        first = make_run(tmp_path / "first", make_sign_answers(tmp_path, [0.5, 1.0] * 4)).folder
        recipe = RECIPE | {"eval": {"metric": "qa", "max_new_tokens": 9}}
        other = make_run(
            tmp_path / "other",
            make_sign_answers(tmp_path, [1.0] * 8),
            recipe=recipe,
            start=start_record(500, "x" * 64) | {"world_size": 2},
        )
        render_compare_page(compare_runs([first, other.folder]))
        render_run_page(first)
        for name in ("result.json", "param_audit.json"):
            (other.folder / name).unlink()
        for going in (False, True):
            assert summary.get_run_status(run_reader.read_run(other.folder), going).description
        render_run_page(other.folder)
        render_run_page(FakeRunDir(tmp_path / "new").folder)
    assert missed - SAME == set()


def test_values_are_escaped_and_not_translated() -> None:
    with use_language("zh"):
        assert translate_markup("about {}", "<b>{}</b>") == "约 &lt;b&gt;{}&lt;/b&gt;"
        assert translate("about {}", "{}{0}") == "约 {}{0}"
    assert translate("a text that no table has") == "a text that no table has"
    assert json.dumps(dict(get_translations())) == "{}"
    with use_language("zh"):
        page = render_page("base", title="x")
    assert "跳到正文" in page


@pytest.mark.parametrize(("variables", "chosen"), CASES["test_locale_selects_the_language"])
def test_locale_selects_the_language(monkeypatch, variables, chosen):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert detect_language() == chosen


def test_nouns_after_one_are_singular() -> None:
    text = "{:,} of {:,} steps on {} boxes, {}s"
    assert translate(text, 1, 1, 1, 1) == "1 of 1 step on 1 box, 1s"
    assert translate(text, 1, 2, 3, 4) == "1 of 2 steps on 3 boxes, 4s"
