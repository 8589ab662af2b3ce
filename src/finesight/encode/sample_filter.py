"""Filter of samples that are too long or have no supervised tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, Protocol

from finesight.errors import UserError


class CountedSample(Protocol):
    """Interface of samples with known token counts."""

    @property
    def id(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_supervised_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class FilteredSamples:
    """Indices and token counts of valid samples, and the ids of skipped samples."""

    sample_indices: tuple[int, ...]
    token_counts: tuple[int, ...]
    too_long_ids: tuple[str, ...]
    unsupervised_ids: tuple[str, ...]

    @property
    def num_skipped(self) -> int:
        return len(self.too_long_ids) + len(self.unsupervised_ids)


def filter_samples(
    samples: Iterable[CountedSample], max_length: int, on_invalid_sample: Literal["skip", "fail"]
) -> FilteredSamples:
    """Select the samples that have supervised tokens and at most `max_length` tokens.

    Samples are never truncated, because a truncated sample loses its answer or part of an image.
    `samples` is iterated once and not stored.

    Raises:
        UserError: A sample is invalid and `on_invalid_sample` is `fail`, or no sample is valid.
    """
    sample_indices, token_counts = [], []
    too_long, unsupervised = [], []
    max_tokens = 0
    for index, sample in enumerate(samples):
        max_tokens = max(max_tokens, sample.num_tokens)
        error = find_sample_error(sample, max_length)
        if error is None:
            sample_indices.append(index)
            token_counts.append(sample.num_tokens)
        elif on_invalid_sample == "fail":
            raise error
        elif sample.num_tokens > max_length:
            too_long.append(sample.id)
        else:
            unsupervised.append(sample.id)
    if not sample_indices:
        raise UserError(
            f"none of {len(too_long) + len(unsupervised)} samples is valid: {len(too_long)}"
            f" exceed {max_length} tokens (the longest has {max_tokens}), {len(unsupervised)}"
            " have no answer",
            where="data",
            expected="samples with an assistant turn and at most data.max_length tokens",
            remedy="raise data.max_length, or set a smaller image size",
        )
    return FilteredSamples(
        tuple(sample_indices), tuple(token_counts), tuple(too_long), tuple(unsupervised)
    )


def find_sample_error(sample: CountedSample, max_length: int) -> UserError | None:
    """Return an error if a sample cannot be used for training, else None."""
    if sample.num_tokens > max_length:
        return _build_length_error(sample.id, sample.num_tokens, max_length)
    return None if sample.num_supervised_tokens else _build_no_answer_error(sample.id)


def _build_length_error(sample_id: str, num_tokens: int, max_length: int) -> UserError:
    return UserError(
        f"{num_tokens} tokens",
        where=f"sample {sample_id}",
        expected=f"at most {max_length} tokens (data.max_length)",
        remedy="raise data.max_length, set a smaller image size, or set"
        " data.on_invalid_sample: skip",
    )


def _build_no_answer_error(sample_id: str) -> UserError:
    return UserError(
        "no assistant turn, so no supervised tokens",
        where=f"sample {sample_id}",
        expected="an assistant turn in every sample",
        remedy="remove the sample, or set data.on_invalid_sample: skip",
    )
