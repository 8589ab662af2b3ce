"""Selection of the layers that are quantized while a model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from finesight.config import WeightFormat
from finesight.errors import UserError
from finesight.model.fused_linear import FusedLinear
from finesight.model.quant.base import QuantizedMatrix, QuantizedWeight
from finesight.model.quant.fp8 import FP8_ALIGNMENT, Fp8Weight
from finesight.model.quant.int4 import RtnInt4Matrix
from finesight.model.quant.nf4 import Nf4Matrix, import_bitsandbytes
from finesight.model.quant.rowwise_quant import Fp8Matrix, Int8Matrix
from finesight.model.trainable import ModelPart, get_part
from finesight.model.vlm import VisionLanguageModel

MATRIX_TYPES: Mapping[str, Callable[[int, int], QuantizedMatrix]] = {
    "nf4": Nf4Matrix,
    "fp8": Fp8Matrix,
    "int8": Int8Matrix,
    "int4": RtnInt4Matrix,
}

_DECODER_PARTS: tuple[ModelPart, ...] = ("language", "embeddings")
"""Model parts that `--weight-format` quantizes, if the head is not tied to the embeddings."""


def quantize_model_parts(
    model: VisionLanguageModel,
    nf4_parts: Collection[ModelPart],
    fp8_parts: Collection[ModelPart],
    weight_format: WeightFormat,
    folder: Path,
) -> None:
    """Replace weights of a model by empty quantized matrices before the weights are loaded.

    `nf4_parts` selects all linear layers of these parts, `fp8_parts` those whose sizes support FP8
    matmuls (`model.quant.fp8`). A `weight_format` other than auto selects the decoder and the head
    in that format instead.

    With `weight_format`, vision encoder and merger remain in their stored dtype: they process an
    image once, with more rows than quantized kernels accelerate, and their errors affect all later
    tokens. A tied head remains as well, because it is the embedding table.

    Raises:
        UserError: Quantization was requested for a tied head or for a decoder with experts, or a
            package is missing. The message names `folder`.
    """
    requests: list[tuple[Collection[ModelPart], str, str]] = [
        (nf4_parts, "nf4", "tune.quantize.nf4"),
        (fp8_parts, "fp8", "tune.quantize.fp8"),
    ]
    if weight_format != "auto":
        decoder: tuple[ModelPart, ...] = ("language",) if model.lm_head is None else _DECODER_PARTS
        requests = [(decoder, weight_format, "--weight-format")]
    for parts, bit_format, where in requests:
        _check_quantizable(model, parts, bit_format, where, folder)
        uses_fp8_matmul = where == "tune.quantize.fp8"
        for linear in _select_linears(model, parts):
            if supports_fp8_matmul(linear) or not uses_fp8_matmul:
                with torch.device("meta"):
                    linear.set_quantized_weight(
                        MATRIX_TYPES[bit_format], Fp8Weight if uses_fp8_matmul else QuantizedWeight
                    )


def _check_quantizable(
    model: VisionLanguageModel,
    parts: Collection[ModelPart],
    bit_format: str,
    where: str,
    folder: Path,
) -> None:
    if parts and bit_format == "nf4":
        import_bitsandbytes(where)
    if "embeddings" in parts and model.lm_head is None:
        raise _tied_embeddings_error(folder)
    if "language" in parts and model.config.decoder.moe is not None:
        raise _moe_error(folder, bit_format, where)


def _select_linears(model: nn.Module, parts: Collection[ModelPart]) -> list[FusedLinear]:
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, FusedLinear) and get_part(f"{path}.weight") in parts
    ]


def supports_fp8_matmul(linear: FusedLinear) -> bool:
    """Return True if the sizes of all layers of a fused linear support FP8 matmuls."""
    return not any(
        size % FP8_ALIGNMENT for size in (linear.in_features, *linear.output_sizes.values())
    )


def count_unquantized_layers(model: nn.Module, fp8_parts: Collection[ModelPart]) -> int:
    """Count the linear layers of `fp8_parts` whose sizes do not support FP8 matmuls."""
    linears = _select_linears(model, fp8_parts)
    return sum(len(linear.output_sizes) for linear in linears if not supports_fp8_matmul(linear))


def _tied_embeddings_error(folder: Path) -> UserError:
    return UserError(
        "embeddings are in nf4, but the head of this model is tied to the embedding table, which "
        "is not quantized",
        where="tune.quantize.nf4",
        expected="embeddings only for a model with a head of its own (tie_word_embeddings false)",
        remedy=f"leave embeddings out of nf4 for {folder.name}",
    )


def _moe_error(folder: Path, weight_format: str, where: str) -> UserError:
    excluded = (
        f"{where} {weight_format} out"
        if where == "--weight-format"
        else f"language out of {weight_format}"
    )
    return UserError(
        f"language is in {weight_format}, but this model has experts, which remain in 16 bits and "
        "hold nearly all of its parameters",
        where=where,
        expected="language only for a model without experts",
        remedy=f"leave {excluded} for {folder.name}",
    )
