"""Rotary positions (Su et al. 2021): a head's numbers turn in pairs, by angles that grow with the
token's position. The families pair number i of a head with number i + D/2.

Shapes: T tokens, N patches, H heads, D numbers of a head, F = D/2 frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finesight.model.fused import turn
from finesight.model.geometry import LanguageGeometry, VisionGeometry


@dataclass(frozen=True)
class Rotation:
    """Cosines and signed sines for each token, the same for all heads: x cos + swap(x) sin,
    where swap exchanges the halves of a head and sin carries the minus of its first half."""

    cos_T1D: Tensor
    sin_T1D: Tensor

    @classmethod
    def by(cls, angles_TF: Tensor, dtype: torch.dtype) -> Rotation:
        """From angles in radians (fp32), rounded once to `dtype`."""
        cos_TF, sin_TF = angles_TF.cos(), angles_TF.sin()
        cos_TD = torch.cat([cos_TF, cos_TF], -1)
        sin_TD = torch.cat([-sin_TF, sin_TF], -1)
        return cls(cos_TD.unsqueeze(1).to(dtype), sin_TD.unsqueeze(1).to(dtype))


def rotate(x_THD: Tensor, rotation: Rotation) -> Tensor:
    """Turn each head by its token's angles, in the wider of both types; the type of `x` back."""
    return turn(x_THD, rotation.cos_T1D, rotation.sin_T1D)


@torch.no_grad()
def language_rotation(
    positions_3T: Tensor, geometry: LanguageGeometry, dtype: torch.dtype
) -> Rotation:
    """M-RoPE (Wang et al. 2024, Qwen2-VL, section 2.1): each frequency reads one of the rows time,
    height and width. Rounded to `dtype`, as the models were trained."""
    device = positions_3T.device
    rows_F = _rows(geometry.rows, device)
    positions_TF = positions_3T.index_select(0, rows_F).T.float()
    return Rotation.by(
        positions_TF * head_frequencies(geometry.head_width, geometry.theta, device), dtype
    )


@torch.no_grad()
def vision_rotation(positions_N2: Tensor, geometry: VisionGeometry) -> Rotation:
    """Half of the frequencies read a patch's row and half its column; kept in fp32."""
    numbers_F = head_frequencies(geometry.head_width // 2, geometry.theta, positions_N2.device)
    angles_N2F = positions_N2.unsqueeze(-1).float() * numbers_F
    return Rotation.by(angles_N2F.flatten(1), torch.float32)


@lru_cache
def head_frequencies(width: int, theta: float, device: torch.device) -> Tensor:
    """theta^(-2 i / width) for each pair i of a head, [width / 2] in fp32."""
    # A cached tensor made while generating must still serve a later backward pass.
    with torch.inference_mode(False):
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        return (1.0 / theta**exponents).to(device)


@lru_cache
def _rows(rows: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(rows, device=device)
