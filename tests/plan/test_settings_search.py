"""Settings search: chosen settings fit into memory and cost as little time as possible."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
from tiny_model import create_tiny_model

from finesight.config import QuantizablePart, Recipe, TrainFileSettings, TuneSettings
from finesight.model_folder import ModelFolder
from finesight.plan.peak_memory import USABLE_MEMORY_FRACTION
from finesight.plan.planned_model import PlannedModel, build_planned_model
from finesight.plan.settings_search import (
    MIN_EFFICIENT_PACK_TOKENS,
    PlannedSettings,
    PlannedSteps,
    SettingsSearch,
)
from finesight.plan.target_device import build_named_target
from finesight.train.dataset_stats import SampleStats

RECIPE_SETTINGS = PlannedSettings(pack_tokens=4096, activation_checkpointing=0.0, nf4_parts=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "deep", preset="finesight-tiny")


def make_search(
    folder: Path, memory_gb: float, steps: PlannedSteps, can_resize: bool = True
) -> SettingsSearch:
    target = build_named_target("H200", "bf16")
    recipe = Recipe(
        model=str(folder),
        data={"train": (TrainFileSettings(path=Path("none")),)},  # type: ignore[arg-type]
        tune=TuneSettings(language="lora"),
        output_dir=Path("none"),
    )

    @lru_cache
    def plan_model(nf4_parts: tuple[QuantizablePart, ...]) -> PlannedModel:
        return build_planned_model(ModelFolder(folder), recipe, nf4_parts, target)

    return SettingsSearch(plan_model, steps, round(memory_gb * 1e9), [()], can_resize)


def make_steps(num_samples: int, num_tokens: int) -> PlannedSteps:
    """Return one step; its last sample has twice the tokens."""
    lengths = [num_tokens] * (num_samples - 1) + [2 * num_tokens]
    samples = [
        SampleStats(str(n), length + 2, length, 50, ((1, 8, 8),), (), frozenset())
        for n, length in enumerate(lengths)
    ]
    return PlannedSteps([samples])


def test_ample_memory_uses_one_pack_without_checkpointing(folder: Path) -> None:
    chosen = make_search(folder, 141, make_steps(20, 1000)).find_best(RECIPE_SETTINGS)
    assert (chosen.activation_checkpointing, chosen.nf4_parts) == (0.0, ())
    assert chosen.pack_tokens >= 21_000
    assert chosen.pack_tokens - 21_000 < 256


def test_settings_stay_unchanged_without_gain(folder: Path) -> None:
    assert (
        make_search(folder, 141, make_steps(3, 100)).find_best(RECIPE_SETTINGS) is RECIPE_SETTINGS
    )
    single_pack = PlannedSettings(pack_tokens=21_000, activation_checkpointing=0.0, nf4_parts=())
    assert make_search(folder, 141, make_steps(20, 1000)).find_best(single_pack) is single_pack


def test_activation_checkpointing_is_disabled_if_memory_allows(folder: Path) -> None:
    checkpointed = PlannedSettings(pack_tokens=4096, activation_checkpointing=1.0, nf4_parts=())
    assert (
        make_search(folder, 141, make_steps(3, 100))
        .find_best(checkpointed)
        .activation_checkpointing
        == 0.0
    )


def test_cuda_graphs_never_cause_activation_checkpointing(folder: Path) -> None:
    """Without memory for graphs, packs run eagerly, with more host time."""
    steps = make_steps(3, 1000)
    ample = make_search(folder, 141, steps).estimate(RECIPE_SETTINGS)
    assert ample.peak.cuda_graphs > 0
    memory_gb = (ample.peak.total - ample.peak.cuda_graphs / 2) / USABLE_MEMORY_FRACTION / 1e9
    search = make_search(folder, memory_gb, steps)
    best = search.find_best(RECIPE_SETTINGS)
    assert best.activation_checkpointing == 0.0
    estimate = search.estimate(best)
    assert estimate.fits
    assert estimate.peak.cuda_graphs == 0
    assert estimate.step_time.host_s > ample.step_time.host_s


def test_chosen_settings_are_the_largest_that_fit(folder: Path) -> None:
    steps = make_steps(20, 1000)
    fractions = []
    for memory_gb in (4.0, 2.0, 1.5, 1.2, 1.1, 1.05, 1.0, 0.95, 0.9):
        search = make_search(folder, memory_gb, steps)
        best = search.find_best(RECIPE_SETTINGS)
        estimate = search.estimate(best)
        if not estimate.fits:
            break
        assert estimate.peak.total <= USABLE_MEMORY_FRACTION * memory_gb * 1e9
        assert best.pack_tokens >= 2000
        if 0 < best.activation_checkpointing < 1:
            # One of five layers less.
            less_checkpointing = PlannedSettings(
                min(MIN_EFFICIENT_PACK_TOKENS, best.pack_tokens),
                round(best.activation_checkpointing - 0.2, 2),
                (),
            )
            assert not search.estimate(less_checkpointing).fits
        if best.pack_tokens < 21_000:
            larger_packs = PlannedSettings(
                best.pack_tokens + 1024, best.activation_checkpointing, ()
            )
            assert not search.estimate(larger_packs).fits
        fractions.append(best.activation_checkpointing)
    assert fractions == sorted(fractions)
    assert 0.0 in fractions
    assert any(0 < fraction < 1 for fraction in fractions)


def test_minimal_settings_are_reported_if_none_fit(folder: Path) -> None:
    search = make_search(folder, 0.5, make_steps(20, 1000))
    best = search.find_best(RECIPE_SETTINGS)
    assert best == PlannedSettings(pack_tokens=2000, activation_checkpointing=1.0, nf4_parts=())
    assert not search.estimate(best).fits


def test_cpu_plan_uses_pack_size_of_recipe(folder: Path) -> None:
    search = make_search(folder, 141, make_steps(20, 1000), can_resize=False)
    assert search.find_best(RECIPE_SETTINGS).pack_tokens == 4096


def test_longest_sample_sets_the_minimum_pack_size(folder: Path) -> None:
    steps = make_steps(2, 6000)
    assert (steps.max_sample_tokens, steps.single_pack_budget) == (12_000, 18_000)
    chosen = make_search(folder, 141, steps).find_best(RECIPE_SETTINGS)
    assert chosen.pack_tokens >= 12_000


def test_more_packs_use_less_memory_and_more_time(folder: Path) -> None:
    search = make_search(folder, 141, make_steps(20, 1000))
    one_pack, many_packs = (
        search.estimate(PlannedSettings(pack_tokens, 0.0, ())) for pack_tokens in (21_000, 2000)
    )
    assert (one_pack.packs_per_step, many_packs.packs_per_step) == (1, 11)
    assert many_packs.peak.activations < one_pack.peak.activations
    assert many_packs.step_time.total > one_pack.step_time.total
    assert many_packs.peak.weights == one_pack.peak.weights
    assert many_packs.cached_step_s is not None
    assert many_packs.cached_step_s < many_packs.step_time.total
