"""Receipts: they add up, and what is asked is printed on them."""

from __future__ import annotations

import json
import random
from decimal import Decimal

import pytest
from synthetic_tasks import receipts

from finesight.samples.sample import BoxPart


@pytest.fixture(scope="module")
def receipt_samples():
    return [receipts.generate_receipt(random.Random(number), "built-in") for number in range(250)]


def _of(drawn, kind):
    found = [each for each in drawn if each.task_kind == kind]
    assert found, f"no question of the kind {kind}"
    return found


def _number(text):
    return Decimal(text.removeprefix("$"))


def test_total_is_the_sum_of_prices():
    for number in range(100):
        content = receipts.sample_receipt(random.Random(number))
        assert _number(content.total) == sum(map(_number, content.prices.values()))


def test_printed_words_match_the_data():
    for number in range(60):
        rng = random.Random(number)
        content = receipts.sample_receipt(rng)
        image = receipts.draw_receipt(content, rng, "built-in")
        if image is None:
            continue
        texts = [word.text for word in content.words]
        for text in (*content.shop.split(), content.date, content.total):
            assert text in texts
        for name, price in content.prices.items():
            assert texts[texts.index(name) + 1] == price
        assert content.total_word.text == content.total
        for word in content.words:
            x1, y1, x2, y2 = word.box
            assert 0 <= x1 < x2 <= image.width
            assert 0 <= y1 < y2 <= image.height


def test_words_do_not_overlap():
    for number in range(60):
        rng = random.Random(number)
        content = receipts.sample_receipt(rng)
        if receipts.draw_receipt(content, rng, "built-in") is None:
            continue
        for at, word in enumerate(content.words):
            for other in content.words[:at]:
                across = min(word.box[2], other.box[2]) - max(word.box[0], other.box[0])
                down = min(word.box[3], other.box[3]) - max(word.box[1], other.box[1])
                assert across <= 0 or down <= 4, f"{word} over {other}"


def test_json_answers_have_the_fields(receipt_samples):
    for each in _of(receipt_samples, "receipt"):
        assert list(json.loads(each.answer[0])) == ["shop", "date", "total"]
    for each in _of(receipt_samples, "prices"):
        assert set(json.loads(each.answer[0])) <= set(receipts.ITEMS)


def test_total_box_answer(receipt_samples):
    for each in _of(receipt_samples, "find_total"):
        (box,) = each.answer
        assert isinstance(box, BoxPart)
        assert _number(box.label) > 0


def test_receipt_images_are_small(receipt_samples):
    assert max(side for each in receipt_samples for side in each.image.size) <= 308
