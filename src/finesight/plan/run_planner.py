"""Search for GPUs, modes of sharding and settings that a run fits.

`RunPlanner` combines the search of settings on one kind of GPU (`plan.settings_search`) with the
modes of `train.parallel`, and finds the number of GPUs that a run needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import get_args

from finesight.errors import UserError
from finesight.optimizer_components import DEFAULT_OPTIMIZER
from finesight.plan.evaluation_estimate import estimate_generation_bytes
from finesight.plan.settings_search import (
    PlannedModel,
    PlannedSettings,
    PlannedSteps,
    SettingsEstimate,
    SettingsSearch,
    StepShares,
    build_planned_model,
)
from finesight.plan.step_time import TargetDevice, extend_to_gpus
from finesight.settings.config import ParallelMode, QuantizablePart, Recipe
from finesight.train.dataset_stats import DatasetStats, SampleStats
from finesight.train.flops import FlopCounter
from finesight.train.setup import check_sharding, estimate_sample_cost
from finesight.train.state import BaseModelRef


@dataclass(frozen=True, slots=True)
class GpuAdvice:
    """Smallest number of GPUs that a run fits.

    Attributes:
        overrides: Command-line overrides for a run on these GPUs.
    """

    num_gpus: int
    estimate: SettingsEstimate
    overrides: tuple[str, ...]

    def describe(self) -> str:
        """Describe GPUs, overrides and memory in a phrase."""
        changes = ""
        if self.overrides:
            changes = f" with {' '.join(self.overrides)}"
        memory = f"{self.estimate.peak.total / 1e9:.1f} GB each"
        if self.estimate.host_bytes:
            memory += f", and {self.estimate.host_bytes / 1e9:.0f} GB of host memory"
        return f"use {self.num_gpus} such GPUs{changes} ({memory})"


class RunPlanner:
    """Plans a run on different numbers of GPUs, with shared statistics of its samples."""

    def __init__(self, recipe: Recipe, base_model: BaseModelRef, data: PlannedData) -> None:
        self.recipe, self._base_model, self._data = recipe, base_model, data
        self._models: dict[object, PlannedModel] = {}
        self._steps: dict[int, PlannedSteps] = {}

    def build_model(
        self,
        target: TargetDevice,
        mode: ParallelMode,
        nf4_parts: tuple[QuantizablePart, ...],
    ) -> PlannedModel:
        """Build a planned model, or return an equal one."""
        if target.num_gpus == 1:
            mode = "ddp"
        key = target, mode, nf4_parts
        if key not in self._models:
            folder = self._base_model.folder
            self._models[key] = build_planned_model(folder, self.recipe, nf4_parts, target, mode)
        return self._models[key]

    def plan_steps(self, target: TargetDevice) -> PlannedSteps:
        """Return the steps of the run, with the samples of each rank."""
        num_ranks = target.num_gpus
        if num_ranks not in self._steps:
            shares = None
            if num_ranks > 1:
                nf4_parts = self.recipe.tune.quantize.nf4 or ()
                planned = self.build_model(target, self.recipe.train.parallel, nf4_parts)
                shares = self._data.build_shares(num_ranks, planned, self.recipe)
            self._steps[num_ranks] = PlannedSteps(
                self._data.steps, self._data.stats.prefix_length, shares
            )
        return self._steps[num_ranks]

    def create_search(
        self,
        target: TargetDevice,
        mode: ParallelMode,
        choices: Sequence[tuple[QuantizablePart, ...]],
    ) -> SettingsSearch:
        """Create a search for settings of one target and mode of sharding."""
        planned = self.build_model(target, mode, choices[0])
        eval_settings, validation_stats = self.recipe.eval, self._data.validation_stats
        generation_bytes = 0
        if eval_settings is not None and validation_stats:
            generation_bytes = estimate_generation_bytes(
                eval_settings, planned, target, validation_stats[: eval_settings.limit]
            )
        return SettingsSearch(
            partial(self.build_model, target, mode),
            self.plan_steps(target),
            target.memory_bytes,
            choices,
            prefer_large_packs=target.compute.is_cuda,
            generation_bytes=generation_bytes,
            host_memory_bytes=target.host_memory_bytes,
        )

    def find_best(self, targets: Sequence[TargetDevice]) -> tuple[TargetDevice, SettingsEstimate]:
        """Find the fastest settings that fit one of the targets; the first of equal ones.

        Sharding changes no result, so all modes are tried before further parts are quantized.
        Another mode than that of the recipe must save more than `MIN_MODE_GAIN` of the time.
        """
        choices = list_quantization_choices(self.recipe)
        best = self._find_among(targets, choices[:1])
        if best[1].fits or not choices[1:]:
            return best
        return self._find_among(targets, choices, best)

    def _find_among(
        self,
        targets: Sequence[TargetDevice],
        choices: Sequence[tuple[QuantizablePart, ...]],
        best: tuple[TargetDevice, SettingsEstimate] | None = None,
    ) -> tuple[TargetDevice, SettingsEstimate]:
        """Find the fastest settings with these choices of quantized parts, or return `best`."""
        settings = PlannedSettings.from_recipe(self.recipe)
        for target in targets:
            for mode in _list_modes(self.recipe, target):
                if best is not None and not _may_be_better(mode, best[1]):
                    continue
                search = self.create_search(target, mode, choices)
                found = search.find_best(replace(settings, parallel=mode))
                estimate = search.estimate(found)
                if best is None or is_better(estimate, best[1]):
                    best = target, estimate
        assert best is not None, "no target"
        return best

    def advise_gpus(self, target: TargetDevice) -> GpuAdvice | None:
        """Find the smallest larger number of GPUs on which the run fits.

        The mode of sharding and the optimizer may change, but not the trained parts.
        """
        if not target.compute.is_cuda:
            return None
        planner = self
        if not self.recipe.train.optimizer_component.supports_sharding:
            train = self.recipe.train.model_copy(update={"optimizer": DEFAULT_OPTIMIZER})
            recipe = self.recipe.model_copy(update={"train": train})
            planner = RunPlanner(recipe, self._base_model, self._data)
        return planner._find_gpus(target, self.recipe)

    def _find_gpus(self, target: TargetDevice, original: Recipe) -> GpuAdvice | None:
        settings = PlannedSettings.from_recipe(self.recipe)
        choices = list_quantization_choices(self.recipe)[:1]
        numbers = [number for number in ADVISED_GPUS if number > target.num_gpus]
        for mode, num_gpus in product(ADVISED_MODES, numbers):
            larger = extend_to_gpus(target, num_gpus)
            search = self.create_search(larger, mode, choices)
            if not search.can_load(settings):
                return None  # on any number of GPUs
            if not search.can_fit(replace(settings, parallel=mode)):
                continue
            best_target, estimate = self.find_best([larger])
            overrides = [*list_overrides(original, estimate.settings, best_target, best_target)]
            if original.train.optimizer != self.recipe.train.optimizer:
                overrides.append(f"train.optimizer={self.recipe.train.optimizer}")
            return GpuAdvice(num_gpus, estimate, tuple(overrides))
        return None


ADVISED_GPUS = (2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are tried for a run that does not fit."""

