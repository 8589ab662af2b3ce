"""Which settings are chosen as memory shrinks: what is chosen fits, and gives up as little as can
be."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from finesight.config import DataFile, Quantisable, Recipe, Tune
from finesight.hub import ModelFolder
from finesight.model.tiny import make_tiny
from finesight.plan.choice import SENSIBLE, Chooser, Setting, Steps
from finesight.plan.memory import FULL
from finesight.plan.model import Sized, sized
from finesight.plan.target import named_target
from finesight.train.survey import Glance

WRITTEN = Setting(pack_tokens=4096, recompute=0.0, nf4=())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "deep", size="finesight-tiny")


def chooser(folder: Path, memory_gb: float, steps: Steps, grows: bool = True) -> Chooser:
    on = named_target("H200", "bf16")
    recipe = Recipe(
        model=str(folder),
        data={"train": (DataFile(path=Path("none")),)},  # type: ignore[arg-type]
        tune=Tune(language="lora"),
        output=Path("none"),
    )

    @lru_cache
    def with_nf4(nf4: tuple[Quantisable, ...]) -> Sized:
        return sized(ModelFolder(folder), recipe, nf4, on)

    return Chooser(with_nf4, steps, round(memory_gb * 1e9), [()], grows)


def steps_of(samples: int, tokens: int) -> Steps:
    """One step of so many samples, the last one twice as long."""
    lengths = [tokens] * (samples - 1) + [2 * tokens]
    one = [
        Glance(str(n), length + 2, length, 50, ((1, 8, 8),), (), frozenset())
        for n, length in enumerate(lengths)
    ]
    return Steps([one])


def test_with_much_memory_a_step_is_one_pack_and_nothing_is_recomputed(folder: Path) -> None:
    found = chooser(folder, 141, steps_of(20, 1000)).best(WRITTEN)
    assert (found.recompute, found.nf4) == (0.0, ())
    assert found.pack_tokens >= 21_000
    assert found.pack_tokens - 21_000 < 256


def test_nothing_is_changed_where_nothing_is_gained(folder: Path) -> None:
    assert chooser(folder, 141, steps_of(3, 100)).best(WRITTEN) is WRITTEN
    whole = Setting(pack_tokens=21_000, recompute=0.0, nf4=())
    assert chooser(folder, 141, steps_of(20, 1000)).best(whole) is whole


def test_recomputing_ends_where_memory_is_enough(folder: Path) -> None:
    needless = Setting(pack_tokens=4096, recompute=1.0, nf4=())
    assert chooser(folder, 141, steps_of(3, 100)).best(needless).recompute == 0.0


def test_recordings_are_no_reason_to_recompute(folder: Path) -> None:
    """A run that has no room for them launches its packs, which takes the host longer."""
    steps = steps_of(3, 1000)
    roomy = chooser(folder, 141, steps).estimate(WRITTEN)
    assert roomy.peak.recordings > 0
    scarce = (roomy.peak.in_all - roomy.peak.recordings / 2) / FULL / 1e9
    choosing = chooser(folder, scarce, steps)
    best = choosing.best(WRITTEN)
    assert best.recompute == 0.0
    found = choosing.estimate(best)
    assert found.fits
    assert found.peak.recordings == 0
    assert found.step.host > roomy.step.host


def test_what_is_chosen_fits_and_a_little_more_would_not(folder: Path) -> None:
    steps = steps_of(20, 1000)
    shares = []
    for memory_gb in (4.0, 2.0, 1.5, 1.2, 1.1, 1.05, 1.0, 0.95, 0.9):
        choosing = chooser(folder, memory_gb, steps)
        best = choosing.best(WRITTEN)
        estimate = choosing.estimate(best)
        if not estimate.fits:
            break
        assert estimate.peak.in_all <= FULL * memory_gb * 1e9
        assert best.pack_tokens >= 2000
        if 0 < best.recompute < 1:
            # A layer of five less.
            less = Setting(min(SENSIBLE, best.pack_tokens), round(best.recompute - 0.2, 2), ())
            assert not choosing.estimate(less).fits
        if best.pack_tokens < 21_000:
            more = Setting(best.pack_tokens + 1024, best.recompute, ())
            assert not choosing.estimate(more).fits
        shares.append(best.recompute)
    assert shares == sorted(shares)
    assert 0.0 in shares
    assert any(0 < share < 1 for share in shares)


def test_where_nothing_fits_the_least_is_told(folder: Path) -> None:
    choosing = chooser(folder, 0.5, steps_of(20, 1000))
    best = choosing.best(WRITTEN)
    assert best == Setting(pack_tokens=2000, recompute=1.0, nf4=())
    assert not choosing.estimate(best).fits


def test_a_processor_keeps_the_packs_of_the_recipe(folder: Path) -> None:
    choosing = chooser(folder, 141, steps_of(20, 1000), grows=False)
    assert choosing.best(WRITTEN).pack_tokens == 4096


def test_the_longest_sample_is_no_reason_to_recompute_less_than_it_takes(folder: Path) -> None:
    steps = steps_of(2, 6000)
    assert (steps.longest, steps.widest) == (12_000, 18_000)
    found = chooser(folder, 141, steps).best(WRITTEN)
    assert found.pack_tokens >= 12_000


def test_more_packs_take_less_memory_and_more_time(folder: Path) -> None:
    choosing = chooser(folder, 141, steps_of(20, 1000))
    few, many = (choosing.estimate(Setting(size, 0.0, ())) for size in (21_000, 2000))
    assert (few.packs, many.packs) == (1, 11)
    assert many.peak.activations < few.peak.activations
    assert many.step.in_all > few.step.in_all
    assert many.peak.weights == few.peak.weights
    assert many.seen_s is not None
    assert many.seen_s < many.step.in_all
