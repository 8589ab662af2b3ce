"""Models without a native implementation, which run through transformers.

The transformers backend processes one sample at a time.
"""

from __future__ import annotations

from collections.abc import Collection
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.encode.batch import PackedBatch
from finesight.errors import UserError
from finesight.files.storage import DIGESTS_FILE, verify_folder
from finesight.model.backend_model import BackendModel, Capabilities
from finesight.model.families import KeyMapping
from finesight.model.linear import FusedLinear, single_output
from finesight.model.trainable import HF_PREFIX
from finesight.model.weights_io import copy_model_files
from finesight.model_folder import ModelFolder
from finesight.settings.setting_types import WeightFormat

NUM_COMPARED_TOKENS = 64
"""Number of tokens whose logits are compared to check the output head."""


class HfLinear(FusedLinear):
    """Linear layer of a transformers model that supports an adapter."""

    def __init__(self, layer: nn.Linear, name: str) -> None:
        with torch.device("meta"):
            super().__init__(
                layer.in_features, {name: layer.out_features}, bias=layer.bias is not None
            )
        self.in_features = layer.in_features
        self.out_features = layer.out_features
        for key, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(key, parameter)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return single_output(super().forward(x))


class HfModel(BackendModel):
    """Wrapper of a transformers model (`inner`) for training and inference.

    Linear layers except the output head are replaced by `HfLinear`, which supports adapters.
    Parameter names are those of transformers with the prefix `inner.`.
    """

    capabilities = Capabilities(
        batches=False, logprobs=False, image_features=False, kernels=False, flops=False
    )
    limitations = (
        "has no native implementation in finesight and runs through transformers. Samples run one"
        " at a time, without packing; images are processed again in every epoch, and once more to"
        " count tokens; FLOPs are not counted; boxes, videos, tune.quantize and merging are not"
        " supported; experts of a mixture are trained completely or not at all"
    )
    adapter_key_mappings = (((HF_PREFIX, ""),),)

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.inner = inner
        self._head_checked = False
        self._activation_checkpointing = 0.0
        head = inner.get_output_embeddings()
        for path, module in list(inner.named_modules()):
            # Other code uses subclasses of nn.Linear without calling their forward.
            if type(module) is nn.Linear and module is not head:
                parent, _, name = path.rpartition(".")
                inner.get_submodule(parent).register_module(name, HfLinear(module, name))

    @property
    def adapter_key_mapping(self) -> KeyMapping:
        return self.adapter_key_mappings[0]

    @property
    def lm_head_weight(self) -> Tensor:
        weight: Tensor = self.inner.get_output_embeddings().weight
        return weight

    @property
    def max_position_embeddings(self) -> int:
        return int(self.inner.config.get_text_config().max_position_embeddings)

    @property
    def activation_checkpointing(self) -> float:
        """Fraction of layers with activation checkpointing."""
        return self._activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, fraction: float) -> None:
        self._activation_checkpointing = fraction
        if fraction:
            if hasattr(self.inner, "activation_checkpointing_enable"):  # transformers 5.23 or newer
                self.inner.activation_checkpointing_enable({"use_reentrant": False})
            else:
                self.inner.gradient_checkpointing_enable({"use_reentrant": False})

    def prepare_inputs(self, batch: PackedBatch) -> dict[str, Tensor]:
        """Build the keyword arguments of the transformers model for a packed batch."""
        dtype = self.inner.dtype
        inputs = {"input_ids": batch.ids_T[None]}
        for name, value in batch.hf_inputs.items():
            inputs[name] = value.to(dtype) if value.is_floating_point() else value
        return inputs

    def forward(
        self,
        batch: PackedBatch,
        features_MKD: Tensor | None = None,
        dropout_seed_1: Tensor | None = None,
    ) -> Tensor:
        assert features_MKD is None, "cached image features are not supported"
        assert dropout_seed_1 is None, "CUDA graphs are not supported"
        if not self._head_checked:
            self._check_head(batch)
            self._head_checked = True
        return self._forward_hidden(batch)[batch.logit_indices_L]

    def _forward_hidden(self, batch: PackedBatch) -> Tensor:
        out = self.inner.base_model(**self.prepare_inputs(batch), use_cache=False)
        h_TD: Tensor = out.last_hidden_state[0]
        return h_TD

    @torch.no_grad()
    def _check_head(self, batch: PackedBatch) -> None:
        """Check that the model's logits are hidden states times head weight.

        The loss is computed from this product. Some families scale, cap or shift the logits in
        addition; they raise UserError.
        """
        if self.inner.base_model is self.inner or self.inner.get_output_embeddings() is None:
            raise _unsupported_head(
                f"the class {type(self.inner).__name__} has no base model apart from its head",
                "hidden states and a head, from which the loss is computed",
            )
        was_training = self.training
        self.eval()
        indices = batch.logit_indices_L[:NUM_COMPARED_TOKENS]
        # Nearly all classes can skip the logits of other tokens, which may be gigabytes.
        skips_logits = "logits_to_keep" in signature(self.inner.forward).parameters
        options = {"logits_to_keep": indices} if skips_logits else {}
        out = self.inner(**self.prepare_inputs(batch), use_cache=False, **options)
        model_logits_CV = out.logits[0]
        if not skips_logits:
            model_logits_CV = model_logits_CV[indices]
        model_logits_CV = model_logits_CV.float()
        h_CD = self._forward_hidden(batch)[indices]
        head_logits_CV = F.linear(h_CD, self.lm_head_weight).float()
        self.train(was_training)
        largest = model_logits_CV.abs().max().clamp(min=1e-6)
        relative_error = (model_logits_CV - head_logits_CV).abs().max() / largest
        # The tolerance allows for the rounding of both results to the model's dtype.
        if not relative_error <= max(1e-4, 2 * torch.finfo(self.inner.dtype).eps):
            raise _unsupported_head(
                f"logits of {self.inner.config.model_type} differ by {float(relative_error):.2g} "
                "of the largest from hidden states times head",
                "logits equal to hidden states times head weight, from which the loss is computed",
            )


