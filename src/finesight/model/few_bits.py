"""Layers that are quantised while a model is loaded: which they are, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from finesight.config import Weights
from finesight.errors import UserError
from finesight.model.fp8 import MULTIPLE, Fp8Weight
from finesight.model.frozen import FrozenMatrix, FrozenWeight
from finesight.model.int4 import RoundedInt4Matrix
from finesight.model.linear import GroupedLinear
from finesight.model.network import VisionLanguageModel
from finesight.model.nf4 import Nf4Matrix, bitsandbytes
from finesight.model.parts import Part, part_of
from finesight.model.rowwise import Fp8Matrix, Int8Matrix

KINDS: Mapping[str, Callable[[int, int], FrozenMatrix]] = {
    "nf4": Nf4Matrix,
    "fp8": Fp8Matrix,
    "int8": Int8Matrix,
    "int4": RoundedInt4Matrix,
}

_DECODER: tuple[Part, ...] = ("language", "embeddings")
"""The parts of `--weights`, where the head is not tied."""


def keep_in_few_bits(
    model: VisionLanguageModel,
    nf4: Collection[Part],
    fp8: Collection[Part],
    kind: Weights,
    folder: Path,
) -> None:
    """Make room for few bits in a model without numbers: for the linear layers of the parts `nf4`,
    and for those of `fp8` whose sizes allow their products in FP8 (`model.fp8`); or, where `kind`
    is not auto, for the decoder's and the head's in that kind instead.

    The vision tower and its merger stay as they are stored: they run once a picture, with more rows
    than few bits make quicker, and what they see wrong no decoder sees right. A tied head is the
    table of the embeddings, which is looked up, and stays too.

    Raises UserError for embeddings in nf4 with a tied head, for a decoder with experts, and where
    quantising needs a package that is missing.
    """
    chosen: list[tuple[Collection[Part], str, str]] = [
        (nf4, "nf4", "tune.nf4"),
        (fp8, "fp8", "tune.fp8"),
    ]
    if kind != "auto":
        decoder: tuple[Part, ...] = ("language",) if model.lm_head is None else _DECODER
        chosen = [(decoder, kind, "--weights")]
    for parts, few, where in chosen:
        _refuse(model, parts, few, where, folder)
        multiplied = where == "tune.fp8"
        for group in _groups(model, parts):
            if multiplies_in_fp8(group) or not multiplied:
                with torch.device("meta"):
                    group.freeze_as(KINDS[few], Fp8Weight if multiplied else FrozenWeight)


def _refuse(
    model: VisionLanguageModel, parts: Collection[Part], few: str, where: str, folder: Path
) -> None:
    if parts and few == "nf4":
        bitsandbytes(where)
    if "embeddings" in parts and model.lm_head is None:
        raise _tied(folder)
    if "language" in parts and model.geometry.language.experts is not None:
        raise _has_experts(folder, few, where)


def _groups(model: nn.Module, parts: Collection[Part]) -> list[GroupedLinear]:
    return [
        module
        for path, module in model.named_modules()
        if isinstance(module, GroupedLinear) and part_of(f"{path}.weight") in parts
    ]


def multiplies_in_fp8(group: GroupedLinear) -> bool:
    """Whether the sizes of its layers allow it."""
    return not any(size % MULTIPLE for size in (group.inputs, *group.outputs.values()))


def left_in_16_bits(model: nn.Module, fp8: Collection[Part]) -> int:
    """How many linear layers of these parts are not multiplied in FP8, for their sizes."""
    groups = _groups(model, fp8)
    return sum(len(group.outputs) for group in groups if not multiplies_in_fp8(group))


def _tied(folder: Path) -> UserError:
    return UserError(
        "embeddings are in nf4, and this model's head is the table of its embeddings, which is"
        " looked up: it would be kept twice",
        where="tune.nf4",
        expected="embeddings only for a model with a head of its own (tie_word_embeddings false)",
        remedy=f"leave embeddings out of nf4 for {folder.name}",
    )


def _has_experts(folder: Path, kind: str, where: str) -> UserError:
    left_out = f"{where} {kind} out" if where == "--weights" else f"language out of {kind}"
    return UserError(
        f"language is in {kind}, and this model has experts, which stay in 16 bits: they are nearly"
        " all of its numbers",
        where=where,
        expected="language only for a model without experts",
        remedy=f"leave {left_out} for {folder.name}",
    )
