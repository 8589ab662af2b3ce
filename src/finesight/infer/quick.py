"""A step of the decoder that Qwen2 and Qwen3 share, in as few kernels as it takes.

It computes what `Decoder.forward` does for one new token a row. A step reads all weights for a few
rows of numbers: what is not that reading is launches, and each saved one counts.

Shapes: R rows, D width, I the MLP's inner width, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.infer.cache import StepAttention
from finesight.model.bank import AdapterBank
from finesight.model.experts import SparseMlp
from finesight.model.frozen import FrozenWeight
from finesight.model.language import DecoderLayer, SelfAttention
from finesight.model.layers import GatedMlp, RmsNorm
from finesight.model.linear import GroupedLinear, only
from finesight.model.network import VisionLanguageModel
from finesight.model.rope import Rotation
from finesight.model.updates import add_update
from finesight.model.words import Norm, WordMatrix, laid_out_for

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
    if model.lm_head is None:
        return _tied_head(model, x_RD)
    if not _is_plain(model.lm_head):
        return model.logits(model.normed(x_RD))
    return _read(model.lm_head, x_RD, decoder.norm)


def _tied_head(model: VisionLanguageModel, x_RD: Tensor) -> Tensor:
    norm, weight = model.model.norm, model.model.embed_tokens.weight
    if len(x_RD) > 1:
        return F.linear(norm(x_RD), weight)
    logits_1V: Tensor = quick_kernels.product(x_RD, weight, norm_I=norm.weight, eps=_eps(norm))
    return logits_1V


def _attend(
    norm: RmsNorm, own: SelfAttention, x_RD: Tensor, rotation: Rotation, attention: StepAttention
) -> Tensor:
    shape = (len(x_RD), -1, own.head_width)
    group = own.qkv_proj
    if _is_plain(group):
        joint = torch.split(_read(group, x_RD, norm), list(group.outputs.values()), dim=1)
        q_RHD, k_RKD, v_RKD = (torch.unflatten(y, 1, shape[1:]) for y in joint)
    else:
        q_RHD, k_RKD, v_RKD = (y.view(shape) for y in group(norm(x_RD)))
    norms = None
    if own.q_norm is not None and own.k_norm is not None:
        norms = own.q_norm.weight, own.k_norm.weight, _eps(own.q_norm)
    cache = attention.cache
    q_RHD = quick_kernels.turn_in(
        q_RHD, k_RKD, v_RKD, norms, rotation.cos_T1D, rotation.sin_T1D, attention.at_R,
        cache.keys_LPSKD[own.layer], cache.values_LPSKD[own.layer],
    )  # fmt: skip
    return _add(own.o_proj, attention.look(own.layer, q_RHD).flatten(1), x_RD)


def _gated(norm: RmsNorm, mlp: GatedMlp, x_RD: Tensor) -> Tensor:
    group = mlp.gate_up_proj
    if not _is_plain(group):
        gate_RI, up_RI = group(norm(x_RD))
        return F.silu(gate_RI).mul_(up_RI)
    if len(x_RD) == 1:
        return _one(group, x_RD, norm=norm, gated=True)
    y_RI: Tensor = quick_kernels.gate(_read(group, x_RD, norm))
    return y_RI


def _read(group: GroupedLinear, x_RD: Tensor, norm: RmsNorm) -> Tensor:
    """The group's outputs of norm(x), side by side."""
    if len(x_RD) == 1:
        return _one(group, x_RD, norm=norm)
    normed_RD = norm(x_RD)
    if isinstance(group.weight, FrozenWeight):
        return torch.cat(group(normed_RD), 1)
    y_RO = F.linear(normed_RD, group.weight, group.bias)
    return _updated(group, normed_RD, y_RO)


def _add(group: GroupedLinear, x_RI: Tensor, to_RD: Tensor) -> Tensor:
    """to + x W^T."""
    if not _is_plain(group) or group.bias is not None:
        return to_RD + only(group(x_RI))
    if len(x_RI) == 1:
        return _one(group, x_RI, to=to_RD)
    if isinstance(group.weight, FrozenWeight):
        return to_RD + only(group(x_RI))
    return _updated(group, x_RI, torch.addmm(to_RD, x_RI, group.weight.T))


def _updated(group: GroupedLinear, x_RI: Tensor, y_RO: Tensor) -> Tensor:
    bank = group.adapter
    if not isinstance(bank, AdapterBank):
        return y_RO
    return add_update(y_RO, F.linear(x_RI, bank.a_SI) * bank.shares_TS, bank.b_OS)


def _one(
    group: GroupedLinear,
    x_1I: Tensor,
    *,
    norm: RmsNorm | None = None,
    to: Tensor | None = None,
    gated: bool = False,
) -> Tensor:
    """All of a group for one row, in a kernel, and one more where it carries adapters."""
    normed: dict[str, Any] = {}
    if norm is not None:
        normed = {"norm_I": norm.weight, "eps": _eps(norm)}
    update, bank = None, group.adapter
    if isinstance(bank, AdapterBank):
        low_1S = quick_kernels.product(x_1I, bank.a_SI, times_1O=bank.shares_TS, **normed)
        update = quick_kernels.Update(low_1S, bank.b_OS)
    if isinstance(group.weight, FrozenWeight):
        y_1O = _words(group.weight, x_1I, group.bias, norm, to)
        if update is not None:
            add_update(y_1O, update.low_1S, update.ups_OS)
        return quick_kernels.gate(y_1O) if gated else y_1O
    one: Tensor = quick_kernels.product(
        x_1I, group.weight, bias_O=group.bias, update=update, added_1O=to, gated=gated, **normed
    )
    return one


def _words(
    weight: FrozenWeight,
    x_1I: Tensor,
    bias_O: Tensor | None,
    norm: RmsNorm | None,
    to: Tensor | None,
) -> Tensor:
    """The same for a group in four bits: a kernel lays the row out, one a layer multiplies it."""
    own = None if norm is None else Norm(norm.weight, _eps(norm))
    matrices = [matrix for matrix in weight.matrices if isinstance(matrix, WordMatrix)]
    widths = [matrix.outputs for matrix in matrices]
    y_1O = x_1I.new_empty(1, sum(widths))
    biases, added = (
        [None] * len(widths) if x is None else torch.split(x.view(-1), widths) for x in (bias_O, to)
    )
    rows = laid_out_for(matrices, x_1I, own)
    for matrix, x, y_O, bias, more in zip(
        matrices, rows, torch.split(y_1O[0], widths), biases, added, strict=True
    ):
        matrix.row(x, y_O, bias, more)
    return y_1O


def _eps(norm: RmsNorm) -> float:
    assert norm.eps is not None, "a norm without eps"
    return norm.eps


def _is_plain(group: GroupedLinear) -> bool:
    """Whether it is products of one kernel a layer: matrices in full, or words of four bits; not an
    adapter as one trains."""
    if group.adapter is not None and not isinstance(group.adapter, AdapterBank):
        return False
    weight = group.weight
    return not isinstance(weight, FrozenWeight) or all(
        isinstance(matrix, WordMatrix) and matrix.fits() for matrix in weight.matrices
    )
