"""Interface of a model family for `model.vlm`, and names of its layers in PEFT adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from finesight.model.config import ConfigReader, DecoderConfig, PixelNormalization
from finesight.model.decoder import Decoder
from finesight.model.vision_encoder import VisionEncoder

KeyMapping = tuple[tuple[str, str], ...]
"""Pairs of a prefix of native layer names and the corresponding prefix of PEFT module names."""

TRANSFORMERS_V5_MAPPING: KeyMapping = (
    ("model.layers.", "model.language_model.layers."),
    ("visual.", "model.visual."),
)
"""Mapping to the module names of transformers 5 and later."""

QWEN_VL_MAPPING: KeyMapping = (
    ("model.layers.", "transformer.h."),
    ("visual.blocks.", "transformer.visual.transformer.resblocks."),
    ("visual.merger.attn_pool.", "transformer.visual.attn_pool."),
)
"""Mapping to the module names in the published code of the first Qwen-VL."""


def to_module_name(layer: str, key_mapping: KeyMapping = TRANSFORMERS_V5_MAPPING) -> str:
    """Map a native layer name to a PEFT module name."""
    for native, foreign in key_mapping:
        if layer.startswith(native):
            return foreign + layer.removeprefix(native)
    assert not key_mapping, f"no adapter is published for a layer named {layer}"
    return layer


def to_layer_name(
    module: str, key_mappings: Sequence[KeyMapping] = (TRANSFORMERS_V5_MAPPING, QWEN_VL_MAPPING)
) -> str:
    """Map a PEFT module name to the native layer name, by the first matching prefix."""
    for native, foreign in chain(*key_mappings):
        if module.startswith(foreign):
            return native + module.removeprefix(foreign)
    return module


TRANSFORMERS_V5_PREFIXES = {"model.": "model.language_model.", "visual.": "model.visual."}
"""Tensor name prefixes that transformers 5 writes, by native prefix. They are accepted for every
family."""


@dataclass(frozen=True)
class Architecture:
    """Config parsers and weight names of a model family."""

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
