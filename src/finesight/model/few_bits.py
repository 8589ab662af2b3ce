"""Layers that are quantised while a model is loaded: which they are, and what becomes of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import torch

from finesight.config import Weights
from finesight.errors import UserError
from finesight.model.frozen import FrozenMatrix
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


def keep_in_few_bits(
    model: VisionLanguageModel, nf4: Collection[Part], kind: Weights, folder: Path
) -> None:
    """Make room for few bits in a model without numbers: for the linear layers of the parts `nf4`,
    or, where `kind` is not auto, for the decoder's and the head's in that kind instead.

    The vision tower and its merger stay as they are stored: they run once a picture, with more rows
    than few bits make quicker, and what they see wrong no decoder sees right. A tied head is the
    table of the embeddings, which is looked up, and stays too.

    Raises UserError for embeddings in nf4 with a tied head, for a decoder with experts, and where
    quantising needs a package that is missing.
    """
    parts = set(nf4)
    if kind != "auto":
        parts = {"language"} if model.lm_head is None else {"language", "embeddings"}
    where, few = ("tune.nf4", "nf4") if kind == "auto" else ("--weights", kind)
    if parts and few == "nf4":
        bitsandbytes(where)
    if "embeddings" in parts and model.lm_head is None:
        raise _tied(folder)
    if "language" in parts and model.geometry.language.experts is not None:
        raise _has_experts(folder, few, where)
    for path, module in list(model.named_modules()):
        if isinstance(module, GroupedLinear) and part_of(f"{path}.weight") in parts:
            with torch.device("meta"):
                module.freeze_as(KINDS[few])


def _tied(folder: Path) -> UserError:
    return UserError(
        "embeddings are in nf4, and this model's head is the table of its embeddings, which is"
        " looked up: it would be kept twice",
        where="tune.nf4",
        expected="embeddings only for a model with a head of its own (tie_word_embeddings false)",
        remedy=f"leave embeddings out of nf4 for {folder.name}",
    )


def _has_experts(folder: Path, kind: str, where: str) -> UserError:
    left_out = "language out of nf4" if where == "tune.nf4" else f"{where} {kind} out"
    return UserError(
        f"language is in {kind}, and this model has experts, which stay in 16 bits: they are nearly"
        " all of its numbers",
        where=where,
        expected="language only for a model without experts",
        remedy=f"leave {left_out} for {folder.name}",
    )
