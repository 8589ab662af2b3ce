"""Interface of a model family: one module per family, registered in `model.vlm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from finesight.model.config import ConfigReader, DecoderConfig, PixelNormalization
from finesight.model.decoder import Decoder
from finesight.model.lora.peft_config import TRANSFORMERS_V5_MAPPING, KeyMapping
from finesight.model.vision_encoder import VisionEncoder

TRANSFORMERS_V5_PREFIXES = {"model.": "model.language_model.", "visual.": "model.visual."}
"""Tensor name prefixes of transformers 5, for every published format."""


@dataclass(frozen=True)
class Architecture:
    """Config parsers and weight names of a model family.

    `parse_decoder_config` and `build_vision_encoder` take the complete config.json and raise
    UserError for missing or unsupported values. The prefix mappings translate native names to
    published names and to the layer names of adapters. A family with its own decoder sets
    `decoder_class`.
    """

    parse_decoder_config: Callable[[ConfigReader], DecoderConfig]
    build_vision_encoder: Callable[[ConfigReader, PixelNormalization], VisionEncoder]
    hub_prefixes: Mapping[str, str] = field(default_factory=dict)
    decoder_class: Callable[[DecoderConfig], Decoder] = Decoder
    adapter_key_mapping: KeyMapping = TRANSFORMERS_V5_MAPPING

    def to_hub_name(self, name: str) -> str:
        """Return the published name of a tensor."""
        for native_prefix, hub_prefix in self.hub_prefixes.items():
            if name.startswith(native_prefix):
                return hub_prefix + name.removeprefix(native_prefix)
        return name

    def to_native_name(self, hub_name: str) -> str:
        """Return the native name of a published tensor or of one written by transformers 5."""
        for prefix_maps in (self.hub_prefixes, TRANSFORMERS_V5_PREFIXES):
            for native_prefix, hub_prefix in prefix_maps.items():
                if hub_name.startswith(hub_prefix):
                    return native_prefix + hub_name.removeprefix(hub_prefix)
        return hub_name
