"""The sizes of a model, read from its config.json in the hub's style and in transformers 5's.

The hub's files keep the language model's keys at the top; transformers 5 writes them into
`text_config` and merges `rope_theta` and `rope_scaling` into `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeGuard

from finesight.errors import UserError

LARGEST = 2**31 - 1
"""Upper limit of a size of a model: vocabularies have fewer than a million tokens."""


def _is_number(value: object) -> TypeGuard[int | float]:
    """Return True for a finite number that fp32 can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 3.4e38


class Settings:
    """A JSON object read with types; what is missing or wrong is refused by its full key. A null
    is as good as missing."""

    def __init__(self, values: Mapping[str, object], file: str = "config.json", at: str = ""):
        self._values, self.file, self._at = values, file, at

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise the UserError that shows the value of `key` and what it should have been."""
        value = self._values.get(key)
        raise UserError(
            f"{self._at}{key} is {'missing' if value is None else f'{value!r:.80}'}",
            where=self.file,
            expected=expected,
            remedy="take the file from the model's own folder",
        )

    def has(self, key: str) -> bool:
        """Whether `key` is there."""
        return self._values.get(key) is not None

    def _get(self, key: str, default: object) -> object:
        return self._values[key] if self.has(key) else default

    def section(self, key: str) -> Settings:
        """The object under `key`."""
        value = self._values.get(key)
        if not isinstance(value, Mapping):
            self.refuse(key, "an object")
        return Settings(value, self.file, f"{self._at}{key}.")

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number from 1 to LARGEST; `default` stands in for a missing one."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= LARGEST:
            self.refuse(key, f"a whole number from 1 to {LARGEST}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number; `default` stands in for a missing one."""
        value = self._get(key, default)
        if not _is_number(value) or value <= 0:
            self.refuse(key, "a number above 0")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def wholes(self, key: str) -> tuple[int, ...]:
        """A list of whole numbers of at least 0."""
        value = self._values.get(key)
        if not isinstance(value, list | tuple):
            self.refuse(key, "a list of whole numbers")
        whole = tuple(item for item in value if isinstance(item, int) and 0 <= item <= LARGEST)
        if len(whole) != len(value):
            self.refuse(key, f"a list of whole numbers from 0 to {LARGEST}")
        return whole

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers."""
        value = self._values.get(key)
        if not isinstance(value, list | tuple) or len(value) != count:
            self.refuse(key, f"a list of {count} numbers")
        numbers = tuple(float(item) for item in value if _is_number(item))
        if len(numbers) != count:
            self.refuse(key, f"a list of {count} numbers")
        return numbers

    def text(self, key: str) -> str:
        """A text."""
        value = self._values.get(key)
        if not isinstance(value, str):
            self.refuse(key, "a text")
        return value

    def require(self, key: str, default: object, supported: tuple[object, ...]) -> None:
        """Refuse a value of `key` that changes the arithmetic in a way that is not built."""
        if self._get(key, default) not in supported:
            self.refuse(key, " or ".join(repr(value) for value in supported))


@dataclass(frozen=True)
class ExpertGeometry:
    """So many experts of that inner width in each layer's place of an MLP, `chosen` for a token."""

    number: int
    chosen: int
    width: int


@dataclass(frozen=True)
class LanguageGeometry:
    """A decoder. Queries and keys have a bias, or a norm of their own where `normed_heads`. `rows`
    says for each frequency of a head which position row it reads (0 time, 1 height, 2 width);
    `positions` are as many as it was made for; `tied` says that the head shares the embedding's
    weight. `experts` stand in place of the MLPs where there are any."""

    vocabulary: int
    width: int
    mlp_width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    normed_heads: bool
    norm_eps: float
    theta: float
    rows: tuple[int, ...]
    positions: int
    tied: bool
    experts: ExpertGeometry | None = None

    def reading(self, tokens: int) -> str:
        """How a prompt of so many tokens is read: keys and values of a beginning are the same in
        two prompts that are read alike."""
        return ""


@dataclass(frozen=True)
class VisionGeometry:
    """A vision tower: patches of `frames` x `patch` x `patch` pixels in, one feature of the
    language model's width out for each square of `merge` x `merge` patches."""

    width: int
    mlp_width: int
    depth: int
    heads: int
    out_width: int
    channels: int
    patch: int
    frames: int
    merge: int
    theta: float

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def patch_shape(self) -> tuple[int, ...]:
        """Of a convolution's weight for one output: over frames too where there are several."""
        frames = (self.frames,) if self.frames > 1 else ()
        return (self.channels, *frames, self.patch, self.patch)

    @property
    def patch_numbers(self) -> int:
        return self.channels * self.frames * self.patch**2


