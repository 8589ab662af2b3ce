"""Compare a merged model with its base and adapter: logits and completions.

The comparison separates the causes of differences. In one precision, usually fp32, it computes the
adapter on its base and the merged weights, which may differ by the order of additions only. Then
the merged weights are rounded to the stored precision, and the model is loaded from disk; these two
may differ by the order of additions only. The remaining difference is rounding, and is measured.

Shapes: n tokens of a completion, V vocabulary.
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

from finesight.encode.packing import pack
from finesight.encode.tokenized_sample import EncodedSample
from finesight.errors import UserError
from finesight.infer.generate import generate
from finesight.model.vlm import VisionLanguageModel

MAX_NEW_TOKENS = 48
"""Maximum tokens of a compared completion; the logits of all tokens are held in memory."""

LOGIT_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest relative difference of logits by the order of additions, for each precision.

In 16 bits, it includes rounding of all activations.
"""


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """Completions of a model and the logits of their tokens.

    `logits` has one tensor [n, V] per prompt, in fp32 on the CPU.
    """

    completions: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Divergence:
    """First difference between two completions of a prompt.

    `logit_gap` is the logit difference between the tokens of both completions in the reference
    model. `max_difference` is the largest difference of the logits of both models at this token. A
    gap of at most twice this difference is a tie that rounding can break.
    """

    sample_id: str
    token_index: int
    logit_gap: float
    max_difference: float

    @property
    def is_tie(self) -> bool:
        """True if rounding explains the difference."""
        return self.logit_gap <= 2 * self.max_difference


_ADAPTER_STEP = "adapter on base, and merged"


