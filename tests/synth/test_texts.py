"""Texts on paper: words in their boxes, and answers that say what is written."""

from __future__ import annotations

import random

import pytest

from finesight.data.sample import BoxPart
from finesight.synth import sheet, texts

TASKS = (texts.word, texts.words, texts.lines, texts.sign)


def _drawn(task, fonts, number=150):
    return [task(random.Random(f"{task.__name__} {seed}"), fonts) for seed in range(number)]


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: task.__name__)
def drawn(request):
    return _drawn(request.param, "built-in")


def test_pictures_are_small_and_coloured(drawn):
    for each in drawn:
        assert each.picture.mode == "RGB"
        assert max(each.picture.size) <= texts.LARGEST
        assert min(each.picture.size) >= sheet.SQUARE


def test_boxes_lie_in_the_picture(drawn):
    boxes = [(each, part) for each in drawn for part in (*each.question, *each.answer)]
    boxes = [(each, part.xyxy) for each, part in boxes if isinstance(part, BoxPart)]
    assert len(boxes) > 20
    for each, (x1, y1, x2, y2) in boxes:
        assert 0 <= x1 < x2 <= each.picture.width
        assert 0 <= y1 < y2 <= each.picture.height


def test_what_is_sought_is_named_once(drawn):
    for each in drawn:
        if each.kind == "find":
            (box,) = each.answer
            assert box.label in "".join(part for part in each.question if isinstance(part, str))


def test_several_words_are_read_row_by_row():
    rows = [
        [texts.Word("one", (0, 0, 9, 9)), texts.Word("two", (12, 0, 20, 9))],
        [texts.Word("three", (0, 20, 20, 30))],
    ]
    rng = random.Random(0)
    assert texts.answered("read", rows, rng)[1] == ("one two\nthree",)
    assert texts.answered("count_words", rows, rng)[1] == ("3",)
    assert [box.label for box in texts.answered("spot", rows, rng)[1]] == ["one", "two", "three"]
    question, answer = texts.answered("read_at", rows, rng)
    (box,) = [part for part in question if isinstance(part, BoxPart)]
    where = {tuple(word.corners): word.text for row in rows for word in row}
    assert answer == (where[tuple(map(int, box.xyxy))],)


def test_a_word_that_occurs_twice_is_not_sought():
    rows = [[texts.Word(text, (n, 0, n + 1, 9)) for n, text in enumerate(("a", "b", "a"))]]
    for seed in range(20):
        assert texts.answered("find", rows, random.Random(seed))[1][0].label == "b"


def test_a_word_with_a_mark_behind_it_is_not_sought():
    rows = [[texts.Word(text, (n, 0, n + 1, 9)) for n, text in enumerate(("a.", "b", "c!"))]]
    for seed in range(20):
        assert texts.answered("find", rows, random.Random(seed))[1][0].label == "b"


def test_letters_are_few_and_nearly_fill_their_picture():
    for each in _drawn(texts.letters, "built-in"):
        (text,) = each.answer
        assert 1 <= len(text) <= 4, text
        assert not set("lI1|oO0").intersection(text), text
        assert max(each.picture.size) < texts.LARGEST / 2, each.picture.size


def test_every_kind_of_question_is_asked():
    kinds = {each.kind for task in TASKS for each in _drawn(task, "built-in")}
    assert kinds == {"word", "read", "find", "read_at", "spot", "count_words"}


def test_all_fonts_can_be_written_in(installed_fonts):
    for fonts in ("seen", "unseen"):
        for task in TASKS:
            assert len(_drawn(task, fonts, 30)) == 30


def test_chinese_is_written_in_chinese(chinese_fonts):
    for each in _drawn(texts.chinese, "seen", 60):
        said = [part if isinstance(part, str) else part.label for part in each.answer]
        assert each.kind != "count_words"
        assert all("\u4e00" <= sign <= "\u9fff" for sign in "".join(said) if sign.strip())
