"""What is asked of the engine, and what comes back token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finesight.encode.encoded import Encoded
from finesight.errors import UserError

Finish = Literal["stop", "length", "cancelled"]
"""Why an answer ended: by its end token or a stop text, at its longest, or because nobody waits."""


class Constraint(Protocol):
    """What tokens may come next, for one answer: a grammar that is followed as it grows."""

    def begin(self) -> None:
        """Start to compute the mask of the first token, without waiting for it."""
        return

    def ready(self, seconds: float) -> bool:
        """Wait up to `seconds` for the mask of the next token; return whether `allow` has it."""
        return True

    def allow(self) -> NDArray[np.int32]:
        """One bit for each token of the vocabulary, in order from the lowest bit of the first
        number: set where the token may come next. Of as many numbers as hold the vocabulary."""
        ...

    def take(self, token: int) -> None:
        """That token has come."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the most probable one at temperature 0, else drawn.

    Logits are divided by `temperature`; then only the `top_k` most probable tokens are kept (0: all
    of them), then the fewest whose probabilities come to `top_p` (Holtzman et al. 2020). Equal
    seeds draw equal answers, whatever is answered beside them. `repetition_penalty` divides the
    positive logits of tokens that the prompt or the answer holds, and multiplies the negative ones
    (Keskar et al. 2019, CTRL): 1 is none, and right for boxes and formulas, whose digits and
    commands repeat.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self._check("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "0 to 100")
        self._check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, up to 1")
        self._check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 for all tokens, or how many")
        penalty = self.repetition_penalty
        self._check("repetition_penalty", penalty, 0.0 < penalty <= 100.0, "above 0, up to 100")
        seed = self.seed
        self._check("seed", seed, seed is None or -(2**63) <= seed < 2**64, "up to 64 bits")

    def _check(self, name: str, value: object, fits: bool, expected: str) -> None:
        if not fits:
            raise UserError(
                f"{name} is {value!r}",
                where="sampling",
                expected=expected,
                remedy="correct it, or leave it out",
            )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0.0


GREEDY = Sampling()


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How one question is to be answered.

    `model` is one of the service's names, None its first. `stop` ends the answer before any of
    these texts. `logprobs` asks for each token's log probability and those of as many others.
    `constraint` is for this one answer alone. `max_new_tokens` None: as many as there is room for.
    """

    max_new_tokens: int | None = 512
    sampling: Sampling = GREEDY
    stop: Sequence[str] = ()
    logprobs: int | None = None
    constraint: Constraint | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise UserError(
                "an empty text to stop at",
                where="stop",
                expected="texts of at least a character",
                remedy="leave it out",
            )


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer: its log probability before temperature, and the most probable ones
    in its place with theirs, where they were asked for."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of a question, those of them that were known from earlier ones, and of its answer."""

    prompt: int
    known: int
    answer: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What an answer has grown by: text that will not change any more, and the tokens since the
    last delta. Text lags behind tokens where a character is incomplete or a stop text may begin."""

    text: str
    tokens: tuple[Token, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A question to the engine: `adapter` is the number of one that the model carries, None for the
    model without any; `pictures` are digests of what the prompt shows."""

    prompt: Encoded
    max_new_tokens: int
    sampling: Sampling = GREEDY
    logprobs: int | None = None
    constraint: Constraint | None = None
    adapter: int | None = None
    pictures: tuple[bytes, ...] | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """What became of a request: a token, its end, or both; `error` in place of both. `known` tokens
    of its prompt had been read before it came."""

    ticket: int
    token: Token | None = None
    finish: Finish | None = None
    error: Exception | None = None
    known: int = 0
