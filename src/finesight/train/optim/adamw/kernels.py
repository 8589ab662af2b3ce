"""Triton kernel of the AdamW step, fused over all parameters of a group.

A program processes one tile of one parameter (`ParamTiles`). Moments are fp32 values, or codes of 8
bits in blocks with a scale. Launches require Triton.

Shapes: P parameters, T tiles of R rows of N = 256 elements, E flat elements and B blocks of a
group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from finesight.model.kernels.param_tiles import (
    NUM_WARPS,
    TILE_ROWS,
    ParamTiles,
    align_gradients,
    load_gradient,
    locate_tile,
)
from finesight.model.kernels.runtime import jit, tl

ADAM_EPS = 1e-8
"""Epsilon of torch.optim.AdamW."""


@jit
def _dequantize(codes, scale, signed: tl.constexpr):
    """Dequantize 8-bit codes to the levels of `create_dynamic_map`.

    Within a power of ten, the level is a linear function of the code. The function is steeper for
    larger powers, so the level is the maximum of all these linear functions.
    """
    if signed:
        m = tl.abs(codes.to(tl.int32) - 127).to(tl.float32) + 0.5
    else:
        m = codes.to(tl.float32) + 1.5
    slope: tl.constexpr = 9e-7 if signed else 4.5e-7
    level = m * slope - 8e-7
    for decade in tl.static_range(1, 7):
        level = tl.maximum(level, m * (slope * 5**decade) - 8e-7 * 10**decade)
    # Zero and one are the ends of the lines.
    level = tl.minimum(tl.maximum(level, 0.0), 1.0) * scale
    if signed:
        level = tl.where(codes.to(tl.int32) < 127, -level, level)
    return level


@jit
def _quantize(values, scale, signed: tl.constexpr):
    """Quantize values to the nearest levels of `create_dynamic_map`.

    This inverts `_dequantize` with the minimum of the inverse linear functions.
    """
    # Avoid division by the scale of a zero block.
    scaled = tl.abs(values) * (1.0 / tl.maximum(scale, 1.1754943508222875e-38))
    slope: tl.constexpr = 9e-7 if signed else 4.5e-7
    m = scaled * (1.0 / slope) + 8e-7 / slope
    for decade in tl.static_range(1, 7):
        m = tl.minimum(m, scaled * (1.0 / (slope * 5**decade)) + 8e-7 / slope * 2**decade)
    # Decades start at powers of two; the midpoint between two decades is slightly higher.
    below = m - 0.2
    crossed = m.to(tl.int32, bitcast=True) ^ below.to(tl.int32, bitcast=True)
    level_index = tl.where(crossed > 0x7FFFFF, below, m).to(tl.int32)
    top: tl.constexpr = 128 if signed else 256
    level_index = tl.where(m > top - 0.25, top, level_index)
    if signed:
        # Minus one is not a level.
        code = tl.where(values < 0.0, tl.maximum(127 - level_index, 0), 127 + level_index)
    else:
        # Non-zero values never round to zero.
        code = tl.where(scaled > 0.0, tl.maximum(level_index - 1, 1), 0)
    return code.to(tl.uint8)


@jit
def _load_master(weights, residual, offset, mask, residual_bytes: tl.constexpr):
    """Load fp32 master weights of `SplitBf16Master`.

    `residual_bytes` is the size of a residual: 2 for bf16 parameters, 4 for fp16 and 0 for fp32.
    """
    if residual_bytes == 4:
        master = tl.load(residual + offset, mask=mask, other=0.0)
    elif residual_bytes == 2:
        upper = tl.load(weights + offset, mask=mask, other=0).to(tl.int32) << 16
        lower = tl.load(residual + offset, mask=mask, other=0).to(tl.int32)
        master = (upper + lower).to(tl.float32, bitcast=True)
    else:
        master = tl.load(weights + offset, mask=mask, other=0.0)
    return master


@jit
def _store_master(master, weights, residual, offset, mask, residual_bytes: tl.constexpr):
    if residual_bytes == 2:
        bits = master.to(tl.int32, bitcast=True)
        tl.store(residual + offset, bits.to(tl.int16), mask=mask)
        tl.store(weights + offset, ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
    else:
        if residual_bytes == 4:
            tl.store(residual + offset, master, mask=mask)
        tl.store(weights + offset, master.to(weights.dtype.element_ty), mask=mask)


@jit
def _load_state(
    codes, scales, offset, blocks, mask, block_mask, is_8bit: tl.constexpr, signed: tl.constexpr,
):  # fmt: skip
    if is_8bit:
        code = tl.load(codes + offset, mask=mask, other=127 if signed else 0)
        scale = tl.load(scales + blocks, mask=block_mask, other=0.0)
        state = _dequantize(code, scale[:, None], signed)
    else:
        state = tl.load(codes + offset, mask=mask, other=0.0)
    return state


@jit
def _store_state(
    state, codes, scales, offset, blocks, mask, block_mask, is_8bit: tl.constexpr,
    signed: tl.constexpr,
):  # fmt: skip
    if is_8bit:
        scale = tl.max(tl.abs(state), axis=1)
        tl.store(codes + offset, _quantize(state, scale[:, None], signed), mask=mask)
        tl.store(scales + blocks, scale, mask=block_mask)
    else:
        tl.store(codes + offset, state, mask=mask)


@jit
def _adamw_kernel(
    param_index_T, param_table_P3, pointers_P, like, weights, residual, exp_avg, exp_avg_scale,
    exp_avg_sq, exp_avg_sq_scale, grad_factor_ptr, num_steps, next_num_steps, log_beta_1,
    log_beta_2, decay_factor, lr, one_minus_beta_1, beta_2, one_minus_beta_2, epsilon,
    residual_bytes: tl.constexpr, is_8bit: tl.constexpr, is_aligned: tl.constexpr,
    rows: tl.constexpr,
):  # fmt: skip
    grad_factor = tl.load(grad_factor_ptr)
    previous_steps = tl.load(num_steps)
    if tl.program_id(0) == 0:
        tl.store(
            next_num_steps,
            tl.where(grad_factor == grad_factor, previous_steps + 1.0, previous_steps),
        )
    if grad_factor != grad_factor:
        return
    # Bias corrections; one minus a value near one needs 64 bits.
    step_size = (lr / (1.0 - tl.exp((previous_steps + 1.0) * log_beta_1))).to(tl.float32)
    bias_correction = (1.0 / tl.sqrt(1.0 - tl.exp((previous_steps + 1.0) * log_beta_2))).to(
        tl.float32
    )
    p, start, param_offset, offset_RN, mask_RN = locate_tile(
        param_index_T, param_table_P3, is_aligned, rows
    )
    grad_RN = load_gradient(pointers_P, p, start, offset_RN, mask_RN, like) * grad_factor
    blocks_R = param_offset // 256 + tl.arange(0, rows)
    block_mask_R = start + tl.arange(0, rows) * 256 < tl.load(param_table_P3 + p * 3 + 2)
    offset_RN += param_offset
    exp_avg_RN = _load_state(
        exp_avg, exp_avg_scale, offset_RN, blocks_R, mask_RN, block_mask_R, is_8bit, True
    )
    exp_avg_sq_RN = _load_state(
        exp_avg_sq, exp_avg_sq_scale, offset_RN, blocks_R, mask_RN, block_mask_R, is_8bit, False
    )
    exp_avg_RN += one_minus_beta_1 * (grad_RN - exp_avg_RN)
    exp_avg_sq_RN = exp_avg_sq_RN * beta_2 + one_minus_beta_2 * grad_RN * grad_RN
    master_RN = _load_master(weights, residual, offset_RN, mask_RN, residual_bytes) * decay_factor
    # The update uses the moments before rounding.
    master_RN -= step_size * (exp_avg_RN / (tl.sqrt(exp_avg_sq_RN) * bias_correction + epsilon))
    _store_master(master_RN, weights, residual, offset_RN, mask_RN, residual_bytes)
    _store_state(
        exp_avg_RN, exp_avg, exp_avg_scale, offset_RN, blocks_R, mask_RN, block_mask_R,
        is_8bit, True,
    )  # fmt: skip
    _store_state(
        exp_avg_sq_RN, exp_avg_sq, exp_avg_sq_scale, offset_RN, blocks_R, mask_RN, block_mask_R,
        is_8bit, False,
    )  # fmt: skip


def adamw_step(
    tiles: ParamTiles,
    gradients: Sequence[Tensor | None],
    weights: tuple[Tensor, Tensor | None],
    moments: Sequence[tuple[Tensor, Tensor | None]],
    grad_factor: Tensor,
    step_counts: tuple[Tensor, Tensor],
    lr: float,
    decay_factor: float,
    betas: tuple[float, float],
) -> None:
    """Apply an AdamW step to one parameter group with one kernel.

    Args:
        gradients: Gradient of each parameter; None counts as zero.
        weights: Parameters, and the bits that their data type lacks; updated in-place.
        moments: Values of both moments, and the scales of 8-bit blocks; updated in-place.
        grad_factor: Scalar on the device that multiplies the gradients; NaN skips the step.
        step_counts: Number of previous steps, and output for the new count; scalars on the device.
        decay_factor: Factor of the weights for decoupled weight decay.
    """
    params_E, residual_E = weights
    gradients = align_gradients(gradients)
    like = next((gradient for gradient in gradients if gradient is not None), params_E)
    residual_bytes = 0 if residual_E is None else residual_E.itemsize
    beta_1, beta_2 = betas
    (exp_avg_E, exp_avg_B), (exp_avg_sq_E, exp_avg_sq_B) = moments
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    _adamw_kernel[(len(tiles.param_index_T),)](
        tiles.param_index_T, tiles.param_table_P3, tiles.data_pointers(gradients), like,
        params_E.view(torch.int16) if residual_bytes == 2 else params_E, residual_E,
        exp_avg_E, exp_avg_B, exp_avg_sq_E, exp_avg_sq_B, grad_factor,
        *step_counts, *logs, decay_factor, lr, 1 - beta_1, beta_2, 1 - beta_2,
        ADAM_EPS, residual_bytes=residual_bytes, is_8bit=exp_avg_B is not None,
        is_aligned=tiles.is_aligned, rows=TILE_ROWS, num_warps=NUM_WARPS,
    )  # fmt: skip
