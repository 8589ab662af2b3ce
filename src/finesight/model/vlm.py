"""Vision-language model: vision encoder, decoder and output head.

Shapes: T tokens of a packed batch, D hidden size, N patches, M image tokens, K features of each, L
tokens that need logits, V vocabulary, R sequences of a decode step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.encode.batch import PackedBatch
from finesight.errors import UserError
from finesight.family_components import FAMILIES, FamilyComponent
from finesight.model import fused_decoder
from finesight.model.attention import (
    AttentionBackend,
    ContextParallelAttention,
    PackedAttention,
    Segments,
    SharedPrefixAttention,
    exchange_features,
    pad_rows,
)
from finesight.model.backend_model import BackendModel, Capabilities
from finesight.model.config import ConfigReader, ModelConfig, parse_pixel_normalization
from finesight.model.decoder import DeepstackFeatures, FusibleLayer
from finesight.model.families import KEY_MAPPINGS, Architecture, KeyMapping
from finesight.model.gated_delta_net import supports_kernels
from finesight.model.layers import requires_host_sync
from finesight.model.linear import FusedLinear, single_output
from finesight.model.lora.fused import MAX_PADDING, FusedWeightSync, set_row_ranges
from finesight.model.lora.multi import LoraRouting
from finesight.model.quant.base import QuantizedWeight
from finesight.model.vision_encoder import VisionEncoder
from finesight.plugins import Registry
from finesight.vision.image_processing import GridTHW

PLUGIN_ARCHITECTURES = Registry[Architecture]("architectures", Architecture, {})
"""Architectures of the families of plug-ins for version 0.1.0, by `model_type`."""


def load_architecture(family: str) -> Architecture | None:
    """Import the architecture of a family; None for a family without native code.

    Raises:
        UserError: A plug-in cannot be imported, has another object or none, or has the name of a
            built-in family.
    """
    component = FAMILIES.get(family)
    plugin = PLUGIN_ARCHITECTURES.find_plugin(family)
    if component is None:
        return PLUGIN_ARCHITECTURES.get(family)
    if not component.architecture:
        if plugin is None:
            problem = "it has no architecture"
            raise FAMILIES.build_error(family, component.renderer, problem, FamilyComponent)
        return PLUGIN_ARCHITECTURES[family]
    owner = FAMILIES.find_plugin(family)
    owner_name = "finesight" if owner is None else f"{owner.package} {owner.version}"
    if plugin is not None and (owner is None or owner.package != plugin.package):
        raise UserError(
            f"several packages define it: {owner_name}, {plugin.package} {plugin.version}",
            where=f"plug-in {family} (finesight.architectures)",
            expected="one package that defines the name",
            remedy=f"remove the package {plugin.package}, or its entry point",
        )
    return cast(Architecture, FAMILIES.load_half(family, component.architecture, Architecture))


class VisionLanguageModel(BackendModel):
    """Vision-language model with a native implementation, for training and generation.

    Parameters have the published names of the hub, with linear layers of a shared input fused
    (`hub_tensors` in `model.weights_io` lists them separately).
    """

    capabilities = Capabilities(
        batches=True, logprobs=True, image_features=True, kernels=True, flops=True
    )
    adapter_key_mappings = KEY_MAPPINGS

    def __init__(
        self, architecture: Architecture, config: ModelConfig, visual: VisionEncoder
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.config = config
        self.activation_checkpointing = 0.0
        """Fraction of layers with activation checkpointing (`gradient_checkpointing` in
        transformers), from 0 to 1."""
        self.lora_routing: LoraRouting | None = None
        self._fused_weight_sync = FusedWeightSync()
        self._matches_decoding = False
        self.visual = visual
        self.model = architecture.decoder_class(config.decoder)
        self.lm_head: FusedLinear | None = None
        if not config.decoder.tie_word_embeddings:
            output_sizes = {"lm_head": config.decoder.vocab_size}
            self.lm_head = FusedLinear(config.decoder.hidden_size, output_sizes, bias=False)

    @property
    def lm_head_weight(self) -> Tensor:
        """Weight of the output head, [V, D]; the embedding weight if tied.

        A quantized head is dequantized on each access: read it once per batch.
        """
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        weight = self.lm_head.weight
        if isinstance(weight, QuantizedWeight):
            return weight.dequantize()
        return weight

    @property
    def max_position_embeddings(self) -> int:
        return self.config.decoder.max_position_embeddings

    @property
    def supports_splitting(self) -> bool:
        # Linear attention layers cannot process a part of a sample.
        return self.config.decoder.linear_attention is None

    @property
    def padding_merge_size(self) -> int | None:
        return self.config.vision.merge_size if self.visual.supports_padding else None

    @property
    def supports_cuda_graphs(self) -> bool:
        weight = self.model.embed_tokens.weight
        linear_attention = self.config.decoder.linear_attention
        if linear_attention is not None and not supports_kernels(linear_attention, weight):
            return False
        if not weight.is_cuda:
            return False
        has_experts = self.config.decoder.moe is not None
        return not (has_experts and requires_host_sync(weight.dtype, weight.device))

    @property
    def adapter_key_mapping(self) -> KeyMapping:
        return self.architecture.adapter_key_mapping

    def list_vision_tensors(self) -> list[Tensor]:
        return [*self.visual.parameters(), *self.visual.buffers()]

    def encode_images(self, patches_ND: Tensor, grid_thw: Sequence[GridTHW]) -> Tensor:
        """Encode uint8 patches to image features [M, K, D]."""
        features_MKD: Tensor = self.visual(patches_ND, grid_thw, self.activation_checkpointing)
        return features_MKD

    def _resolve_features(
        self, batch: PackedBatch, cached_features_MKD: Tensor | None
    ) -> Tensor | None:
        """Return the features of the batch's image tokens, [M, K, D], or None without images."""
        shard = batch.context_shard
        if cached_features_MKD is not None:
            return cached_features_MKD
        features_MKD = None
        if batch.grid_thw:
            features_MKD = self.encode_images(batch.patches_ND, batch.grid_thw)
        if shard is None:
            return features_MKD
        if features_MKD is None and any(shard.features_per_rank):
            # There are fewer frames than ranks, and this rank has none. Either all ranks receive
            # gradients or no rank does.
            weight = self.model.embed_tokens.weight
            features_MKD = weight.new_empty(
                0, self.visual.features_per_token, self.config.decoder.hidden_size
            )
            features_MKD.requires_grad_(any(p.requires_grad for p in self.visual.parameters()))
        if features_MKD is None:
            return None
        return exchange_features(features_MKD, shard)

    def forward_hidden(
        self,
        batch: PackedBatch,
        attention: AttentionBackend,
        logit_indices_L: Tensor | None = None,
        features_MKD: Tensor | None = None,
    ) -> Tensor:
        """Compute the hidden states of the decoder before the final norm.

        The first feature of an image token replaces its placeholder embedding; the others are added
        after the first layers (DeepStack).
        """
        x_TD = self.model.embed(batch.ids_T)
        features_MKD = self._resolve_features(batch, features_MKD)
        deepstack = None
        if features_MKD is not None:
            visual_indices_M = batch.visual_indices_M
            num_placeholders = len(visual_indices_M)
            num_features = len(features_MKD)
            assert num_placeholders == num_features, (
                f"{num_placeholders} placeholder tokens for {num_features} image features"
            )
            x_TD = x_TD.index_copy(0, visual_indices_M, features_MKD[:, 0])
            deepstack = DeepstackFeatures(visual_indices_M, features_MKD[:, 1:])
        h_TD: Tensor = self.model(
            x_TD,
            batch.position_ids_3T,
            attention,
            self.activation_checkpointing,
            logit_indices_L,
            deepstack,
        )
        return h_TD

    def apply_final_norm(self, h_TD: Tensor) -> Tensor:
        y_TD: Tensor = self.model.norm(h_TD)
        return y_TD

    def compute_logits(self, h_TD: Tensor) -> Tensor:
        # Libraries sum in another order for few rows.
        rows_TD = pad_rows(h_TD, MAX_PADDING) if self._matches_decoding else h_TD
        if self.lm_head is None:
            return F.linear(rows_TD, self.model.embed_tokens.weight)[: len(h_TD)]
        return single_output(self.lm_head(rows_TD))[: len(h_TD)]

    def match_decoding(self) -> bool:
        """Let training compute the same bits as decoding steps that match it, if supported.

        Supported are models on a GPU whose decoder layers are all fused, with dense weights. A
        result for a token is then independent of the tokens of other sequences.
        """
        embedding = self.model.embed_tokens.weight
        is_fused = all(
            isinstance(layer, FusibleLayer) and layer.can_fuse(embedding)
            for layer in self.model.layers
        )
        linears = list(self._iter_fusible_linears())
        is_quantized = any(isinstance(linear.weight, QuantizedWeight) for linear in linears)
        is_supported = is_fused and not is_quantized and self.supports_cuda_graphs
        if is_supported and not self._matches_decoding:
            self.sync_fused_weights()
            set_row_ranges(linears)
            self._matches_decoding = True
        return self._matches_decoding

    def sync_fused_weights(self) -> None:
        """Copy the LoRA up-projections to the fused weights, which the first call allocates."""
        embedding = self.model.embed_tokens.weight
        if embedding.is_cuda and fused_decoder.supports_fused_layers(embedding):
            self._fused_weight_sync.copy_up_projections(self._iter_fusible_linears())

    def _iter_fusible_linears(self) -> Iterator[FusedLinear]:
        """Yield the linears of all decoder layers that `fused_decoder` supports, in order."""
        for layer in self.model.layers:
            if isinstance(layer, FusibleLayer):
                yield from layer.fusible_linears

    def forward(
        self,
        batch: PackedBatch,
        features_MKD: Tensor | None = None,
        dropout_seed_1: Tensor | None = None,
    ) -> Tensor:
        # Features first: the state of the seed's RNG must not depend on cached features.
        features_MKD = self._resolve_features(batch, features_MKD)
        if dropout_seed_1 is None and self.training and batch.ids_T.is_cuda:
            dropout_seed_1 = torch.randint(
                2**31 - 1, (1,), device=batch.ids_T.device, dtype=torch.int32
            )
        attention = _build_attention(batch, dropout_seed_1, self._matches_decoding)
        self.sync_fused_weights()
        return self.apply_final_norm(
            self.forward_hidden(batch, attention, batch.logit_indices_L, features_MKD)
        )


