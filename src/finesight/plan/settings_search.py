"""Search for the fastest settings of a run that fit the device memory.

The model is built on the meta device. The search covers the pack size, activation checkpointing and
NF4 quantization.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import chain
from operator import attrgetter
from statistics import fmean
from typing import Literal

import torch

from finesight.encode.packing import compute_min_budget, effective_prefix_length
from finesight.encode.renderer import require_native
from finesight.errors import UserError
from finesight.infer.model_loader import resolve_model_source
from finesight.model.quant.base import find_quantized_weights
from finesight.model.trainable import ModelPart, configure_tuning
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import build_meta_model
from finesight.model_folder import ModelFolder
from finesight.objective_components import Needs, Teacher
from finesight.plan.dry_run import PlannedPack, StepTracer, build_split_pack, plan_step_packs
from finesight.plan.peak_memory import (
    USABLE_MEMORY_FRACTION,
    PeakMemory,
    PersistentMemory,
    compute_evaluation_memory,
    compute_graph_shape,
    compute_loading_memory,
    compute_peak_memory,
    compute_persistent_memory,
)
from finesight.plan.sharded_memory import GPUS_PER_MACHINE, RankLayout
from finesight.plan.step_time import StepTime, StepTimeEstimator, TargetDevice, average_step_times
from finesight.settings.config import ParallelMode, QuantizablePart, Recipe
from finesight.train.cuda_graphs import MAX_GRAPHS
from finesight.train.dataset_stats import SampleStats
from finesight.train.graph_buffers import GraphShape, can_capture_vision, should_capture_vision
from finesight.train.oom import max_unsplit_packs
from finesight.train.parallel.fsdp_units import mark_as_sharded
from finesight.train.recipe_check import build_objective, resolve_tune
from finesight.train.sampler import assign_to_ranks

MIN_EFFICIENT_PACK_TOKENS = 4096
"""Pack size in tokens that saturates a GPU. Smaller packs are launch-bound."""

PACK_TOKENS_STEP = 256
"""Step of pack sizes in the search, in tokens."""

MAX_TIMED_STEPS = 40
"""Maximum number of training steps whose time is estimated, since steps are similar."""

Phase = Literal["step", "evaluation", "loading"]
"""Phase of a run: training steps, evaluations with the export, or loading the model."""

PACK_SIZES = ("num_tokens", "num_patches", "num_supervised_tokens", "num_attention_scores")


@dataclass(frozen=True)
class PlannedModel:
    """Model on the meta device, with its traces and estimates."""

    model: VisionLanguageModel
    needs: Needs
    tracer: StepTracer
    persistent: PersistentMemory
    step_timer: StepTimeEstimator

    @property
    def num_params(self) -> int:
        """Number of parameters, including adapters and quantized weights."""
        quantized = find_quantized_weights(self.model).values()
        num_quantized = sum(weight.num_elements for weight in quantized)
        return num_quantized + sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def allows_vision_cache(self) -> bool:
        """True if image features are constant, and steps do not contain their images.

        A sharded encoder runs in every step, because its weights are all-gathered.
        """
        if self.persistent.sharded is not None:
            return False
        is_frozen = not any(one.requires_grad for one in self.model.visual.parameters())
        return is_frozen and not self.needs.steps_contain_images


def build_planned_model(
    folder: ModelFolder,
    recipe: Recipe,
    nf4_parts: tuple[QuantizablePart, ...],
    target: TargetDevice,
    mode: ParallelMode = "ddp",
) -> PlannedModel:
    """Build a planned model from the small files of a model folder, without reading weights.

    Args:
        mode: Value of `train.parallel`; without effect on a single GPU.

    Raises:
        UserError: The family has no native implementation, so the layers are unknown.
    """
    # The memory of other layers is unknown.
    remedy = "train without a plan, and with smaller images if memory runs out"
    require_native(folder, recipe.model, remedy)
    fp8_parts = [part for part in recipe.tune.quantize.fp8 or () if part not in nf4_parts]
    model = build_meta_model(folder, target.dtype, nf4_parts, fp8_parts)
    train = recipe.train
    configure_tuning(model.train(), resolve_tune(recipe), train.seed)
    teacher = None
    if recipe.needs.teacher is not None:
        teacher = _build_teacher(recipe.needs.teacher, target.dtype)
    layout = RankLayout(target.num_gpus, mode)
    if layout.is_sharded:
        mark_as_sharded(model)
    persistent = compute_persistent_memory(model, train, target.compute, teacher, layout)
    objective = build_objective(recipe, folder.family)
    tracer = StepTracer(model, objective, target.compute, teacher, persistent.sharded)
    num_workers = target.num_workers if train.num_workers is None else train.num_workers
    step_timer = StepTimeEstimator(tracer, target, persistent, num_workers)
    return PlannedModel(model, recipe.needs, tracer, persistent, step_timer)


def _build_teacher(settings: Teacher, dtype: torch.dtype) -> VisionLanguageModel:
    """Build the teacher of a distillation on the meta device."""
    source = resolve_model_source(settings.model)
    nf4_parts: Collection[ModelPart] = source.nf4_parts
    fp8_parts: Collection[ModelPart] = source.fp8_parts
    if settings.weight_format in ("nf4", "int4"):
        nf4_parts = ["language"]
        fp8_parts = []
    elif settings.weight_format != "auto":
        nf4_parts = []
        fp8_parts = ["language"]
    teacher = build_meta_model(source.folder, dtype, nf4_parts, fp8_parts)
    return teacher.requires_grad_(False).eval()


@dataclass(frozen=True, slots=True)
class PlannedSettings:
    """Settings that the search varies.

    Attributes:
        pack_tokens: Maximum number of tokens per pack.
        activation_checkpointing: Fraction of layers with activation checkpointing.
        nf4_parts: Parts of the model quantized to NF4.
        parallel: Mode of sharding; without effect on a single GPU.
    """

    pack_tokens: int
    activation_checkpointing: float
    nf4_parts: tuple[QuantizablePart, ...]
    parallel: ParallelMode = "ddp"

    @classmethod
    def from_recipe(cls, recipe: Recipe) -> PlannedSettings:
        """Return the settings of a recipe."""
        train = recipe.train
        nf4_parts = recipe.tune.quantize.nf4 or ()
        fraction = float(train.activation_checkpointing)
        return cls(train.pack_tokens, fraction, nf4_parts, train.parallel)


@dataclass(frozen=True, slots=True)
class SettingsEstimate:
    """Estimated memory and time of a run with the given settings.

    Attributes:
        settings: Settings of the estimate.
        peak: Peak memory of a GPU.
        phase: Phase of the run with the peak.
        step_time: Mean time of a step.
        cached_step_s: Mean seconds of a step with cached image features. None if the vision encoder
            is trainable.
        packs_per_step: Mean number of packs per step, of the rank with the most work.
        memory_limit: Usable memory of the device in bytes.
        host_bytes: Bytes of offloaded shards in the memory of a machine, of all its ranks.
        host_memory_bytes: Memory of the machine; None if it is unknown.
    """

    settings: PlannedSettings
    peak: PeakMemory
    phase: Phase
    step_time: StepTime
    cached_step_s: float | None
    packs_per_step: float
    memory_limit: int
    host_bytes: int = 0
    host_memory_bytes: int | None = None

    @property
    def fits(self) -> bool:
        """True if the memory of the GPU and of the machine is sufficient."""
        return self.peak.total <= self.memory_limit and not self.exceeds_host_memory

    @property
    def exceeds_host_memory(self) -> bool:
        """True if the offloaded shards need more than the memory of the machine."""
        return self.host_memory_bytes is not None and self.host_bytes > self.host_memory_bytes

    @property
    def rank(self) -> tuple[bool, float]:
        """Sorting key: settings that fit first, by time; others by memory."""
        if self.fits:
            return (False, self.step_time.total)
        return (True, self.peak.total)


@dataclass(frozen=True)
class StepShares:
    """Distribution of the samples of a step over the ranks of a run.

    Attributes:
        num_ranks: Number of ranks.
        cost_fn: Function from a sample to its cost, with which training balances the ranks.
        can_split_samples: Whether all ranks share a sample that is much longer than a pack.
    """

    num_ranks: int = 1
    cost_fn: Callable[[SampleStats], float] = attrgetter("num_packed_tokens")
    can_split_samples: bool = False

    def is_split(self, sample: SampleStats, token_budget: int) -> bool:
        """Return whether the ranks share a sample."""
        if self.num_ranks == 1 or not self.can_split_samples:
            return False
        max_tokens = max_unsplit_packs(self.num_ranks) * max(2, token_budget)
        return sample.num_packed_tokens > max_tokens

    def assign(self, samples: Sequence[SampleStats]) -> list[list[SampleStats]]:
        """Return the samples of each rank, the rank with the highest cost first.

        Ranks without samples are omitted.
        """
        if self.num_ranks == 1:
            return [list(samples)]
        costs = [self.cost_fn(sample) for sample in samples]
        shares = assign_to_ranks(costs, self.num_ranks)
        shares.sort(key=lambda share: -sum(costs[position] for position in share))
        ranks = []
        for share in shares:
            ranks.append([samples[position] for position in share])
        return ranks


class PlannedSteps:
    """Training steps of a run, which can be packed with any token budget."""

    def __init__(
        self,
        steps: Sequence[Sequence[SampleStats]],
        prefix_length: int = 0,
        shares: StepShares | None = None,
    ) -> None:
        """Create the steps.

        Args:
            steps: Samples of each step, of all ranks.
            shares: Distribution of the samples over the ranks; None for a single process.
        """
        self._steps = steps
        self._prefix_length = prefix_length
        self._shares = shares or StepShares()
        self._bounds: dict[tuple[int, bool], tuple[list[PlannedPack], bool]] = {}

    def _plan_ranks(
        self, step: Sequence[SampleStats], token_budget: int
    ) -> list[list[PlannedPack]]:
        """Return the packs of each rank in a step, highest cost first."""
        split_packs: list[PlannedPack] = []
        whole: list[SampleStats] = []
        for sample in step:
            if self._shares.is_split(sample, token_budget):
                split_packs.append(build_split_pack(sample, self._shares.num_ranks))
            else:
                whole.append(sample)
        ranks = []
        for share in self._shares.assign(whole) or [[]]:
            own_packs = plan_step_packs(share, token_budget, self._prefix_length)
            ranks.append([*split_packs, *own_packs])
        return ranks

    def has_split_samples(self, token_budget: int) -> bool:
        """Return whether the ranks share a sample."""
        samples = chain.from_iterable(self._steps)
        return any(self._shares.is_split(sample, token_budget) for sample in samples)

    @property
    def max_sample_tokens(self) -> int:
        """Number of tokens of the longest sample, including a shared prefix."""
        samples = chain.from_iterable(self._steps)
        return max(sample.num_packed_tokens for sample in samples)

    @cached_property
    def single_pack_budget(self) -> int:
        """Smallest token budget with which the samples of each rank fit in one pack."""
        budgets = []
        for step in self._steps:
            for share in self._shares.assign(step):
                lengths = [sample.num_packed_tokens for sample in share]
                prefix_length = effective_prefix_length(self._prefix_length, lengths)
                budgets.append(compute_min_budget(lengths, prefix_length))
        return max(budgets)

    def largest_packs(
        self, token_budget: int, model: VisionLanguageModel, activation_checkpointing: float
    ) -> tuple[list[PlannedPack], bool]:
        """Return the packs that may need most memory, and whether a step has several packs.

        The packs are the first one of each CUDA graph shape, and those with the most tokens,
        patches, supervised tokens and attention scores.

        Args:
            model: Model, configured for tuning. The result is cached: the model of each call may
                differ only in its quantization and sharding.
        """
        # Graph shapes depend on activation checkpointing, but not on the fraction of layers.
        key = token_budget, activation_checkpointing > 0
        if key in self._bounds:
            return self._bounds[key]
        ranks: list[list[PlannedPack]] = []
        for step in self._steps:
            ranks += self._plan_ranks(step, token_budget)
        packs = [*chain.from_iterable(ranks)]
        first_by_shape: dict[GraphShape, PlannedPack] = {}
        can_capture = can_capture_vision(model)
        for pack in packs:
            captures_vision = can_capture and should_capture_vision(
                pack.num_patches, activation_checkpointing
            )
            shape = compute_graph_shape(model.visual, pack, captures_vision)
            first_by_shape.setdefault(shape, pack)
            if len(first_by_shape) == MAX_GRAPHS:
                break
        largest = dict.fromkeys(max(packs, key=attrgetter(name)) for name in PACK_SIZES)
        has_multiple_packs = any(len(own_packs) > 1 for own_packs in ranks)
        self._bounds[key] = ([*first_by_shape.values(), *largest], has_multiple_packs)
        return self._bounds[key]

    def timed_steps(self, token_budget: int) -> list[list[PlannedPack]]:
        """Return the packs of the slowest rank in the timed steps."""
        stride = math.ceil(len(self._steps) / MAX_TIMED_STEPS)
        return [self._plan_ranks(step, token_budget)[0] for step in self._steps[::stride]]


class SettingsSearch:
    """Estimates settings for one device, and searches for the fastest ones that fit."""

    def __init__(
        self,
        build_model: Callable[[tuple[QuantizablePart, ...]], PlannedModel],
        steps: PlannedSteps,
        memory_bytes: int,
        quantization_choices: Sequence[tuple[QuantizablePart, ...]],
        prefer_large_packs: bool,
        generation_bytes: int = 0,
        host_memory_bytes: int | None = None,
    ) -> None:
        """Initialize a search without estimating any settings.

        Args:
            build_model: Returns the planned model with the given parts quantized to NF4. The mode
                of sharding is that of the settings that are searched.
            quantization_choices: Sets of parts to quantize to NF4, the set of the recipe first.
                Sets that the model does not support are skipped.
            prefer_large_packs: Whether larger packs are faster, as on a GPU.
            generation_bytes: Memory of generation in an evaluation, beside the complete weights.
            host_memory_bytes: Memory of the machine, for offloaded shards; None if it is unknown.
        """
        self._build_model = build_model
        self._steps = steps
        self._quantization_choices = quantization_choices
        self._prefer_large_packs = prefer_large_packs
        self.memory_limit = round(memory_bytes * USABLE_MEMORY_FRACTION)
        """Usable memory of a GPU in bytes."""
        self._generation_bytes = generation_bytes
        self._host_memory_bytes = host_memory_bytes

    def estimate(self, settings: PlannedSettings) -> SettingsEstimate:
        """Estimate the memory and time of a run with the given settings."""
        planned = self._build_model(settings.nf4_parts)
        packed_steps = self._steps.timed_steps(settings.pack_tokens)
        phase, peak = self._find_phase(settings)
        use_graphs = peak.cuda_graphs > 0
        cached_step_s = None
        if planned.allows_vision_cache:
            cached_steps = self._time_steps(
                settings, use_graphs=use_graphs, has_cached_features=True
            )
            cached_step_s = fmean(step.total for step in cached_steps)
        return SettingsEstimate(
            settings,
            peak,
            phase,
            self.estimate_step_time(settings, use_graphs=use_graphs),
            cached_step_s,
            packs_per_step=fmean(len(step) for step in packed_steps),
            memory_limit=self.memory_limit,
            host_bytes=_count_host_bytes(planned),
            host_memory_bytes=self._host_memory_bytes,
        )

    def estimate_step_time(self, settings: PlannedSettings, *, use_graphs: bool = True) -> StepTime:
        """Estimate the mean time of a step, whether its memory fits or not."""
        return average_step_times(self._time_steps(settings, use_graphs=use_graphs))

    def _time_steps(
        self, settings: PlannedSettings, *, use_graphs: bool, has_cached_features: bool = False
    ) -> list[StepTime]:
        time_step = partial(
            self._build_model(settings.nf4_parts).step_timer.estimate_step,
            activation_checkpointing=settings.activation_checkpointing,
            has_cached_features=has_cached_features,
            use_graphs=use_graphs,
        )
        return [time_step(step) for step in self._steps.timed_steps(settings.pack_tokens)]

    def estimate_peak(self, settings: PlannedSettings) -> PeakMemory:
        """Estimate the peak memory with CUDA graphs if they fit, otherwise without."""
        return self._find_phase(settings)[1]

    def _find_phase(self, settings: PlannedSettings) -> tuple[Phase, PeakMemory]:
        """Return the phase with the highest memory, and its memory, with graphs if they fit."""
        phase, peak = self._compute_phase(settings, use_graphs=True)
        if peak.total <= self.memory_limit:
            return phase, peak
        return self._compute_phase(settings, use_graphs=False)

    def _compute_phase(
        self, settings: PlannedSettings, *, use_graphs: bool
    ) -> tuple[Phase, PeakMemory]:
        """Return the phase with the highest memory, and its memory."""
        planned = self._build_model(settings.nf4_parts)
        step = self._compute_step(planned, settings, use_graphs=use_graphs)
        phases: list[tuple[Phase, PeakMemory]] = [("step", step)]
        phases += self._compute_other_phases(planned)
        return max(phases, key=lambda item: item[1].total)

    def _compute_step(
        self, planned: PlannedModel, settings: PlannedSettings, *, use_graphs: bool
    ) -> PeakMemory:
        packs, has_multiple_packs = self._steps.largest_packs(
            settings.pack_tokens, planned.model, settings.activation_checkpointing
        )
        return compute_peak_memory(
            planned.persistent,
            planned.tracer,
            packs,
            settings.activation_checkpointing,
            has_multiple_packs=has_multiple_packs,
            use_graphs=use_graphs and planned.persistent.sharded is None,
        )

    def _compute_other_phases(self, planned: PlannedModel) -> list[tuple[Phase, PeakMemory]]:
        """Return the memory of a sharded run outside of its steps."""
        persistent = planned.persistent
        tracer = planned.tracer
        phases: list[tuple[Phase, PeakMemory]] = []
        evaluation = compute_evaluation_memory(persistent, tracer, self._generation_bytes)
        if evaluation is not None:
            phases.append(("evaluation", evaluation))
        loading = compute_loading_memory(persistent, tracer)
        if loading is not None:
            phases.append(("loading", loading))
        return phases

    def _fits_memory(self, settings: PlannedSettings) -> bool:
        planned = self._build_model(settings.nf4_parts)
        limit = self._host_memory_bytes
        if limit is not None and _count_host_bytes(planned) > limit:
            return False
        # A model that is too large is known without a trace.
        if planned.persistent.fixed_bytes > self.memory_limit:
            return False
        if any(peak.total > self.memory_limit for _, peak in self._compute_other_phases(planned)):
            return False
        return self._compute_step(planned, settings, use_graphs=False).total <= self.memory_limit

    def can_load(self, settings: PlannedSettings) -> bool:
        """Return whether a GPU holds the complete weights, as while a model is loaded."""
        persistent = self._build_model(settings.nf4_parts).persistent
        if persistent.sharded is None:
            return persistent.weight_bytes <= self.memory_limit
        return persistent.sharded.total.weight_bytes <= self.memory_limit

    def can_fit(self, settings: PlannedSettings) -> bool:
        """Return whether any size of packs fits, with activation checkpointing of all layers."""
        return any(map(self._fits_memory, self._list_least_memory(settings)))

    def minimize(self, settings: PlannedSettings) -> PlannedSettings:
        """Return settings with the smallest packs, and activation checkpointing of all layers."""
        min_budget = self._steps.max_sample_tokens
        return replace(settings, pack_tokens=min_budget, activation_checkpointing=1.0)

    def has_split_samples(self, settings: PlannedSettings) -> bool:
        """Return whether the ranks share a sample."""
        return self._steps.has_split_samples(settings.pack_tokens)

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
        if is_as_good and self._fits_memory(recipe_settings):
            return recipe_settings
        return best

    def _search(self, recipe_settings: PlannedSettings) -> PlannedSettings:
        min_budget = self._steps.max_sample_tokens
        wanted = recipe_settings.pack_tokens
        if self._prefer_large_packs:
            wanted = MIN_EFFICIENT_PACK_TOKENS
        target_budget = max(min_budget, min(wanted, self._steps.single_pack_budget))
        wanted_settings = None
        problem: UserError | None = None
        for nf4_parts in self._quantization_choices:
            try:
                self._build_model(nf4_parts)
            except UserError as error:
                # Mixture of experts, a pre-quantized model, or bitsandbytes is missing.
                problem = error
                continue
            wanted_settings = replace(
                recipe_settings, pack_tokens=target_budget, nf4_parts=nf4_parts
            )
            fraction = self._find_min_checkpointing(wanted_settings)
            if fraction is not None:
                return self._find_max_budget(
                    replace(wanted_settings, activation_checkpointing=fraction)
                )
            for least in self._list_least_memory(wanted_settings):
                if self._fits_memory(least):
                    return self._find_max_budget(least)
        if wanted_settings is None:
            assert problem is not None  # there is at least one choice
            raise problem
        return min(
            self._list_least_memory(wanted_settings),
            key=lambda least: self.estimate_peak(least).total,
        )

    def _list_least_memory(self, settings: PlannedSettings) -> list[PlannedSettings]:
        """List the settings of which one needs the least memory.

        The smallest packs have the fewest activations. With a single pack per step, the gradients
        need no fp32 sums.
        """
        smallest = self.minimize(settings)
        single = replace(smallest, pack_tokens=_round_up(self._steps.single_pack_budget))
        return [smallest, single]

    def _find_min_checkpointing(self, settings: PlannedSettings) -> float | None:
        """Find the smallest fraction of checkpointed layers that fits; None if none does."""
        num_layers = len(self._build_model(settings.nf4_parts).model.model.layers)
        # Rounded up to the two decimals of a recipe.
        fractions = [math.ceil(100 * count / num_layers) / 100 for count in range(num_layers + 1)]

        def fits(fraction: float) -> bool:
            return self._fits_memory(replace(settings, activation_checkpointing=fraction))

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
        if num_fitting == 0:
            return settings
        return replace(settings, pack_tokens=budgets[num_fitting - 1])


def _count_host_bytes(planned: PlannedModel) -> int:
    """Return the bytes of the offloaded shards of all ranks of a machine."""
    persistent = planned.persistent
    return persistent.host_bytes * min(persistent.layout.num_ranks, GPUS_PER_MACHINE)


def _round_up(token_budget: int) -> int:
    return -(-token_budget // PACK_TOKENS_STEP) * PACK_TOKENS_STEP
