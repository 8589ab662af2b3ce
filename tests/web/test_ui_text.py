from __future__ import annotations

from dataclasses import fields

import pytest

from finesight.web.ui_text import CHINESE, ENGLISH, UiText, get_other_language, select_ui_text


@pytest.mark.parametrize(
    ("accepted", "words"),
    [
        ("zh-CN,zh;q=0.9,en;q=0.8", CHINESE),
        ("en-GB,en;q=0.9,zh;q=0.8", ENGLISH),
        ("de-DE,de;q=0.9,zh-TW;q=0.3", CHINESE),
        ("de", ENGLISH),
        ("", ENGLISH),
    ],
)
def test_first_available_language_is_used(accepted: str, words: UiText) -> None:
    assert select_ui_text(accepted) is words


def test_both_languages_have_all_texts_and_placeholders() -> None:
    assert get_other_language(get_other_language(ENGLISH)) is ENGLISH
    for field in fields(UiText):
        english, chinese = (str(getattr(words, field.name)) for words in (ENGLISH, CHINESE))
        assert english != chinese, field.name
        assert english.count("{}") == chinese.count("{}"), field.name
