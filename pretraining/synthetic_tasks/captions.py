"""Captions of scenes in a fixed grammar, in English and Chinese, and their parser.

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

from synthetic_tasks.scenes import COLORS, FILLS, SHAPES, ShapeKind

Relation = Literal["left", "right", "above", "below", "inside", "larger", "smaller"]
RelationTriple = tuple[ShapeKind, Relation, ShapeKind]

_INVERSE_RELATIONS: dict[Relation, Relation] = {
    "right": "left",
    "below": "above",
    "smaller": "larger",
}

ENGLISH_RELATIONS: dict[Relation, str] = {
    "left": "left of",
    "right": "right of",
    "above": "above",
    "below": "below",
    "inside": "inside",
    "larger": "larger than",
    "smaller": "smaller than",
}

CHINESE_RELATIONS: dict[Relation, str] = {
    "left": "左边",
    "right": "右边",
    "above": "上面",
    "below": "下面",
    "inside": "里面",
    "larger": "大",
    "smaller": "小",
}

_CHINESE_COLORS = dict(
    zip(
        COLORS,
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
class CaptionFacts:
    """Content of a caption: its objects and the relations between them.

    Attributes:
        relations: Relations, normalized to `left`, `above`, `inside` and `larger`.
        unparsed: Sentences that the grammar does not contain.
    """

    objects: frozenset[ShapeKind]
    relations: frozenset[RelationTriple]
    unparsed: tuple[str, ...] = ()


def write_caption(
    objects: Sequence[ShapeKind], relations: Sequence[RelationTriple], *, is_chinese: bool = False
) -> str:
    """Write a caption with one sentence per relation.

    Without relations, the caption names the only object.
    """
    if is_chinese:
        return (
            "".join(_write_chinese_fact(fact) for fact in relations)
            or f"一个{describe_in_chinese(objects[0])}。"
        )
    if not relations:
        return f"{_get_article(objects[0]).capitalize()} {objects[0].phrase}."
    mentioned: set[ShapeKind] = set()
    sentences = []
    for first, relation, second in relations:
        subject, target = (
            _name_with_article(first, mentioned),
            _name_with_article(second, mentioned | {first}),
        )
        mentioned |= {first, second}
        sentences.append(f"{subject.capitalize()} is {ENGLISH_RELATIONS[relation]} {target}.")
    return " ".join(sentences)


def parse_caption(text: str) -> CaptionFacts:
    """Parse an English or Chinese caption.

    Captions with the same meaning give equal results.
    """
    objects: set[ShapeKind] = set()
    relations: set[RelationTriple] = set()
    unparsed = []
    for sentence in filter(None, (part.strip() for part in re.split(r"[.。\n]", text))):
        kind = _parse_kind(sentence)
        if kind:
            objects.add(kind)
            continue
        fact = _parse_english(sentence) or _parse_chinese(sentence)
        if fact:
            relations.add(_normalize_relation(fact))
            objects |= {fact[0], fact[2]}
        else:
            unparsed.append(sentence)
    return CaptionFacts(frozenset(objects), frozenset(relations), tuple(unparsed))


def score_caption(answer: str, reference: str) -> dict[str, float]:
    """Score a predicted caption against the reference by the facts that it states.

    Returns:
        `exact`, and separate scores for `colours`, `shapes`, `things` (fill, color and shape) and
        `relations`.
    """
    predicted, expected = parse_caption(answer), parse_caption(reference)
    colors, shapes = (
        [sorted(get_attribute(kind) for kind in facts.objects) for facts in (predicted, expected)]
        for get_attribute in (attrgetter("color"), attrgetter("shape"))
    )
    matches = {
        "exact": predicted == expected,
        "colours": colors[0] == colors[1],
        "shapes": shapes[0] == shapes[1],
        "things": predicted.objects == expected.objects,
        "relations": predicted.relations == expected.relations,
    }
    return {name: float(value) for name, value in matches.items()}


def describe_in_chinese(kind: ShapeKind) -> str:
    fill, color = _CHINESE_FILLS[kind.fill], _CHINESE_COLORS[kind.color]
    return f"{fill}{color}{_CHINESE_SHAPES[kind.shape]}"


def describe_kind(kind: ShapeKind, is_chinese: bool) -> str:
    """Describe a kind of shape by fill, color and shape name, in English or Chinese."""
    return describe_in_chinese(kind) if is_chinese else kind.phrase


def get_shape_name(shape: str, is_chinese: bool) -> str:
    return _CHINESE_SHAPES[shape] if is_chinese else shape


def get_color_name(color: str, is_chinese: bool) -> str:
    return _CHINESE_COLORS[color] if is_chinese else color


def _get_article(kind: ShapeKind) -> str:
    return "an" if kind.phrase[0] in "aeiou" else "a"


def _name_with_article(kind: ShapeKind, mentioned: set[ShapeKind]) -> str:
    return f"{'the' if kind in mentioned else _get_article(kind)} {kind.phrase}"


def _write_chinese_fact(fact: RelationTriple) -> str:
    first, second = describe_in_chinese(fact[0]), describe_in_chinese(fact[2])
    if fact[1] in ("larger", "smaller"):
        return f"{first}比{second}{CHINESE_RELATIONS[fact[1]]}。"
    return f"{first}在{second}{CHINESE_RELATIONS[fact[1]]}。"


_KIND_BY_PHRASE = {
    words: kind
    for kind in (
        ShapeKind(fill, colour, shape) for fill in FILLS for colour in COLORS for shape in SHAPES
    )
    for words in (kind.phrase, describe_in_chinese(kind))
}
_ENGLISH_SENTENCE = re.compile(rf"(.+?) is ({'|'.join(ENGLISH_RELATIONS.values())}) (.+)")
_CHINESE_POSITION = re.compile(
    rf"(.+?)在(.+?)的?({'|'.join(list(CHINESE_RELATIONS.values())[:5])})"
)
_CHINESE_COMPARISON = re.compile(rf"(.+?)比(.+?)({'|'.join(list(CHINESE_RELATIONS.values())[5:])})")
_RELATION_BY_WORD: dict[str, Relation] = {
    word: relation
    for words in (ENGLISH_RELATIONS, CHINESE_RELATIONS)
    for relation, word in words.items()
}


def _parse_kind(text: str) -> ShapeKind | None:
    return _KIND_BY_PHRASE.get(re.sub(r"^(?:(?:an?|the)\s+|一个)", "", text.strip().lower()))


def _parse_english(sentence: str) -> RelationTriple | None:
    match = _ENGLISH_SENTENCE.fullmatch(sentence)
    return _parse_relation(match[1], match[2], match[3]) if match else None


def _parse_chinese(sentence: str) -> RelationTriple | None:
    match = _CHINESE_POSITION.fullmatch(sentence) or _CHINESE_COMPARISON.fullmatch(sentence)
    return _parse_relation(match[1], match[3], match[2]) if match else None


def _parse_relation(first: str, relation: str, second: str) -> RelationTriple | None:
    subject, target = _parse_kind(first), _parse_kind(second)
    return (subject, _RELATION_BY_WORD[relation], target) if subject and target else None


def _normalize_relation(fact: RelationTriple) -> RelationTriple:
    """Reverse the relations `right`, `below` and `smaller`, so that equal facts compare equal."""
    first, relation, second = fact
    if relation in _INVERSE_RELATIONS:
        return second, _INVERSE_RELATIONS[relation], first
    return fact
