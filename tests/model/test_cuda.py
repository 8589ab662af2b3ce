"""GPU: variable-length attention, the bucketed path, 16-bit dtypes, no host synchronization."""

import contextlib
from dataclasses import asdict, replace
from typing import Any

import hf_reference
import pytest
import torch
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.model import attention, layers
from finesight.model.cuda_graph_cache import CudaGraphCache
from finesight.model.layers import GatedMlp, RmsNorm, add_norm
from finesight.model.linear import FusedLinear
from finesight.model.vlm import VisionLanguageModel

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda")
SAMPLES = [
    hf_reference.make_conversation(1, 3, ("image", (1, 10, 12)), 4),
    hf_reference.make_conversation(2, 19),
    hf_reference.make_conversation(3, 1, ("video", (3, 4, 6)), 2, ("image", (1, 2, 4)), 5),
    hf_reference.make_conversation(4, 2, ("image", (1, 18, 10)), 1),
]
LENGTHS = [33, 64, 1, 64, 130, 64]
HOST = {
    "ids_T",
    "position_ids_3T",
    "cu_seqlens_S1",
    "patches_ND",
    "visual_indices_M",
    "logit_indices_L",
    "labels_L",
}
HALF = [torch.bfloat16, torch.float16]


def wide_config(family: str) -> dict[str, Any]:
    """Return a config with head dimension 16, which the kernel supports."""
    if family.startswith("qwen3_vl"):
        return hf_reference.make_config(family, vision={"hidden_size": 32})
    return hf_reference.make_config(
        family,
        hidden_size=64,
        rope_scaling={"type": "mrope", "mrope_section": [2, 3, 3]},
        vision={"out_hidden_size" if family == "qwen2_5_vl" else "hidden_size": 64},
    )


def on_card(theirs: Any, dtype: torch.dtype) -> Any:
    """Move the reference model; only its parameters have `dtype`, and fp32 does not use TF32."""
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
def test_half_precision_attention_matches_fp32_cpu(causal, kv_heads, width, dtype, by_segment):
    inputs = [x.requires_grad_() for x in heads(kv_heads, width, dtype)]
    assert attention.supports_varlen_attention(inputs[0])
    segments = attention.Segments.from_lengths(LENGTHS, CUDA)
    if by_segment:
        found = attention.bucketed_attention(*inputs, segments.length_buckets, causal)
    else:
        found = attention.varlen_attention(*inputs, segments, causal=causal)
    exact = [x.detach().float().cpu().requires_grad_() for x in inputs]
    expected = attention.varlen_attention(
        *exact, attention.Segments.from_lengths(LENGTHS, torch.device("cpu")), causal=causal
    )
    assert hf_reference.max_relative_error(found.cpu(), expected) < 0.01
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((found * weights.to(found)).sum(), inputs)
    theirs = torch.autograd.grad((expected * weights).sum(), exact)
    for mine, other in zip(ours, theirs, strict=True):
        assert hf_reference.max_relative_error(mine.cpu(), other) < 0.02


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_bf16_error_is_not_larger_than_reference(family):
    exact = on_card(hf_reference.make_reference_model(wide_config(family)), torch.float32)
    batch = hf_reference.pack_conversations(exact, SAMPLES).to(CUDA)
    with torch.no_grad():
        expected = torch.cat([hf_reference.reference_logits(exact, sample) for sample in SAMPLES])
        fine = hf_reference.make_native_model(wide_config(family), exact)
        assert hf_reference.max_relative_error(fine.compute_logits(fine(batch)), expected) <= 1e-5
        rough = on_card(exact, torch.bfloat16)
        ours = hf_reference.make_native_model(wide_config(family), rough)
        found = ours.compute_logits(ours(batch))
        theirs = torch.cat([hf_reference.reference_logits(rough, sample) for sample in SAMPLES])
    off = (found - expected).float().square().mean()
    assert off <= 1.5 * (theirs - expected).float().square().mean()
    assert off > 0


def step(model: VisionLanguageModel, batch: PackedBatch) -> None:
    model(batch).float().square().mean().backward()


def encode_images(model: VisionLanguageModel, batch: PackedBatch) -> None:
    with torch.inference_mode():
        model.encode_images(batch.patches_ND, batch.grid_thw)