@dataclass(frozen=True, slots=True)
class MergeParity:
    """Results of the comparison.

    Differences of logits are relative to the largest logit of the trained model.

    Attributes:
        origin: Origin of the prompts.
        num_prompts: Number of prompts.
        num_tokens: Number of tokens of all completions.
        compute_precision: Precision of the comparison.
        weight_precision: Precision of the stored weights.
        adapter_change: Effect of the adapter; None without one.
        merge_change: Effect of merging, or of dequantizing 4-bit weights; None without either.
        rounding_change: Effect of rounding to the stored precision; None if it is lossless.
        reload_difference: Difference between the written model and the one loaded from disk.
        num_equal: Number of equal completions.
        divergences: First differences of the others.
        quantized_comparison: Logit difference and fraction of equal completions, compared with the
            quantized base on which the adapter was trained.
    """

    origin: str
    num_prompts: int
    num_tokens: int
    compute_precision: str
    weight_precision: str
    adapter_change: float | None
    merge_change: float | None
    rounding_change: float | None
    reload_difference: float
    num_equal: int
    divergences: tuple[Divergence, ...]
    quantized_comparison: tuple[float, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """Convert to a JSON object."""
        comparison = self.quantized_comparison
        comparison_dict = (
            None
            if comparison is None
            else {"logits": comparison[0], "equal_answers": comparison[1]}
        )
        return asdict(self) | {"quantized_comparison": comparison_dict}

    def format_lines(self) -> list[str]:
        """Format the results for the console."""
        lines = [
            f"{self.num_prompts} prompts about {self.origin}, {self.num_tokens} generated"
            f" tokens, computed in {self.compute_precision}",
            "largest difference of logits, relative to the largest logit:",
        ]
        merge_step = "4 bits, and dequantized" if self.adapter_change is None else _ADAPTER_STEP
        steps = {
            "base and adapter": self.adapter_change,
            merge_step: self.merge_change,
            f"rounded to {self.weight_precision}": self.rounding_change,
            "saved and loaded": self.reload_difference,
        }
        lines += [
            f"  {step:30}{difference:.1e}"
            for step, difference in steps.items()
            if difference is not None
        ]
        lines.append(f"{self.num_equal} of {self.num_prompts} completions have equal tokens")
        lines += [
            f"  {divergence.sample_id} differs after {divergence.token_index} tokens:"
            f" logit gap {divergence.logit_gap:.1e} of the two tokens, rounding there"
            f" {divergence.max_difference:.1e}"
            for divergence in self.divergences
        ]
        if self.quantized_comparison is not None:
            logits, equal_fraction = self.quantized_comparison
            lines.append(
                f"compared with the quantized base used in training: {logits:.1e} of the"
                f" largest logit, {equal_fraction:.0%} of the completions equal"
            )
        return lines


def check_same_prompts(actual: Sequence[EncodedSample], expected: Sequence[EncodedSample]) -> None:
    """Raise UserError if the files of the folder produce other prompts or patches."""
    for actual_prompt, expected_prompt in zip(actual, expected, strict=True):
        actual_tokens, expected_tokens = actual_prompt.tokenized, expected_prompt.tokenized
        if not (
            np.array_equal(actual_tokens.ids_T, expected_tokens.ids_T)
            and np.array_equal(actual_tokens.position_ids_3T, expected_tokens.position_ids_3T)
            and np.array_equal(actual_prompt.patches_ND, expected_prompt.patches_ND)
        ):
            raise UserError(
                f"the merged folder encodes {expected_tokens.id:.60} as"
                f" {actual_tokens.num_tokens} tokens and {actual_tokens.num_patches}"
                " patches",
                where="parity",
                expected=f"the {expected_tokens.num_tokens} tokens and"
                f" {expected_tokens.num_patches} patches of the run",
                remedy="this is a bug in finesight: keep the run, and report it",
            )


def generate_completions(
    model: VisionLanguageModel, prompts: Sequence[EncodedSample], eos_ids: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """Generate greedily with at most MAX_NEW_TOKENS tokens, like `finesight predict`."""
    output_ids = generate(model, prompts, max_new_tokens=MAX_NEW_TOKENS, end_ids=eos_ids)
    return tuple(tuple(sequence) for sequence in output_ids)


@torch.no_grad()
def compute_logits(
    model: VisionLanguageModel,
    prompts: Sequence[EncodedSample],
    completions: Sequence[Sequence[int]],
) -> tuple[Tensor, ...]:
    """Compute the logits [n, V] of each token of the completions."""
    device = model.model.embed_tokens.weight.device
    logits = []
    for prompt, output_ids in zip(prompts, completions, strict=True):
        batch = pack([_append_completion(prompt, output_ids)]).to(device)
        logits.append(model.compute_logits(model(batch)).float().cpu())
    return tuple(logits)


def _append_completion(prompt: EncodedSample, output_ids: Sequence[int]) -> EncodedSample:
    """Append a completion with a full loss mask, so that its tokens are predicted."""
    tokenized, num_tokens = prompt.tokenized, len(output_ids)
    # Text positions continue from the largest position in all axes.
    position_ids = int(tokenized.position_ids_3T.max()) + 1 + np.arange(num_tokens, dtype=np.int32)
    return replace(
        prompt,
        tokenized=replace(
            tokenized,
            ids_T=np.concatenate([tokenized.ids_T, np.asarray(output_ids, dtype=np.int32)]),
            loss_mask_T=np.concatenate(
                [np.zeros(tokenized.num_tokens, bool), np.ones(num_tokens, bool)]
            ),
            position_ids_3T=np.concatenate(
                [tokenized.position_ids_3T, np.broadcast_to(position_ids, (3, num_tokens))], axis=1
            ),
        ),
    )


def max_abs_logit(logits: Sequence[Tensor]) -> float:
    """Return the largest absolute logit."""
    return max(float(tensor.abs().max()) for tensor in logits)


def max_logit_difference(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Return the largest difference of logits; infinity for a non-finite one."""
    pairs = zip(actual, expected, strict=True)
    differences = [
        float((actual_logits - expected_logits).abs().max())
        for actual_logits, expected_logits in pairs
    ]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def find_divergences(
    reference: ModelOutputs, other: ModelOutputs, sample_ids: Iterable[str]
) -> tuple[int, tuple[Divergence, ...]]:
    """Count equal completions, and find the first difference of the others.

    `other` has its own completions, with logits for the completions of `reference`.
    """
    num_equal, divergences = 0, []
    for sample_id, reference_ids, other_ids, reference_logits, other_logits in zip(
        sample_ids,
        reference.completions,
        other.completions,
        reference.logits,
        other.logits,
        strict=True,
    ):
        if reference_ids == other_ids:
            num_equal += 1
            continue
        pairs = enumerate(zip(reference_ids, other_ids, strict=False))
        index = next((i for i, (a, b) in pairs if a != b), None)
        if index is None:  # one continues after the other's end token
            index = min(len(reference_ids), len(other_ids)) - 1
        row, other_row = reference_logits[index], other_logits[index]
        logit_gap = float(row[reference_ids[index]] - row[other_ids[index]])
        divergences.append(
            Divergence(sample_id, index, logit_gap, float((row - other_row).abs().max()))
        )
    return num_equal, tuple(divergences)


def check_parity(parity: MergeParity, tolerance: float) -> None:
    """Raise UserError for a difference that rounding or the order of additions cannot explain."""
    # Any finite rounding is valid, but fp16 overflows above 65504.
    checks = (
        ("merging or dequantizing", parity.merge_change or 0.0, tolerance),
        (
            f"rounding to {parity.weight_precision}",
            parity.rounding_change or 0.0,
            sys.float_info.max,
        ),
        ("saving and loading the folder", parity.reload_difference, tolerance),
    )
    for step, difference, limit in checks:
        if not difference <= limit:
            raise _build_parity_error(
                f"{step} changes logits by {difference:.2e} of the largest logit", f"{limit:.1e}"
            )
    for divergence in parity.divergences:
        if not divergence.is_tie:
            raise _build_parity_error(
                f"the completion of {divergence.sample_id:.60} differs after"
                f" {divergence.token_index} tokens, where the logit gap of the first model"
                f" is {divergence.logit_gap:.2e}",
                f"{2 * divergence.max_difference:.2e}, the effect of rounding there",
            )


def _build_parity_error(what: str, limit: str) -> UserError:
    return UserError(
        f"the merged model differs from the trained one: {what}",
        where="parity",
        expected=f"at most {limit}",
        remedy="no files were written; use --precision fp32 to avoid rounding, or use the"
        " adapter (finesight predict RUN)",
    )
