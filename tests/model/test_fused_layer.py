"""Decoder layers in few kernels: what they compute is what the layers compute one step after the
other, forwards and backwards, as near to fp32 as those are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor

from finesight.model import fused_layer, wide
from finesight.model.attention import PackedAttention, Segments
from finesight.model.fp8 import Fp8Weight
from finesight.model.geometry import LanguageGeometry
from finesight.model.language import DecoderLayer
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup, LowRank
from finesight.model.rope import Rotation
from finesight.model.rowwise import Fp8Matrix

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
LENGTHS = (140, 3, 271, 64)
TOKENS = sum(LENGTHS)
IN_ORDER = (140, 3, 200, 135)
"""As many, in sequences that have kernels of our own: torch's, of longer ones, add up gradients of
queries in the order in which they come."""
GEOMETRY = LanguageGeometry(
    vocabulary=64,
    width=384,
    mlp_width=1088,
    depth=1,
    heads=6,
    kv_heads=2,
    head_width=64,
    normed_heads=False,
    norm_eps=1e-6,
    theta=1e4,
    rows=(0,) * 32,
    positions=1024,
    tied=True,
)
ONLY = torch.tensor([2, 139, 141, 200, 413])


@dataclass(frozen=True)
class Passed:
    """A pass's output and gradients, in fp32."""

    y: Tensor
    grads: Mapping[str, Tensor]


def layer(rank: int | None, dropout: float = 0.0, *, learns: bool = False) -> DecoderLayer:
    made = DecoderLayer(GEOMETRY, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        parameter.requires_grad_(learns)
    for group in groups(made):
        if rank is not None:
            layers = {name: LowRank(rank, 2.0 * rank) for name in group.outputs}
            group.adapter = LoraGroup(group, layers, dropout)
            for parameter in group.adapter.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return made.to(CUDA).train()


def in_fp8(made: DecoderLayer) -> DecoderLayer:
    """The layer with the weights of its products in FP8."""
    for group in groups(made):
        weights = torch.split(group.weight.detach(), list(group.outputs.values()))
        group.freeze_as(Fp8Matrix, Fp8Weight)
        assert isinstance(group.weight, Fp8Weight)
        group.weight.to(CUDA)
        for matrix, weight in zip(group.weight.matrices, weights, strict=True):
            (piece,) = matrix.pieces()
            piece.fill(weight)
    return made


def groups(made: DecoderLayer) -> list[GroupedLinear]:
    return [module for module in made.modules() if isinstance(module, GroupedLinear)]


def passed(
    made: DecoderLayer,
    dtype: torch.dtype,
    only: Tensor | None,
    seed: int = 7,
    lengths: tuple[int, ...] = LENGTHS,
) -> Passed:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, GEOMETRY.width, generator=generator).to(CUDA, dtype).requires_grad_()
    angles = torch.randn(TOKENS, 32, generator=generator).to(CUDA)
    rotation = Rotation.by(angles, dtype)
    segments = Segments.of(lengths, CUDA)
    attention = PackedAttention(segments, torch.tensor([seed], dtype=torch.int32, device=CUDA))
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    y = made(x, rotation, attention, only)
    weights = torch.randn(y.shape, generator=generator).to(CUDA, dtype)
    named = {name: p for name, p in made.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *named.values()], weights)
    wide = dict(zip(["x", *named], (grad.float() for grad in grads), strict=True))
    return Passed(y.detach().float(), wide)


