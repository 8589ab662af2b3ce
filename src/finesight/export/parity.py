"""A merged folder against the adapter on its base: the same logits, the same answers.

What can differ is taken apart. In one precision, usually fp32, the adapter beside its base and the
sum of both are computed: they may differ by the order of additions only. Then the numbers of the
sum are rounded as in the file, and the model is loaded anew from the disk: these two may differ by
nothing but the order of additions either. What is left between them is rounding, and is measured.

Shapes: n tokens of an answer, V vocabulary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finesight.encode.encoded import Encoded
from finesight.encode.pack import pack
from finesight.errors import UserError
from finesight.infer.generate import generate
from finesight.model.network import VisionLanguageModel

MOST_TOKENS = 48
"""Tokens of an answer that are compared: as many rows of a vocabulary are kept in memory."""

BOUNDS = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference of logits, relative to the largest of them, that the order of additions makes
in a precision; in 16 bits it holds the rounding of every activation, too."""


@dataclass(frozen=True, slots=True)
class Said:
    """The answers of a model, and what stood behind each of their tokens: `logits` are [n, V] in
    fp32 on the CPU, one for each prompt."""

    answers: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Parting:
    """Where two answers to a question part: after `token` equal tokens, `gap` is by how much the
    first model preferred its own next token to the other's and `noise` the largest difference of
    the two models' logits there. A gap of at most twice the noise is a tie that rounding broke.
    """

    question: str
    token: int
    gap: float
    noise: float

    @property
    def tie(self) -> bool:
        """Whether rounding explains it."""
        return self.gap <= 2 * self.noise


_BESIDE = "adapter beside, and added in"


@dataclass(frozen=True, slots=True)
class Parity:
    """What was compared and what came out. Differences of logits are relative to the largest logit
    of the trained model: of the adapter on its base, where there is one.

    `questions` says where they come from; `computed` and `stored` are precisions. `adapter` is what
    the adapter changes at all (None without one), `summed` what adding it into the weights changed,
    or writing weights of four bits in full (None where neither was done), `rounded` what
    their rounding to `stored` changed (None where it is none) and `reloaded` by how much the folder
    on the disk differs from the model that was written. `as_trained` compares with the base in few
    bits, which the adapter was trained on: its logits and the share of equal answers.
    """

    questions: str
    prompts: int
    tokens: int
    computed: str
    stored: str
    adapter: float | None
    summed: float | None
    rounded: float | None
    reloaded: float
    equal: int
    partings: tuple[Parting, ...]
    as_trained: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        trained = self.as_trained
        named = None if trained is None else {"logits": trained[0], "equal_answers": trained[1]}
        return asdict(self) | {"as_trained": named}

    def as_lines(self) -> list[str]:
        """For people."""
        lines = [
            f"{self.prompts} questions about {self.questions}, {self.tokens} tokens of answers,"
            f" computed in {self.computed}",
            "largest difference of logits, as a share of the largest logit:",
        ]
        beside = "in four bits, and in full" if self.adapter is None else _BESIDE
        steps = {
            "base and adapter": self.adapter,
            beside: self.summed,
            f"rounded to {self.stored}": self.rounded,
            "written, and read again": self.reloaded,
        }
        lines += [f"  {step:30}{n:.1e}" for step, n in steps.items() if n is not None]
        lines.append(f"{self.equal} of {self.prompts} answers are equal, token by token")
        lines += [
            f"  {one.question} parts after {one.token} tokens: a gap of {one.gap:.1e} between the"
            f" first two, rounding there {one.noise:.1e}"
            for one in self.partings
        ]
        if self.as_trained is not None:
            logits, equal = self.as_trained
            lines.append(
                f"against the base in few bits, as it was trained: {logits:.1e} of the largest"
                f" logit, {equal:.0%} of the answers equal"
            )
        return lines


def same_prompts(found: Sequence[Encoded], expected: Sequence[Encoded]) -> None:
    """Raise UserError where the folder's own files make other prompts or patches."""
    for one, other in zip(found, expected, strict=True):
        ours, theirs = one.outline, other.outline
        if not (
            np.array_equal(ours.ids_T, theirs.ids_T)
            and np.array_equal(ours.positions_3T, theirs.positions_3T)
            and np.array_equal(one.patches_ND, other.patches_ND)
        ):
            raise UserError(
                f"the merged folder reads {theirs.id:.60} as {ours.tokens} tokens and"
                f" {ours.patches} patches",
                where="parity",
                expected=f"the {theirs.tokens} tokens and {theirs.patches} patches of the run",
                remedy="this is a fault of finesight: keep the run, and report it",
            )


