"""Lengths of reference answers, compared with a limit of generated tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress

from finesight.encode.renderer import Renderer
from finesight.errors import UserError, format_count
from finesight.samples.sample import LocatedSample

MAX_CUT_SHARE = 0.05
"""Share of answers beyond a limit, or without an end token, up to which there is no warning."""


def measure_answers(renderer: Renderer, samples: Iterable[LocatedSample]) -> list[int]:
    """Return the number of tokens of the last answer of each sample, with its end token.

    Samples that cannot be rendered are left out: their errors are reported elsewhere.
    """
    lengths = []
    for sample in samples:
        with suppress(UserError):
            lengths.append(renderer.tokenize(sample).num_answer_tokens)
    return lengths


def describe_cut_answers(lengths: Sequence[int], limit: int, setting: str, kind: str) -> str:
    """Warn about a limit below the lengths of reference answers; empty if few are longer.

    Args:
        setting: Name of the limit.
        kind: Kind of the answers, such as `validation answer`.
    """
    longer = [length for length in lengths if length > limit]
    if len(longer) <= MAX_CUT_SHARE * len(lengths):
        return ""
    share = len(longer) / len(lengths)
    return (
        f"warning: {setting} {limit} is too small for {len(longer)} of"
        f" {format_count(len(lengths), kind)} ({share:.0%}), which have up to {max(longer)} tokens:"
        f" set it to {max(longer)} or more"
    )


def describe_truncation(num_truncated: int, total: int, limit: int, setting: str) -> str:
    """Warn about generated answers that reached a limit; empty if few did."""
    if num_truncated <= MAX_CUT_SHARE * total:
        return ""
    return (
        f"{num_truncated} of {format_count(total, 'answer')} ({num_truncated / total:.0%}) were"
        f" truncated at {setting} {limit}: raise it, unless the model does not end its answers"
    )
