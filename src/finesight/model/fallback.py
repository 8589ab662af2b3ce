"""A model of any other family, computed by its class of transformers: a sample at a time."""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.config import Weights
from finesight.digests import DIGESTS, verify_folder
from finesight.encode.borrowed import LOCAL, configuration, transformers
from finesight.encode.pack import PackedBatch
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.model.linear import GroupedLinear, only
from finesight.model.parts import INNER
from finesight.model.peft_config import Names
from finesight.model.weights import copy_descriptions

LIMITS = (
    "has no code of its own in finesight: transformers computes it. Samples run one at a time,"
    " without packing; pictures are processed again in every epoch, and once more to count tokens;"
    " the arithmetic of a step is not counted; boxes, videos, tune.nf4, tune.fp8 and"
    " `finesight merge` are refused; experts of a mixture learn whole or not at all"
)
"""What a user is told when a run starts."""

COMPARED = 64
"""Tokens of the first sample whose logits are looked at."""


class Alone(GroupedLinear):
    """A linear layer of a model of transformers, with room for an adapter; its parameters are the
    layer's own."""

    def __init__(self, layer: nn.Linear, name: str) -> None:
        with torch.device("meta"):
            super().__init__(
                layer.in_features, {name: layer.out_features}, bias=layer.bias is not None
            )
        self.in_features, self.out_features = layer.in_features, layer.out_features
        for key, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(key, parameter)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """[..., inputs] to [..., outputs], as the code around it expects."""
        return only(super().forward(x))


class FallbackModel(nn.Module):
    """What training and answering ask of a model, from a class of transformers (`inner`).

    Its parameters have the names that they have there, behind `inner.`.
    """

    known_names: tuple[Names, ...] = (((INNER, ""),),)
    """How names of layers in adapters become names here."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self._checked = False
        self._recompute = 0.0
        head = inner.get_output_embeddings()
        for path, module in list(inner.named_modules()):
            # Its subclasses are read by others than their own forward.
            if type(module) is nn.Linear and module is not head:
                parent, _, name = path.rpartition(".")
                inner.get_submodule(parent).register_module(name, Alone(module, name))

    @property
    def module_names(self) -> Names:
        """How names of layers here become those that adapters are published under."""
        return self.known_names[0]

    @property
    def head_weight(self) -> Tensor:
        """[V, D], the embedding's own where the head is tied."""
        weight: Tensor = self.inner.get_output_embeddings().weight
        return weight

    @property
    def positions(self) -> int:
        """As many as the model was made for."""
        return int(self.inner.config.get_text_config().max_position_embeddings)

    @property
    def recompute(self) -> float:
        """The share of layers whose activations are computed twice to keep fewer; transformers
        knows all or none, and takes any share for all."""
        return self._recompute

    @recompute.setter
    def recompute(self, wanted: float) -> None:
        self._recompute = wanted
        if wanted:
            self.inner.gradient_checkpointing_enable({"use_reentrant": False})

    def inputs_of(self, batch: PackedBatch) -> dict[str, Tensor]:
        """What the class of transformers takes: numbers of pictures in the model's type."""
        dtype = self.inner.dtype
        others = {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in batch.inputs.items()
        }
        return {"input_ids": batch.ids_T[None], **others}

    def forward(self, batch: PackedBatch, features_MKD: Tensor | None = None) -> Tensor:
        """A pack of one sample to the normed hidden states [L, D] of the tokens that predict
        learned ones. Features of pictures cannot be handed in.

        The first call checks that the head alone makes logits of them; UserError if it does not.
        """
        assert features_MKD is None, "features of pictures that the model has not asked for"
        if not self._checked:
            self._check(batch)
            self._checked = True
        return self._hidden(batch)[batch.predict_L]

    def _hidden(self, batch: PackedBatch) -> Tensor:
        out = self.inner.base_model(**self.inputs_of(batch), use_cache=False)
        h_TD: Tensor = out.last_hidden_state[0]
        return h_TD

    @torch.no_grad()
    def _check(self, batch: PackedBatch) -> None:
        """Some families scale, cap or shift what the head gives: their loss is another one."""
        if self.inner.base_model is self.inner or self.inner.get_output_embeddings() is None:
            raise UserError(
                f"the class {type(self.inner).__name__} keeps no model apart from its head",
                where="model",
                expected="hidden states and a head: of these the loss is computed",
                remedy="choose another family; answering with this one works",
            )
        was_training = self.training
        self.eval()
        at = batch.predict_L[:COMPARED]
        # Nearly all classes can leave the others out, which may be gigabytes.
        selects = "logits_to_keep" in signature(self.inner.forward).parameters
        kept = {"logits_to_keep": at} if selects else {}
        own_CV = self.inner(**self.inputs_of(batch), use_cache=False, **kept).logits[0].float()
        own_CV = own_CV if selects else own_CV[at]
        head_CV = F.linear(self._hidden(batch)[at], self.head_weight).float()
        self.train(was_training)
        apart = (own_CV - head_CV).abs().max() / own_CV.abs().max().clamp(min=1e-6)
        # Both are rounded once to the model's type.
        if not apart <= max(1e-4, 2 * torch.finfo(self.inner.dtype).eps):
            family = self.inner.config.model_type
            raise UserError(
                f"logits of {family} differ by {float(apart):.2g} of the largest from hidden states"
                " times head",
                where="model",
                expected="logits that the head alone makes: of these the loss is computed",
                remedy="choose another family; answering with this one works",
            )


