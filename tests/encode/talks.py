"""Conversations about pictures, drawn from a seed: what ways to write a chat are compared on."""

from __future__ import annotations

import random
from dataclasses import dataclass

from mixed_strings import harmless


@dataclass(frozen=True)
class Picture:
    """A picture of 1000 x 1000 pixels, where thousandths are pixels."""

    name: str


@dataclass(frozen=True)
class Words:
    """Text that spells no special token."""

    text: str


@dataclass(frozen=True)
class Framed:
    """A box with its label, in whole pixels."""

    label: str
    xyxy: tuple[int, int, int, int]


Part = Picture | Words | Framed
Turn = tuple[str, list[Part]]


@dataclass(frozen=True)
class Talk:
    """Turns of user and assistant by turns; the last one is the assistant's."""

    system: str
    turns: list[Turn]


def talks(count: int, seed: int) -> list[Talk]:
    """Conversations of one to four questions with up to three pictures each."""
    rng = random.Random(seed)
    return [_talk(rng, number) for number in range(count)]


def _talk(rng: random.Random, number: int) -> Talk:
    turns: list[Turn] = []
    pictures = 0
    for question in range(rng.randrange(1, 5)):
        asked: list[Part] = []
        for _ in range(rng.randrange(0 if question or number % 5 == 0 else 1, 4)):
            asked.append(Picture(f"{pictures}.png"))
            pictures += 1
        asked.append(Words(harmless(rng)))
        turns += [("user", asked), ("assistant", _answer(rng, pictures))]
    system = "You are a helpful assistant." if number % 3 else harmless(rng)
    return Talk(system, turns)


def _answer(rng: random.Random, pictures: int) -> list[Part]:
    parts: list[Part] = [Words(harmless(rng))]
    for _ in range(rng.randrange(3) if pictures else 0):
        x1, x2 = sorted(rng.sample(range(1000), 2))
        y1, y2 = sorted(rng.sample(range(1000), 2))
        parts += [Framed(harmless(rng).strip() or "dog", (x1, y1, x2, y2)), Words(harmless(rng))]
    return parts if rng.random() < 0.9 else parts[1:] or parts
