"""Steps in few kernels compute what the layers compute."""

import pytest
import torch
import torch.nn.functional as F

from finesight.model.attention import Segments, varlen_attention
from finesight.model.layers import RotaryCosSin, apply_rotary_pos_emb

pytestmark = pytest.mark.gpu

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def relative_error(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> bool:
    """Both in fp32, by the length of their difference."""
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).norm() <= bound * wanted.norm())


def random_tensor(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


@NARROW
@pytest.mark.parametrize("inputs", [96, 1536, 5000])
@pytest.mark.parametrize("outputs", [40, 3100, 70000])
def test_fused_gemv_with_norm_bias_and_residual(dtype, inputs, outputs):
    from finesight.model.kernels import decoding

    x_1I, norm_I = random_tensor(1, inputs, dtype=dtype), random_tensor(inputs, dtype=dtype)
    w_OI = random_tensor(outputs, inputs, dtype=dtype) * inputs**-0.5
    bias_O, added_1O = random_tensor(outputs, dtype=dtype), random_tensor(1, outputs, dtype=dtype)
    normed = F.rms_norm(x_1I.double(), (inputs,), norm_I.double(), 1e-6)
    wide = w_OI.double()
    found = decoding.fused_gemv(x_1I, w_OI, norm_I=norm_I, eps=1e-6, bias_O=bias_O)
    assert relative_error(found, F.linear(normed, wide, bias_O.double()), 4e-3)
    found = decoding.fused_gemv(x_1I, w_OI, residual_1O=added_1O)
    assert relative_error(found, F.linear(x_1I.double(), wide) + added_1O.double(), 4e-3)
    gate, up = F.linear(normed, wide).chunk(2, dim=-1)
    found = decoding.fused_gemv(x_1I, w_OI, norm_I=norm_I, eps=1e-6, is_gated=True)
    assert relative_error(found, F.silu(gate) * up, 4e-3)
    ups_OS, share_1S = random_tensor(outputs, 12, dtype=dtype), random_tensor(1, 12, dtype=dtype)
    low = decoding.fused_gemv(
        x_1I, w_OI[:12].contiguous(), norm_I=norm_I, eps=1e-6, output_scale_1O=share_1S
    )
    assert relative_error(low, F.linear(normed, wide[:12]) * share_1S, 4e-3)
    delta = decoding.GemvLoraDelta(low, ups_OS)
    more = F.linear(low.double(), ups_OS.double())
    found = decoding.fused_gemv(x_1I, w_OI, lora_delta=delta, residual_1O=added_1O)
    assert relative_error(found, F.linear(x_1I.double(), wide) + more + added_1O.double(), 4e-3)
    gate, up = (F.linear(normed, wide) + more).chunk(2, dim=-1)
    found = decoding.fused_gemv(
        x_1I, w_OI, norm_I=norm_I, eps=1e-6, lora_delta=delta, is_gated=True
    )
    assert relative_error(found, F.silu(gate) * up, 4e-3)


@NARROW
@pytest.mark.parametrize("num_seqs", [1, 5])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_and_cache_write_are_fused(dtype, num_seqs, normed):
    from finesight.model.kernels import decoding

    heads, key_heads, width = 6, 2, 24
    qkv = random_tensor(num_seqs, (heads + 2 * key_heads) * width, dtype=dtype)
    q_RHD, k_RKD, v_RKD = (
        x.unflatten(1, (-1, width))
        for x in qkv.split([heads * width, key_heads * width, key_heads * width], 1)
    )
    angles = random_tensor(num_seqs, width // 2, dtype=torch.float32)
    for kind in (dtype, torch.float32):
        rotation = RotaryCosSin.from_angles(angles, kind)
        norms = decoding.QKNorms(
            random_tensor(width, dtype=dtype), random_tensor(width, dtype=dtype) * 2, 1e-6
        )
        keys, values = (torch.zeros(3, 16, key_heads, width, dtype=dtype).cuda() for _ in range(2))
        at_R = torch.tensor([3, 20, 47, 16, 1][:num_seqs], device="cuda")
        found = decoding.rope_and_cache(
            q_RHD, k_RKD, v_RKD, norms if normed else None, rotation.cos_T1D, rotation.sin_T1D,
            at_R, keys, values,
        )  # fmt: skip
        q, k = q_RHD, k_RKD
        if normed:
            q, k = (F.rms_norm(x, (width,), norms[n], 1e-6) for n, x in enumerate((q, k)))
        assert relative_error(found, apply_rotary_pos_emb(q, rotation), 2e-3)
        assert relative_error(keys.flatten(0, 1)[at_R], apply_rotary_pos_emb(k, rotation), 2e-3)
        assert torch.equal(values.flatten(0, 1)[at_R], v_RKD)
        assert int(values.flatten(0, 1).any(-1).any(-1).sum()) == num_seqs


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_flash_decode_equals_flash_attention(head_dim):
    """A decoding step has each bit of the last rows of a forward pass over whole sequences."""
    from finesight.model.kernels import decoding

    heads, key_heads, block, lengths = 6, 2, 64, (1, 64, 65, 300, 777)
    segments = Segments.from_lengths(lengths, torch.device("cuda"))
    q_THD = random_tensor(sum(lengths), heads, head_dim, dtype=torch.bfloat16) * 3
    k_TKD, v_TKD = random_tensor(2, sum(lengths), key_heads, head_dim, dtype=torch.bfloat16)
    expected = varlen_attention(q_THD, k_TKD, v_TKD, segments, causal=True, key_segments=segments)
    num_blocks = [-(-length // block) for length in lengths]
    order = torch.randperm(sum(num_blocks), generator=torch.Generator().manual_seed(0)) + 1
    table_RB = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int32)
    keys, values = (
        torch.full((2, len(order) + 1, block, key_heads, head_dim), torch.nan).cuda().to(q_THD)
    )
    starts = segments.cu_seqlens_S1.tolist()
    for row, ids in enumerate(torch.split(order, num_blocks)):
        table_RB[row, : len(ids)] = ids
        tokens = slice(starts[row], starts[row + 1])
        for cache, x_TKD in ((keys, k_TKD), (values, v_TKD)):
            sequence = cache[ids.cuda()].flatten(0, 1)
            sequence[: lengths[row]] = x_TKD[tokens]
            cache[ids.cuda()] = sequence.unflatten(0, (-1, block))
    last = segments.cu_seqlens_S1[1:].long() - 1
    found = decoding.flash_decode(
        q_THD[last], keys, values, table_RB.cuda(), segments.cu_seqlens_S1.diff().long()
    )
    assert torch.equal(found, expected[last])
