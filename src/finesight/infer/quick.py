"""A step of the decoder that Qwen2 and Qwen3 share, in as few kernels as it takes.

It computes what `Decoder.forward` does for one new token a row. A step reads all weights for a few
rows of numbers: what is not that reading is launches, and each saved one counts.

Shapes: R rows, D width, I the MLP's inner width, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.infer.cache import StepAttention
from finesight.model.experts import SparseMlp
from finesight.model.frozen import FrozenWeight
from finesight.model.language import DecoderLayer, SelfAttention
from finesight.model.layers import GatedMlp, RmsNorm
from finesight.model.linear import GroupedLinear, only
from finesight.model.network import VisionLanguageModel
from finesight.model.rope import Rotation

_TRITON = find_spec("triton") is not None

if _TRITON:
    from finesight.infer import quick_kernels


def is_quick(model: VisionLanguageModel) -> bool:
    """Whether its steps can be computed here: 16-bit numbers on a card, layers of this decoder."""
    weight = model.model.embed_tokens.weight
    narrow = weight.dtype in (torch.bfloat16, torch.float16)
    known = all(isinstance(layer, DecoderLayer) for layer in model.model.layers)
    return _TRITON and weight.is_cuda and narrow and known


def quick_step(
    model: VisionLanguageModel, ids_R: Tensor, positions_3R: Tensor, attention: StepAttention
) -> Tensor:
    """One more token for each row to logits [R, V]."""
    decoder = model.model
    x_RD = decoder.embed(ids_R)
    rotation = decoder.rotations(positions_3R, attention, x_RD.dtype)
    assert isinstance(rotation, Rotation), f"positions turn by a {type(rotation).__name__}"
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer), f"a layer is a {type(layer).__name__}"
        x_RD = _attend(layer.input_layernorm, layer.self_attn, x_RD, rotation, attention)
        mlp, norm = layer.mlp, layer.post_attention_layernorm
        if isinstance(mlp, SparseMlp):
            x_RD = x_RD + mlp(norm(x_RD))
        else:
            x_RD = _add(mlp.down_proj, _gated(norm, mlp, x_RD), x_RD)
    head = decoder.embed_tokens.weight if model.lm_head is None else _plain(model.lm_head)
    if head is None:
        return model.logits(model.normed(x_RD))
    return _product(x_RD, head, decoder.norm)


def _attend(
    norm: RmsNorm, own: SelfAttention, x_RD: Tensor, rotation: Rotation, attention: StepAttention
) -> Tensor:
    shape = (len(x_RD), -1, own.head_width)
    group = own.qkv_proj
    weight = _plain(group)
    if weight is not None:
        joint = torch.split(
            _product(x_RD, weight, norm, group.bias), list(group.outputs.values()), dim=1
        )
        q_RHD, k_RKD, v_RKD = (torch.unflatten(y, 1, shape[1:]) for y in joint)
    else:
        q_RHD, k_RKD, v_RKD = (y.view(shape) for y in group(norm(x_RD)))
    norms = None
    if own.q_norm is not None and own.k_norm is not None:
        assert own.q_norm.eps is not None, "a norm without eps"
        norms = own.q_norm.weight, own.k_norm.weight, own.q_norm.eps
    cache = attention.cache
    q_RHD = quick_kernels.turn_in(
        q_RHD, k_RKD, v_RKD, norms, rotation.cos_T1D, rotation.sin_T1D, attention.at_R,
        cache.keys_LPSKD[own.layer], cache.values_LPSKD[own.layer],
    )  # fmt: skip
    return _add(own.o_proj, attention.look(own.layer, q_RHD).flatten(1), x_RD)


def _gated(norm: RmsNorm, mlp: GatedMlp, x_RD: Tensor) -> Tensor:
    group = mlp.gate_up_proj
    weight = _plain(group)
    if weight is None:
        gate_RI, up_RI = group(norm(x_RD))
        return F.silu(gate_RI).mul_(up_RI)
    assert group.bias is None, "a decoder's MLP with a bias"
    if len(x_RD) > 1:
        y_RI: Tensor = quick_kernels.gate(F.linear(norm(x_RD), weight))
    else:
        y_RI = quick_kernels.product(
            x_RD, weight, norm_I=norm.weight, eps=norm.eps or 0.0, gated=True
        )
    return y_RI


def _product(x_RD: Tensor, weight: Tensor, norm: RmsNorm, bias: Tensor | None = None) -> Tensor:
    """norm(x) W^T + bias."""
    if len(x_RD) > 1:
        return F.linear(norm(x_RD), weight, bias)
    y_RO: Tensor = quick_kernels.product(
        x_RD, weight, norm_I=norm.weight, eps=norm.eps or 0.0, bias_O=bias
    )
    return y_RO


def _add(group: GroupedLinear, x_RI: Tensor, to_RD: Tensor) -> Tensor:
    """to + x W^T."""
    weight = _plain(group)
    if weight is None or group.bias is not None:
        return to_RD + only(group(x_RI))
    if len(x_RI) > 1:
        return torch.addmm(to_RD, x_RI, weight.T)
    y_RD: Tensor = quick_kernels.product(x_RI, weight, added_1O=to_RD)
    return y_RD


def _plain(group: GroupedLinear) -> Tensor | None:
    """The weight, where the product with it is all there is: no adapter, no weight in few bits."""
    weight = group.weight
    return None if group.adapter is not None or isinstance(weight, FrozenWeight) else weight