@pytest.mark.parametrize("work", [step, encode_images])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_forward_and_step_do_not_synchronize(family, work):
    theirs = hf_reference.make_reference_model(wide_config(family))
    batch = hf_reference.pack_conversations(theirs, SAMPLES)
    model = hf_reference.make_native_model(wide_config(family), on_card(theirs, torch.bfloat16))
    batch = replace(
        batch,
        **{name: tensor.pin_memory() for name, tensor in asdict(batch).items() if name in HOST},
    )
    work(model, batch.to(CUDA))  # The first call fills the caches.
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work(model, batch.to(CUDA))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("width", [8, 16, 40, 72, 80, 104, 128])
@pytest.mark.parametrize("lengths", [[64, 64, 64], [400, 400], [300, 7, 1, 80, 128]])
def test_frozen_encoder_attention_matches_fp32_cpu(lengths, width, dtype):
    # Adjacent as in a fused projection, inside of memory that must not be read.
    fused = torch.full((sum(lengths) + 128, 12, width), torch.nan, dtype=dtype, device=CUDA)
    inputs = [*fused[64:-64].chunk(3, dim=1)]
    for own, drawn in zip(inputs, heads(4, width, dtype), strict=True):
        own.copy_(drawn.repeat(3, 1, 1)[: sum(lengths)])
    segments = attention.Segments.from_lengths(lengths, CUDA)
    with torch.no_grad():
        found = attention.varlen_attention(*inputs, segments, causal=False)
    exact = [x.float().cpu() for x in inputs]
    expected = attention.varlen_attention(
        *exact, attention.Segments.from_lengths(lengths, torch.device("cpu")), causal=False
    )
    assert hf_reference.max_relative_error(found.cpu(), expected) < 0.01


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_fused_residual_norm_matches_two_steps(dtype):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, 1280, generator=generator).to(CUDA, dtype) for _ in range(2))
    for norm in (torch.nn.LayerNorm(1280, eps=1e-6), RmsNorm(1280, eps=1e-6)):
        norm.weight.data.normal_(generator=generator)
        own = norm.to(CUDA, dtype)
        reader = FusedLinear(1280, {"qkv": 16}, bias=False)
        with torch.no_grad():
            total, normed = add_norm(x, y, own, reader)
        retained, expected = add_norm(x, y, own, reader)
        assert torch.equal(total, retained)
        torch.testing.assert_close(normed, expected, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("trainable", [False, True])
def test_odd_width_gated_mlp_error_is_bounded(trainable, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    mlp = GatedMlp(64, 100, bias=True).requires_grad_(trainable).to(CUDA)
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
        patched.setattr(layers, "ALIGNMENT", 1)
        baseline = passed()
    assert len(found) == len(exact) == (6 if trainable else 2)
    for one, other, right in zip(found, baseline, exact, strict=True):
        assert hf_reference.max_relative_error(one, right) <= 1.3 * hf_reference.max_relative_error(
            other, right
        )
    # Changed storage of weights is detected at once.
    assert mlp.down_proj.bias is not None
    mlp.down_proj.bias.data *= 2
    mlp.down_proj.weight.data = mlp.down_proj.weight.data * 2
    torch.testing.assert_close(passed()[0], 2 * found[0])


@pytest.mark.parametrize("output", [True, False])
def test_failed_capture_falls_back_to_eager(output):
    """Who waits for the card in it spoils it, whether or not he hears of that."""
    torch.manual_seed(7)
    expected = [torch.rand(3, device=CUDA) for _ in range(3)]
    torch.manual_seed(7)
    drawn = [torch.rand(3, device=CUDA)]
    graphs, values = CudaGraphCache(CUDA), torch.ones(3, device=CUDA)

    def wait() -> torch.Tensor:
        with contextlib.nullcontext() if output else contextlib.suppress(RuntimeError):
            values.sum().item()
        return values * 2

    assert graphs.run(1, wait).tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError):
        graphs.run(1, wait)
    drawn.append(torch.rand(3, device=CUDA))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    # What another stream has used comes back once that is through.
    with torch.cuda.stream(torch.cuda.Stream()):
        lent = torch.empty(1 << 26, dtype=torch.uint8, device=CUDA)
    lent.record_stream(torch.cuda.current_stream())
    del lent
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + (1 << 26)
    again = CudaGraphCache(CUDA)
    for _ in range(3):
        assert again.run(1, lambda: values * 3).tolist() == [3, 3, 3]
    drawn.append(torch.rand(3, device=CUDA))
    assert torch.equal(torch.stack(drawn), torch.stack(expected))


def test_graphs_are_captured_once_per_key():
    """Request keys in any order; each call runs once, eagerly, captured or replayed."""
    total = torch.zeros(8, device=CUDA)

    def add(number: int) -> torch.Tensor:
        total[:number] += number
        return total[:number] * 2

    graphs, wanted = CudaGraphCache(CUDA), torch.zeros(8)
    for number in (1, 4, 1, 1, 4, 8, 4, 1, 8, 8):
        wanted[:number] += number
        found = graphs.run(number, lambda number=number: add(number))
        assert torch.equal(found.cpu(), 2 * wanted[:number])
    assert torch.equal(total.cpu(), wanted)
