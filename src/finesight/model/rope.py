"""Rotary position embeddings (Su et al. 2021).

Element i of a head is paired with element i + D/2 and rotated by an angle proportional to the
position.

Shapes: T tokens, N patches, H heads, D head dimension, F = D/2 frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finesight.model.config import DecoderConfig, VisionConfig
from finesight.model.fused_ops import apply_rotary


@dataclass(frozen=True)
class RotaryCosSin:
    """Cosines and signed sines of the rotation angles of each token, shared by all heads."""

    cos_T1D: Tensor
    sin_T1D: Tensor

    @classmethod
    def from_angles(cls, angles_TF: Tensor, dtype: torch.dtype) -> RotaryCosSin:
        cos_TF, sin_TF = angles_TF.cos(), angles_TF.sin()
        cos_TD = torch.cat([cos_TF, cos_TF], -1)
        sin_TD = torch.cat([-sin_TF, sin_TF], -1)
        return cls(cos_TD.unsqueeze(1).to(dtype), sin_TD.unsqueeze(1).to(dtype))


def apply_rotary_pos_emb(x_THD: Tensor, rotary: RotaryCosSin) -> Tensor:
    """Rotate each head by the angles of its token, in the wider of both dtypes."""
    return apply_rotary(x_THD, rotary.cos_T1D, rotary.sin_T1D)


def apply_partial_rotary_pos_emb(x_THD: Tensor, rotary: RotaryCosSin) -> Tensor:
    """Rotate the leading elements of each head, as many as there are angles."""
    rotary_dim = rotary.cos_T1D.shape[-1]
    rotated_THR = apply_rotary_pos_emb(x_THD[..., :rotary_dim].contiguous(), rotary)
    return torch.cat([rotated_THR, x_THD[..., rotary_dim:]], dim=-1)


@torch.no_grad()
def compute_mrope(
    position_ids_3T: Tensor, config: DecoderConfig, dtype: torch.dtype
) -> RotaryCosSin:
    """Compute multimodal rotary embeddings (M-RoPE; Wang et al. 2024, Qwen2-VL, section 2.1).

    Each frequency uses one of the position axes time, height and width. Cosines and sines are
    rounded to `dtype`, as in the training of the base models.
    """
    device = position_ids_3T.device
    axes_F = _axis_tensor(config.mrope_axes, device)
    position_ids_TF = position_ids_3T.index_select(0, axes_F).T.float()
    return RotaryCosSin.from_angles(
        position_ids_TF * inverse_frequencies(config.rotary_dim, config.rope_theta, device), dtype
    )


@torch.no_grad()
def compute_vision_rope(position_ids_N2: Tensor, config: VisionConfig) -> RotaryCosSin:
    """Compute 2-D rotary embeddings of patches in fp32, with half of the frequencies per axis."""
    inv_freq_F = inverse_frequencies(
        config.head_dim // 2, config.rope_theta, position_ids_N2.device
    )
    angles_N2F = position_ids_N2.unsqueeze(-1).float() * inv_freq_F
    return RotaryCosSin.from_angles(angles_N2F.flatten(1), torch.float32)


@lru_cache
def inverse_frequencies(head_dim: int, rope_theta: float, device: torch.device) -> Tensor:
    """Return the rotary frequencies theta^(-2 i / head_dim) of a head in fp32."""
    # Created outside inference mode: a tensor cached during generation may be used in a backward
    # pass.
    with torch.inference_mode(False):
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return (1.0 / rope_theta**exponents).to(device)


@lru_cache
def _axis_tensor(axes: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(axes, device=device)
