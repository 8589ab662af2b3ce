"""Search for the fastest settings of a run that fit the device memory.

The model is built on the meta device. The search covers the pack size, activation checkpointing and
NF4 quantization.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from statistics import fmean

import torch

from finesight.config import DistillSettings, QuantizablePart, Recipe
from finesight.encode.packing import compute_min_budget, effective_prefix_length
from finesight.encode.renderer import is_native
from finesight.errors import UserError
from finesight.infer.model_loader import resolve_model_source
from finesight.model.quant.base import find_quantized_weights
from finesight.model.trainable import ModelPart, configure_tuning
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import build_meta_model
from finesight.model_folder import ModelFolder
from finesight.plan.dry_run import PlannedPack, StepTracer, plan_step_packs
from finesight.plan.peak_memory import (
    USABLE_MEMORY_FRACTION,
    PeakMemory,
    PersistentMemory,
    compute_graph_shape,
    compute_peak_memory,
    compute_persistent_memory,
)
from finesight.plan.step_time import StepTime, StepTimeEstimator, TargetDevice, average_step_times
from finesight.train.cuda_graphs import MAX_GRAPHS
from finesight.train.dataset_stats import SampleStats
from finesight.train.graph_buffers import GraphShape, can_capture_vision, should_capture_vision
from finesight.train.objectives.distill import DistillObjective
from finesight.train.objectives.grpo import GrpoObjective
from finesight.train.recipe_check import build_objective, resolve_tune

MIN_EFFICIENT_PACK_TOKENS = 4096
"""Pack size in tokens that saturates a GPU. Smaller packs are launch-bound."""

PACK_TOKENS_STEP = 256
"""Step of pack sizes in the search, in tokens."""

MAX_TIMED_STEPS = 40
"""Maximum number of training steps whose time is estimated, since steps are similar."""

PACK_SIZES = ("num_tokens", "num_patches", "num_supervised_tokens", "num_attention_scores")


@dataclass(frozen=True)
class PlannedModel:
    """Model on the meta device, with its traces and estimates."""

    model: VisionLanguageModel
    tracer: StepTracer
    persistent: PersistentMemory
    step_timer: StepTimeEstimator

    @property
    def num_params(self) -> int:
        """Number of parameters, including adapters and quantized weights."""
        num_quantized = sum(
            weight.num_elements for weight in find_quantized_weights(self.model).values()
        )
        return num_quantized + sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def allows_vision_cache(self) -> bool:
        """True if image features are constant, and steps do not contain their images."""
        is_frozen = not any(one.requires_grad for one in self.model.visual.parameters())
        return is_frozen and not isinstance(self.tracer.objective, GrpoObjective | DistillObjective)


def build_planned_model(
    folder: ModelFolder,
    recipe: Recipe,
    nf4_parts: tuple[QuantizablePart, ...],
    target: TargetDevice,
) -> PlannedModel:
    """Build a planned model from the small files of a model folder, without reading weights.

    Raises:
        UserError: The family has no native implementation, so the layers are unknown.
    """
    if not is_native(folder):
        raise UserError(
            f"family {folder.family} uses the transformers backend",
            where=recipe.model,
            expected="a model of a native family; the memory of other layers is unknown",
            remedy="start with train.pack_tokens=1024, and increase it while memory is available",
        )
    fp8_parts = [part for part in recipe.tune.quantize.fp8 or () if part not in nf4_parts]
    model, train = build_meta_model(folder, target.dtype, nf4_parts, fp8_parts), recipe.train
    configure_tuning(model.train(), resolve_tune(recipe), train.seed)
    teacher = _build_teacher(train.distill, target.dtype) if train.objective == "distill" else None
    persistent = compute_persistent_memory(model, train, target.compute, teacher)
    tracer = StepTracer(model, build_objective(train, folder.family), target.compute, teacher)
    num_workers = target.num_workers if train.num_workers is None else train.num_workers
    return PlannedModel(
        model, tracer, persistent, StepTimeEstimator(tracer, target, persistent, num_workers)
    )


def _build_teacher(settings: DistillSettings, dtype: torch.dtype) -> VisionLanguageModel:
    """Build the teacher of a distillation on the meta device."""
    source = resolve_model_source(settings.teacher or "")
    parts: tuple[Collection[ModelPart], Collection[ModelPart]] = source.nf4_parts, source.fp8_parts
    if settings.weight_format != "auto":
        has_4_bits = settings.weight_format in ("nf4", "int4")
        parts = (["language"], []) if has_4_bits else ([], ["language"])
    return build_meta_model(source.folder, dtype, *parts).requires_grad_(False).eval()


@dataclass(frozen=True, slots=True)
class PlannedSettings:
    """Settings that the search varies.

    Attributes:
        pack_tokens: Maximum number of tokens per pack.
        activation_checkpointing: Fraction of layers with activation checkpointing.
        nf4_parts: Parts of the model quantized to NF4.
    """

    pack_tokens: int
    activation_checkpointing: float
    nf4_parts: tuple[QuantizablePart, ...]

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PlannedSettings:
        """Return the settings of a recipe."""
        train, nf4_parts = recipe.train, recipe.tune.quantize.nf4 or ()
        return cls(train.pack_tokens, float(train.activation_checkpointing), nf4_parts)


@dataclass(frozen=True, slots=True)
class SettingsEstimate:
    """Estimated memory and time of a run with the given settings.

    Attributes:
        settings: Settings of the estimate.
        peak: Peak memory.
        step_time: Mean time of a step.
        cached_step_s: Mean seconds of a step with cached image features. None if the vision encoder
            is trainable.
        packs_per_step: Mean number of packs per step.
        memory_limit: Usable memory of the device in bytes.
    """

    settings: PlannedSettings
    peak: PeakMemory
    step_time: StepTime
    cached_step_s: float | None
    packs_per_step: float
    memory_limit: int

    @property
    def fits(self) -> bool:
        """True if the peak memory is within the usable memory."""
        return self.peak.total <= self.memory_limit

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorting key: settings that fit first, by time; others by memory."""
        return (not self.fits, self.step_time.total if self.fits else self.peak.total)


