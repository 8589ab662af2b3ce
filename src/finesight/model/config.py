"""Model configuration, parsed from config.json.

Two layouts are supported. Published files keep the language model's keys at the top level.
transformers 5 writes them to `text_config` and merges `rope_theta` and `rope_scaling` into
`rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NoReturn, TypeGuard

from finesight.errors import UserError

MAX_INT = 2**31 - 1
"""Upper limit of the integers in a config, far above any vocabulary size."""


def _is_number(value: object) -> TypeGuard[int | float]:
    """Return True for a number that is finite in fp32."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 3.4e38


def _is_int(value: object, minimum: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= MAX_INT


class ConfigReader:
    """Typed access to the keys of a JSON config.

    Missing or invalid values raise a UserError that names the full key. A null value counts as
    missing.
    """

    def __init__(
        self, values: Mapping[str, object], file: str = "config.json", key_prefix: str = ""
    ):
        self._values = values
        self.file = file
        self._key_prefix = key_prefix

    def raise_invalid(self, key: str, expected: str) -> NoReturn:
        """Raise a UserError with the current and the expected value of `key`."""
        value = self._values.get(key)
        current = "missing" if value is None else f"{value!r:.80}"
        raise UserError(
            f"{self._key_prefix}{key} is {current}",
            where=self.file,
            expected=expected,
            remedy="take the file from the model's own folder",
        )

    def has(self, key: str) -> bool:
        return self._values.get(key) is not None

    def _get(self, key: str, default: object) -> object:
        if not self.has(key):
            return default
        return self._values[key]

    def section(self, key: str) -> ConfigReader:
        """Return a reader of the JSON object stored under `key`."""
        value = self._values.get(key)
        if not isinstance(value, Mapping):
            self.raise_invalid(key, "an object")
        return ConfigReader(value, self.file, f"{self._key_prefix}{key}.")

    def get_int(self, key: str, default: int | None = None) -> int:
        """Return an integer from 1 to MAX_INT, or `default` if the key is missing."""
        value = self._get(key, default)
        if not _is_int(value, 1):
            self.raise_invalid(key, f"an integer from 1 to {MAX_INT}")
        return value

    def get_float(self, key: str, default: float | None = None) -> float:
        """Return a positive finite float, or `default` if the key is missing."""
        value = self._get(key, default)
        if not _is_number(value) or value <= 0:
            self.raise_invalid(key, "a positive number")
        return float(value)

    def get_bool(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.raise_invalid(key, "true or false")
        return value

    def get_ints(self, key: str) -> tuple[int, ...]:
        """Return the list of non-negative integers stored under `key`."""
        value = self._values.get(key)
        if not isinstance(value, list | tuple) or not all(_is_int(item, 0) for item in value):
            self.raise_invalid(key, f"a list of integers from 0 to {MAX_INT}")
        return tuple(value)

    def get_strs(self, key: str) -> tuple[str, ...]:
        """Return the list of strings stored under `key`."""
        value = self._values.get(key)
        if not isinstance(value, list | tuple) or not all(isinstance(x, str) for x in value):
            self.raise_invalid(key, "a list of strings")
        return tuple(value)

    def get_floats(self, key: str, length: int) -> tuple[float, ...]:
        """Return the list of `length` finite floats stored under `key`."""
        value = self._values.get(key)
        if (
            not isinstance(value, list | tuple)
            or len(value) != length
            or not all(map(_is_number, value))
        ):
            self.raise_invalid(key, f"a list of {length} values")
        return tuple(map(float, value))

    def get_str(self, key: str) -> str:
        value = self._values.get(key)
        if not isinstance(value, str):
            self.raise_invalid(key, "a string")
        return value

    def require_supported(self, key: str, default: object, supported: tuple[object, ...]) -> None:
        """Raise a UserError unless the value of `key` is one of `supported`."""
        if self._get(key, default) not in supported:
            self.raise_invalid(key, " or ".join(repr(value) for value in supported))


@dataclass(frozen=True)
class MoeConfig:
    """Mixture-of-experts config of the decoder.

    Attributes:
        shared_intermediate_size: Intermediate size of the shared expert; None without one.
    """

    num_experts: int
    num_experts_per_tok: int
    intermediate_size: int
    shared_intermediate_size: int | None = None


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Config of the linear attention layers (Gated DeltaNet) of a hybrid decoder.

    Attributes:
        full_attention_layers: Indices of the decoder layers with full attention.
        conv_kernel_size: Kernel size of the causal convolution.
    """

    full_attention_layers: tuple[int, ...]
    num_key_heads: int
    num_value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel_size: int

    @property
    def key_size(self) -> int:
        return self.num_key_heads * self.key_head_dim

    @property
    def value_size(self) -> int:
        return self.num_value_heads * self.value_head_dim

    @property
    def conv_size(self) -> int:
        """Number of channels of the convolution: queries, keys and values."""
        return 2 * self.key_size + self.value_size


@dataclass(frozen=True)
class DecoderConfig:
    """Decoder config.

    Attributes:
        use_qk_norm: Normalize each head of queries and keys, as in Qwen3. Otherwise queries, keys
            and values have a bias, as in Qwen2.
        mrope_axes: Position axis of each rotary frequency of a head (0 time, 1 height, 2 width).
        max_position_embeddings: Context length of the base model.
        tie_word_embeddings: The head shares the weight of the token embedding.
        moe: Config of the experts that replace the MLPs; None for a dense model.
        linear_attention: Config of the linear attention layers; None without such layers.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    use_qk_norm: bool
    rms_norm_eps: float
    rope_theta: float
    mrope_axes: tuple[int, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool
    moe: MoeConfig | None = None
    linear_attention: LinearAttentionConfig | None = None

    @cached_property
    def rotary_dim(self) -> int:
        """Number of leading elements of a head that the rotary embedding rotates."""
        return 2 * len(self.mrope_axes)

    @property
    def num_full_attention_layers(self) -> int:
        """Number of layers with full attention, which have a KV cache."""
        if self.linear_attention is None:
            return self.num_layers
        return len(self.linear_attention.full_attention_layers)

    def prefix_cache_key(self, num_tokens: int) -> str:
        """Return a key that separates prompts which cannot share KV cache entries."""
        return ""


@dataclass(frozen=True)
class VisionConfig:
    """Vision encoder config."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    rope_theta: float

    @cached_property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Shape of one patch as input of the published convolution weight."""
        frames = (self.temporal_patch_size,) if self.temporal_patch_size > 1 else ()
        return (self.in_channels, *frames, self.patch_size, self.patch_size)

    @property
    def patch_dim(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2


@dataclass(frozen=True)
class PixelNormalization:
    """Pixel normalization of a preprocessor: (byte x rescale_factor - mean) / std per channel."""

    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ModelConfig:
    """Configs of the decoder and the vision encoder of a model."""

    decoder: DecoderConfig
    vision: VisionConfig


def sequential_mrope_axes(sections: tuple[int, ...]) -> tuple[int, ...]:
    """Assign rotary frequencies to the axes time, height and width in consecutive sections."""
    axes: list[int] = []
    for axis, size in enumerate(sections):
        axes += [axis] * size
    return tuple(axes)


def parse_decoder_config(
    hf_config: ConfigReader,
    *,
    head_dim: int | None = None,
    rotary_dim: int | None = None,
    intermediate_size: int | None = None,
    use_qk_norm: bool = False,
    mrope_axes: Callable[[tuple[int, ...]], tuple[int, ...]] = sequential_mrope_axes,
) -> DecoderConfig:
    """Parse the decoder config from config.json.

    The rotary embedding rotates `rotary_dim` elements of a head; None means all.
    """
    text = get_text_config(hf_config)
    text.require_supported("hidden_act", "silu", ("silu",))
    text.require_supported("use_sliding_window", False, (False,))
    text.require_supported("attention_dropout", 0.0, (0.0,))
    rope = get_rope_config(text)
    # Published files have `type: mrope`; transformers 5 adds `rope_type: default`.
    rope.require_supported("type", "mrope", ("mrope", "default"))
    rope.require_supported("rope_type", "default", ("mrope", "default"))
    hidden_size = text.get_int("hidden_size")
    num_heads = text.get_int("num_attention_heads")
    num_kv_heads = text.get_int("num_key_value_heads", num_heads)
    sections = rope.get_ints("mrope_section")
    if head_dim is None:
        head_dim = get_even_head_dim(text, hidden_size, num_heads)
        text.require_supported("head_dim", None, (None, head_dim))
    if num_heads % num_kv_heads:
        text.raise_invalid("num_key_value_heads", f"a divisor of {num_heads} heads")
    rotary_dim = rotary_dim or head_dim
    if len(sections) != 3 or sum(sections) * 2 != rotary_dim:
        rope.raise_invalid("mrope_section", f"three integers with the sum {rotary_dim / 2:g}")
    if sequential_mrope_axes(sections) != tuple(sorted(mrope_axes(sections))):
        rope.raise_invalid(
            "mrope_section", "sections that can be interleaved, with the first as the longest"
        )
    # The top-level value takes precedence: the config class of the text part has another default.
    tied = text.get_bool("tie_word_embeddings", False)
    rope_theta_section = rope if rope.has("rope_theta") else text
    return DecoderConfig(
        vocab_size=text.get_int("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size or text.get_int("intermediate_size"),
        num_layers=text.get_int("num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        use_qk_norm=use_qk_norm,
        rms_norm_eps=text.get_float("rms_norm_eps"),
        rope_theta=rope_theta_section.get_float("rope_theta"),
        mrope_axes=mrope_axes(sections),
        max_position_embeddings=text.get_int("max_position_embeddings", 32768),
        tie_word_embeddings=hf_config.get_bool("tie_word_embeddings", tied),
    )


def get_even_head_dim(text: ConfigReader, hidden_size: int, num_heads: int) -> int:
    """Return the head dimension of heads that share the hidden size; it must be even."""
    if hidden_size % num_heads or (hidden_size // num_heads) % 2:
        expected = f"a divisor of hidden_size {hidden_size} with an even quotient"
        text.raise_invalid("num_attention_heads", expected)
    return hidden_size // num_heads


def get_text_config(hf_config: ConfigReader) -> ConfigReader:
    """Return the section of config.json with the language model's keys."""
    if hf_config.has("text_config"):
        return hf_config.section("text_config")
    return hf_config


def get_rope_config(text: ConfigReader) -> ConfigReader:
    """Return the section of the text config with the rotary embedding's keys."""
    return text.section("rope_parameters" if text.has("rope_parameters") else "rope_scaling")


def parse_vision_config(
    vision: ConfigReader,
    *,
    hidden_size_key: str = "hidden_size",
    out_hidden_size_key: str = "out_hidden_size",
    intermediate_size: int | None = None,
) -> VisionConfig:
    """Parse the vision encoder config."""
    rope_theta = 10000.0
    if vision.has("rope_parameters"):
        rope_theta = vision.section("rope_parameters").get_float("rope_theta", rope_theta)
    config = VisionConfig(
        hidden_size=vision.get_int(hidden_size_key),
        intermediate_size=intermediate_size or vision.get_int("intermediate_size"),
        num_layers=vision.get_int("depth"),
        num_heads=vision.get_int("num_heads"),
        out_hidden_size=vision.get_int(out_hidden_size_key),
        in_channels=vision.get_int("in_channels", 3),
        patch_size=vision.get_int("patch_size"),
        temporal_patch_size=vision.get_int("temporal_patch_size"),
        merge_size=vision.get_int("spatial_merge_size"),
        rope_theta=rope_theta,
    )
    vision.require_supported("in_channels", 3, (3,))
    vision.require_supported("in_chans", 3, (3,))
    if config.hidden_size % config.num_heads or config.head_dim % 4:
        vision.raise_invalid(
            "num_heads", f"a divisor of {hidden_size_key} with a quotient that is a multiple of 4"
        )
    return config


def parse_pixel_normalization(
    preprocessor: ConfigReader, num_channels: int = 3
) -> PixelNormalization:
    """Parse the pixel normalization from preprocessor_config.json."""
    preprocessor.require_supported("do_normalize", True, (True,))
    preprocessor.require_supported("do_rescale", True, (True,))
    std = preprocessor.get_floats("image_std", num_channels)
    if min(std) <= 0:
        preprocessor.raise_invalid("image_std", f"a list of {num_channels} positive values")
    rescale_factor = preprocessor.get_float("rescale_factor", 1 / 255)
    mean = preprocessor.get_floats("image_mean", num_channels)
    return PixelNormalization(rescale_factor, mean, std)