def _build_attention(
    batch: PackedBatch, dropout_seed_1: Tensor | None, matches_decoding: bool
) -> PackedAttention:
    num_tokens = len(batch.ids_T)
    segments = Segments(batch.lengths, batch.cu_seqlens_S1, max(batch.lengths), num_tokens)
    if batch.prefix_length:
        return SharedPrefixAttention(segments, dropout_seed_1, matches_decoding)
    if batch.context_shard is not None:
        return ContextParallelAttention(segments, dropout_seed_1, context_shard=batch.context_shard)
    return PackedAttention(segments, dropout_seed_1)


@contextmanager
def raise_on_failed_allocation(file: str) -> Iterator[None]:
    """Convert failed memory allocations for the sizes in `file` to UserError.

    CUDA out-of-memory errors pass through, since callers can reduce memory use.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, TypeError) as error:
        message = str(error)
        if "overflow" not in message.lower() and "allocate memory" not in message:
            raise
        raise UserError(
            "the model is too large for this machine's memory",
            where=file,
            expected="a model that fits into memory",
            remedy="take the file from the model's own folder, or a smaller model",
        ) from error


def build_model(
    hf_config: ConfigReader, preprocessor: ConfigReader, dtype: torch.dtype, device: torch.device
) -> VisionLanguageModel:
    """Build a model with uninitialized parameters from its config.json."""
    architecture = load_architecture(hf_config.get_str("model_type"))
    if architecture is None:
        hf_config.raise_invalid("model_type", " or ".join(FAMILIES))
    decoder_config = architecture.parse_decoder_config(hf_config)
    with raise_on_failed_allocation(hf_config.file), torch.device("meta"):
        visual = architecture.build_vision_encoder(
            hf_config, parse_pixel_normalization(preprocessor)
        )
        model = VisionLanguageModel(
            architecture, ModelConfig(decoder_config, visual.config), visual
        )
    if visual.config.out_hidden_size != decoder_config.hidden_size:
        raise UserError(
            f"image features have {visual.config.out_hidden_size} dimensions",
            where=hf_config.file,
            expected=f"the language model's hidden_size, {decoder_config.hidden_size}",
            remedy="take the file from the model's own folder",
        )
    model.to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(architecture.fp32_suffixes):
            parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
    materialize_parameters(model, device)
    return model.eval()


def materialize_parameters(model: nn.Module, device: torch.device) -> None:
    """Replace meta parameters and buffers by uninitialized tensors on `device`.

    Equivalent to `nn.Module.to_empty`, which would import torch's symbolic shapes and take half a
    second per command.
    """
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            storage = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(storage, requires_grad=parameter.requires_grad))
        for name, buffer in [*module.named_buffers(recurse=False)]:
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))