class PlannedSteps:
    """Training steps of a run, which can be packed with any token budget."""

    def __init__(self, steps: Sequence[Sequence[SampleStats]], prefix_length: int = 0) -> None:
        self._steps = steps
        self._prefix_length = prefix_length
        self._bounds: dict[tuple[int, bool], tuple[list[PlannedPack], bool]] = {}

    @property
    def max_sample_tokens(self) -> int:
        """Number of tokens of the longest sample, including a shared prefix."""
        return max(sample.num_packed_tokens for step in self._steps for sample in step)

    @property
    def single_pack_budget(self) -> int:
        """Smallest token budget with which every step fits in one pack."""
        step_lengths = ([sample.num_packed_tokens for sample in step] for step in self._steps)
        return max(
            compute_min_budget(step, effective_prefix_length(self._prefix_length, step))
            for step in step_lengths
        )

    def largest_packs(
        self, token_budget: int, model: VisionLanguageModel, activation_checkpointing: float
    ) -> tuple[list[PlannedPack], bool]:
        """Return the packs that may need the most memory, and whether a step has several packs.

        The packs are the first one of each CUDA graph shape, and those with the most tokens,
        patches, supervised tokens and attention scores.

        Args:
            model: Model, configured for tuning. The result is cached: the model of each call may
                differ only in its quantization.
        """
        # Graph shapes depend on activation checkpointing, but not on the fraction of layers.
        key = token_budget, activation_checkpointing > 0
        if key in self._bounds:
            return self._bounds[key]
        steps = [plan_step_packs(step, token_budget, self._prefix_length) for step in self._steps]
        packs = [pack for step in steps for pack in step]
        first_by_shape: dict[GraphShape, PlannedPack] = {}
        can_capture = can_capture_vision(model)
        for pack in packs:
            captures_vision = can_capture and should_capture_vision(
                pack.num_patches, activation_checkpointing
            )
            first_by_shape.setdefault(
                compute_graph_shape(model.visual, pack, captures_vision), pack
            )
            if len(first_by_shape) == MAX_GRAPHS:
                break
        largest = dict.fromkeys(max(packs, key=attrgetter(name)) for name in PACK_SIZES)
        self._bounds[key] = [*first_by_shape.values(), *largest], any(len(s) > 1 for s in steps)
        return self._bounds[key]

    def timed_steps(self, token_budget: int) -> list[list[PlannedPack]]:
        """Return the packs of the steps whose time is estimated."""
        stride = math.ceil(len(self._steps) / MAX_TIMED_STEPS)
        return [
            plan_step_packs(step, token_budget, self._prefix_length)
            for step in self._steps[::stride]
        ]