def load_fallback(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    nf4: Collection[str] = (),
    kind: Weights = "auto",
    fp8: Collection[str] = (),
) -> FallbackModel:
    """The model of a folder by its class of transformers, every tensor of it read.

    Raises UserError for a family that transformers has no class for, for tensors that are missing
    or of another shape, for a folder that has changed since finesight wrote it, and for parts in
    few bits.
    """
    if nf4 or fp8 or kind != "auto":
        where, chosen = "--weights", f"weights in {kind}"
        if kind == "auto":
            where = "tune.nf4" if nf4 else "tune.fp8"
            chosen = f"{' and '.join(nf4 or fp8)} in {'NF4' if nf4 else 'FP8'}"
        raise UserError(
            f"{chosen} of a model of the family {folder.family}",
            where=where,
            expected="a native family: transformers computes with weights as published",
            remedy=f"leave {where} out",
        )
    config = configuration(folder)
    # Where weights were published as pickles, they lie in a folder of their own as safetensors.
    weights = folder.weight_files()[0].parent
    if (weights / DIGESTS).is_file():
        verify_folder(weights)
    inner, told = transformers().AutoModelForImageTextToText.from_pretrained(
        str(weights),
        config=config,
        # Answers are greedy, whatever the folder suggests: a penalty damages what repeats rightly.
        generation_config=transformers().GenerationConfig(),
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **LOCAL,
    )
    wrong = [*told["missing_keys"], *(str(key) for key in told["mismatched_keys"])]
    if wrong:
        raise UserError(
            f"{len(wrong)} tensors are missing or of another shape: {', '.join(sorted(wrong)[:5])}",
            where=str(folder.path),
            expected="all those of config.json",
            remedy="download the model again",
        )
    return FallbackModel(inner.to(device)).eval()


def save_fallback(
    model: FallbackModel, folder: ModelFolder, target: Path, dtype: torch.dtype
) -> None:
    """Write the model into the folder `target` as transformers publishes it, beside the tokenizer
    and processor files of `folder`. Adapters must have been taken off."""
    copy_descriptions(folder, target, dtype)
    state = model.inner.state_dict()
    kept: dict[int, Tensor] = {}
    for tensor in state.values():
        # A tied tensor once, so that it stays tied; each in memory of its own.
        kept.setdefault(tensor.data_ptr(), tensor.to("cpu", dtype, copy=True))
    copies = {name: kept[tensor.data_ptr()] for name, tensor in state.items()}
    (target / "config.json").unlink()
    model.inner.config.dtype = dtype
    model.inner.config.save_pretrained(target)
    model.inner.save_pretrained(target, state_dict=copies)
