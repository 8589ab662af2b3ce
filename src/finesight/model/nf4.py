"""Frozen weights in four bits: NF4 with double quantisation (Dettmers et al. 2023,
arXiv:2305.14314), quantised and made in full by bitsandbytes.

Shapes: O outputs, I inputs of one layer; B = ceil(O I / 64) blocks of a matrix.
"""

from __future__ import annotations

import logging
import sys
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from finesight.errors import UserError
from finesight.model.frozen import KERNELS, Piece
from finesight.model.words import Norm, WordMatrix, Words

if KERNELS:
    from finesight.model.kernels import tile as tile_kernels
    from finesight.model.kernels import word as word_kernels

BLOCK, SCALES_BLOCK = 64, 256
"""Numbers of a matrix that share a scale, and scales that share theirs."""

AT_ONCE = 1 << 20
"""Numbers that are quantised at once: on a CPU each takes 64 bytes meanwhile."""


def bitsandbytes(setting: str) -> Any:
    """The package that quantises. Raises UserError, naming the setting, where it is missing."""
    try:
        return _imported()
    except ImportError as error:
        raise UserError(
            f"the package bitsandbytes cannot be imported: {error}",
            where=setting,
            expected="bitsandbytes, which quantises",
            remedy="pip install 'finesight[quant]'",
        ) from error


@lru_cache
def _imported() -> Any:
    # While it is imported on some processors, bitsandbytes fetches code from a hub through the
    # package `kernels`, and says so where that is missing: no code is fetched here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    modules: dict[str, Any] = sys.modules
    present = modules.get("kernels")
    modules["kernels"] = None
    try:
        import bitsandbytes
    finally:
        del modules["kernels"]
        if present is not None:
            modules["kernels"] = present
    return bitsandbytes


@lru_cache
def _levels(device: torch.device) -> Tensor:
    """The 256 values that an eight-bit scale stands for."""
    levels: Tensor = _imported().functional.create_dynamic_map().to(device)
    return levels


@lru_cache
def _values(device: torch.device) -> Tensor:
    """The 16 values that a code stands for, in blocks whose largest magnitude is 1."""
    values: Tensor = _imported().functional.get_4bit_type("nf4", device=device)
    return values


class Nf4Matrix(WordMatrix):
    """A frozen matrix [O, I] in about 4.13 bits a number.

    `codes` [ceil(O I / 2), 1] holds two numbers to a byte, row after row. Each block of them is
    scaled by its largest magnitude, kept as eight bits in `scales_B` less the mean of all, `mean`;
    blocks of these are scaled in turn by `coarse`, in fp32. The same bits as those of
    bitsandbytes.nn.Linear4bit.
    """

    codes: Tensor
    scales_B: Tensor
    coarse: Tensor
    mean: Tensor

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(outputs, inputs)
        blocks = -(-self.numbers // BLOCK)
        self.register_buffer("codes", torch.empty(-(-self.numbers // 2), 1, dtype=torch.uint8))
        self.register_buffer("scales_B", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("coarse", torch.empty(-(-blocks // SCALES_BLOCK)))
        self.register_buffer("mean", torch.empty(()))

    def pieces(self) -> tuple[Piece, ...]:
        """The dense matrix: it is quantised here."""
        return self._whole(self.fill)

    @torch.no_grad()
    def fill(self, values_OI: Tensor) -> None:
        """Quantise a matrix, on the device where the bits will lie."""
        self._check_whole(values_OI)
        functional = _imported().functional
        # Made now: while a step is recorded, its memory would be the recording's.
        _values(self.codes.device)
        flat = values_OI.flatten()
        scales = []
        for start in range(0, self.numbers, AT_ONCE):
            some = flat[start : start + AT_ONCE].to(self.codes.device)
            codes, state = functional.quantize_4bit(some, blocksize=BLOCK, quant_type="nf4")
            self.codes[start // 2 : start // 2 + len(codes)].copy_(codes)
            scales.append(state.absmax)
        scales_B = torch.cat(scales)
        self.mean.copy_(scales_B.mean())
        codes_B, state = functional.quantize_blockwise(
            scales_B - self.mean, code=_levels(scales_B.device), blocksize=SCALES_BLOCK
        )
        self.scales_B.copy_(codes_B)
        self.coarse.copy_(state.absmax)

    def _state(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        state = _imported().functional.QuantState
        return state(
            absmax=self.scales_B,
            shape=shape,
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.mean,
            state2=state(
                absmax=self.coarse,
                blocksize=SCALES_BLOCK,
                code=_levels(self.codes.device),
                dtype=torch.float32,
            ),
        )

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I], made anew in bf16, fp16 or fp32."""
        # As one row: on a CPU, bitsandbytes begins a new block with every row, where the rows are
        # no multiple of a block, though it did not when it quantised.
        state = self._state((self.numbers,), dtype)
        flat: Tensor = _imported().functional.dequantize_4bit(self.codes, state)
        return flat.reshape(self.outputs, self.inputs)

    def fits(self) -> bool:
        """Whether its rows are whole blocks."""
        return KERNELS and self.codes.is_cuda and self.inputs % BLOCK == 0

    def lay_out(self, x_1I: Tensor, norm: Norm | None) -> Words:
        """`WordMatrix`: neighbours are neighbours."""
        return word_kernels.laid_out(x_1I, norm, None)

    def row(self, x: Words, y_O: Tensor, bias_O: Tensor | None, added_O: Tensor | None) -> None:
        """x W^T + bias + added into `y_O`."""
        word_kernels.nf4_row(x, *self._parts(), y_O, bias_O, added_O)

    def tiles(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias by tensor cores."""
        return tile_kernels.nf4_tiles(
            x_RI, *self._parts(), bias, tile_kernels.plan(self.outputs, len(x_RI))
        )

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        levels = _levels(self.codes.device), _values(self.codes.device)
        return self.codes, self.scales_B, self.coarse, self.mean, levels
