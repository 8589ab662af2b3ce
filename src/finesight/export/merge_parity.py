"""Compare logits and completions of a merged model with those of base and adapter.

The comparison has three steps, all computed in one precision, usually fp32:

1. Base model with adapter, and merged weights: only the order of additions differs.
2. Merged weights, and merged weights rounded to the stored precision: the rounding error.
3. Rounded weights, and the model loaded from disk: only the order of additions differs.

Steps 1 and 3 must agree within a tolerance. The rounding error of step 2 is reported.

Shapes: n tokens of a completion, V vocabulary.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from finesight.encode.packing import pack
from finesight.encode.renderer import Renderer
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError
from finesight.infer.block_manager import append_tokens
from finesight.infer.prediction import generate
from finesight.model.vlm import VisionLanguageModel
from finesight.samples.corpus import load_corpus
from finesight.samples.image_file import CorruptImageError
from finesight.samples.sample import ImagePart, LocatedSample, Message, Sample, TextPart
from finesight.settings.manifest import RECIPE_FILE, find_run_dir
from finesight.settings.recipe import load_recipe
from finesight.synth.tickets import draw_ticket, sample_ticket

IMAGE_SEED = 20260
"""Random seed of the images that are generated if a run has no validation samples."""

MAX_SCANNED_SAMPLES = 200


def load_validation_samples(source: str, max_samples: int) -> list[LocatedSample]:
    """Load the first validation samples with images of a run.

    Returns an empty list if `source` has no recipe, or if its validation data cannot be read.
    """
    path = find_run_dir(Path(source)) / RECIPE_FILE
    if not path.is_file():
        return []
    try:
        recipe = load_recipe(path)
        if not recipe.data.eval:
            return []
        corpus = load_corpus(recipe.data.eval)
        candidates = [corpus[i] for i in range(min(len(corpus), MAX_SCANNED_SAMPLES))]
    except UserError:
        return []
    samples = []
    for candidate in candidates:
        if any(isinstance(part, ImagePart) for part in candidate.sample.iter_parts()):
            samples.append(candidate)
    return samples[:max_samples]


def draw_questions(folder: Path, num_questions: int) -> list[LocatedSample]:
    """Save generated images of tickets in a folder, and return one question about each."""
    questions = []
    for index in range(num_questions):
        rng = random.Random(f"ticket {IMAGE_SEED} {index}")
        draw_ticket(sample_ticket(rng), rng).save(folder / f"{index}.png")
        parts = (ImagePart(image=f"{index}.png"), TextPart(text="Describe this image."))
        sample = Sample(
            id=f"generated {index}", messages=(Message(role="user", content=parts),), meta={}
        )
        questions.append(LocatedSample(sample, folder))
    return questions


def encode_prompts(
    renderer: Renderer, questions: Sequence[LocatedSample]
) -> list[tuple[LocatedSample, EncodedSample]]:
    """Encode questions as prompts, and omit those that cannot be encoded."""
    encoded_samples = []
    for question in questions:
        try:
            prompt = renderer.load_patches(renderer.tokenize_prompt(question))
        except (CorruptImageError, UserError):
            continue
        encoded_samples.append((question, prompt))
    return encoded_samples


MAX_NEW_TOKENS = 48
"""Maximum number of tokens per compared completion, because their logits are kept in memory."""

LOGIT_TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Maximum difference of logits that a different order of additions may cause, by precision.

Differences are relative to the largest logit. In 16 bits, the tolerance includes the rounding of
activations.
"""


@dataclass(frozen=True, slots=True)
class ModelOutputs:
    """Completions of a model, with the logits of each token.

    Attributes:
        logits: One tensor [n, V] per prompt, in fp32 on the CPU.
    """

    completions: tuple[tuple[int, ...], ...]
    logits: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class Divergence:
    """First token at which the completions of two models for one prompt differ.

    Attributes:
        max_difference: Largest difference between the logits of both models at this token.
    """

    sample_id: str
    token_index: int
    logit_gap: float
    max_difference: float

    @property
    def is_tie(self) -> bool:
        """Whether rounding explains the difference: the gap is at most twice `max_difference`."""
        return self.logit_gap <= 2 * self.max_difference


_ADAPTER_STEP = "adapter on base, and merged"