class SettingsSearch:
    """Estimates settings for one device, and searches for the fastest ones that fit."""

    def __init__(
        self,
        build_model: Callable[[tuple[QuantizablePart, ...]], PlannedModel],
        steps: PlannedSteps,
        memory_bytes: int,
        quantization_choices: Sequence[tuple[QuantizablePart, ...]],
        prefer_large_packs: bool,
    ) -> None:
        """Initialize a search without estimating any settings.

        Args:
            build_model: Returns the planned model with the given parts quantized to NF4.
            quantization_choices: Sets of parts to quantize to NF4, the set of the recipe first.
                Sets that the model does not support are skipped.
            prefer_large_packs: Whether larger packs are faster, as on a GPU.
        """
        self._build_model, self._steps = build_model, steps
        self._quantization_choices = quantization_choices
        self._prefer_large_packs = prefer_large_packs
        self._memory_limit = round(memory_bytes * USABLE_MEMORY_FRACTION)

    def estimate(self, settings: PlannedSettings) -> SettingsEstimate:
        """Estimate the memory and time of a run with the given settings."""
        planned = self._build_model(settings.nf4_parts)
        packed_steps = self._steps.timed_steps(settings.pack_tokens)
        peak = self.estimate_peak(settings)
        time_step = partial(
            planned.step_timer.estimate_step,
            activation_checkpointing=settings.activation_checkpointing,
            use_graphs=peak.cuda_graphs > 0,
        )
        cached_step_s = None
        if planned.allows_vision_cache:
            cached_step_s = fmean(
                time_step(step, has_cached_features=True).total for step in packed_steps
            )
        return SettingsEstimate(
            settings,
            peak,
            average_step_times([time_step(step) for step in packed_steps]),
            cached_step_s,
            packs_per_step=fmean(len(step) for step in packed_steps),
            memory_limit=self._memory_limit,
        )

    def estimate_peak(self, settings: PlannedSettings) -> PeakMemory:
        """Estimate the peak memory with CUDA graphs if they fit, otherwise without."""
        with_graphs = self._compute_peak(settings, use_graphs=True)
        if with_graphs.total <= self._memory_limit:
            return with_graphs
        return self._compute_peak(settings, use_graphs=False)

    def _compute_peak(self, settings: PlannedSettings, *, use_graphs: bool) -> PeakMemory:
        planned = self._build_model(settings.nf4_parts)
        packs, has_multiple_packs = self._steps.largest_packs(
            settings.pack_tokens, planned.model, settings.activation_checkpointing
        )
        return compute_peak_memory(
            planned.persistent,
            planned.tracer,
            packs,
            settings.activation_checkpointing,
            has_multiple_packs=has_multiple_packs,
            use_graphs=use_graphs,
        )

    def _fits_memory(self, settings: PlannedSettings) -> bool:
        return self._compute_peak(settings, use_graphs=False).total <= self._memory_limit

    def find_best(self, recipe_settings: PlannedSettings) -> PlannedSettings:
        """Find the fastest settings that fit the device memory.

        The search prefers, in this order:

        - no activation checkpointing, if packs of an efficient size fit;
        - the smallest fraction of layers with activation checkpointing;
        - activation checkpointing of all layers, with the largest packs that fit;
        - the same with more parts quantized to NF4.

        If nothing fits, the settings with the least memory are returned. If the recipe is as good
        as the result, `recipe_settings` is returned.
        """
        best = self._search(recipe_settings)
        max_budget = self._steps.single_pack_budget
        is_as_good = (
            recipe_settings.nf4_parts == best.nf4_parts
            and recipe_settings.activation_checkpointing <= best.activation_checkpointing
            and min(recipe_settings.pack_tokens, max_budget) >= min(best.pack_tokens, max_budget)
        )
        return recipe_settings if is_as_good and self._fits_memory(recipe_settings) else best

    def _search(self, recipe_settings: PlannedSettings) -> PlannedSettings:
        min_budget = self._steps.max_sample_tokens
        wanted = (
            MIN_EFFICIENT_PACK_TOKENS if self._prefer_large_packs else recipe_settings.pack_tokens
        )
        target_budget = max(min_budget, min(wanted, self._steps.single_pack_budget))
        for nf4_parts in self._quantization_choices:
            try:
                self._build_model(nf4_parts)
            except UserError:
                # Mixture of experts, a pre-quantized model, or bitsandbytes is missing.
                continue
            fraction = self._find_min_checkpointing(target_budget, nf4_parts)
            if fraction is not None:
                return self._find_max_budget(PlannedSettings(target_budget, fraction, nf4_parts))
            minimal = PlannedSettings(min_budget, 1.0, nf4_parts)
            if self._fits_memory(minimal):
                return self._find_max_budget(minimal)
        return minimal

    def _find_min_checkpointing(
        self, token_budget: int, nf4_parts: tuple[QuantizablePart, ...]
    ) -> float | None:
        """Find the smallest fraction of checkpointed layers that fits; None if none does."""
        num_layers = len(self._build_model(nf4_parts).model.model.layers)
        # Rounded up to the two decimals of a recipe.
        fractions = [math.ceil(100 * count / num_layers) / 100 for count in range(num_layers + 1)]

        def fits(fraction: float) -> bool:
            return self._fits_memory(PlannedSettings(token_budget, fraction, nf4_parts))

        if fits(0.0):  # the most frequent case
            return 0.0
        if not fits(1.0):
            return None
        return fractions[bisect_left(fractions, True, lo=1, hi=num_layers, key=fits)]

    def _find_max_budget(self, settings: PlannedSettings) -> PlannedSettings:
        """Replace the token budget by the largest multiple of `PACK_TOKENS_STEP` that fits."""
        first = _round_up(settings.pack_tokens)
        last = first
        if self._prefer_large_packs:
            last = _round_up(self._steps.single_pack_budget)
        budgets = range(first, last + 1, PACK_TOKENS_STEP)

        def exceeds_memory(pack_tokens: int) -> bool:
            return not self._fits_memory(replace(settings, pack_tokens=pack_tokens))

        num_fitting = bisect_left(budgets, True, key=exceeds_memory)
        return replace(settings, pack_tokens=budgets[num_fitting - 1]) if num_fitting else settings


def _round_up(token_budget: int) -> int:
    return -(-token_budget // PACK_TOKENS_STEP) * PACK_TOKENS_STEP