def off(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("only", [None, ONLY], ids=["all", "labels"])
@pytest.mark.parametrize("rank", ["all learns", None, 4, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("apart", [False, True], ids=["beside", "apart"])
def test_as_near_to_fp32_as_one_step_after_the_other(
    rank: int | Literal["all learns"] | None,
    dtype: torch.dtype,
    only: Tensor | None,
    apart: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    only = None if only is None else only.to(CUDA)
    made = layer(None, learns=True) if rank == "all learns" else layer(rank)
    for group in groups(made):
        group.apart = apart
    fused = passed(made, dtype, only)
    monkeypatch.setattr(fused_layer, "takes", lambda *_: False)
    plain = passed(made, dtype, only)
    exact = passed(made, torch.float32, only)
    assert fused.grads.keys() == exact.grads.keys()
    assert len(fused.grads) == {"all learns": 8, None: 1}.get(rank, 12)
    assert off(fused.y, exact.y) <= 1.2 * off(plain.y, exact.y)
    for name, grad in exact.grads.items():
        assert off(fused.grads[name], grad) <= 1.3 * off(plain.grads[name], grad), name
    assert not torch.equal(fused.y, plain.y), "the same path twice"


def test_the_same_bits_again() -> None:
    made = layer(16, dropout=0.3)
    one, other = (passed(made, torch.bfloat16, None, lengths=IN_ORDER) for _ in range(2))
    assert torch.equal(one.y, other.y)
    assert all(torch.equal(one.grads[name], other.grads[name]) for name in one.grads)
    another = passed(made, torch.bfloat16, None, seed=8, lengths=IN_ORDER)
    assert not torch.equal(one.y, another.y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rank", "share"), [(None, 0.0), (16, 0.0), (16, 0.3)])
def test_norms_in_fp8_give_what_products_put_into_fp8_give(
    rank: int | None, share: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, forwards and backwards; and near to fp32, as FP8 is."""
    exact = passed(layer(rank), torch.float32, None, lengths=IN_ORDER)
    made = in_fp8(layer(rank, share).to(dtype))
    codes = passed(made, dtype, None, lengths=IN_ORDER)
    monkeypatch.setattr(wide, "takes_rows", lambda _: False)
    own = passed(made, dtype, None, lengths=IN_ORDER)
    assert torch.equal(codes.y, own.y)
    assert all(torch.equal(codes.grads[name], own.grads[name]) for name in own.grads)
    assert share or off(codes.y, exact.y) < 0.05


def test_drop_out_is_that_of_its_share_on_average() -> None:
    """The mean over many seeds is what comes without: of the output, where it is linear."""
    from finesight.model.kernels import lora as lora_kernels
    from finesight.model.kernels.drop import Drop

    generator = torch.Generator().manual_seed(2)
    x = torch.randn(300, 384, generator=generator).to(CUDA, torch.bfloat16)
    a = torch.randn(24, 384, generator=generator).to(CUDA, torch.bfloat16)
    total = torch.zeros(300, 24, device=CUDA)
    for seed in range(400):
        seeds = torch.tensor([seed], dtype=torch.int32, device=CUDA)
        total += lora_kernels.lowered(x, a, Drop(seeds, 5, 0.25, 1 / 0.75), 0)[1].float()
    exact = x.float() @ a.float().T
    # Of 400 draws, the mean is off by sqrt(0.25 / 0.75 / 400) of what a row and a column share.
    expected = (x.float().square() @ a.float().square().T).sqrt() * (1 / 3 / 400) ** 0.5
    z = (total / 400 - exact) / expected
    assert float(z.abs().max()) < 6.0
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.15)


def test_what_goes_back_meets_the_numbers_that_went_forth() -> None:
    """The mask is made anew for each use, by several kernels: a gradient of the adapter's input is
    zero exactly where its number was dropped."""
    from finesight.model.kernels import gate as gate_kernels
    from finesight.model.kernels import lora as lora_kernels
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels.drop import Drop

    seeds = torch.tensor([11], dtype=torch.int32, device=CUDA)
    drop = Drop(seeds, salt=1, share=0.4, times=1.0)
    ones = torch.ones(200, 128, device=CUDA, dtype=torch.bfloat16)
    eye = torch.eye(128, device=CUDA, dtype=torch.bfloat16)
    whole, forth = lora_kernels.lowered(ones, eye, drop, 192)
    assert torch.equal(whole, torch.cat([ones, forth, torch.zeros_like(ones[:, :64])], 1))
    back, by_a = lora_kernels.lowered_back(ones, None, torch.zeros_like(ones), ones, eye, drop)
    assert torch.equal(back, forth)
    assert torch.equal(by_a, ones.T @ forth)
    room = torch.empty(200, 192, device=CUDA, dtype=torch.bfloat16)
    dropped, scales = norm_kernels.rms_normed(ones, ones[0], 0.0, room[:, :128], drop)
    assert torch.equal(dropped, forth)
    assert torch.equal(room[:, :128], ones)
    norm = lora_kernels.Norm(ones[0], scales)
    assert torch.equal(lora_kernels.down_grad(ones, norm, ones, eye, drop), by_a)
    # silu(gate) up with gates so large that it is their product.
    both = torch.cat([64 * ones, ones / 64], 1)
    gated, low = gate_kernels.gated_low(both, eye, drop, 128)
    assert torch.equal(gated[:, :128], ones)
    assert low is not None
    assert torch.equal(low, forth)
    grads = gate_kernels.gated_low_back(both.clone(), eye, torch.zeros_like(ones), ones, drop)
    assert torch.equal(grads.both_TF2[:, 128:], 64 * forth)
    assert grads.a_RF is not None
    assert torch.equal(grads.a_RF, ones.T @ forth)
    assert set(forth.unique().tolist()) == {0.0, 1.0}
    assert float(forth.float().mean()) == pytest.approx(0.6, abs=0.02)
    by_row, by_column = forth.float().mean(1), forth.float().mean(0)
    assert float(by_row.std()) == pytest.approx((0.24 / 128) ** 0.5, rel=0.3)
    assert float(by_column.std()) == pytest.approx((0.24 / 200) ** 0.5, rel=0.3)


def test_masks_of_rows_columns_and_seeds_have_nothing_in_common() -> None:
    """Each mask beside its neighbours': as many numbers in common as chance gives, and no squares
    of rows and columns that go together."""
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels.drop import Drop

    ones = torch.ones(2048, 1536, device=CUDA, dtype=torch.bfloat16)

    def mask(seed: int, salt: int) -> Tensor:
        seeds = torch.tensor([seed], dtype=torch.int32, device=CUDA)
        drop = Drop(seeds, salt, share=0.5, times=1.0)
        kept, _ = norm_kernels.rms_normed(ones, ones[0], 0.0, torch.empty_like(ones), drop)
        return kept.double() * 2 - 1

    own = mask(1, 0)
    spread = own.numel() ** -0.5
    neighbours = (own.roll(1, 0), own.roll(1, 1), own.roll(64, 0), mask(2, 0), mask(1, 1))
    for other in neighbours:
        assert abs(float((own * other).mean())) < 5 * spread
    for rows, columns in ((1, 1), (1, 2), (2, 64), (16, 256)):
        square = own * own.roll(rows, 0) * own.roll(columns, 1) * own.roll((rows, columns), (0, 1))
        assert abs(float(square.mean())) < 5 * spread


def test_what_was_learned_is_laid_beside_the_weights_before_the_next_pass() -> None:
    from finesight.model.joined import Laying

    made, laying = layer(16).to(torch.bfloat16), Laying()
    first = passed(made, torch.bfloat16, None)
    for group in groups(made):
        assert isinstance(group.adapter, LoraGroup)
        for parameter in group.adapter.b.values():
            # Where it lies changes, too.
            parameter.data = parameter.data * -1.5
    laying.lay(fused_layer.joined_groups(groups(made)))
    second = passed(made, torch.bfloat16, None)
    for group in groups(made):
        group.weight = torch.nn.Parameter(group.weight.detach().contiguous(), requires_grad=False)
    anew = passed(made, torch.bfloat16, None)
    assert not torch.equal(first.y, second.y)
    assert torch.equal(second.y, anew.y)


def test_a_second_way_back_is_refused() -> None:
    made = layer(16)
    x = torch.randn(TOKENS, GEOMETRY.width, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    rotation = Rotation.by(torch.randn(TOKENS, 32, device=CUDA), torch.bfloat16)
    made.to(torch.bfloat16)
    y = made(x, rotation, PackedAttention(Segments.of(LENGTHS, CUDA)))
    y.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="second way back"):
        y.sum().backward()


@pytest.mark.parametrize("kind", ["rank", "scale", "part"])
def test_what_kernels_do_not_take_goes_one_step_after_the_other(kind: str) -> None:
    made = layer(16)
    group = made.self_attn.qkv_proj
    if kind == "rank":
        layers = {name: LowRank(8 if name == "q_proj" else 4, 8.0) for name in group.outputs}
        group.adapter = LoraGroup(group, layers, 0.0)
    if kind == "scale":
        layers = {name: LowRank(8, 8.0 if name == "q_proj" else 4.0) for name in group.outputs}
        group.adapter = LoraGroup(group, layers, 0.0)
    if kind == "part":
        group.adapter = LoraGroup(group, {"q_proj": LowRank(8, 8.0)}, 0.0)
    made.to(CUDA)
    found = passed(made, torch.bfloat16, None)
    assert all(grad.isfinite().all() for grad in found.grads.values())
