"""Receipts: they add up, and what is asked is printed on them."""

from __future__ import annotations

import json
import random
from decimal import Decimal

import pytest

from finesight.data.sample import BoxPart
from finesight.synth import receipts


@pytest.fixture(scope="module")
def drawn():
    return [receipts.receipt(random.Random(number), "built-in") for number in range(250)]


def _of(drawn, kind):
    found = [each for each in drawn if each.kind == kind]
    assert found, f"no question of the kind {kind}"
    return found


def _number(text):
    return Decimal(text.removeprefix("$"))


def test_totals_are_the_sums_of_the_prices():
    for number in range(100):
        content = receipts.invented(random.Random(number))
        assert _number(content.total) == sum(map(_number, content.prices.values()))


def test_what_is_printed_is_what_is_noted():
    for number in range(60):
        rng = random.Random(number)
        content = receipts.invented(rng)
        picture = receipts.printed(content, rng, "built-in")
        if picture is None:
            continue
        texts = [word.text for word in content.words]
        for text in (*content.shop.split(), content.date, content.total):
            assert text in texts
        for name, price in content.prices.items():
            assert texts[texts.index(name) + 1] == price
        assert content.sum_at.text == content.total
        for word in content.words:
            x1, y1, x2, y2 = word.corners
            assert 0 <= x1 < x2 <= picture.width
            assert 0 <= y1 < y2 <= picture.height


def test_words_do_not_overlap():
    for number in range(60):
        rng = random.Random(number)
        content = receipts.invented(rng)
        if receipts.printed(content, rng, "built-in") is None:
            continue
        for at, word in enumerate(content.words):
            for other in content.words[:at]:
                across = min(word.corners[2], other.corners[2]) - max(
                    word.corners[0], other.corners[0]
                )
                down = min(word.corners[3], other.corners[3]) - max(
                    word.corners[1], other.corners[1]
                )
                assert across <= 0 or down <= 4, f"{word} over {other}"


def test_answers_in_json_hold_the_fields(drawn):
    for each in _of(drawn, "receipt"):
        assert list(json.loads(each.answer[0])) == ["shop", "date", "total"]
    for each in _of(drawn, "prices"):
        assert set(json.loads(each.answer[0])) <= set(receipts.ITEMS)


def test_the_total_is_found_by_its_box(drawn):
    for each in _of(drawn, "find_total"):
        (box,) = each.answer
        assert isinstance(box, BoxPart)
        assert _number(box.label) > 0


def test_receipts_stay_small(drawn):
    assert max(side for each in drawn for side in each.picture.size) <= 308
