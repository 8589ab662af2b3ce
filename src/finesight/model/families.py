"""Architectures of model families: their interface for `model.vlm`, and names of parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
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

KEY_MAPPINGS = (TRANSFORMERS_V5_MAPPING, QWEN_VL_MAPPING)


def replace_prefix(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    """Replace the first old prefix that matches by the new one; other names are unchanged."""
    for old, new in prefixes:
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def to_module_name(layer: str, key_mapping: KeyMapping = TRANSFORMERS_V5_MAPPING) -> str:
    """Map a native layer name to a PEFT module name. An empty mapping changes no name."""
    native_prefixes = tuple(native for native, _ in key_mapping)
    is_known = not key_mapping or layer.startswith(native_prefixes)
    assert is_known, f"no adapter is published for a layer named {layer}"
    return replace_prefix(layer, key_mapping)


def to_layer_name(module: str, key_mappings: Sequence[KeyMapping] = KEY_MAPPINGS) -> str:
    """Map a PEFT module name of transformers 4 or 5 to the native layer name."""
    return replace_prefix(module, ((new, old) for old, new in chain(*key_mappings)))


TRANSFORMERS_V5_PREFIXES = {"model.": "model.language_model.", "visual.": "model.visual."}
"""Tensor name prefixes of transformers 5 by native prefix, accepted for every family."""


@dataclass(frozen=True)
class Architecture:
    """Config parsers and weight names of a model family.

    Attributes:
        fp32_suffixes: Name suffixes of parameters that are in fp32 for any dtype of the model.
            Files store them in the dtype of the source folder.
        copied_prefixes: Name prefixes of published tensors that the model does not load. Saved
            models contain unchanged copies.
    """

    parse_decoder_config: Callable[[ConfigReader], DecoderConfig]
    build_vision_encoder: Callable[[ConfigReader, PixelNormalization], VisionEncoder]
    hub_prefixes: Mapping[str, str] = field(default_factory=dict)
    decoder_class: Callable[[DecoderConfig], Decoder] = Decoder
    adapter_key_mapping: KeyMapping = TRANSFORMERS_V5_MAPPING
    fp32_suffixes: tuple[str, ...] = ()
    copied_prefixes: tuple[str, ...] = ()

    def to_hub_name(self, name: str) -> str:
        """Map the native name of a tensor to its published name."""
        return replace_prefix(name, self.hub_prefixes.items())

    def to_native_name(self, hub_name: str) -> str:
        """Map a published tensor name, or one of transformers 5, to its native name."""
        pairs = chain(self.hub_prefixes.items(), TRANSFORMERS_V5_PREFIXES.items())
        return replace_prefix(hub_name, ((hub, native) for native, hub in pairs))