def _unsupported_head(problem: str, expected: str) -> UserError:
    return UserError(
        problem,
        where="model",
        expected=expected,
        remedy="choose another family; inference with this one works",
    )


def _unsupported_quantization(requested: str, where: str, folder: ModelFolder) -> UserError:
    return UserError(
        f"{requested} for a model of the family {folder.family}",
        where=where,
        expected="a native family; transformers uses the published weights",
        remedy=f"leave {where} out",
    )


def load_hf_model(
    folder: ModelFolder,
    dtype: torch.dtype,
    device: torch.device,
    nf4_parts: Collection[str] = (),
    weight_format: WeightFormat = "auto",
    fp8_parts: Collection[str] = (),
) -> HfModel:
    if weight_format != "auto":
        requested = f"weights in {weight_format}"
        raise _unsupported_quantization(requested, "--weight-format", folder)
    if nf4_parts:
        requested = f"{' and '.join(nf4_parts)} in NF4"
        raise _unsupported_quantization(requested, "tune.quantize.nf4", folder)
    if fp8_parts:
        requested = f"{' and '.join(fp8_parts)} in FP8"
        raise _unsupported_quantization(requested, "tune.quantize.fp8", folder)
    # Native families do not need this backend.
    from finesight.encode.hf_renderer import (
        FROM_PRETRAINED_OPTIONS,
        import_transformers,
        load_hf_config,
    )

    config = load_hf_config(folder)
    # Weights published as pickles are converted to safetensors in a separate folder.
    weights_folder = folder.weight_files()[0].parent
    if (weights_folder / DIGESTS_FILE).is_file():
        verify_folder(weights_folder)
    transformers = import_transformers()
    inner, loading_info = transformers.AutoModelForImageTextToText.from_pretrained(
        str(weights_folder),
        config=config,
        # Ignore the folder's settings: decoding is greedy, and penalties damage correct
        # repetitions.
        generation_config=transformers.GenerationConfig(),
        dtype=dtype,
        use_safetensors=True,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **FROM_PRETRAINED_OPTIONS,
    )
    mismatched = (str(key) for key in loading_info["mismatched_keys"])
    invalid_keys = sorted([*loading_info["missing_keys"], *mismatched])
    if invalid_keys:
        raise UserError(
            f"{len(invalid_keys)} tensors are missing or of another shape: "
            f"{', '.join(invalid_keys[:5])}",
            where=str(folder.path),
            expected="all tensors of config.json",
            remedy="download the model again",
        )
    return HfModel(inner.to(device)).eval()


def save_hf_model(model: HfModel, folder: ModelFolder, target: Path, dtype: torch.dtype) -> None:
    """Write all weights to `target`, with the other files of the base model in `folder`."""
    copy_model_files(folder, target, dtype)
    state = model.inner.state_dict()
    copies_by_pointer: dict[int, Tensor] = {}
    for tensor in state.values():
        # Copy a tied tensor once, so that it remains tied; every other tensor has its own memory.
        copies_by_pointer.setdefault(tensor.data_ptr(), tensor.to("cpu", dtype, copy=True))
    copies = {name: copies_by_pointer[tensor.data_ptr()] for name, tensor in state.items()}
    (target / "config.json").unlink()
    model.inner.config.dtype = dtype
    model.inner.config.save_pretrained(target)
    model.inner.save_pretrained(target, state_dict=copies)
