"""Captions of scenes in a fixed grammar, in English and Chinese, and what such a caption states.

caption  = thing "." | sentence+
sentence = thing "is" relation thing "."
thing    = article [fill] colour shape
relation = left of | right of | above | below | inside | larger than | smaller than
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal

from finesight.synth.shapes import COLOURS, FILLS, SHAPES, Kind

Relation = Literal["left", "right", "above", "below", "inside", "larger", "smaller"]
Stated = tuple[Kind, Relation, Kind]

_TURNED: dict[Relation, Relation] = {"right": "left", "below": "above", "smaller": "larger"}

ENGLISH: dict[Relation, str] = {
    "left": "left of",
    "right": "right of",
    "above": "above",
    "below": "below",
    "inside": "inside",
    "larger": "larger than",
    "smaller": "smaller than",
}

CHINESE: dict[Relation, str] = {
    "left": "左边",
    "right": "右边",
    "above": "上面",
    "below": "下面",
    "inside": "里面",
    "larger": "大",
    "smaller": "小",
}

_CHINESE_COLOURS = dict(
    zip(
        COLOURS,
        [
            "红色",
            "绿色",
            "蓝色",
            "黄色",
            "橙色",
            "紫色",
            "粉色",
            "棕色",
            "黑色",
            "白色",
            "灰色",
            "青色",
        ],
        strict=True,
    )
)
_CHINESE_SHAPES = dict(
    zip(
        SHAPES,
        [
            "圆形",
            "椭圆",
            "正方形",
            "长方形",
            "三角形",
            "菱形",
            "六边形",
            "五角星",
            "十字",
            "心形",
            "月牙",
            "圆环",
            "箭头",
        ],
        strict=True,
    )
)
_CHINESE_FILLS = dict(zip(FILLS, ("", "条纹", "空心"), strict=True))


@dataclass(frozen=True)
class Facts:
    """What a caption states: things, and relations with `left`, `above`, `inside` and `larger`
    only. `unread` are sentences that are not of the grammar."""

    things: frozenset[Kind]
    relations: frozenset[Stated]
    unread: tuple[str, ...] = ()


def caption(things: Sequence[Kind], stated: Sequence[Stated], *, chinese: bool = False) -> str:
    """The sentences that say `stated` in this order, or, when nothing is, the one thing."""
    if chinese:
        return "".join(_in_chinese(fact) for fact in stated) or f"一个{chinese_words(things[0])}。"
    if not stated:
        return f"{_article(things[0]).capitalize()} {things[0].words}."
    known: set[Kind] = set()
    sentences = []
    for first, relation, second in stated:
        subject, target = _named(first, known), _named(second, known | {first})
        known |= {first, second}
        sentences.append(f"{subject.capitalize()} is {ENGLISH[relation]} {target}.")
    return " ".join(sentences)


def caption_facts(text: str) -> Facts:
    """What a caption in either language states; two captions of the same facts, in whatever order
    and from whichever side they are told, give equal Facts."""
    things: set[Kind] = set()
    relations: set[Stated] = set()
    unread = []
    for sentence in filter(None, (piece.strip() for piece in re.split(r"[.。\n]", text))):
        found = _thing(sentence)
        if found:
            things.add(found)
            continue
        fact = _english(sentence) or _chinese(sentence)
        if fact:
            relations.add(_seen_from(fact))
            things |= {fact[0], fact[2]}
        else:
            unread.append(sentence)
    return Facts(frozenset(things), frozenset(relations), tuple(unread))


def caption_scores(answer: str, truth: str) -> dict[str, float]:
    """Whether an answer states the facts of the truth, all of them and no others: `exact`, and
    apart from each other `colours`, `shapes`, `things` (fill, colour and shape) and `relations`."""
    said, true = caption_facts(answer), caption_facts(truth)
    of_colour, of_shape = (
        [sorted(part(thing) for thing in facts.things) for facts in (said, true)]
        for part in (attrgetter("colour"), attrgetter("shape"))
    )
    right = {
        "exact": said == true,
        "colours": of_colour[0] == of_colour[1],
        "shapes": of_shape[0] == of_shape[1],
        "things": said.things == true.things,
        "relations": said.relations == true.relations,
    }
    return {name: float(value) for name, value in right.items()}


def chinese_words(kind: Kind) -> str:
    fill, colour = _CHINESE_FILLS[kind.fill], _CHINESE_COLOURS[kind.colour]
    return f"{fill}{colour}{_CHINESE_SHAPES[kind.shape]}"


def spoken(kind: Kind, chinese: bool) -> str:
    """The thing in the language of the question."""
    return chinese_words(kind) if chinese else kind.words


def shape_word(shape: str, chinese: bool) -> str:
    return _CHINESE_SHAPES[shape] if chinese else shape


def colour_word(colour: str, chinese: bool) -> str:
    return _CHINESE_COLOURS[colour] if chinese else colour


def _article(kind: Kind) -> str:
    return "an" if kind.words[0] in "aeiou" else "a"


def _named(kind: Kind, known: set[Kind]) -> str:
    return f"{'the' if kind in known else _article(kind)} {kind.words}"


def _in_chinese(fact: Stated) -> str:
    first, second = chinese_words(fact[0]), chinese_words(fact[2])
    if fact[1] in ("larger", "smaller"):
        return f"{first}比{second}{CHINESE[fact[1]]}。"
    return f"{first}在{second}{CHINESE[fact[1]]}。"


_KINDS = {
    words: kind
    for kind in (
        Kind(fill, colour, shape) for fill in FILLS for colour in COLOURS for shape in SHAPES
    )
    for words in (kind.words, chinese_words(kind))
}
_ENGLISH = re.compile(rf"(.+?) is ({'|'.join(ENGLISH.values())}) (.+)")
_PLACED = re.compile(rf"(.+?)在(.+?)的?({'|'.join(list(CHINESE.values())[:5])})")
_COMPARED = re.compile(rf"(.+?)比(.+?)({'|'.join(list(CHINESE.values())[5:])})")
_OF_WORD: dict[str, Relation] = {
    word: relation for words in (ENGLISH, CHINESE) for relation, word in words.items()
}


def _thing(text: str) -> Kind | None:
    return _KINDS.get(re.sub(r"^(?:(?:an?|the)\s+|一个)", "", text.strip().lower()))


def _english(sentence: str) -> Stated | None:
    match = _ENGLISH.fullmatch(sentence)
    return _fact(match[1], match[2], match[3]) if match else None


def _chinese(sentence: str) -> Stated | None:
    match = _PLACED.fullmatch(sentence) or _COMPARED.fullmatch(sentence)
    return _fact(match[1], match[3], match[2]) if match else None


def _fact(first: str, relation: str, second: str) -> Stated | None:
    subject, target = _thing(first), _thing(second)
    return (subject, _OF_WORD[relation], target) if subject and target else None


def _seen_from(fact: Stated) -> Stated:
    """The same relation from the side that Facts tell it from."""
    first, relation, second = fact
    if relation in _TURNED:
        return second, _TURNED[relation], first
    return fact
