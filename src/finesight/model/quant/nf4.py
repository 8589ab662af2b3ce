"""Frozen NF4 weights with double quantization (QLoRA), implemented with bitsandbytes.

Dettmers et al. 2023, arXiv:2305.14314.

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
from finesight.model.kernels import quant_gemm as quant_gemm_kernels
from finesight.model.kernels import quant_gemv as quant_gemv_kernels
from finesight.model.quant.base import Packed4BitMatrix, PackedInput, RmsNormParams

BLOCK_SIZE = 64
"""Number of elements that share a scale."""

SCALE_BLOCK_SIZE = 256
"""Number of scales that share a nested scale."""

CHUNK_ELEMENTS = 1 << 20
"""Number of elements quantized at once; a CPU needs 64 bytes of memory for each."""


def import_bitsandbytes(setting: str) -> Any:
    """Import bitsandbytes; raise a UserError that names `setting` if it is missing."""
    try:
        return _import_bitsandbytes()
    except ImportError as error:
        raise UserError(
            f"the package bitsandbytes cannot be imported: {error}",
            where=setting,
            expected="bitsandbytes, for quantization",
            remedy="pip install 'finesight[quant]'",
        ) from error


@lru_cache
def _import_bitsandbytes() -> Any:
    # On some CPUs bitsandbytes downloads code through the package `kernels` while it is imported,
    # and logs an error if that is missing. No code is downloaded here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    modules: dict[str, Any] = sys.modules
    previous = modules.get("kernels")
    modules["kernels"] = None
    try:
        import bitsandbytes
    finally:
        del modules["kernels"]
        if previous is not None:
            modules["kernels"] = previous
    return bitsandbytes


@lru_cache
def _codebooks(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 256 values of 8-bit codes for block scales, and those of NF4.

    The 16 values of NF4 are normalized to a largest magnitude of 1.
    """
    functional = _import_bitsandbytes().functional
    return functional.create_dynamic_map().to(device), functional.get_4bit_type("nf4", device)


class Nf4Matrix(Packed4BitMatrix):
    """NF4 matrix [O, I] with about 4.13 bits per element.

    The codes equal those of bitsandbytes.nn.Linear4bit.

    Attributes:
        codes: Two elements per byte, row by row, [ceil(O I / 2), 1].
        absmax_B: Largest magnitude of each block in 8 bits, relative to `absmax_mean`.
        nested_absmax: Scale of each block of 256 elements of `absmax_B`, in fp32.
        absmax_mean: Mean of the largest magnitudes of all blocks.
    """

    codes: Tensor
    absmax_B: Tensor
    nested_absmax: Tensor
    absmax_mean: Tensor

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__(out_features, in_features)
        blocks = -(-self.num_elements // BLOCK_SIZE)
        self.register_buffer("codes", torch.empty(-(-self.num_elements // 2), 1, dtype=torch.uint8))
        self.register_buffer("absmax_B", torch.empty(blocks, dtype=torch.uint8))
        self.register_buffer("nested_absmax", torch.empty(-(-blocks // SCALE_BLOCK_SIZE)))
        self.register_buffer("absmax_mean", torch.empty(()))

    def quantize(self, values_OI: Tensor) -> None:
        functional = _import_bitsandbytes().functional
        # Create them now: during a CUDA graph capture they would be allocated in the memory pool of
        # the graph.
        scale_codebook, _ = _codebooks(self.codes.device)
        flat = values_OI.flatten()
        absmax_chunks = []
        for start in range(0, self.num_elements, CHUNK_ELEMENTS):
            chunk = flat[start : start + CHUNK_ELEMENTS].to(self.codes.device)
            codes, state = functional.quantize_4bit(chunk, blocksize=BLOCK_SIZE, quant_type="nf4")
            self.codes[start // 2 : start // 2 + len(codes)].copy_(codes)
            absmax_chunks.append(state.absmax)
        absmax_B = torch.cat(absmax_chunks)
        self.absmax_mean.copy_(absmax_B.mean())
        codes_B, state = functional.quantize_blockwise(
            absmax_B - self.absmax_mean, code=scale_codebook, blocksize=SCALE_BLOCK_SIZE
        )
        self.absmax_B.copy_(codes_B)
        self.nested_absmax.copy_(state.absmax)

    def _quant_state(self, shape: tuple[int, ...], dtype: torch.dtype) -> Any:
        state = _import_bitsandbytes().functional.QuantState
        return state(
            absmax=self.absmax_B,
            shape=shape,
            blocksize=BLOCK_SIZE,
            quant_type="nf4",
            dtype=dtype,
            offset=self.absmax_mean,
            state2=state(
                absmax=self.nested_absmax,
                blocksize=SCALE_BLOCK_SIZE,
                code=_codebooks(self.codes.device)[0],
                dtype=torch.float32,
            ),
        )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        # Dequantize as one row: on a CPU, bitsandbytes starts a new block at each row if rows are
        # not multiples of a block, although its quantization does not.
        state = self._quant_state((self.num_elements,), dtype)
        flat: Tensor = _import_bitsandbytes().functional.dequantize_4bit(self.codes, state)
        return flat.reshape(self.out_features, self.in_features)

    def supports_kernels(self) -> bool:
        return self.has_kernels and self.in_features % BLOCK_SIZE == 0

    def pack_input(self, x_1I: Tensor, norm: RmsNormParams | None) -> PackedInput:
        return quant_gemv_kernels.pack_input(x_1I, norm, None)

    def gemv_packed(
        self, x: PackedInput, y_O: Tensor, bias_O: Tensor | None, residual_O: Tensor | None
    ) -> None:
        quant_gemv_kernels.nf4_gemv(x, *self._kernel_args(), y_O, bias_O, residual_O)

    def gemm(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        *weights, codebooks = self._kernel_args()
        return quant_gemm_kernels.gemm(
            quant_gemm_kernels.nf4_gemm_kernel,
            x_RI,
            (*weights, *codebooks),
            bias,
            self.out_features,
            shuffled=x_RI.is_cuda,
        )

    def _kernel_args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
        codebooks = _codebooks(self.codes.device)
        return self.codes, self.absmax_B, self.nested_absmax, self.absmax_mean, codebooks