def answered(
    model: VisionLanguageModel, prompts: Sequence[Encoded], ends: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Greedy answers of at most MOST_TOKENS tokens, as `finesight predict` makes them."""
    ids = generate(model, prompts, max_new_tokens=MOST_TOKENS, end_ids=ends)
    return tuple(tuple(one) for one in ids)


@torch.no_grad()
def weighed(
    model: VisionLanguageModel, prompts: Sequence[Encoded], answers: Sequence[Sequence[int]]
) -> tuple[Tensor, ...]:
    """The logits [n, V] that stand behind each token of these answers."""
    device = model.model.embed_tokens.weight.device
    found = []
    for prompt, ids in zip(prompts, answers, strict=True):
        batch = pack([_continued(prompt, ids)]).to(device)
        found.append(model.logits(model(batch)).float().cpu())
    return tuple(found)


def _continued(prompt: Encoded, ids: Sequence[int]) -> Encoded:
    """The prompt with an answer that counts as learned: so its tokens are the ones predicted."""
    outline, count = prompt.outline, len(ids)
    # Text goes on from the largest position of any row, in all rows alike.
    after = int(outline.positions_3T.max()) + 1 + np.arange(count, dtype=np.int32)
    return replace(
        prompt,
        outline=replace(
            outline,
            ids_T=np.concatenate([outline.ids_T, np.asarray(ids, dtype=np.int32)]),
            learned_T=np.concatenate([np.zeros(outline.tokens, bool), np.ones(count, bool)]),
            positions_3T=np.concatenate(
                [outline.positions_3T, np.broadcast_to(after, (3, count))], axis=1
            ),
        ),
    )


def largest(logits: Sequence[Tensor]) -> float:
    """The largest of all, which differences are told in terms of."""
    return max(float(one.abs().max()) for one in logits)


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of logits; infinite where one of them is no number."""
    pairs = zip(found, expected, strict=True)
    furthest = [float((ours - theirs).abs().max()) for ours, theirs in pairs]
    return max(furthest) if all(map(math.isfinite, furthest)) else math.inf


def partings(first: Said, other: Said, questions: Iterable[str]) -> tuple[int, tuple[Parting, ...]]:
    """How many answers are equal, and where the others part. `other` has its own answers, and the
    logits behind those of `first`."""
    equal, found = 0, []
    for question, ours, theirs, logits, others in zip(
        questions, first.answers, other.answers, first.logits, other.logits, strict=True
    ):
        if ours == theirs:
            equal += 1
            continue
        pairs = enumerate(zip(ours, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), None)
        if at is None:  # one goes on where the other ended, which only an end token can make
            at = min(len(ours), len(theirs)) - 1
        row, other_row = logits[at], others[at]
        gap = float(row[ours[at]] - row[theirs[at]])
        found.append(Parting(question, at, gap, float((row - other_row).abs().max())))
    return equal, tuple(found)


def refuse_unlike(parity: Parity, bound: float) -> None:
    """Raise UserError for a difference that neither rounding nor the order of additions makes."""
    # Rounding may change what it will, but not into what is no number: fp16 ends at 65504.
    checks = (
        ("writing it as one model in full", parity.summed or 0.0, bound),
        (f"rounding to {parity.stored}", parity.rounded or 0.0, sys.float_info.max),
        ("writing the folder and reading it again", parity.reloaded, bound),
    )
    for what, found, most in checks:
        if not found <= most:
            raise _unlike(f"{what} changes logits by {found:.2e} of the largest", f"{most:.1e}")
    for one in parity.partings:
        if not one.tie:
            raise _unlike(
                f"the answer to {one.question:.60} parts after {one.token} tokens, where the first"
                f" model prefers its own by {one.gap:.2e}",
                f"{2 * one.noise:.2e}, what rounding can turn around there",
            )


def _unlike(what: str, most: str) -> UserError:
    return UserError(
        f"the merged model is not the trained one: {what}",
        where="parity",
        expected=f"at most {most}",
        remedy="nothing was written; with --precision fp32 nothing is rounded, or go on with the"
        " adapter (finesight predict RUN)",
    )
