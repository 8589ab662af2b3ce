"""Which settings are chosen as memory shrinks: what is chosen fits, and gives up as little as can
be."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from finesight.config import QuantizablePart, Recipe, TrainFileSettings, TuneSettings
from finesight.model.tiny import create_tiny_model
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

WRITTEN = PlannedSettings(pack_tokens=4096, activation_checkpointing=0.0, nf4_parts=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "deep", preset="finesight-tiny")


def chooser(
    folder: Path, memory_gb: float, steps: PlannedSteps, can_resize: bool = True
) -> SettingsSearch:
    on = build_named_target("H200", "bf16")
    recipe = Recipe(
        model=str(folder),
        data={"train": (TrainFileSettings(path=Path("none")),)},  # type: ignore[arg-type]
        tune=TuneSettings(language="lora"),
        output_dir=Path("none"),
    )

    @lru_cache
    def with_nf4(nf4: tuple[QuantizablePart, ...]) -> PlannedModel:
        return build_planned_model(ModelFolder(folder), recipe, nf4, on)

    return SettingsSearch(with_nf4, steps, round(memory_gb * 1e9), [()], can_resize)


def steps_of(samples: int, tokens: int) -> PlannedSteps:
    """One step of so many samples, the last one twice as long."""
    lengths = [tokens] * (samples - 1) + [2 * tokens]
    one = [
        SampleStats(str(n), length + 2, length, 50, ((1, 8, 8),), (), frozenset())
        for n, length in enumerate(lengths)
    ]
    return PlannedSteps([one])


def test_ample_memory_uses_one_pack_without_checkpointing(folder: Path) -> None:
    found = chooser(folder, 141, steps_of(20, 1000)).find_best(WRITTEN)
    assert (found.activation_checkpointing, found.nf4_parts) == (0.0, ())
    assert found.pack_tokens >= 21_000
    assert found.pack_tokens - 21_000 < 256


def test_settings_stay_unchanged_without_gain(folder: Path) -> None:
    assert chooser(folder, 141, steps_of(3, 100)).find_best(WRITTEN) is WRITTEN
    full = PlannedSettings(pack_tokens=21_000, activation_checkpointing=0.0, nf4_parts=())
    assert chooser(folder, 141, steps_of(20, 1000)).find_best(full) is full


def test_activation_checkpointing_is_disabled_if_memory_allows(folder: Path) -> None:
    needless = PlannedSettings(pack_tokens=4096, activation_checkpointing=1.0, nf4_parts=())
    assert (
        chooser(folder, 141, steps_of(3, 100)).find_best(needless).activation_checkpointing == 0.0
    )


def test_cuda_graphs_never_cause_activation_checkpointing(folder: Path) -> None:
    """Check that a run without enough memory for CUDA graphs runs eagerly, with more host time."""
    steps = steps_of(3, 1000)
    roomy = chooser(folder, 141, steps).estimate(WRITTEN)
    assert roomy.peak.cuda_graphs > 0
    scarce = (roomy.peak.total - roomy.peak.cuda_graphs / 2) / USABLE_MEMORY_FRACTION / 1e9
    choosing = chooser(folder, scarce, steps)
    best = choosing.find_best(WRITTEN)
    assert best.activation_checkpointing == 0.0
    found = choosing.estimate(best)
    assert found.fits
    assert found.peak.cuda_graphs == 0
    assert found.step_time.host_s > roomy.step_time.host_s


def test_chosen_settings_are_the_largest_that_fit(folder: Path) -> None:
    steps = steps_of(20, 1000)
    shares = []
    for memory_gb in (4.0, 2.0, 1.5, 1.2, 1.1, 1.05, 1.0, 0.95, 0.9):
        choosing = chooser(folder, memory_gb, steps)
        best = choosing.find_best(WRITTEN)
        estimate = choosing.estimate(best)
        if not estimate.fits:
            break
        assert estimate.peak.total <= USABLE_MEMORY_FRACTION * memory_gb * 1e9
        assert best.pack_tokens >= 2000
        if 0 < best.activation_checkpointing < 1:
            # A layer of five less.
            less = PlannedSettings(
                min(MIN_EFFICIENT_PACK_TOKENS, best.pack_tokens),
                round(best.activation_checkpointing - 0.2, 2),
                (),
            )
            assert not choosing.estimate(less).fits
        if best.pack_tokens < 21_000:
            more = PlannedSettings(best.pack_tokens + 1024, best.activation_checkpointing, ())
            assert not choosing.estimate(more).fits
        shares.append(best.activation_checkpointing)
    assert shares == sorted(shares)
    assert 0.0 in shares
    assert any(0 < share < 1 for share in shares)


def test_minimal_settings_are_reported_if_none_fit(folder: Path) -> None:
    choosing = chooser(folder, 0.5, steps_of(20, 1000))
    best = choosing.find_best(WRITTEN)
    assert best == PlannedSettings(pack_tokens=2000, activation_checkpointing=1.0, nf4_parts=())
    assert not choosing.estimate(best).fits


def test_cpu_plan_uses_pack_size_of_recipe(folder: Path) -> None:
    choosing = chooser(folder, 141, steps_of(20, 1000), can_resize=False)
    assert choosing.find_best(WRITTEN).pack_tokens == 4096


def test_longest_sample_sets_the_minimum_pack_size(folder: Path) -> None:
    steps = steps_of(2, 6000)
    assert (steps.max_sample_tokens, steps.single_pack_budget) == (12_000, 18_000)
    found = chooser(folder, 141, steps).find_best(WRITTEN)
    assert found.pack_tokens >= 12_000


def test_more_packs_use_less_memory_and_more_time(folder: Path) -> None:
    choosing = chooser(folder, 141, steps_of(20, 1000))
    few, many = (choosing.estimate(PlannedSettings(size, 0.0, ())) for size in (21_000, 2000))
    assert (few.packs_per_step, many.packs_per_step) == (1, 11)
    assert many.peak.activations < few.peak.activations
    assert many.step_time.total > few.step_time.total
    assert many.peak.weights == few.peak.weights
    assert many.cached_step_s is not None
    assert many.cached_step_s < many.step_time.total
