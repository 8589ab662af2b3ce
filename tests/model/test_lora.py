"""The adapter's arithmetic: against finite differences, against peft, and what it costs."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile

from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup, LowRank, adaptable_layers, adapters

WIDTHS = {"q_proj": 5, "k_proj": 3, "v_proj": 4}


def make_group(
    widths: dict[str, int] = WIDTHS, inputs: int = 6, dtype: torch.dtype = torch.float32
) -> GroupedLinear:
    torch.manual_seed(0)
    group = GroupedLinear(inputs, widths, bias=True).to(dtype)
    for parameter in group.parameters():
        nn.init.normal_(parameter)
    return group.requires_grad_(False)


def with_random_adapter(
    group: GroupedLinear, layers: dict[str, LowRank], dropout: float = 0.0
) -> LoraGroup:
    adapter = LoraGroup(group, layers, dropout)
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    group.adapter = adapter
    return adapter


class Separate(nn.Module):
    """The same layers one by one, as transformers has them."""

    def __init__(self, group: GroupedLinear) -> None:
        super().__init__()
        rows = group.weight.split(list(group.outputs.values()))
        biases = group.bias.split(list(group.outputs.values()))
        for name, weight_OI, bias_O in zip(group.outputs, rows, biases, strict=True):
            layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0])
            layer.weight = nn.Parameter(weight_OI.clone())
            layer.bias = nn.Parameter(bias_O.clone())
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(x) for layer in self.children())


def peft_twin(group: GroupedLinear, adapter: LoraGroup) -> nn.Module:
    config = peft.LoraConfig(
        r=max(low.rank for low in adapter.layers.values()),
        target_modules=list(adapter.layers),
        rank_pattern={name: low.rank for name, low in adapter.layers.items()},
        alpha_pattern={name: low.alpha for name, low in adapter.layers.items()},
    )
    twin = peft.get_peft_model(Separate(group), config).to(group.weight.dtype)
    own = dict(twin.named_parameters())
    with torch.no_grad():
        for name, (a_RI, b_OR) in adapter.factors().items():
            own[f"base_model.model.{name}.lora_A.default.weight"].copy_(a_RI)
            own[f"base_model.model.{name}.lora_B.default.weight"].copy_(b_OR)
    return twin


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize(
    "layers",
    [
        dict.fromkeys(WIDTHS, LowRank(2, 3.0)),
        {"v_proj": LowRank(4, 8.0), "q_proj": LowRank(2, 1.0)},
    ],
    ids=["all", "some, of mixed ranks"],
)
@pytest.mark.parametrize("shape", [(7, 6), (2, 3, 6)], ids=["2-D", "3-D"])
def test_outputs_and_gradients_equal_peft(
    layers: dict[str, LowRank], shape: tuple[int, ...]
) -> None:
    group = make_group(dtype=torch.float64)
    adapter = with_random_adapter(group, layers)
    twin = peft_twin(group, adapter)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x_twin = x.detach().clone().requires_grad_()
    outputs, expected = group(x), twin(x_twin)
    sum((y.sin().sum() for y in outputs), torch.tensor(0.0)).backward()
    sum((y.sin().sum() for y in expected), torch.tensor(0.0)).backward()

    for found, wanted in zip(outputs, expected, strict=True):
        assert found.shape == wanted.shape
        assert relative(found, wanted) < 1e-12
    assert relative(x.grad, x_twin.grad) < 1e-12
    theirs = dict(twin.named_parameters())
    for name, band in adapter.bands.items():
        prefix = f"base_model.model.{name}"
        assert (
            relative(adapter.a.grad[band.rows], theirs[f"{prefix}.lora_A.default.weight"].grad)
            < 1e-12
        )
        assert (
            relative(adapter.b[name].grad, theirs[f"{prefix}.lora_B.default.weight"].grad) < 1e-12
        )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trains_input", [True, False])
def test_gradients_equal_finite_differences(dropout: float, trains_input: bool) -> None:
    group = make_group(dtype=torch.float64)
    layers = {"q_proj": LowRank(2, 3.0), "v_proj": LowRank(3, 1.0)}
    adapter = with_random_adapter(group, layers, dropout)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=trains_input)

    def outputs(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(1)  # the same mask each time
        return group(x)

    assert torch.autograd.gradcheck(outputs, (x, *adapter.parameters()))


def test_dropout_is_of_the_update_only_one_mask_a_group_and_none_when_evaluating() -> None:
    group = make_group()
    with torch.no_grad():
        group.weight.zero_()
        group.bias.zero_()
    adapter = with_random_adapter(group, dict.fromkeys(WIDTHS, LowRank(6, 6.0)), dropout=0.5)
    with torch.no_grad():
        adapter.a.copy_(torch.eye(6).repeat(3, 1))
        for b_OR in adapter.b.values():
            b_OR.copy_(torch.eye(6)[: len(b_OR)])
    x = torch.ones(64, 6)
    q, k, v = group(x)
    assert torch.equal(q[:, :3], k)
    assert torch.equal(q[:, :4], v)
    assert set(q.unique().tolist()) == {0.0, 2.0}
    group.eval()
    assert torch.equal(torch.cat(group(x), 1), torch.ones(64, 12))


def test_a_new_adapter_changes_nothing_and_starts_alike_everywhere() -> None:
    group = make_group()
    plain = group(torch.ones(2, 6))
    whole = LoraGroup(group, dict.fromkeys(WIDTHS, LowRank(2, 16.0)), 0.0)
    whole.start(3, "model.layers.0.self_attn.qkv_proj")
    group.adapter = whole
    for found, expected in zip(group(torch.ones(2, 6)), plain, strict=True):
        assert torch.equal(found, expected)

    # The same values if other layers of the group are adapted too, and in another type.
    alone = LoraGroup(group, {"v_proj": LowRank(2, 16.0)}, 0.0)
    alone.start(3, "model.layers.0.self_attn.qkv_proj")
    assert torch.equal(alone.a, whole.factors()["v_proj"].a)
    half = LoraGroup(group, {"v_proj": LowRank(2, 16.0)}, 0.0, torch.bfloat16)
    half.start(3, "model.layers.0.self_attn.qkv_proj")
    assert torch.equal(half.a, alone.a.bfloat16())

    # Others for another seed, layer or position.
    for seed, path in [(4, "model.layers.0.self_attn.qkv_proj"), (3, "model.layers.1.self_attn.x")]:
        alone.start(seed, path)
        assert not torch.equal(alone.a, whole.factors()["v_proj"].a)
    assert not torch.equal(whole.factors()["q_proj"].a, whole.factors()["v_proj"].a)


def test_a_starts_uniform_within_one_over_the_root_of_the_inputs() -> None:
    group = make_group({"o_proj": 3}, inputs=400)
    adapter = LoraGroup(group, {"o_proj": LowRank(50, 1.0)}, 0.0)
    adapter.start(0, "model.layers.0.self_attn.o_proj")
    assert 0.0499 < float(adapter.a.detach().abs().max()) <= 0.05
    # Standard deviation of the uniform distribution on +-b: b / sqrt(3).
    assert float(adapter.a.detach().std()) == pytest.approx(0.05 / 3**0.5, rel=0.02)


def test_a_trained_base_below_an_adapter_is_a_bug() -> None:
    group = make_group()
    with_random_adapter(group, {"q_proj": LowRank(2, 1.0)})
    group.weight.requires_grad_(True)
    with pytest.raises(AssertionError, match="trained as well"):
        group(torch.ones(2, 6))


def test_few_operations_forwards_and_backwards() -> None:
    """Of the operations that touch whole activations, the group issues one product a layer for the
    base, one for the stacked A and one for each B, and copies none."""
    group = make_group({"gate_proj": 8, "up_proj": 8})
    layers = dict.fromkeys(group.outputs, LowRank(2, 1.0))
    with_random_adapter(group, layers)
    x = torch.randn(5, 6, requires_grad=True)
    with profile() as forward:
        outputs = group(x)
    ones = [torch.ones(5, 8)] * 2
    with profile() as backward:
        inputs = [x, *group.adapter.parameters()]
        torch.autograd.grad(outputs, inputs, ones)
    products = ("aten::mm", "aten::addmm", "aten::addmm_")
    copies = ("aten::cat", "aten::copy_", "aten::add", "aten::add_", "aten::clone")

    def count(run: profile, names: tuple[str, ...]) -> int:
        return sum(event.count for event in run.key_averages() if event.key in names)

    assert count(forward, products) == 2 + 1 + 2
    # Each B: its own gradient and that of its input; A likewise; the base by layer.
    assert count(backward, products) == 2 * 2 + 2 + 2
    assert count(backward, copies) == 0


def test_layers_and_adapters_are_found_by_their_hub_names() -> None:
    model = nn.ModuleDict({"attn": nn.ModuleDict({"qkv_proj": make_group()})})
    assert list(adaptable_layers(model)) == ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
    assert not list(adapters(model))
    adapter = with_random_adapter(model["attn"]["qkv_proj"], {"k_proj": LowRank(1, 1.0)})
    assert [(path, a is adapter) for path, _, a in adapters(model)] == [("attn.qkv_proj", True)]
