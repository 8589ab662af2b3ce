from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor, nn

from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear, iter_adapters
from finesight.model.lora.multi import LoraRouting, MultiLora

INPUTS, WIDTHS = 6, {"q_proj": 5, "k_proj": 3, "v_proj": 4}
Layers = dict[str, LoraConfig] | None
ADAPTERS: list[Layers] = [
    {"q_proj": LoraConfig(2, 3.0), "v_proj": LoraConfig(1, 4.0)},
    {"k_proj": LoraConfig(3, 1.0)},
    None,
    {name: LoraConfig(2, 1.0) for name in WIDTHS},
]
"""Adapters of some layers, one, none and all, with different ranks and scales."""


def _model() -> nn.ModuleDict:
    """Return two fused linears; some adapters skip the second."""
    groups = {
        "qkv_proj": FusedLinear(INPUTS, WIDTHS, bias=True),
        "o_proj": FusedLinear(INPUTS, {"o_proj": 5}, bias=False),
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
        layers["o_proj"] = {"o_proj": LoraConfig(1, 2.0)}
    generator = torch.Generator().manual_seed(number + 1)
    for path, ranks in layers.items():
        group = model[path]
        group.adapter = LoraLinear(group, ranks, 0.0)
        for parameter in group.adapter.parameters():
            nn.init.normal_(parameter, generator=generator)


def _make_multi_lora() -> tuple[nn.ModuleDict, LoraRouting]:
    model = _model()
    multi_lora = MultiLora(model)
    for number in range(len(ADAPTERS)):
        _install(model, number)
        multi_lora.collect_adapter()
        assert not list(iter_adapters(model))
    routing = multi_lora.install()
    assert routing is not None
    return model, routing


@torch.no_grad()
def _alone(number: int | None, x_TI: Tensor) -> list[Tensor]:
    model = _model()
    if number is not None:
        _install(model, number)
    return [y for path in ("qkv_proj", "o_proj") for y in model[path](x_TI)]


CHOICES = [None, *range(len(ADAPTERS))]


@torch.no_grad()
def test_single_adapter_matches_installed_adapter():
    model, routing = _make_multi_lora()
    x_TI = torch.randn(7, INPUTS, generator=torch.Generator().manual_seed(9))
    found = {}
    for number in CHOICES:
        routing.set_mask(routing.build_mask(number))
        found[number] = [y for path in ("qkv_proj", "o_proj") for y in model[path](x_TI)]
        for mine, wanted in zip(found[number], _alone(number, x_TI), strict=True):
            torch.testing.assert_close(mine, wanted)
    # The third adapter has no layer here and equals the base. The others differ.
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
def test_each_row_uses_its_adapter(seed):
    model, routing = _make_multi_lora()
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(11, INPUTS, generator=generator)
    chosen = [CHOICES[n] for n in torch.randint(len(CHOICES), (11,), generator=generator).tolist()]
    routing.set_mask(torch.cat([routing.build_mask(number) for number in chosen]))
    found = [y for path in ("qkv_proj", "o_proj") for y in model[path](x_TI)]
    for row, number in enumerate(chosen):
        for mine, wanted in zip(found, _alone(number, x_TI[row : row + 1]), strict=True):
            torch.testing.assert_close(mine[row], wanted[0])


@torch.no_grad()
def test_more_than_two_input_dimensions():
    """Inputs with the batch dimensions of a vision encoder."""
    model, routing = _make_multi_lora()
    x = torch.randn(2, 3, INPUTS, generator=torch.Generator().manual_seed(1))
    routing.set_mask(routing.build_mask(0))
    found = model["qkv_proj"](x)
    wanted = _alone(0, x.flatten(0, 1))
    assert [y.shape for y in found] == [(2, 3, width) for width in WIDTHS.values()]
    for mine, other in zip(found, wanted, strict=False):
        torch.testing.assert_close(mine.flatten(0, 1), other)


def test_no_adapter_gives_the_base_output():
    model, _ = _make_multi_lora()
    x_TI = torch.ones(2, INPUTS)
    with torch.no_grad():
        for mine, wanted in zip(model["qkv_proj"](x_TI), _alone(None, x_TI), strict=False):
            torch.testing.assert_close(mine, wanted)


def test_empty_multi_lora_is_none():
    model = _model()
    multi_lora = MultiLora(model)
    multi_lora.collect_adapter()
    assert multi_lora.install() is None
    assert all(group.adapter is None for group in model.values())


@torch.no_grad()
def test_scale_beyond_the_range_of_fp16():
    """An adapter with tiny weights may have a large alpha."""
    model = _model().half()
    group = model["o_proj"]
    group.adapter = LoraLinear(group, {"o_proj": LoraConfig(1, 1e6)}, 0.0)
    for parameter in group.adapter.parameters():
        parameter.fill_(1e-4)
    x_TI = torch.ones(2, INPUTS, dtype=torch.float16)
    (expected,) = group(x_TI)
    assert expected.isfinite().all()
    multi_lora = MultiLora(model)
    multi_lora.collect_adapter()
    routing = multi_lora.install()
    assert routing is not None
    routing.set_mask(routing.build_mask(0))
    (found,) = group(x_TI)
    torch.testing.assert_close(found, expected)
    routing.set_mask(routing.build_mask(None))
    (base,) = group(x_TI)
    assert base.isfinite().all()
    assert not torch.allclose(base, expected)
