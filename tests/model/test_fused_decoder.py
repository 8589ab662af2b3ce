"""Fused decoder layers: outputs and gradients as close to fp32 as those of unfused layers."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import pytest
import torch
from decoder_fixtures import SMALL_DECODER
from torch import Tensor

from finesight.model import fused_decoder
from finesight.model.attention import PackedAttention, Segments
from finesight.model.config import LinearAttentionConfig
from finesight.model.decoder import DecoderLayer
from finesight.model.hybrid_decoder import HybridDecoderLayer
from finesight.model.layers import RotaryCosSin
from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
LENGTHS = (140, 3, 271, 64)
TOKENS = sum(LENGTHS)
IN_ORDER = (140, 3, 200, 135)
"""The same number of tokens in sequences for which the native kernels are deterministic; torch's
kernels for longer ones are not.
"""
CONFIG = replace(
    SMALL_DECODER, hidden_size=384, intermediate_size=1088, head_dim=64, mrope_axes=(0,) * 32
)
ONLY = torch.tensor([2, 139, 141, 200, 413])


LayerType = TypeVar("LayerType", DecoderLayer, HybridDecoderLayer)
HYBRID_CONFIG = replace(
    CONFIG,
    linear_attention=LinearAttentionConfig(
        full_attention_layers=(1,),
        num_key_heads=2,
        num_value_heads=4,
        key_head_dim=64,
        value_head_dim=32,
        conv_kernel_size=4,
    ),
)


@dataclass(frozen=True)
class PassResult:
    y: Tensor
    grads: Mapping[str, Tensor]


def layer(rank: int | None, dropout: float = 0.0, *, trainable: bool = False) -> DecoderLayer:
    return initialize(DecoderLayer(CONFIG, 0), rank, dropout, trainable=trainable)


def initialize(
    made: LayerType, rank: int | None, dropout: float = 0.0, *, trainable: bool = False
) -> LayerType:
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
        parameter.requires_grad_(trainable)
    for group in groups(made):
        if rank is not None:
            layers = {name: LoraConfig(rank, 2.0 * rank) for name in group.output_sizes}
            group.adapter = LoraLinear(group, layers, dropout)
            for parameter in group.adapter.parameters():
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return made.to(CUDA).train()


def groups(made: LayerType) -> list[FusedLinear]:
    return [module for module in made.modules() if isinstance(module, FusedLinear)]


def run_pass(
    made: LayerType,
    dtype: torch.dtype,
    only: Tensor | None,
    seed: int = 7,
    lengths: tuple[int, ...] = LENGTHS,
) -> PassResult:
    generator = torch.Generator().manual_seed(1)
    x = (
        torch.randn(TOKENS, CONFIG.hidden_size, generator=generator)
        .to(CUDA, dtype)
        .requires_grad_()
    )
    angles = torch.randn(TOKENS, 32, generator=generator).to(CUDA)
    rotation = RotaryCosSin.from_angles(angles, dtype)
    segments = Segments.from_lengths(lengths, CUDA)
    attention = PackedAttention(segments, torch.tensor([seed], dtype=torch.int32, device=CUDA))
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    y = made(x, rotation, attention, only)
    weights = torch.randn(y.shape, generator=generator).to(CUDA, dtype)
    named = {name: p for name, p in made.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(y, [x, *named.values()], weights)
    grads_by_name = dict(zip(["x", *named], (grad.float() for grad in grads), strict=True))
    return PassResult(y.detach().float(), grads_by_name)


def relative_error(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def compare_with_unfused(
    made: LayerType,
    dtype: torch.dtype,
    only: Tensor | None,
    bound: float,
    monkeypatch: pytest.MonkeyPatch,
) -> PassResult:
    """Compare errors against fp32 with those of the unfused layer. Returns the fused pass."""
    only = None if only is None else only.to(CUDA)
    fused = run_pass(made, dtype, only)
    with monkeypatch.context() as patch:
        patch.setattr(fused_decoder, "supports_fused_layers", lambda *_: False)
        baseline = run_pass(made, dtype, only)
        exact = run_pass(made, torch.float32, only)
    assert fused.grads.keys() == exact.grads.keys()
    assert relative_error(fused.y, exact.y) <= 1.2 * relative_error(baseline.y, exact.y)
    for name, grad in exact.grads.items():
        error = relative_error(fused.grads[name], grad)
        assert error <= bound * relative_error(baseline.grads[name], grad), name
    assert not torch.equal(fused.y, baseline.y), "the same path twice"
    return fused


@pytest.mark.parametrize("only", [None, ONLY])
@pytest.mark.parametrize("rank", ["all trainable", None, 4, 64, 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("apart", [False, True])
def test_fused_layer_error_is_bounded(rank, dtype, only, apart, monkeypatch):
    made = layer(None, trainable=True) if rank == "all trainable" else layer(rank)
    for group in groups(made):
        group.is_sharded = apart
    fused = compare_with_unfused(made, dtype, only, 1.3, monkeypatch)
    assert len(fused.grads) == {"all trainable": 8, None: 1}.get(rank, 12)


@pytest.mark.parametrize("only", [None, ONLY])
@pytest.mark.parametrize("rank", ["all trainable", None, 4, 64])
@pytest.mark.parametrize("index", [0, 1], ids=["linear attention", "full attention"])
def test_fused_hybrid_layer_error_is_bounded(index, rank, only, monkeypatch):
    trainable = rank == "all trainable"
    made = HybridDecoderLayer(HYBRID_CONFIG, index)
    made = initialize(made, None if rank == "all trainable" else rank, trainable=trainable)
    compare_with_unfused(made, torch.bfloat16, only, 1.4, monkeypatch)


def test_fused_layer_is_deterministic():
    made = layer(16, dropout=0.3)
    one, other = (run_pass(made, torch.bfloat16, None, lengths=IN_ORDER) for _ in range(2))
    assert torch.equal(one.y, other.y)
    assert all(torch.equal(one.grads[name], other.grads[name]) for name in one.grads)
    another = run_pass(made, torch.bfloat16, None, seed=8, lengths=IN_ORDER)
    assert not torch.equal(one.y, another.y)


def test_backward_uses_the_forward_dropout_mask():
    """Kernels recompute the mask of the norm: gradients are zero exactly at dropped elements."""
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels import swiglu as swiglu_kernels
    from finesight.model.kernels.runtime import SeededDropout

    seeds = torch.tensor([11], dtype=torch.int32, device=CUDA)
    drop = SeededDropout(seeds, salt=1, p=0.4, scale=1.0)
    ones = torch.ones(200, 128, device=CUDA, dtype=torch.bfloat16)
    eye = torch.eye(128, device=CUDA, dtype=torch.bfloat16)
    forward, _ = norm_kernels.rms_norm_dropout(ones, ones[0], 0.0, torch.empty_like(ones), drop)
    # silu(gate) up with gates so large that it equals their product.
    both = torch.cat([64 * ones, ones / 64], 1)
    gated, low = swiglu_kernels.swiglu_lora(both, eye, drop, 128)
    assert torch.equal(gated[:, :128], ones)
    assert low is not None
    assert torch.equal(low, forward)
    grads = swiglu_kernels.swiglu_lora_backward(
        both.clone(), eye, torch.zeros_like(ones), ones, drop
    )
    assert torch.equal(grads.gate_up_TF2[:, 128:], 64 * forward)
    assert grads.lora_A_RF is not None
    assert torch.equal(grads.lora_A_RF, ones.T @ forward)
    assert set(forward.unique().tolist()) == {0.0, 1.0}
    assert float(forward.float().mean()) == pytest.approx(0.6, abs=0.02)
    by_row, by_column = forward.float().mean(1), forward.float().mean(0)
    assert float(by_row.std()) == pytest.approx((0.24 / 128) ** 0.5, rel=0.3)
    assert float(by_column.std()) == pytest.approx((0.24 / 200) ** 0.5, rel=0.3)


def test_dropout_masks_are_uncorrelated():
    """Masks of adjacent rows, columns and layers agree as often as by chance."""
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels.runtime import SeededDropout

    ones = torch.ones(2048, 1536, device=CUDA, dtype=torch.bfloat16)

    def mask(seed: int, salt: int) -> Tensor:
        seeds = torch.tensor([seed], dtype=torch.int32, device=CUDA)
        drop = SeededDropout(seeds, salt, p=0.5, scale=1.0)
        stored, _ = norm_kernels.rms_norm_dropout(ones, ones[0], 0.0, torch.empty_like(ones), drop)
        return stored.double() * 2 - 1

    own = mask(1, 0)
    spread = own.numel() ** -0.5
    neighbours = (own.roll(1, 0), own.roll(1, 1), own.roll(64, 0), mask(2, 0), mask(1, 1))
    for other in neighbours:
        assert abs(float((own * other).mean())) < 5 * spread
    for rows, columns in ((1, 1), (1, 2), (2, 64), (16, 256)):
        square = own * own.roll(rows, 0) * own.roll(columns, 1) * own.roll((rows, columns), (0, 1))
        assert abs(float(square.mean())) < 5 * spread


def test_updated_adapter_is_used_in_next_pass():
    from finesight.model.lora.fused import FusedWeightSync

    made, laying = layer(16).to(torch.bfloat16), FusedWeightSync()
    first = run_pass(made, torch.bfloat16, None)
    for group in groups(made):
        assert isinstance(group.adapter, LoraLinear)
        for parameter in group.adapter.lora_B.values():
            # Its address changes as well.
            parameter.data = parameter.data * -1.5
    laying.copy_up_projections(groups(made))
    second = run_pass(made, torch.bfloat16, None)
    for group in groups(made):
        group.weight = torch.nn.Parameter(group.weight.detach().contiguous(), requires_grad=False)
    again = run_pass(made, torch.bfloat16, None)
    assert not torch.equal(first.y, second.y)
    assert torch.equal(second.y, again.y)


def test_second_backward_raises():
    made = layer(16)
    x = torch.randn(
        TOKENS, CONFIG.hidden_size, device=CUDA, dtype=torch.bfloat16, requires_grad=True
    )
    rotation = RotaryCosSin.from_angles(torch.randn(TOKENS, 32, device=CUDA), torch.bfloat16)
    made.to(torch.bfloat16)
    y = made(x, rotation, PackedAttention(Segments.from_lengths(LENGTHS, CUDA)))
    y.sum().backward(retain_graph=True)
    with pytest.raises(AssertionError, match="backward can run only once"):
        y.sum().backward()


@pytest.mark.parametrize("other", [LoraConfig(4, 8.0), LoraConfig(8, 4.0), None])
def test_unsupported_layers_fall_back(other):
    """One layer of a group has another rank or scale than the others, or the only adapter."""
    made = layer(16)
    group = made.self_attn.qkv_proj
    layers = dict.fromkeys(group.output_sizes, other) | {"q_proj": LoraConfig(8, 8.0)}
    group.adapter = LoraLinear(group, {name: one for name, one in layers.items() if one}, 0.0)
    made.to(CUDA)
    found = run_pass(made, torch.bfloat16, None)
    assert all(grad.isfinite().all() for grad in found.grads.values())


RANKS = [1, 8, 24, 40, 64, 72, 100, 128, 192, 256, 300, 384]
"""Single ranks, small ones, ranks split into two blocks, and the maximum."""


def random_values(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda", dtype)


def error_norm(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def rounding(dtype: torch.dtype) -> float:
    """Return the largest relative rounding error of one element."""
    return torch.finfo(dtype).eps / 2


# Cases, since compiling the kernels of a rank takes 10 seconds.
@pytest.mark.parametrize("ranks", [rank for rank in RANKS if rank <= 128])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (77, 176), (90, 99), (300, 1536)])
def test_forward_matches_fp64(ranks, rows, width, share, dtype):
    from finesight.model.kernels import lora_gemm as lora_gemm_kernels
    from finesight.model.kernels.runtime import SeededDropout
    from finesight.model.lora.fused import padding_columns

    x_TI, a_RI = random_values((rows, width), 1, dtype), random_values((ranks, width), 2, dtype)
    drop = SeededDropout(torch.tensor([3], dtype=torch.int32, device="cuda"), 4, share, 0.7)
    behind = padding_columns(width, ranks)
    x_TJ, low_TR = lora_gemm_kernels.lora_down(x_TI, a_RI, drop, behind)
    alone, same_TR = lora_gemm_kernels.lora_down(x_TI, a_RI, drop, 0)
    assert alone is x_TI
    assert error_norm(same_TR, low_TR.double()) < rounding(dtype)
    empty = low_TR.new_zeros(rows, behind - ranks)
    assert torch.equal(x_TJ, torch.cat([x_TI, low_TR, empty], 1))
    exact = 0.7 * apply_dropout(x_TI, drop).double() @ a_RI.double().T
    assert error_norm(low_TR, exact) < rounding(dtype)


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("share", [0.0, 0.3])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (77, 176), (90, 99), (3000, 1536)])
def test_backward_matches_fp64(ranks, rows, width, normed, share, dtype):
    """Gradients are slices of wider rows, as in fused matmuls."""
    from finesight.model.kernels import lora_gemm as lora_gemm_kernels
    from finesight.model.kernels import norm as norm_kernels
    from finesight.model.kernels.runtime import SeededDropout

    x_TI, a_SI = random_values((rows, width), 1, dtype), random_values((ranks, width), 2, dtype)
    dn_TJ = random_values((rows, width + ranks), 5, dtype)
    dn_TI, dlow_TS = dn_TJ[:, :width], dn_TJ[:, width:]
    drop = SeededDropout(torch.tensor([3], dtype=torch.int32, device="cuda"), 4, share, 0.7)
    n_TI, norm = x_TI, None
    if normed:
        w_I, n_TI = random_values((width,), 6, dtype), torch.empty_like(x_TI)
        _, scale_T = norm_kernels.rms_norm_dropout(x_TI, w_I, 1e-6, n_TI, drop)
        norm = lora_gemm_kernels.RmsNormStats(w_I, scale_T)
    stored_TI = apply_dropout(torch.ones_like(x_TI), drop).double()
    dx_TI, da_SI = lora_gemm_kernels.lora_down_backward(x_TI, norm, dn_TI, dlow_TS, a_SI, drop)
    exact = dn_TI.double() + 0.7 * stored_TI * (dlow_TS.double() @ a_SI.double())
    assert error_norm(dx_TI, exact) < rounding(dtype)
    assert error_norm(da_SI, 0.7 * dlow_TS.double().T @ (stored_TI * n_TI.double())) < rounding(
        dtype
    )
    alone_SI = lora_gemm_kernels.lora_A_grad(x_TI, norm, dlow_TS, a_SI, drop)
    assert error_norm(alone_SI, da_SI.double()) < rounding(dtype)
    again = lora_gemm_kernels.lora_down_backward(x_TI, norm, dn_TI, dlow_TS, a_SI, drop)
    assert torch.equal(again[1], da_SI)


def apply_dropout(x_TI: Tensor, drop: Any) -> Tensor:
    """Apply the dropout mask with another kernel, without a matmul."""
    from finesight.model.kernels import norm as norm_kernels

    ones_TI = torch.ones_like(x_TI)
    stored_TI, _ = norm_kernels.rms_norm_dropout(
        ones_TI, ones_TI[0], 0.0, torch.empty_like(x_TI), drop
    )
    return x_TI * stored_TI
