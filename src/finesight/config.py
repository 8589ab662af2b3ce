"""Every setting of a recipe. Unknown keys are refused with the nearest known name."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    """A group of settings: frozen, unknown keys refused, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _as_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def _as_path(value: object) -> object:
    return Path(os.path.expanduser(value)) if isinstance(value, str) else value


def _as_float(value: object) -> object:
    # YAML reads 1 as an integer and, without a dot, 1e-4 as text: both mean a number here.
    if isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return value
    return value


FilePath = Annotated[Path, BeforeValidator(_as_path)]
Real = Annotated[float, BeforeValidator(_as_float)]

MOST = 1_000_000_000
"""Of anything that is counted: what is more was mistyped, and would end where memory does."""

Positive = Annotated[int, Field(gt=0, le=MOST)]
Steps = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(gt=0, le=65_535)]
"""Pixels along a side, as many as a JPEG may have."""

Share = Annotated[Real, Field(gt=0.0, lt=1.0)]
StepsOrShare = Steps | Share
"""A count of optimiser steps (integer) or a share of the run (a fraction below 1)."""


def _as_place(value: object) -> object:
    return value if is_address(value) else _as_path(value)


def is_address(value: object) -> bool:
    """Whether it is text that names a file in object storage, such as `s3://BUCKET/NAME`."""
    return isinstance(value, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value) is not None


FilePlace = Annotated[Path | str, BeforeValidator(_as_place)]
"""A path, or the address of a file in object storage: no other text."""


class HeldOutFile(Section):
    """A file of samples, JSONL, Parquet or tar, or a pattern that fits many of them; `limit` takes
    only its first samples."""

    path: FilePlace
    limit: Positive | None = None


class DataFile(HeldOutFile):
    """A file to learn from. `weight` is how many times an epoch passes over it (2.0: twice, 0.5: a
    different half each epoch)."""

    weight: Annotated[Real, Field(gt=0.0, le=10_000.0)] = 1.0


def _as_files(value: object) -> object:
    items = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": item} if isinstance(item, str | Path) else item for item in items)


DataFiles = Annotated[tuple[DataFile, ...], BeforeValidator(_as_files), Field(min_length=1)]
HeldOutFiles = Annotated[tuple[HeldOutFile, ...], BeforeValidator(_as_files)]


class Data(Section):
    """What to learn from and what to measure on."""

    train: DataFiles
    eval: HeldOutFiles = ()
    system: str | None = None
    max_length: Positive = 8192
    unusable: Literal["drop", "refuse"] = "drop"


class PixelRange(Section):
    """The families' own rule: keep the shape, stay within this many pixels."""

    min_pixels: Positive
    max_pixels: Positive

    @model_validator(mode="after")
    def _ordered(self) -> PixelRange:
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} is above max_pixels {self.max_pixels}")
        return self


class ExactSize(Section):
    """Every picture to one size, rounded to what the family's patches allow."""

    height: Side
    width: Side


class LongestSide(Section):
    """Scale so that the longer side has this many pixels, keep the shape."""

    longest_side: Side


PictureRule = PixelRange | ExactSize | LongestSide

Tuning = Literal["frozen", "lora", "full"]

Device = Literal["auto", "cpu", "cuda"]

