"""Request and event types of the inference engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finesight.encode.tokenized_sample import EncodedSample
from finesight.errors import UserError

FinishReason = Literal["stop", "length", "cancelled"]
"""Reason for the end of a completion: end token or stop string, length limit, or cancellation."""


class DecodingConstraint(Protocol):
    """Restricts the next token of one sequence, for example by a grammar."""

    def start(self) -> None:
        """Start to compute the first bitmask asynchronously."""
        return

    def wait_bitmask(self, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for the next bitmask; return whether it is available."""
        return True

    def compute_bitmask(self) -> NDArray[np.int32]:
        """Return the bitmask of valid next tokens: one bit per token, least significant first."""
        ...

    def accept_token(self, token: int) -> None:
        """Advance the constraint by a sampled token."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of a request.

    Attributes:
        temperature: 0 selects the most probable token.
        top_p: Nucleus sampling: smallest set of tokens with this probability (Holtzman et al.
            2020).
        top_k: Number of most probable tokens to sample from; 0 for all.
        seed: Random seed; equal seeds give equal completions in any batch.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in the prompt
            and the completion (Keskar et al. 2019, CTRL). Use 1 for boxes and formulas, whose
            tokens repeat.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        self._check("temperature", self.temperature, 0.0 <= self.temperature <= 100.0, "0 to 100")
        self._check("top_p", self.top_p, 0.0 < self.top_p <= 1.0, "above 0, up to 1")
        self._check("top_k", self.top_k, 0 <= self.top_k < 2**31, "0 for all tokens, or a count")
        penalty = self.repetition_penalty
        self._check("repetition_penalty", penalty, 0.0 < penalty <= 100.0, "above 0, up to 100")
        seed = self.seed
        self._check("seed", seed, seed is None or -(2**63) <= seed < 2**64, "up to 64 bits")

    def _check(self, name: str, value: object, is_valid: bool, expected: str) -> None:
        if not is_valid:
            raise UserError(
                f"{name} is {value!r}",
                where="sampling",
                expected=expected,
                remedy="correct the value, or omit it",
            )

    @property
    def is_greedy(self) -> bool:
        """True if the most probable token is selected."""
        return self.temperature == 0.0


GREEDY_SAMPLING = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Options of one request.

    Attributes:
        max_new_tokens: Maximum completion length; None for the available KV cache.
        stop_strings: Strings that end the completion, excluded from it.
        logprobs: Number of alternative tokens with log probabilities.
        constraint: Decoding constraint for this request only.
        model: Name of an adapter or model; None for the default.
    """

    max_new_tokens: int | None = 512
    sampling_params: SamplingParams = GREEDY_SAMPLING
    stop_strings: Sequence[str] = ()
    logprobs: int | None = None
    constraint: DecodingConstraint | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if "" in self.stop_strings:
            raise UserError(
                "empty stop string",
                where="stop",
                expected="strings of at least one character",
                remedy="remove it",
            )


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """A token with its log probability before temperature and the most probable alternatives."""

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Token counts of a request; `cached_tokens` are prompt tokens from the prefix cache."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """New final text of a completion and the tokens since the last delta.

    Text may lag behind the tokens at incomplete characters and possible stop strings.
    """

    text: str
    tokens: tuple[GeneratedToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Request to the engine.

    Attributes:
        adapter_index: Index of a loaded adapter; None for the base model.
        image_hashes: Pixel hash of each visual span; computed if None.
    """

    prompt: EncodedSample
    max_new_tokens: int
    sampling_params: SamplingParams = GREEDY_SAMPLING
    logprobs: int | None = None
    constraint: DecodingConstraint | None = None
    adapter_index: int | None = None
    image_hashes: tuple[bytes, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """New token or end of a request; `error` if the request failed."""

    request_id: int
    token: GeneratedToken | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    num_cached_tokens: int = 0