@dataclass(frozen=True, slots=True)
class MergeParity:
    """Results of the comparison between a merged model and the trained model.

    Differences are the largest differences of logits, relative to the largest logit of the trained
    model.

    Attributes:
        origin: Kind of the images in the prompts: validation or generated images.
        adapter_change: Difference between base model and base model with adapter; None without an
            adapter.
        merge_change: Difference due to merging, or to dequantizing 4-bit weights; None without
            either.
        rounding_change: Difference due to rounding to `weight_precision`; None if it is lossless.
        reload_difference: Difference between the written weights and those loaded from disk.
        divergences: First different token of the other completions.
        quantized_comparison: For a run with quantized weights, logit difference and fraction of
            equal completions between the merged model and the quantized model of the training.
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
        """Return the results as JSON data."""
        comparison = None
        if self.quantized_comparison is not None:
            logits, equal_fraction = self.quantized_comparison
            comparison = {"logits": logits, "equal_answers": equal_fraction}
        return asdict(self) | {"quantized_comparison": comparison}

    def format_lines(self) -> list[str]:
        """Return the results as console lines."""
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
        for step, difference in steps.items():
            if difference is not None:
                lines.append(f"  {step:30}{difference:.1e}")
        lines.append(f"{self.num_equal} of {self.num_prompts} completions have equal tokens")
        for divergence in self.divergences:
            lines.append(
                f"  {divergence.sample_id} differs after {divergence.token_index} tokens:"
                f" logit gap {divergence.logit_gap:.1e} of the two tokens, rounding there"
                f" {divergence.max_difference:.1e}"
            )
        if self.quantized_comparison is not None:
            logits, equal_fraction = self.quantized_comparison
            lines.append(
                f"compared with the quantized base used in training: {logits:.1e} of the"
                f" largest logit, {equal_fraction:.0%} of the completions equal"
            )
        return lines


def check_same_prompts(actual: Sequence[EncodedSample], expected: Sequence[EncodedSample]) -> None:
    """Raise UserError if the merged folder encodes prompts to other tokens or patches."""
    for actual_prompt, expected_prompt in zip(actual, expected, strict=True):
        actual_tokens = actual_prompt.tokenized
        expected_tokens = expected_prompt.tokenized
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
    """Generate a completion per prompt with greedy decoding, of at most MAX_NEW_TOKENS tokens."""
    output_ids = generate(model, prompts, max_new_tokens=MAX_NEW_TOKENS, end_ids=eos_ids)
    return tuple(tuple(sequence) for sequence in output_ids)


def generate_outputs(
    model: VisionLanguageModel, prompts: Sequence[EncodedSample], eos_ids: Sequence[int]
) -> ModelOutputs:
    """Generate completions, and compute the logits of their tokens."""
    completions = generate_completions(model, prompts, eos_ids)
    return ModelOutputs(completions, compute_logits(model, prompts, completions))


@torch.no_grad()
def compute_logits(
    model: VisionLanguageModel,
    prompts: Sequence[EncodedSample],
    completions: Sequence[Sequence[int]],
) -> tuple[Tensor, ...]:
    """Compute the logits of the tokens of given completions.

    Returns a tensor [n, V] per prompt.
    """
    device = model.model.embed_tokens.weight.device
    logits = []
    for prompt, output_ids in zip(prompts, completions, strict=True):
        tokenized = append_tokens(prompt.tokenized, output_ids, is_supervised=True)
        batch = pack([replace(prompt, tokenized=tokenized)]).to(device)
        logits.append(model.compute_logits(model(batch)).float().cpu())
    return tuple(logits)


def relative_difference(
    actual: Sequence[Tensor], expected: Sequence[Tensor], reference: Sequence[Tensor]
) -> float:
    """Return the largest difference between logits, relative to the largest logit of `reference`.

    It is infinity if a difference is not finite.
    """
    differences = [float((x - y).abs().max()) for x, y in zip(actual, expected, strict=True)]
    if not all(map(math.isfinite, differences)):
        return math.inf
    return max(differences) / max(float(logits.abs().max()) for logits in reference)


def find_divergences(
    reference: ModelOutputs, other: ModelOutputs, sample_ids: Iterable[str]
) -> tuple[int, tuple[Divergence, ...]]:
    """Count the equal completions of two models, and find the first difference of the others.

    Args:
        other: Completions of the merged model, and its logits for the tokens of `reference`.
    """
    num_equal = 0
    divergences = []
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
        row = reference_logits[index]
        other_row = other_logits[index]
        logit_gap = float(row[reference_ids[index]] - row[other_ids[index]])
        max_difference = float((row - other_row).abs().max())
        divergences.append(Divergence(sample_id, index, logit_gap, max_difference))
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
        " adapter in place of the merged model",
    )
