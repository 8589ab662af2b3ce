"""What makes a step quicker or slower."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finesight.config import DataFile, Recipe
from finesight.hub import ModelFolder
from finesight.model.tiny import make_tiny
from finesight.plan.load import Load
from finesight.plan.model import Sized, sized
from finesight.plan.seconds import IN_FP8, StepTime
from finesight.plan.target import Target, named_target, own_target

LOAD = Load((500,) * 40, ((1, 20, 20),) * 40, 4000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("model") / "deep", size="finesight-tiny")


def made(folder: Path, on: Target, train: dict[str, Any], tune: dict[str, Any]) -> Sized:
    recipe = Recipe.model_validate(
        {
            "model": str(folder),
            "data": {"train": (DataFile(path=Path("none")),)},
            "tune": tune,
            "train": {"workers": 4, **train},
            "output": Path("none"),
        }
    )
    return sized(ModelFolder(folder), recipe, (), on)


def test_a_step_is_its_longest_part_and_the_optimiser() -> None:
    step = StepTime(products=3.0, moved=2.0, host=4.0, optimiser=0.5, reading=1.0, waits=False)
    assert step.in_all == 5.5
    assert replace(step, host=7.0).in_all == 7.5
    assert replace(step, reading=9.0).in_all == 9.0
    assert replace(step, waits=True).in_all == 6.5


def test_time_goes_with_the_card_and_with_what_is_computed(folder: Path) -> None:
    quick, slow = (named_target(name, "bf16") for name in ("H200", "RTX 3060"))
    lora = {"language": "lora"}
    on_quick, on_slow = (made(folder, on, {}, lora).clock for on in (quick, slow))
    plain = on_quick.step([LOAD], 0.0)
    assert on_slow.step([LOAD], 0.0).products > 10 * plain.products
    assert on_slow.step([LOAD], 0.0).moved > 10 * plain.moved
    whole, half = (on_quick.step([LOAD], share) for share in (1.0, 0.5))
    assert plain.products < half.products < whole.products
    # Twice forwards and once back in place of once each: never half as much again.
    assert whole.products < 1.5 * plain.products
    assert on_quick.step([LOAD, LOAD], 0.0).products == pytest.approx(2 * plain.products)
    assert on_quick.step([LOAD, LOAD], 0.0).optimiser == plain.optimiser
    seen = on_quick.step([LOAD], 0.0, seen=True)
    assert seen.products < plain.products
    assert seen.reading == 0


def test_products_in_fp8_are_quicker(folder: Path) -> None:
    on, lora = named_target("H200", "bf16"), {"language": "lora"}
    plain, some, both = (
        made(folder, on, {}, lora | fp8).clock
        for fp8 in ({}, {"fp8": ["language"]}, {"fp8": ["language", "vision"]})
    )
    times = [clock.step([LOAD], 0.0) for clock in (plain, some, both)]
    products = [time.products for time in times]
    assert products == sorted(products, reverse=True)
    assert 1.0 < products[0] / products[2] < IN_FP8
    # Nothing is made wide, as in four bits.
    assert times[0].moved == pytest.approx(times[2].moved, rel=0.1)
    of_tower = [clock.step([LOAD], 0.0, seen=True).products for clock in (some, both)]
    assert of_tower[0] == of_tower[1]


def test_the_host_starts_less_where_layers_are_in_few_kernels_or_recorded(folder: Path) -> None:
    quick, old = (named_target(name, "bf16") for name in ("H200", "T4"))
    lora, small = {"language": "lora"}, Load((100,) * 8, (), 80)
    few, many = (
        made(folder, on, {}, lora).clock for on in (quick, replace(quick, computing=old.computing))
    )
    launched = few.step([small], 0.0, recorded=False).host
    assert 0 < launched < many.step([small], 0.0, recorded=False).host
    assert few.step([small], 0.0).host == 0
    assert many.step([small], 0.0).host == many.step([small], 0.0, recorded=False).host
    seen = Load(small.lengths, ((1, 20, 20),), 80)
    assert few.step([seen], 0.0).host > few.step([seen], 0.0, seen=True).host == 0
    assert few.step([LOAD], 0.0).host > launched


def test_an_optimiser_of_more_numbers_takes_longer(folder: Path) -> None:
    on = named_target("H200", "bf16")
    everything = {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"}
    lora = made(folder, on, {}, {"language": "lora"}).clock.step([LOAD], 0.0)
    full = made(folder, on, {}, everything).clock.step([LOAD], 0.0)
    eight = made(folder, on, {"optimizer": "adamw8bit"}, everything).clock.step([LOAD], 0.0)
    assert lora.optimiser < full.optimiser < eight.optimiser


def test_reading_waits_where_no_process_does_it_ahead(folder: Path) -> None:
    on = named_target("H200", "bf16")
    alone = made(folder, on, {"workers": 0}, {"language": "lora"}).clock.step([LOAD], 0.0)
    ahead = made(folder, on, {"workers": 8}, {"language": "lora"}).clock.step([LOAD], 0.0)
    assert alone.waits
    assert not ahead.waits
    assert alone.reading == pytest.approx(8 * ahead.reading)


def test_this_machine_is_measured() -> None:
    found = own_target("cpu", "auto")
    assert found.measured
    assert found.precision == "fp32"
    assert not found.computing.cuda
    assert 1e9 < found.peak < 1e15
    assert 1e8 < found.bandwidth < 1e13
    assert found.memory > 1e9
    assert own_target("cpu", "bf16").computing.number == 2


@pytest.mark.parametrize(
    ("name", "precision", "computed"),
    [("T4", "auto", "fp16"), ("A10", "auto", "bf16"), ("A10", "fp32", "fp32")],
)
def test_a_named_card_computes_in_what_it_can(name: str, precision: Any, computed: str) -> None:
    found = named_target(name, precision)
    assert found.precision == computed
    assert found.computing.flash == (computed == "bf16")
    assert not found.measured
