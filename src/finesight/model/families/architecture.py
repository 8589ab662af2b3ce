"""Interface of a model family, which each family module implements for `model.vlm`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from finesight.model.config import ConfigReader, DecoderConfig, PixelNormalization
from finesight.model.decoder import Decoder
from finesight.model.lora.peft_config import TRANSFORMERS_V5_MAPPING, KeyMapping
from finesight.model.vision_encoder import VisionEncoder

TRANSFORMERS_V5_PREFIXES = {"model.": "model.language_model.", "visual.": "model.visual."}
"""Tensor name prefixes that transformers 5 writes, by native prefix. They are accepted for every
family."""


@dataclass(frozen=True)
class Architecture:
    """Config parsers and weight names of a model family.

    Attributes:
        parse_decoder_config: Function that parses the decoder config from config.json. Raises
            UserError for missing or unsupported values.
        build_vision_encoder: Function that builds the vision encoder from config.json. Raises
            UserError for missing or unsupported values.
        hub_prefixes: Prefixes of published tensor names by native prefix, where they differ.
        decoder_class: Decoder class, for families with their own.
        adapter_key_mapping: Mapping from native layer names to PEFT module names.
    """

    parse_decoder_config: Callable[[ConfigReader], DecoderConfig]
    build_vision_encoder: Callable[[ConfigReader, PixelNormalization], VisionEncoder]
    hub_prefixes: Mapping[str, str] = field(default_factory=dict)
    decoder_class: Callable[[DecoderConfig], Decoder] = Decoder
    adapter_key_mapping: KeyMapping = TRANSFORMERS_V5_MAPPING

    def to_hub_name(self, name: str) -> str:
        """Map the native name of a tensor to its published name."""
        for native_prefix, hub_prefix in self.hub_prefixes.items():
            if name.startswith(native_prefix):
                return hub_prefix + name.removeprefix(native_prefix)
        return name

    def to_native_name(self, hub_name: str) -> str:
        """Map a published tensor name, or one of transformers 5, to its native name."""
        for prefix_maps in (self.hub_prefixes, TRANSFORMERS_V5_PREFIXES):
            for native_prefix, hub_prefix in prefix_maps.items():
                if hub_name.startswith(hub_prefix):
                    return native_prefix + hub_name.removeprefix(hub_prefix)
        return hub_name
