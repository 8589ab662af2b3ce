"""Request and event types of the inference engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from finesight.encode.family import DEFAULT_THINKING, ThinkingOptions
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError

FinishReason = Literal["stop", "length", "cancelled"]
"""Reason for the end of a completion: end token or stop string, length limit, or cancellation."""


class DecodingConstraint(Protocol):
    """Interface that restricts the next token of a sequence, for example by a grammar."""

    def start(self) -> None:
        """Start the computation of the first bitmask in the background."""
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
        temperature: Softmax temperature; 0 selects the most probable token.
        top_p: Nucleus sampling: sample from the smallest set of tokens with this probability
            (Holtzman et al. 2020).
        top_k: Number of most probable tokens to sample from; 0 for all.
        seed: Random seed; equal seeds give equal completions in any batch.
        repetition_penalty: Divides positive and multiplies negative logits of tokens in the prompt
            and the completion (Keskar et al. 2019, CTRL). Use 1 for boxes and formulas, whose
            tokens repeat.
        banned_ids: Tokens that are never sampled, such as placeholders of images.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    repetition_penalty: float = 1.0
    banned_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        seed, penalty = self.seed, self.repetition_penalty
        for name, is_valid, expected in (
            ("temperature", 0.0 <= self.temperature <= 100.0, "0 to 100"),
            ("top_p", 0.0 < self.top_p <= 1.0, "above 0, up to 1"),
            ("top_k", 0 <= self.top_k < 2**31, "0 for all tokens, or a count"),
            ("repetition_penalty", 0.0 < penalty <= 100.0, "above 0, up to 100"),
            ("seed", seed is None or -(2**63) <= seed < 2**64, "up to 64 bits"),
        ):
            if not is_valid:
                what, remedy = f"{name} is {asdict(self)[name]!r}", "correct the value, or omit it"
                raise UserError(what, where="sampling", expected=expected, remedy=remedy)

    @property
    def is_greedy(self) -> bool:
        """True if decoding is greedy: the most probable token is selected."""
        return self.temperature == 0.0


GREEDY_SAMPLING = SamplingParams()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationOptions:
    """Generation options of one request to `InferenceService`.

    Attributes:
        max_new_tokens: Maximum completion length; None for the default limit of the service.
        skip_special_tokens: Whether streamed text omits special tokens, such as those of boxes.
        logprobs: Number of alternative tokens with log probabilities; None for no log
            probabilities.
        model: Name of an adapter or model; None for the default.
        thinking: Thinking mode and reasoning effort; by default those of the model.
    """

    max_new_tokens: int | None = 512
    sampling_params: SamplingParams = GREEDY_SAMPLING
    stop_strings: Sequence[str] = ()
    skip_special_tokens: bool = True
    logprobs: int | None = None
    constraint: DecodingConstraint | None = None
    model: str | None = None
    thinking: ThinkingOptions = DEFAULT_THINKING

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
    """A generated token with its log probability, if requested.

    Log probabilities are computed from the raw logits, before sampling parameters and constraints;
    those of a request with `processed_logprobs` are of the distribution that is sampled from.

    Attributes:
        logprob: Log probability of the token; None if not requested.
    """

    id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class TokenUsage:
    """Token counts of a request.

    Attributes:
        cached_tokens: Number of prompt tokens whose keys and values were in the prefix cache.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """Increment of a streamed completion: new text, and tokens since the last delta.

    Text may lag behind the tokens at incomplete characters and possible stop strings.

    Attributes:
        reasoning: New text of the reasoning before the answer.
    """

    text: str
    tokens: tuple[GeneratedToken, ...]
    reasoning: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """Request to the inference engine to complete an encoded prompt.

    Attributes:
        adapter_index: Index of a loaded adapter; None for the base model.
        image_hashes: Pixel hash of each image or video; computed if None.
        processed_logprobs: Whether log probabilities are those after temperature, penalty and
            constraints; top-k and top-p do not change them.
    """

    prompt: EncodedSample
    max_new_tokens: int
    sampling_params: SamplingParams = GREEDY_SAMPLING
    logprobs: int | None = None
    processed_logprobs: bool = False
    constraint: DecodingConstraint | None = None
    adapter_index: int | None = None
    image_hashes: tuple[bytes, ...] | None = None


@dataclass(frozen=True, slots=True)
class EngineEvent:
    """Event of a request in an engine step: a new token, the end of the request, or both."""

    request_id: int
    token: GeneratedToken | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    num_cached_tokens: int = 0
