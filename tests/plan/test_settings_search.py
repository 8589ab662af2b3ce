"""Settings search: chosen settings fit into memory and cost as little time as possible."""

from functools import lru_cache

from plan_fixtures import plan_tiny_model

from finesight.plan.peak_memory import USABLE_MEMORY_FRACTION
from finesight.plan.settings_search import (
    MIN_EFFICIENT_PACK_TOKENS,
    PlannedModel,
    PlannedSettings,
    PlannedSteps,
    SettingsSearch,
)
from finesight.plan.step_time import build_named_target
from finesight.settings.config import QuantizablePart
from finesight.train.dataset_stats import SampleStats


def choose(pack_tokens: int, activation_checkpointing: float = 0.0) -> PlannedSettings:
    return PlannedSettings(pack_tokens, activation_checkpointing, ())


RECIPE_SETTINGS = choose(4096)


def make_steps(num_samples: int, num_tokens: int) -> PlannedSteps:
    """Return one step; its last sample has twice the tokens."""
    lengths = [num_tokens] * (num_samples - 1) + [2 * num_tokens]
    samples = [
        SampleStats(str(n), length + 2, length, 50, ((1, 8, 8),), (), frozenset())
        for n, length in enumerate(lengths)
    ]
    return PlannedSteps([samples])


STEPS = make_steps(20, 1000)


def make_search(memory_gb=141, steps=STEPS, can_resize=True):
    return SettingsSearch(plan_model, steps, round(memory_gb * 1e9), [()], can_resize)


@lru_cache
def plan_model(nf4_parts: tuple[QuantizablePart, ...]) -> PlannedModel:
    return plan_tiny_model(build_named_target("H200", "bf16"), None, nf4_parts)


def test_ample_memory_uses_one_pack_without_checkpointing() -> None:
    for start in (RECIPE_SETTINGS, choose(4096, 1.0)):
        chosen = make_search().find_best(start)
        assert (chosen.activation_checkpointing, chosen.nf4_parts) == (0.0, ())
        assert 21_000 <= chosen.pack_tokens < 21_000 + 256
    assert make_search(can_resize=False).find_best(RECIPE_SETTINGS).pack_tokens == 4096


def test_settings_stay_unchanged_without_gain_and_minimal_ones_are_reported():
    small = make_search(steps=make_steps(3, 100))
    assert small.find_best(RECIPE_SETTINGS) is RECIPE_SETTINGS
    single_pack = choose(21_000)
    assert make_search().find_best(single_pack) is single_pack
    search = make_search(0.5)
    best = search.find_best(RECIPE_SETTINGS)
    assert best == choose(2000, 1.0)
    assert not search.estimate(best).fits


def test_cuda_graphs_never_cause_activation_checkpointing() -> None:
    """Without memory for graphs, packs run eagerly, with more host time."""
    steps = make_steps(3, 1000)
    ample = make_search(steps=steps).estimate(RECIPE_SETTINGS)
    assert ample.peak.cuda_graphs > 0
    memory_gb = (ample.peak.total - ample.peak.cuda_graphs / 2) / USABLE_MEMORY_FRACTION / 1e9
    search = make_search(memory_gb, steps)
    best = search.find_best(RECIPE_SETTINGS)
    assert best.activation_checkpointing == 0.0
    estimate = search.estimate(best)
    assert estimate.fits
    assert estimate.peak.cuda_graphs == 0
    assert estimate.step_time.host_s > ample.step_time.host_s


def test_chosen_settings_are_the_largest_that_fit() -> None:
    fractions = []
    for memory_gb in (4.0, 2.0, 1.5, 1.2, 1.1, 1.05, 1.0, 0.95, 0.9):
        search = make_search(memory_gb)
        best = search.find_best(RECIPE_SETTINGS)
        estimate, fraction = search.estimate(best), best.activation_checkpointing
        if not estimate.fits:
            break
        assert estimate.peak.total <= USABLE_MEMORY_FRACTION * memory_gb * 1e9
        assert best.pack_tokens >= 2000
        if 0 < fraction < 1:
            # One of five layers less.
            pack_tokens = min(MIN_EFFICIENT_PACK_TOKENS, best.pack_tokens)
            assert not search.estimate(choose(pack_tokens, round(fraction - 0.2, 2))).fits
        if best.pack_tokens < 21_000:
            assert not search.estimate(choose(best.pack_tokens + 1024, fraction)).fits
        fractions.append(fraction)
    assert fractions == sorted(fractions)
    assert 0.0 in fractions
    assert any(0 < fraction < 1 for fraction in fractions)


def test_longest_sample_sets_the_minimum_pack_size() -> None:
    steps = make_steps(2, 6000)
    assert (steps.max_sample_tokens, steps.single_pack_budget) == (12_000, 18_000)
    assert make_search(steps=steps).find_best(RECIPE_SETTINGS).pack_tokens >= 12_000