Sharing = Literal["ddp", "zero2", "fsdp", "fsdp_offload"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Cache = Literal["auto", "never", "memory", "disk"]
Weights = Literal["auto", "nf4", "fp8", "int8", "int4"]
"""`auto`: as they are stored, or as a run trained with them; the others are made while loading."""


class Lora(Section):
    """Low-rank adapters (Hu et al. 2021): scale is alpha / rank; `targets` narrows the linear
    layers of a part by the last piece of their hub name, by default all of them."""

    rank: Annotated[int, Field(gt=0, le=65_536)] = 64
    alpha: Annotated[Real, Field(gt=0.0, le=1e9)] = 16.0
    dropout: Annotated[Real, Field(ge=0.0, lt=1.0)] = 0.05
    targets: Annotated[tuple[str, ...], BeforeValidator(_as_tuple)] | None = None


Quantisable = Literal["vision", "merger", "language", "embeddings"]
"""Of the embeddings the head alone is kept in four bits: the table is looked up."""


def _frozen_modes(part: str) -> str:
    return "frozen" if part == "embeddings" else "lora or frozen"


def _as_names(value: object) -> object:
    return (value,) if isinstance(value, str) else _as_tuple(value)


Multiplied = Literal["vision", "language"]
"""The parts with nearly all of a step's arithmetic. A merger has little, and of the embeddings the
head makes the loss: what it rounds shows there at once."""


class Tune(Section):
    """How each part of the model learns, and whose frozen linear layers are kept in four bits, NF4
    with double quantisation (Dettmers et al. 2023), or multiplied in FP8 (Micikevicius et al.
    2022)."""

    vision: Tuning = "frozen"
    merger: Tuning = "frozen"
    language: Tuning = "lora"
    embeddings: Literal["frozen", "full"] = "frozen"
    lora: Lora = Lora()
    nf4: (
        Annotated[tuple[Quantisable, ...], BeforeValidator(_as_names), Field(min_length=1)] | None
    ) = None

    fp8: (
        Annotated[tuple[Multiplied, ...], BeforeValidator(_as_names), Field(min_length=1)] | None
    ) = None

    @field_validator("nf4", "fp8")
    @classmethod
    def _in_one_order(cls, parts: tuple[Quantisable, ...] | None) -> tuple[Quantisable, ...] | None:
        """However they were listed, the same parts are the same setting."""
        if parts is None:
            return None
        return tuple(part for part in get_args(Quantisable) if part in parts)

    @model_validator(mode="after")
    def _quantised_parts_are_frozen(self) -> Tune:
        modes = {
            "vision": self.vision,
            "merger": self.merger,
            "language": self.language,
            "embeddings": self.embeddings,
        }
        for part in self.nf4 or ():
            if modes[part] == "full":
                raise ValueError(
                    f"{part} is full and in nf4: weights in four bits cannot be trained;"
                    f" set tune.{part} to {_frozen_modes(part)}, or leave it out of nf4"
                )
        for part in self.fp8 or ():
            if modes[part] == "full":
                raise ValueError(
                    f"{part} is full and in fp8: only weights that stay as they are can be in FP8;"
                    f" set tune.{part} to lora or frozen, or leave it out of fp8"
                )
            if part in (self.nf4 or ()):
                raise ValueError(f"{part} is in nf4 and in fp8: leave it out of one of them")
        return self

    @model_validator(mode="after")
    def _something_learns(self) -> Tune:
        if not (self.uses("lora") or self.uses("full")):
            raise ValueError("every part is frozen: set at least one to lora or full")
        return self

    def uses(self, tuning: Tuning) -> bool:
        """Whether at least one part is in this mode."""
        return tuning in (self.vision, self.merger, self.language, self.embeddings)


Rate = Annotated[Real, Field(gt=0.0)]
Beta = Annotated[Real, Field(ge=0.0, lt=1.0)]


class Rates(Section):
    """Learning rates by part; a part left out takes `default`."""

    default: Rate
    vision: Rate | None = None
    merger: Rate | None = None
    language: Rate | None = None
    embeddings: Rate | None = None


def _as_rates(value: object) -> object:
    return value if isinstance(value, dict | Rates) else {"default": value}


class Train(Section):
    """The optimisation: AdamW (Loshchilov & Hutter 2019) over packed micro-batches, or for weights
    that start from nothing Muon (Jordan et al. 2024), with AdamW for vectors and embeddings.
    `adamw8bit` keeps AdamW's moments of matrices in eight bits (Dettmers et al. 2022).

    `batch` counts samples of one optimiser step over all GPUs; `pack_tokens` is the token budget
    of one packed micro-batch (a longer sample stands alone, a much longer one is shared out over
    all processes). `cache` says where features of pictures are kept that a frozen tower has looked
    at. `parallel` says what several processes share out: nothing (DDP), gradients and moments
    (ZeRO-2), or weights, too (FSDP2), which, like moments, may lie in the CPU's memory.
    """

    epochs: Annotated[Real, Field(gt=0.0, le=1e6)] | None = None
    steps: Positive | None = None
    batch: Positive = 16
    pack_tokens: Positive = 4096
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    learning_rate: Annotated[Rates, BeforeValidator(_as_rates)] = Rates(default=1e-4)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: StepsOrShare = 0.03
    weight_decay: Annotated[Real, Field(ge=0.0)] = 0.0
    betas: Annotated[tuple[Beta, Beta], BeforeValidator(_as_tuple)] = (0.9, 0.999)
    clip: Annotated[Real, Field(gt=0.0)] | None = 1.0
    recompute: bool | Share = False
    precision: Precision = "auto"
    device: Device = "auto"
    seed: Seed = 0
    data_seed: Seed = 0
    workers: Annotated[int, Field(ge=0, le=1024)] | None = None
    cache: Cache = "auto"
    parallel: Sharing = "ddp"
    save_every: StepsOrShare | None = None
    keep: Positive = 2

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.epochs is not None and self.steps is not None:
            raise ValueError("epochs and steps are both set: give one, and null for the other")
        return self


TaskName = Literal[
    "captions", "latex", "ocr", "qa", "classification", "json", "grounding", "detection"
]

OwnMetric = Annotated[str, Field(pattern=r"\.py:[A-Za-z_]\w*$")]
"""A function in a Python file: `path/to/metric.py:function`."""

Metric = TaskName | OwnMetric


class Eval(Section):
    """Measuring by generation on held-out samples, before the first step and after the last;
    `every` adds measurements in between. After `patience` of them without a better headline the
    run stops; with it, the weights of a run are those of its best measurement."""

    metric: Metric
    every: StepsOrShare | None = None
    patience: Positive | None = None
    limit: Positive | None = None
    max_new_tokens: Annotated[int, Field(gt=0, le=1_048_576)] = 512
    batch: Positive = 32

    @model_validator(mode="after")
    def _measured_on_the_way(self) -> Eval:
        if self.patience is not None and self.every is None:
            raise ValueError("patience counts measurements on the way, and every is not set")
        return self


TrackerKind = Literal["swanlab", "tensorboard", "wandb", "mlflow", "trackio"]

WORDS: dict[TrackerKind, tuple[str, ...]] = {
    "swanlab": ("cloud", "local", "offline"),
    "wandb": ("cloud", "offline"),
}
"""Addresses that are no addresses: whether figures go to the makers' own server, or into files."""


class Tracker(Section):
    """Where figures go beside `metrics.jsonl`, which is always written: one of five packages, the
    project there that the run is listed in, and the address of its server or store."""

    kind: TrackerKind
    project: Annotated[str, Field(min_length=1)] = "finesight"
    address: Annotated[str, Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _known_address(self) -> Tracker:
        address, words = self.address, WORDS.get(self.kind, ())
        if address is None or address in words:
            return self
        if self.kind == "tensorboard":
            raise ValueError("tensorboard writes into the run's folder: it takes no address")
        if words and not is_address(address):
            known = ", ".join((*words, "https://HOST"))
            raise ValueError(f"{self.kind} cannot send to {address!r}: it knows {known}")
        if _SECRET_PARTS.search(address):
            raise ValueError(
                f"the address of {self.kind} holds a password or token, which would be written"
                " into the run: leave it out, the package reads it from the environment"
            )
        return self


_SECRET_PARTS = re.compile("(?i)://[^/]*@|[?&][^=&]*(?:key|token|secret|sig|pass)[^=&]*=")
"""Of an address: a user's name before the host, or a query that lets in."""


def _as_trackers(value: object) -> object:
    items = value if isinstance(value, list | tuple) else [] if value is None else [value]
    return tuple({"kind": item} if isinstance(item, str) else item for item in items)


Trackers = Annotated[tuple[Tracker, ...], BeforeValidator(_as_trackers)]


class Recipe(Section):
    """One run, from pictures to a tuned model."""

    model: str
    adapter: FilePath | None = None
    data: Data
    picture: PictureRule | None = None
    tune: Tune = Tune()
    train: Train = Train()
    eval: Eval | None = None
    track: Trackers = ()
    output: FilePath

    @field_validator("track")
    @classmethod
    def _each_once(cls, trackers: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        kinds = [tracker.kind for tracker in trackers]
        if twice := [kind for kind in dict.fromkeys(kinds) if kinds.count(kind) > 1]:
            raise ValueError(f"{twice[0]} is listed twice: list each tracker once")
        return trackers