ADVISED_MODES: tuple[ParallelMode, ...] = ("fsdp", "fsdp_offload")
"""Modes with the least memory, which decide how many GPUs a run needs.

More GPUs are preferred to shards in host memory, which make each step several times as long.
"""

MIN_MODE_GAIN = 0.1
"""Fraction of the step time that another mode of sharding must save, since times are estimates."""


def is_better(estimate: SettingsEstimate, best: SettingsEstimate) -> bool:
    """Return whether an estimate is better than the best of earlier targets and modes."""
    is_other_mode = estimate.settings.parallel != best.settings.parallel
    if not (is_other_mode and estimate.fits and best.fits):
        return estimate.rank < best.rank
    return estimate.step_time.total < best.step_time.total * (1 - MIN_MODE_GAIN)


def _may_be_better(mode: ParallelMode, best: SettingsEstimate) -> bool:
    """Return whether a mode is worth an estimate.

    Sharding adds communication, and only saves time if it makes activation checkpointing
    unnecessary. Shards in host memory are slower than all others.
    """
    if not best.fits or mode == "ddp":
        return True
    is_fastest = best.settings.parallel == "ddp" and not best.settings.activation_checkpointing
    return mode != "fsdp_offload" and not is_fastest


def _list_modes(recipe: Recipe, target: TargetDevice) -> list[ParallelMode]:
    """List the modes that training accepts, that of the recipe first."""
    own_mode = recipe.train.parallel
    if target.num_gpus == 1:
        return [own_mode]
    modes: list[ParallelMode] = []
    for mode in dict.fromkeys((own_mode, *get_args(ParallelMode))):
        train = recipe.train.model_copy(update={"parallel": mode})
        with suppress(UserError):
            check_sharding(train, "cuda", is_native=True)
            modes.append(mode)
    return modes


