from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from finesight.model.bank import Bank, Readers
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup, LowRank, adapters

INPUTS, WIDTHS = 6, {"q_proj": 5, "k_proj": 3, "v_proj": 4}
Layers = dict[str, LowRank] | None
ADAPTERS: list[Layers] = [
    {"q_proj": LowRank(2, 3.0), "v_proj": LowRank(1, 4.0)},
    {"k_proj": LowRank(3, 1.0)},
    None,
    {name: LowRank(2, 1.0) for name in WIDTHS},
]
"""Of one group: some layers, one, none, all; ranks and scales differ within one too."""


def _model() -> nn.ModuleDict:
    """Two groups, the second without an adapter in some."""
    groups = {
        "qkv_proj": GroupedLinear(INPUTS, WIDTHS, bias=True),
        "o_proj": GroupedLinear(INPUTS, {"o_proj": 5}, bias=False),
    }
    model = nn.ModuleDict(groups)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
            parameter.requires_grad_(False)
    return model


def _install(model: nn.ModuleDict, number: int) -> None:
    chosen = ADAPTERS[number]
    layers = {"qkv_proj": chosen} if chosen else {}
    if number in (1, 3):
        layers["o_proj"] = {"o_proj": LowRank(1, 2.0)}
    generator = torch.Generator().manual_seed(number + 1)
    for path, ranks in layers.items():
        group = model[path]
        group.adapter = LoraGroup(group, ranks, 0.0)
        for parameter in group.adapter.parameters():
            nn.init.normal_(parameter, generator=generator)


def _banked() -> tuple[nn.ModuleDict, Readers]:
    model = _model()
    bank = Bank(model)
    for number in range(len(ADAPTERS)):
        _install(model, number)
        bank.take()
        assert not list(adapters(model))
    readers = bank.install()
    assert readers is not None
    return model, readers


@torch.no_grad()
def _alone(number: int | None, x_TI: Tensor) -> list[Tensor]:
    model = _model()
    if number is not None:
        _install(model, number)
    return [y for path in ("qkv_proj", "o_proj") for y in model[path](x_TI)]


CHOICES = [None, *range(len(ADAPTERS))]


@torch.no_grad()
def test_one_adapter_reads_all_rows_as_if_it_were_installed():
    model, readers = _banked()
    x_TI = torch.randn(7, INPUTS, generator=torch.Generator().manual_seed(9))
    found = {}
    for number in CHOICES:
        readers.choose(readers.mask(number))
        found[number] = [y for path in ("qkv_proj", "o_proj") for y in model[path](x_TI)]
        for mine, wanted in zip(found[number], _alone(number, x_TI), strict=True):
            torch.testing.assert_close(mine, wanted)
    # The third has no layer: as the base. The others differ.
    differ = {
        (a, b): not torch.allclose(torch.cat(found[a], 1), torch.cat(found[b], 1))
        for a, b in product(CHOICES, CHOICES)
    }
    assert {pair for pair, other in differ.items() if not other} == {
        *((number, number) for number in CHOICES),
        (None, 2),
        (2, None),
    }


@pytest.mark.parametrize("seed", range(5))
@torch.no_grad()
def test_each_row_is_read_with_its_own(seed):
    model, readers = _banked()
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(11, INPUTS, generator=generator)
    chosen = [CHOICES[n] for n in torch.randint(len(CHOICES), (11,), generator=generator).tolist()]
    readers.choose(torch.cat([readers.mask(number) for number in chosen]))
    found = [y for path in ("qkv_proj", "o_proj") for y in model[path](x_TI)]
    for row, number in enumerate(chosen):
        for mine, wanted in zip(found, _alone(number, x_TI[row : row + 1]), strict=True):
            torch.testing.assert_close(mine[row], wanted[0])


@torch.no_grad()
def test_more_dimensions_than_rows():
    """As a tower of pictures reads them."""
    model, readers = _banked()
    x = torch.randn(2, 3, INPUTS, generator=torch.Generator().manual_seed(1))
    readers.choose(readers.mask(0))
    found = model["qkv_proj"](x)
    wanted = _alone(0, x.flatten(0, 1))
    assert [y.shape for y in found] == [(2, 3, width) for width in WIDTHS.values()]
    for mine, other in zip(found, wanted, strict=False):
        torch.testing.assert_close(mine.flatten(0, 1), other)


def test_nobody_chosen_is_the_base():
    model, _ = _banked()
    x_TI = torch.ones(2, INPUTS)
    with torch.no_grad():
        for mine, wanted in zip(model["qkv_proj"](x_TI), _alone(None, x_TI), strict=False):
            torch.testing.assert_close(mine, wanted)


def test_a_bank_of_nothing_is_none():
    model = _model()
    bank = Bank(model)
    bank.take()
    assert bank.install() is None
    assert all(group.adapter is None for group in model.values())
