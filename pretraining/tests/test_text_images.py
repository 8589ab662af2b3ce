"""Texts on paper: words in their boxes, and answers that say what is written."""

from __future__ import annotations

import random

import pytest
from synthetic_tasks import backgrounds, text_images

from finesight.samples.sample import BoxPart

TASKS = (
    text_images.generate_word,
    text_images.generate_words,
    text_images.generate_lines,
    text_images.generate_sign,
)


def _drawn(task, fonts, number=150):
    return [task(random.Random(f"{task.__name__} {seed}"), fonts) for seed in range(number)]


@pytest.fixture(scope="module", params=TASKS, ids=lambda task: task.__name__)
def text_samples(request):
    return _drawn(request.param, "built-in")


def test_images_are_small_and_rgb(text_samples):
    for each in text_samples:
        assert each.image.mode == "RGB"
        assert max(each.image.size) <= text_images.MAX_IMAGE_SIZE
        assert min(each.image.size) >= backgrounds.TOKEN_SIZE


def test_boxes_are_inside_the_image(text_samples):
    boxes = [(each, part) for each in text_samples for part in (*each.question, *each.answer)]
    boxes = [(each, part.xyxy) for each, part in boxes if isinstance(part, BoxPart)]
    assert len(boxes) > 20
    for each, (x1, y1, x2, y2) in boxes:
        assert 0 <= x1 < x2 <= each.image.width
        assert 0 <= y1 < y2 <= each.image.height


def test_target_word_is_named_once(text_samples):
    for each in text_samples:
        if each.task_kind == "find":
            (box,) = each.answer
            assert box.label in "".join(part for part in each.question if isinstance(part, str))


def test_words_are_read_row_by_row():
    rows = [
        [
            text_images.RenderedWord("one", (0, 0, 9, 9)),
            text_images.RenderedWord("two", (12, 0, 20, 9)),
        ],
        [text_images.RenderedWord("three", (0, 20, 20, 30))],
    ]
    rng = random.Random(0)
    assert text_images.make_question("read", rows, rng)[1] == ("one two\nthree",)
    assert text_images.make_question("count_words", rows, rng)[1] == ("3",)
    assert [box.label for box in text_images.make_question("spot", rows, rng)[1]] == [
        "one",
        "two",
        "three",
    ]
    question, answer = text_images.make_question("read_at", rows, rng)
    (box,) = [part for part in question if isinstance(part, BoxPart)]
    where = {tuple(word.box): word.text for row in rows for word in row}
    assert answer == (where[tuple(map(int, box.xyxy))],)


def test_repeated_word_is_not_a_target():
    rows = [
        [text_images.RenderedWord(text, (n, 0, n + 1, 9)) for n, text in enumerate(("a", "b", "a"))]
    ]
    for seed in range(20):
        assert text_images.make_question("find", rows, random.Random(seed))[1][0].label == "b"


def test_word_with_punctuation_is_not_a_target():
    rows = [
        [
            text_images.RenderedWord(text, (n, 0, n + 1, 9))
            for n, text in enumerate(("a.", "b", "c!"))
        ]
    ]
    for seed in range(20):
        assert text_images.make_question("find", rows, random.Random(seed))[1][0].label == "b"


def test_letter_images_have_few_large_characters():
    for each in _drawn(text_images.generate_letters, "built-in"):
        (text,) = each.answer
        assert 1 <= len(text) <= 4, text
        assert not set("lI1|oO0").intersection(text), text
        assert max(each.image.size) < text_images.MAX_IMAGE_SIZE / 2, each.image.size


def test_every_question_kind_occurs():
    kinds = {each.task_kind for task in TASKS for each in _drawn(task, "built-in")}
    assert kinds == {"word", "read", "find", "read_at", "spot", "count_words"}


def test_all_fonts_can_be_used(installed_fonts):
    for fonts in ("seen", "unseen"):
        for task in TASKS:
            assert len(_drawn(task, fonts, 30)) == 30


def test_chinese_images_contain_chinese_text(chinese_fonts):
    for each in _drawn(text_images.generate_chinese, "seen", 60):
        output = [part if isinstance(part, str) else part.label for part in each.answer]
        assert each.task_kind != "count_words"
        assert all("\u4e00" <= sign <= "\u9fff" for sign in "".join(output) if sign.strip())