@dataclass(frozen=True)
class PlannedData:
    """Samples of a run, for plans of any number of GPUs.

    Attributes:
        steps: Samples of the planned steps.
        stats: Statistics of the training data.
        validation_stats: Statistics of the validation samples.
    """

    steps: Sequence[Sequence[SampleStats]]
    stats: DatasetStats
    validation_stats: Sequence[SampleStats] = ()

    def build_shares(self, num_ranks: int, planned: PlannedModel, recipe: Recipe) -> StepShares:
        """Return the distribution of samples over the ranks, as `train.setup` builds it."""
        if not self.stats.is_complete:
            return StepShares(num_ranks, lambda sample: 1.0)
        counter = FlopCounter(planned.model)
        prefix_length = self.stats.prefix_length
        return StepShares(
            num_ranks,
            lambda sample: estimate_sample_cost(sample, prefix_length, counter),
            can_split_samples=recipe.needs.supports_splitting and planned.model.supports_splitting,
        )


def list_quantization_choices(recipe: Recipe) -> list[tuple[QuantizablePart, ...]]:
    """List the sets of model parts that may be quantized to NF4.

    The first set is that of the recipe. Others add the decoder, then all other frozen parts.
    """
    recipe_nf4, tuning_modes = recipe.tune.quantize.nf4 or (), dict(recipe.tune)
    sets = [
        tuple(p for p in get_args(QuantizablePart) if p in recipe_nf4 or p in parts)
        for parts in (("language",), ("vision", "merger", "language"))
    ]
    frozen = [one for one in sets if not any(tuning_modes.get(part) == "full" for part in one)]
    return [*dict.fromkeys([recipe_nf4, *frozen])]


def list_overrides(
    recipe: Recipe,
    chosen_settings: PlannedSettings,
    target: TargetDevice,
    recipe_target: TargetDevice,
    num_workers: int | None = None,
) -> tuple[str, ...]:
    """List the command-line overrides that change the recipe to the chosen settings.

    Args:
        num_workers: Chosen number of data loader workers; None for that of the recipe.
    """
    recipe_settings = PlannedSettings.from_recipe(recipe)
    overrides = []
    if chosen_settings.parallel != recipe_settings.parallel:
        overrides.append(f"train.parallel={chosen_settings.parallel}")
    if chosen_settings.pack_tokens != recipe_settings.pack_tokens:
        overrides.append(f"train.pack_tokens={chosen_settings.pack_tokens}")
    if chosen_settings.activation_checkpointing != recipe_settings.activation_checkpointing:
        value = chosen_settings.activation_checkpointing
        fraction = {0.0: "false", 1.0: "true"}.get(value, f"{value:g}")
        overrides.append(f"train.activation_checkpointing={fraction}")
    if chosen_settings.nf4_parts != recipe_settings.nf4_parts:
        overrides.append(f"tune.quantize.nf4=[{','.join(chosen_settings.nf4_parts)}]")
    if target.dtype != recipe_target.dtype:
        overrides.append(f"train.precision={target.precision}")
    if num_workers not in (None, resolve_num_workers(recipe, target)):
        overrides.append(f"train.num_workers={num_workers}")
    return tuple(overrides)


def resolve_num_workers(recipe: Recipe, target: TargetDevice) -> int:
    return target.num_workers if recipe.train.num_workers is None else recipe.train.num_workers
