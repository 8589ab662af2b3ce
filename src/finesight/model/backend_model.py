"""Interface of the models of both backends, native code and transformers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from finesight.encode.batch import PackedBatch
from finesight.model.families import KeyMapping


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Features of a backend beside training and greedy generation of single samples.

    Attributes:
        batches: Packs, prefixes and generation steps are shared by several samples.
        logprobs: Generated tokens are sampled, and have log-probabilities.
        image_features: The features of images can be computed before the decoder runs.
        kernels: Triton kernels are compiled before the first step.
        flops: The FLOPs of a sample are known.
    """

    batches: bool
    logprobs: bool
    image_features: bool
    kernels: bool
    flops: bool


class BackendModel(nn.Module, ABC):
    """Vision-language model of a backend, for training and generation."""

    capabilities: ClassVar[Capabilities]

    limitations: ClassVar[str] = ""
    """Limitations of the backend, logged after the family name at the start of a run."""

    adapter_key_mappings: ClassVar[tuple[KeyMapping, ...]]
    """Supported mappings between native layer names and PEFT module names."""

    activation_checkpointing: float
    """Fraction of layers with activation checkpointing, from 0 to 1."""

    @property
    @abstractmethod
    def adapter_key_mapping(self) -> KeyMapping:
        """Mapping that PEFT folders are written with."""

    @property
    @abstractmethod
    def lm_head_weight(self) -> Tensor:
        """Weight of the output head, [V, D]; the embedding weight if tied."""

    @property
    @abstractmethod
    def max_position_embeddings(self) -> int:
        """Number of positions that the decoder supports."""

    @property
    def supports_cuda_graphs(self) -> bool:
        """True if forward passes can be captured as CUDA graphs."""
        return False

    @property
    def supports_splitting(self) -> bool:
        """True if several ranks can share a long sample (context parallelism)."""
        return False

    @property
    def padding_merge_size(self) -> int | None:
        """Merge size of the patches that can be padded; None if images cannot be padded."""
        return None

    def list_vision_tensors(self) -> list[Tensor]:
        """Return the tensors of a vision encoder that runs apart from the decoder."""
        return []

    @abstractmethod
    def forward(
        self,
        batch: PackedBatch,
        features_MKD: Tensor | None = None,
        dropout_seed_1: Tensor | None = None,
    ) -> Tensor:
        """Compute the normalized hidden states [L, D] of the tokens that need logits.

        Args:
            features_MKD: Image features that were computed before.
            dropout_seed_1: Only in a CUDA graph: buffer with the seed of dropout.
        """
