"""Which samples can be learned from: over-long ones are dropped and counted, or refused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from finesight.errors import UserError


class Counted(Protocol):
    """A sample whose tokens are counted: all of them, and those that carry loss."""

    @property
    def id(self) -> str: ...

    @property
    def tokens(self) -> int: ...

    @property
    def supervised(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Usable:
    """Indices of the samples that can be learned from, their tokens, and the ids of the rest."""

    kept: tuple[int, ...]
    tokens: tuple[int, ...]
    too_long: tuple[str, ...]
    without_answer: tuple[str, ...]

    @property
    def dropped(self) -> int:
        return len(self.too_long) + len(self.without_answer)


def usable(
    outlines: Iterable[Counted], max_length: int, policy: Literal["drop", "refuse"]
) -> Usable:
    """Sort samples into those of at most `max_length` tokens that hold something to learn, and
    the rest. Nothing is ever cut: a cut sample loses its answer or half a picture.

    Raises UserError for the first unusable sample when the policy is to refuse, and when nothing
    is left. `outlines` is gone through once and not kept.
    """
    kept, tokens = [], []
    too_long, without_answer = [], []
    longest = 0
    for index, outline in enumerate(outlines):
        longest = max(longest, outline.tokens)
        problem = unfit(outline, max_length)
        if problem is None:
            kept.append(index)
            tokens.append(outline.tokens)
        elif policy == "refuse":
            raise problem
        elif outline.tokens > max_length:
            too_long.append(outline.id)
        else:
            without_answer.append(outline.id)
    if not kept:
        raise UserError(
            f"none of {len(too_long) + len(without_answer)} samples is usable: {len(too_long)}"
            f" over {max_length} tokens (the longest has {longest}), {len(without_answer)}"
            " without an answer",
            where="data",
            expected="samples with an assistant turn, within the limit of length",
            remedy="raise data.max_length, or set a smaller picture",
        )
    return Usable(tuple(kept), tuple(tokens), tuple(too_long), tuple(without_answer))


def unfit(outline: Counted, max_length: int) -> UserError | None:
    """Why nothing is learned from a sample; None where it can be."""
    if outline.tokens > max_length:
        return _too_long(outline.id, outline.tokens, max_length)
    return None if outline.supervised else _without_answer(outline.id)


def _too_long(sample: str, tokens: int, max_length: int) -> UserError:
    return UserError(
        f"{tokens} tokens",
        where=f"sample {sample}",
        expected=f"at most {max_length} tokens (data.max_length)",
        remedy="raise data.max_length, set a smaller picture, or set data.unusable: drop",
    )


def _without_answer(sample: str) -> UserError:
    return UserError(
        "no assistant turn, so nothing to learn",
        where=f"sample {sample}",
        expected="a turn of the assistant in every sample",
        remedy="take the sample out of the data, or set data.unusable: drop",
    )
