"""Random conversations about images, to compare implementations of the chat format."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tokenizer_strings import random_text_without_specials


@dataclass(frozen=True)
class ChatImage:
    """Write an image of 1000 x 1000 pixels, where thousandths are pixels."""

    name: str


@dataclass(frozen=True)
class ChatText:
    """Text that spells no special token."""

    text: str


@dataclass(frozen=True)
class ChatBox:
    """A box with its label, in whole pixels."""

    label: str
    xyxy: tuple[int, int, int, int]


ChatPart = ChatImage | ChatText | ChatBox
ChatTurn = tuple[str, list[ChatPart]]


@dataclass(frozen=True)
class SampleChat:
    """Turns of user and assistant by turns; the last one is the assistant's."""

    system: str
    turns: list[ChatTurn]


def make_chats(count: int, seed: int) -> list[SampleChat]:
    """Make conversations of one to four questions with up to three images each."""
    rng = random.Random(seed)
    return [_make_chat(rng, number) for number in range(count)]


def _make_chat(rng: random.Random, number: int) -> SampleChat:
    turns: list[ChatTurn] = []
    num_images = 0
    for question in range(rng.randrange(1, 5)):
        question_parts: list[ChatPart] = []
        for _ in range(rng.randrange(0 if question or number % 5 == 0 else 1, 4)):
            question_parts.append(ChatImage(f"{num_images}.png"))
            num_images += 1
        question_parts.append(ChatText(random_text_without_specials(rng)))
        turns += [("user", question_parts), ("assistant", _make_answer(rng, num_images))]
    system = "You are a helpful assistant." if number % 3 else random_text_without_specials(rng)
    return SampleChat(system, turns)


def _make_answer(rng: random.Random, num_images: int) -> list[ChatPart]:
    parts: list[ChatPart] = [ChatText(random_text_without_specials(rng))]
    for _ in range(rng.randrange(3) if num_images else 0):
        x1, x2 = sorted(rng.sample(range(1000), 2))
        y1, y2 = sorted(rng.sample(range(1000), 2))
        parts += [
            ChatBox(random_text_without_specials(rng).strip() or "dog", (x1, y1, x2, y2)),
            ChatText(random_text_without_specials(rng)),
        ]
    return parts if rng.random() < 0.9 else parts[1:] or parts
