"""On a card: variable-length attention, the segment-wise path, 16-bit numbers, no waiting."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from oracle import config, conversation, distance, native, packed, reference, reference_logits
from torch import Tensor

from finesight.encode.pack import PackedBatch
from finesight.model import layers
from finesight.model.attention import Segments, attend, attend_by_segment, has_varlen
from finesight.model.layers import GatedMlp, RmsNorm, added_norm
from finesight.model.linear import GroupedLinear
from finesight.model.network import VisionLanguageModel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")
SAMPLES = [
    conversation(1, 3, ("image", (1, 10, 12)), 4),
    conversation(2, 19),
    conversation(3, 1, ("video", (3, 4, 6)), 2, ("image", (1, 2, 4)), 5),
    conversation(4, 2, ("image", (1, 18, 10)), 1),
]
LENGTHS = [33, 64, 1, 64, 130, 64]
HOST = {"ids_T", "positions_3T", "bounds_S1", "patches_ND", "visual_at_M", "predict_L", "target_L"}
HALF = [torch.bfloat16, torch.float16]


def wide(family: str) -> dict[str, Any]:
    """Heads of 16 numbers in the language model and in the tower, which the kernel takes."""
    if family.startswith("qwen3_vl"):
        return config(family, vision={"hidden_size": 32})
    return config(
        family,
        hidden_size=64,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vision={"out_hidden_size" if family == "qwen2_5_vl" else "hidden_size": 64},
    )


def on_card(theirs: Any, dtype: torch.dtype) -> Any:
    """The reference on the card; only its parameters in `dtype`, its rotary tables stay fp32, and
    its convolution in fp32 is not cut to TF32."""
    torch.backends.cudnn.allow_tf32 = False
    for parameter in theirs.parameters():
        parameter.data = parameter.data.to(dtype)
    return theirs.to(CUDA)


def heads(kv_heads: int, width: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    sizes = (4, kv_heads, kv_heads)
    return [torch.randn(total, n, width, generator=generator).to(CUDA, dtype) for n in sizes]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("kv_heads", "width"), [(4, 80), (2, 128), (1, 16)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("by_segment", [False, True])
def test_attention_in_16_bits_is_that_of_the_processor_in_32(
    causal: bool, kv_heads: int, width: int, dtype: torch.dtype, by_segment: bool
) -> None:
    inputs = [x.requires_grad_() for x in heads(kv_heads, width, dtype)]
    assert has_varlen(inputs[0])
    segments = Segments.of(LENGTHS, CUDA)
    if by_segment:
        found = attend_by_segment(*inputs, segments.runs, causal)
    else:
        found = attend(*inputs, segments, causal=causal)
    exact = [x.detach().float().cpu().requires_grad_() for x in inputs]
    expected = attend(*exact, Segments.of(LENGTHS, torch.device("cpu")), causal=causal)
    assert distance(found.cpu(), expected) < 0.01
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((found * weights.to(found)).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), exact)
    for mine, other in zip(ours, theirs, strict=True):
        assert distance(mine.cpu(), other) < 0.02


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_bf16_is_as_near_to_fp32_as_the_reference_is(family: str) -> None:
    exact = on_card(reference(wide(family)), torch.float32)
    batch = packed(exact, SAMPLES).to(CUDA)
    with torch.no_grad():
        expected = torch.cat([reference_logits(exact, sample) for sample in SAMPLES])
        fine = native(wide(family), exact)
        assert distance(fine.logits(fine(batch)), expected) <= 1e-5
        rough = on_card(exact, torch.bfloat16)
        ours = native(wide(family), rough)
        found = ours.logits(ours(batch))
        theirs = torch.cat([reference_logits(rough, sample) for sample in SAMPLES])
    off = (found - expected).float().square().mean()
    assert off <= 1.5 * (theirs - expected).float().square().mean()
    assert off > 0


# With experts, a rounding may choose another one: these outputs are no near ones.
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_cards_without_the_kernel_compute_the_same_model(family: str, dtype: torch.dtype) -> None:
    # Heads of 12 numbers take the segment-wise path, as all heads do on a T4.
    exact = on_card(reference(config(family)), torch.float32)
    batch = packed(exact, SAMPLES).to(CUDA)
    with torch.no_grad():
        fine = native(config(family), exact)
        expected = fine.logits(fine(batch))
        model = native(config(family), on_card(exact, dtype))
        assert not has_varlen(torch.zeros(1, 1, 12, device=CUDA, dtype=dtype))
        assert distance(model.logits(model(batch)), expected) < 0.05


def step(model: VisionLanguageModel, batch: PackedBatch) -> None:
    model(batch).float().square().mean().backward()


def see_alone(model: VisionLanguageModel, batch: PackedBatch) -> None:
    with torch.inference_mode():
        model.see(batch.patches_ND, batch.grids)


@pytest.mark.parametrize("work", [step, see_alone])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_nothing_waits_for_the_card(
    family: str, work: Callable[[VisionLanguageModel, PackedBatch], None]
) -> None:
    theirs = reference(wide(family))
    batch = packed(theirs, SAMPLES)
    model = native(wide(family), on_card(theirs, torch.bfloat16))
    batch = replace(
        batch,
        **{name: tensor.pin_memory() for name, tensor in asdict(batch).items() if name in HOST},
    )
    work(model, batch.to(CUDA))  # the first call fills the tables that are kept
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work(model, batch.to(CUDA))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [8, 16, 40, 72, 80, 104, 128])
@pytest.mark.parametrize("lengths", [[64, 64, 64], [400, 400], [300, 7, 1, 80, 128]], ids=str)
def test_attention_of_a_frozen_tower_is_that_of_the_processor_in_32(
    lengths: list[int], width: int, dtype: torch.dtype
) -> None:
    # Side by side, as in a joint product, and in the midst of what must not be read.
    joint = torch.full((sum(lengths) + 128, 12, width), torch.nan, dtype=dtype, device=CUDA)
    inputs = [*joint[64:-64].chunk(3, dim=1)]
    for own, drawn in zip(inputs, heads(4, width, dtype), strict=True):
        own.copy_(drawn.repeat(3, 1, 1)[: sum(lengths)])
    segments = Segments.of(lengths, CUDA)
    with torch.no_grad():
        found = attend(*inputs, segments, causal=False)
    exact = [x.float().cpu() for x in inputs]
    expected = attend(*exact, Segments.of(lengths, torch.device("cpu")), causal=False)
    assert distance(found.cpu(), expected) < 0.01


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_norm_of_a_sum_is_that_of_the_two_steps(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 1280, generator=generator).to(CUDA, dtype) for _ in range(2))
    for norm in (torch.nn.LayerNorm(1280, eps=1e-6), RmsNorm(1280, eps=1e-6)):
        norm.weight.data.normal_(generator=generator)
        own = norm.to(CUDA, dtype)
        reader = GroupedLinear(1280, {"qkv": 16}, bias=False)
        with torch.no_grad():
            total, normed = added_norm(x, y, own, reader)
        kept, expected = added_norm(x, y, own, reader)
        assert torch.equal(total, kept)
        torch.testing.assert_close(normed, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("learns", [False, True])
def test_a_gated_mlp_of_an_odd_width_is_as_near_to_fp32_as_layer_by_layer(
    learns: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    mlp = GatedMlp(64, 100, bias=True).requires_grad_(learns).to(CUDA)
    for parameter in mlp.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(CUDA) * 0.2
    x = torch.randn(70, 64, generator=generator).to(CUDA)
    dy = torch.randn(70, 64, generator=generator).to(CUDA)

    def passed() -> list[Tensor]:
        own = x.to(next(mlp.parameters()).dtype).requires_grad_()
        y = mlp(own)
        wanted = [own, *(p for p in mlp.parameters() if p.requires_grad)]
        return [y, *torch.autograd.grad(y, wanted, dy.to(y.dtype))]

    exact = passed()
    mlp.to(dtype)
    found = passed()
    with torch.no_grad():
        torch.testing.assert_close(mlp(x.to(dtype)), found[0])
    with monkeypatch.context() as patched:
        patched.setattr(layers, "ALIGNED", 1)
        plain = passed()
    assert len(found) == len(exact) == (6 if learns else 2)
    for one, other, right in zip(found, plain, exact, strict=True):
        assert distance(one, right) <= 1.3 * distance(other, right)
    # Weights that come to lie elsewhere are seen at once.
    assert mlp.down_proj.bias is not None
    mlp.down_proj.bias.data *= 2
    mlp.down_proj.weight.data = mlp.down_proj.weight.data * 2
    torch.testing.assert_close(passed()[0], 2 * found[0])
