from __future__ import annotations

from dataclasses import fields

import pytest

from finesight.web.words import CHINESE, ENGLISH, Words, other_than, preferred


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
def test_the_first_language_that_there_is_is_taken(accepted: str, words: Words) -> None:
    assert preferred(accepted) is words


def test_both_languages_say_all_with_as_many_places() -> None:
    assert other_than(other_than(ENGLISH)) is ENGLISH
    for field in fields(Words):
        english, chinese = (str(getattr(words, field.name)) for words in (ENGLISH, CHINESE))
        assert english != chinese, field.name
        assert english.count("{}") == chinese.count("{}"), field.name