@dataclass(frozen=True)
class Pixels:
    """How bytes of a picture become numbers: (byte x scale - mean) / std for each channel."""

    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Geometry:
    """All sizes of a vision-language model."""

    language: LanguageGeometry
    vision: VisionGeometry


def in_sections(sections: tuple[int, ...]) -> tuple[int, ...]:
    """The frequencies of time, then those of height, then those of width."""
    return tuple(row for row, size in enumerate(sections) for _ in range(size))


def read_language(
    config: Settings,
    *,
    head_width: int | None = None,
    normed_heads: bool = False,
    rows: Callable[[tuple[int, ...]], tuple[int, ...]] = in_sections,
) -> LanguageGeometry:
    """The decoder's sizes, from either style of config.json; `rows` shares a head's frequencies out
    to the position rows, which get as many of them as `mrope_section` says.

    Heads are the width's equal shares unless `head_width` is given.
    """
    text = text_settings(config)
    text.require("hidden_act", "silu", ("silu",))
    text.require("use_sliding_window", False, (False,))
    text.require("attention_dropout", 0.0, (0.0,))
    rope = rope_settings(text)
    # Published files say type mrope, transformers 5 says rope_type default beside it.
    rope.require("type", "mrope", ("mrope", "default"))
    rope.require("rope_type", "default", ("mrope", "default"))
    width, heads = text.whole("hidden_size"), text.whole("num_attention_heads")
    kv_heads = text.whole("num_key_value_heads", heads)
    sections = rope.wholes("mrope_section")
    if head_width is None:
        if width % heads or (width // heads) % 2:
            text.refuse("num_attention_heads", f"a divisor of hidden_size {width}, even shares")
        head_width = width // heads
        text.require("head_dim", None, (None, head_width))
    if heads % kv_heads:
        text.refuse("num_key_value_heads", f"a divisor of {heads} heads")
    if len(sections) != 3 or sum(sections) * 2 != head_width:
        rope.refuse("mrope_section", f"three numbers that add up to {head_width / 2:g}")
    if in_sections(sections) != tuple(sorted(rows(sections))):
        rope.refuse("mrope_section", "sections that can be interleaved, the first the longest")
    return LanguageGeometry(
        vocabulary=text.whole("vocab_size"),
        width=width,
        mlp_width=text.whole("intermediate_size"),
        depth=text.whole("num_hidden_layers"),
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        normed_heads=normed_heads,
        norm_eps=text.number("rms_norm_eps"),
        theta=(rope if rope.has("rope_theta") else text).number("rope_theta"),
        rows=rows(sections),
        positions=text.whole("max_position_embeddings", 32768),
        # The top decides where both say it: the class of the text part has defaults of its own.
        tied=config.flag("tie_word_embeddings", text.flag("tie_word_embeddings", False)),
    )


def text_settings(config: Settings) -> Settings:
    """Where the language model's keys stand."""
    return config.section("text_config") if config.has("text_config") else config


def rope_settings(text: Settings) -> Settings:
    """Where the keys of the language model's rotary positions stand."""
    return text.section("rope_parameters" if text.has("rope_parameters") else "rope_scaling")


def read_vision(
    vision: Settings,
    *,
    width: str = "hidden_size",
    out_width: str = "out_hidden_size",
    mlp_width: int | None = None,
) -> VisionGeometry:
    """A vision tower's sizes from `vision_config`; a family with other keys names them."""
    if mlp_width is None:
        mlp_width = vision.whole("intermediate_size")
    rope_theta = 10000.0
    if vision.has("rope_parameters"):
        rope_theta = vision.section("rope_parameters").number("rope_theta", rope_theta)
    geometry = VisionGeometry(
        width=vision.whole(width),
        mlp_width=mlp_width,
        depth=vision.whole("depth"),
        heads=vision.whole("num_heads"),
        out_width=vision.whole(out_width),
        channels=vision.whole("in_channels", 3),
        patch=vision.whole("patch_size"),
        frames=vision.whole("temporal_patch_size"),
        merge=vision.whole("spatial_merge_size"),
        theta=rope_theta,
    )
    vision.require("in_channels", 3, (3,))
    vision.require("in_chans", 3, (3,))
    if geometry.width % geometry.heads or geometry.head_width % 4:
        vision.refuse("num_heads", f"a divisor of {width} in shares of a multiple of 4")
    return geometry


def read_pixels(settings: Settings, channels: int = 3) -> Pixels:
    """Scale, mean and deviation of each channel, from preprocessor_config.json."""
    settings.require("do_normalize", True, (True,))
    settings.require("do_rescale", True, (True,))
    if min(settings.numbers("image_std", channels)) <= 0:
        settings.refuse("image_std", f"a list of {channels} numbers above 0")
    return Pixels(
        scale=settings.number("rescale_factor", 1 / 255),
        mean=settings.numbers("image_mean", channels),
        std=settings.numbers("image_std", channels),
    )
