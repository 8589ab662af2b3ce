from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from finesight.encode.encoded import Encoded, Outline, Span
from finesight.infer.pages import Key, Pages, grown, keys_of, picture_digests

S = 4


def _key(number: int) -> bytes:
    return number.to_bytes(2, "big")


def test_pages_are_taken_and_given_back():
    pages = Pages(4)
    taken = pages.take(3)
    assert sorted(taken) == [1, 2, 3]
    assert pages.free == 0
    with pytest.raises(AssertionError, match="1 pages of 0 free ones"):
        pages.take(1)
    pages.give_back(taken[1:])
    assert pages.free == 2
    assert sorted(pages.take(2)) == sorted(taken[1:])
    with pytest.raises(AssertionError, match="1 pages"):
        Pages(1)


def test_a_beginning_is_found_up_to_the_first_unknown_page():
    pages = Pages(8)
    keys = [_key(n) for n in range(4)]
    taken = pages.take(4)
    pages.know(keys, taken)
    assert pages.known([keys[0], keys[1], _key(9), keys[3]]) == taken[:2]
    assert pages.known([_key(9), *keys]) == []


def test_known_pages_stay_until_their_room_is_needed_the_beginning_longest():
    pages = Pages(4)
    keys = [_key(n) for n in range(3)]
    first = pages.take(3)
    pages.know(keys, first)
    pages.give_back(first)
    assert pages.free == 3
    assert pages.take(1) == [first[2]]
    assert pages.known(keys) == first[:2]
    # Held now, and not to be had.
    assert pages.free == 0


def test_of_two_pages_with_one_content_the_first_is_known():
    pages = Pages(5)
    one, other = pages.take(1), pages.take(1)
    pages.know([_key(1)], one)
    pages.know([_key(1)], other)
    assert pages.known([_key(1)]) == one
    pages.give_back(other)
    pages.give_back(one)
    assert pages.known([_key(1)]) == one
    pages.give_back(one)
    pages.give_back(one)
    assert pages.free == 4
    assert sorted(pages.take(4)) == [1, 2, 3, 4]


class Book:
    """What any number of answers did to pages, kept the plain way."""

    def __init__(self, pages: Pages) -> None:
        self.pages = pages
        self.answers: list[list[int]] = []
        self.content: dict[int, bytes] = {}

    def begin(self, keys: list[bytes], more: int) -> None:
        """An answer to a prompt with these keys, if there is room."""
        found = self.pages.known(keys)
        assert [self.content[page] for page in found] == keys[: len(found)]
        needed = len(keys) - len(found) + more
        if needed > self.pages.free:
            self.pages.give_back(found)
            return
        new = self.pages.take(needed)
        held = {page for answer in self.answers for page in answer} | {*found}
        assert not held & {*new}
        assert len({*new}) == needed
        for page in new:
            self.content.pop(page, None)
        answer = found + new
        self.content.update(zip(answer, keys, strict=False))
        self.pages.know(keys, answer[: len(keys)])
        self.answers.append(answer)

    def check(self) -> None:
        held = Counter(page for answer in self.answers for page in answer)
        assert 0 not in held
        assert self.pages.free == self.pages.number - 1 - len(held)
        assert self.pages._held == held


@pytest.mark.parametrize("seed", range(40))
def test_no_page_is_lost_or_given_twice(seed):
    rng = random.Random(seed)
    book = Book(Pages(rng.randrange(2, 30)))
    for _ in range(300):
        if book.answers and rng.random() < 0.5:
            book.pages.give_back(book.answers.pop(rng.randrange(len(book.answers))))
        else:
            # Beginnings that many share: a page's key says all that comes before it.
            branch = rng.randrange(3)
            keys = [_key(100 * branch + n) for n in range(rng.randrange(8))]
            book.begin(keys, rng.randrange(1, 4))
        book.check()
    for answer in book.answers:
        book.pages.give_back(answer)
    assert book.pages.free == book.pages.number - 1
    assert sorted(book.pages.take(book.pages.free)) == list(range(1, book.pages.number))


def _prompt(tokens: int = 18, pictures: tuple[tuple[int, int], ...] = ((3, 6), (9, 13))) -> Encoded:
    """Pictures of one row of patches each, one token a patch of one pixel."""
    spans = tuple(
        Span("image", start, stop, (1, 1, stop - start), (), (14, 14), (1, stop - start))
        for start, stop in pictures
    )
    count = sum(stop - start for start, stop in pictures)
    patches = np.arange(count * 3, dtype=np.uint8).reshape(count, 3)
    positions = np.tile(np.arange(tokens, dtype=np.int32), (3, 1))
    ids = np.arange(tokens, dtype=np.int32)
    return Encoded(Outline("s", ids, np.zeros(tokens, dtype=bool), positions, spans), patches)


def _keys(prompt: Encoded, reader: str = "") -> list[Key]:
    return keys_of(prompt.outline, picture_digests(prompt), S, reader)


def _shared(one: Encoded, other: Encoded, readers: tuple[str, str] = ("", "")) -> int:
    """How many pages both begin with."""
    pairs = zip(_keys(one, readers[0]), _keys(other, readers[1]), strict=False)
    equal = [mine == theirs for mine, theirs in pairs]
    assert equal == sorted(equal, reverse=True), "alike after a difference"
    return sum(equal)


def test_only_pages_that_the_prompt_fills_have_keys():
    assert [len(_keys(_prompt(tokens, ()))) for tokens in (3, 4, 7, 8)] == [0, 1, 1, 2]


def test_prompts_share_the_pages_before_their_first_difference():
    prompt = _prompt()
    assert _shared(prompt, _prompt()) == 4
    for at in range(16):
        ids = prompt.outline.ids_T.copy()
        ids[at] = 99
        assert (
            _shared(prompt, replace(prompt, outline=replace(prompt.outline, ids_T=ids))) == at // S
        )
        positions = prompt.outline.positions_3T.copy()
        positions[at % 3, at] = 99
        moved = replace(prompt.outline, positions_3T=positions)
        assert _shared(prompt, replace(prompt, outline=moved)) == at // S


def test_other_pixels_are_another_picture():
    prompt = _prompt()
    # Patch 0 is of the picture at tokens 3 to 5, patch 3 of that at 9 to 12.
    for patch, pages in ((0, 0), (2, 0), (3, 2), (6, 2)):
        patches = prompt.patches_ND.copy()
        patches[patch, 1] ^= 1
        assert _shared(prompt, replace(prompt, patches_ND=patches)) == pages


def test_the_same_patches_in_another_shape_are_another_picture():
    prompt = _prompt(12, ((2, 6),))
    (span,) = prompt.outline.spans
    square = replace(prompt.outline, spans=(replace(span, grid=(1, 2, 2), resized=(2, 2)),))
    assert _shared(prompt, replace(prompt, outline=square)) == 0


def test_readers_share_nothing():
    assert _shared(_prompt(), _prompt(), ("0 ", "1 ")) == 0
    assert _shared(_prompt(), _prompt(), ("None ", "0 ")) == 0


def test_a_prompt_and_its_answer_begin_what_is_asked_next():
    """As if the answer had been a part of the prompt."""
    whole, prompt = _prompt(18, ()), _prompt(10, ())
    said = grown(prompt.outline, whole.outline.ids_T[10:].tolist())
    assert keys_of(said, (), S, "") == _keys(whole)
    assert keys_of(grown(prompt.outline, []), (), S, "") == _keys(prompt)
    far = replace(prompt.outline, positions_3T=prompt.outline.positions_3T + 5)
    assert grown(far, [1, 2]).positions_3T[:, -2:].tolist() == [[15, 16]] * 3
