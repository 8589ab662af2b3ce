"""A model's folder as hubs lay it out: configuration, tokenizer, preprocessor, weights."""

from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from finesight.bounded_files import read_bytes, read_json_object, read_text
from finesight.errors import UserError
from finesight.pickled import convert_once
from finesight.remote.address import Address, is_on_a_hub, model_address

WANTED = (
    *("*.json", "*.safetensors", "*.jinja", "*.txt", "*.tiktoken"),
    *("LICENSE*", "NOTICE*", "README.md"),
)
"""What is fetched of a hub repository: data files, never code. The card too, as the digests of a
folder that finesight made list it."""

PICKLED_INDEX = "pytorch_model.bin.index.json"
"""Of the weights of models that were never published as safetensors: `finesight.pickled`."""

CONVERTED = "finesight-safetensors"
"""The folder, within a model's, that holds such weights as safetensors."""

PREPROCESSOR_DEFAULTS: Mapping[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 56 * 56,
    "max_pixels": 16384 * 28 * 28,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""What the published Qwen2-VL and Qwen2.5-VL folders say, for folders that say nothing. Mean and
deviation by channel are those of CLIP (Radford et al. 2021), for pixels scaled to 0..1."""

PREPROCESSOR = "preprocessor_config.json"
PROCESSOR = "processor_config.json"
"""Where transformers 5 writes what stood in PREPROCESSOR, as `image_processor`."""

_FIRST = "qwen"
_OF_THE_DEFAULTS = ("qwen2_vl", "qwen2_5_vl")

TINY = "finesight-tiny"
"""The name of the model that the package brings: a recipe says `model: finesight-tiny`."""

TINY_FOLDER = Path(__file__).resolve().parent / "assets" / TINY
"""Where that model lies, wherever finesight is installed."""

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format for the header of a file."""

MOST_LAYERS = 1000
"""The largest models have about a hundred; each takes milliseconds to build."""

_LAYERS = re.compile(r"(.*_)?(layers?|depths?)")

_LONGEST_LINK = 1024
_AGAIN = "download the file again"
_POSSIBLE = (
    "a model folder, a hub name such as Qwen/Qwen2-VL-2B-Instruct (modelscope: before it for that"
    f" hub, @REVISION after it), or {TINY}"
)


def _nothing() -> None:
    """A folder of the user's own has what it has."""


@dataclass(frozen=True)
class ModelFolder:
    """A local folder in the hub's layout; nothing is read before it is asked for, and of a hub's
    model no weights are fetched before."""

    path: Path
    fetch_weights: Callable[[], object] = field(default=_nothing, repr=False, compare=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config.json`. Raises UserError when it is missing or broken, or names more layers than
        any model has."""
        content = self._json("config.json")
        for key, count in _layer_counts(content):
            if count > MOST_LAYERS:
                raise UserError(
                    f"{key} is {count}",
                    where=str(self.path / "config.json"),
                    expected=f"at most {MOST_LAYERS} layers",
                    remedy="take the config.json of the published model",
                )
        return content

    @cached_property
    def family(self) -> str:
        """The `model_type` of the configuration; the folder's name says nothing."""
        family = self.config.get("model_type")
        if not isinstance(family, str):
            raise UserError(
                f"model_type is {family!r}",
                where=str(self.path / "config.json"),
                expected="the name of the model's family, such as qwen2_vl",
                remedy="take the config.json of the published model",
            )
        return family

    @cached_property
    def preprocessor(self) -> dict[str, Any]:
        """The picture settings, with PREPROCESSOR_DEFAULTS for those that are not given.

        They stand in a file of their own, as published, or within the processor's, where
        transformers 5 writes them; the pixel limits under `min_pixels` and `max_pixels`, or under
        `size`. Raises UserError for a folder without, unless its family has always had the same.
        """
        name, given = self._picture_settings()
        size = given.get("size")
        sizes = size if isinstance(size, dict) else {}
        renamed = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        found = {ours: sizes[theirs] for ours, theirs in renamed.items() if theirs in sizes}
        present = {key: value for key, value in given.items() if value is not None}
        merged = {**PREPROCESSOR_DEFAULTS, **found, **present}
        for key in ("patch_size", "merge_size", "temporal_patch_size", *renamed):
            value = merged[key]
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"{key} is {value!r}",
                    where=str(self.path / name),
                    expected="a whole number from 1 upwards",
                    remedy="take the preprocessor_config.json of the published model",
                )
        if merged["min_pixels"] > merged["max_pixels"]:
            raise UserError(
                f"min_pixels {merged['min_pixels']} is above max_pixels {merged['max_pixels']}",
                where=str(self.path / name),
                expected="a range of pixels",
                remedy="take the preprocessor_config.json of the published model",
            )
        return merged

    def _picture_settings(self) -> tuple[str, dict[str, Any]]:
        if self.family == _FIRST:
            return "config.json", self._fixed_pictures()
        if self.file(PREPROCESSOR) is not None:
            return PREPROCESSOR, self._json(PREPROCESSOR)
        if self.file(PROCESSOR) is not None:
            nested = self._json(PROCESSOR).get("image_processor")
            if isinstance(nested, dict):
                return PROCESSOR, nested
        if self.family not in _OF_THE_DEFAULTS:
            self._required(PREPROCESSOR)
        return PREPROCESSOR, {}

    def _fixed_pictures(self) -> dict[str, Any]:
        """What the first Qwen-VL's configuration says: pictures of `image_size` pixels each way,
        whose patches become a square of features."""
        found = self.config.get("visual")
        visual = found if isinstance(found, dict) else {}
        numbers = {"image_size": 0, "patch_size": 0, "n_queries": 256}
        for key, default in numbers.items():
            value = visual.get(key, default)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UserError(
                    f"visual.{key} is {visual.get(key)!r}",
                    where=str(self.path / "config.json"),
                    expected="a whole number from 1 upwards",
                    remedy="take the config.json of the published model",
                )
            numbers[key] = value
        side, patch, queries = numbers.values()
        return {
            "image_size": side,
            "patch_size": patch,
            "merge_size": max(1, side // patch // math.isqrt(queries)),
            "temporal_patch_size": 1,
            "min_pixels": side**2,
            "max_pixels": side**2,
        }

    @cached_property
    def chat_template(self) -> str:
        """The chat template, from the first file that has one; empty without any."""
        template = self.file("chat_template.jinja")
        if template is not None:
            return read_text(template, expected="a Jinja template", remedy=_AGAIN)
        for name in ("chat_template.json", "tokenizer_config.json"):
            found = self._json(name).get("chat_template") if self.file(name) is not None else None
            if isinstance(found, str):
                return found
        return ""

    @cached_property
    def generation(self) -> dict[str, Any]:
        """`generation_config.json`, empty where there is none."""
        name = "generation_config.json"
        return self._json(name) if self.file(name) is not None else {}

    @cached_property
    def tokenizer_file(self) -> Path:
        """`tokenizer.json`, the form that holds the whole tokenizer; of the first Qwen, its
        `qwen.tiktoken`. UserError without it."""
        return self._required("qwen.tiktoken" if self.family == _FIRST else "tokenizer.json")

    def file(self, name: str) -> Path | None:
        """Where the content of the folder's file `name` stands, or None without such a file.

        Some folders share files through symbolic links. A checkout that cannot make links (git
        on Windows, some archives) writes in their place a small text file with the target's
        path; that is followed as the link it stands for.
        """
        path = self.path / name
        if not path.is_file():
            return None
        if path.stat().st_size > _LONGEST_LINK:
            return path
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            return path
        is_link = Path(text).name == name and "/" in text and "\n" not in text
        return path.parent / text if is_link and (path.parent / text).is_file() else path

    def weight_files(self) -> list[Path]:
        """The safetensors files that hold the weights, by the index or the single file; of a hub's
        model they are fetched if need be.

        Where there are only pickled ones, they are converted first, into the folder CONVERTED
        within this one, and anew where they have changed since. Raises UserError for a folder
        without weights, for an index with a missing file, and for a pickle that holds more than
        tensors.
        """
        self.fetch_weights()
        single = self.file("model.safetensors")
        index = self._index()
        if index is not None:
            return [self._required(name) for name in self._shards(index)]
        if single is not None:
            return [single]
        pickled = self._pickled()
        if pickled:
            converted = self.path / CONVERTED
            convert_once(pickled, converted)
            return ModelFolder(converted).weight_files()
        raise UserError(
            f"a model folder without weights: {self.path.name} has no safetensors file",
            where=str(self.path),
            expected="model.safetensors, or model.safetensors.index.json and the files it names",
            remedy="download the model again, weights included",
        )

    def fingerprint(self) -> str:
        """SHA-256 over the headers of the weight files and the index: names, types, shapes and
        offsets, not the numbers themselves, so it takes milliseconds."""
        total = hashlib.sha256()
        index = self._index()
        if index is not None:
            total.update(read_bytes(index, expected="an index of weights", remedy=_AGAIN))
        for path in self.weight_files():
            total.update(path.name.encode())
            total.update(_header(path))
        return total.hexdigest()

    def _index(self) -> Path | None:
        return self.file("model.safetensors.index.json")

    def _pickled(self) -> list[Path]:
        index, single = self.file(PICKLED_INDEX), self.file("pytorch_model.bin")
        if index is not None:
            return [self._required(name) for name in self._shards(index)]
        return [] if single is None else [single]

    def _shards(self, index: Path) -> list[str]:
        names = _read_json(index).get("weight_map")
        sound = isinstance(names, dict) and all(
            isinstance(name, str) and Path(name).name == name for name in names.values()
        )
        if not isinstance(names, dict) or not names or not sound:
            raise UserError(
                f"weight_map is {_shown(names)}, not names and the files that hold them",
                where=str(index),
                expected='{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}',
                remedy="download the index again",
            )
        return sorted(set(names.values()))

    def _json(self, name: str) -> dict[str, Any]:
        return _read_json(self._required(name))

    def _required(self, name: str) -> Path:
        path = self.file(name)
        if path is None:
            raise UserError(
                f"no {name}",
                where=str(self.path),
                expected="a model folder with config.json, tokenizer.json and safetensors weights",
                remedy="download the model again, or correct the path",
            )
        return path


def locate(name_or_path: str) -> ModelFolder:
    """The package's own model, the model folder at a path, or the hub's model of that name, whose
    small files are fetched if need be, and the weights of the same commit once they are asked for.

    The bare name `finesight-tiny` always is the package's model, so that a recipe or a run that
    names it means the same in every working directory; a folder of that name is
    `./finesight-tiny`. A folder wins over a hub's model of the same name: only a name that is no
    existing folder touches the network or the hub's cache. Raises UserError for a missing folder
    and for a model that cannot be had (unknown, gated, offline, left out of the installation).
    """
    # os.path's functions also stand what cannot be a path: a home of nobody, a name too long.
    path = named(name_or_path)
    if name_or_path == TINY and not any(path.glob("*.safetensors")):
        raise UserError(
            f"finesight is installed without its model {TINY}",
            where=str(path),
            expected="the folder that the package brings",
            remedy="install finesight again, from its wheel, its source archive or a checkout"
            " (pip install -e .)",
        )
    if name_or_path and os.path.isdir(path):
        return ModelFolder(path)
    if os.path.isfile(path):
        raise UserError(
            f"{name_or_path} is a file",
            where="model",
            expected=_POSSIBLE,
            remedy=f"give the folder, {path.parent}",
        )
    address = model_address(name_or_path)
    if address is None:
        raise UserError(
            f"no folder {name_or_path!r}",
            where="model",
            expected=_POSSIBLE,
            remedy="correct the path",
        )
    return _fetched(name_or_path, address)


def named(name_or_path: str) -> Path:
    """The path that a name stands for, which need not exist: the package's own folder for the bare
    name `finesight-tiny`, else the name read as a path, `~` as the user's home."""
    return TINY_FOLDER if name_or_path == TINY else Path(os.path.expanduser(name_or_path))


def lasting_name(folder: ModelFolder) -> str:
    """What finds a local folder again from any working directory: its absolute path or, for the
    package's own model, which lies elsewhere in another installation, `finesight-tiny`."""
    path = folder.path.resolve()
    return TINY if path == TINY_FOLDER.resolve() else str(path)


def _fetched(name: str, address: Address) -> ModelFolder:
    # Imported here: it is slow to import, and local folders never need it.
    from finesight.remote.repository import WEIGHTS, open_model

    try:
        model = open_model(address, WANTED)
        small = [path for path in model.paths if not path.endswith(WEIGHTS)]
        folder = model.bring(small, model.folder)
        return ModelFolder(folder, partial(model.bring, model.paths, folder))
    except UserError as error:
        if is_on_a_hub(name):
            raise
        raise UserError(
            f"{name} is no local folder and cannot be had from the hub: {error.what}",
            where=error.where,
            expected=error.expected,
            remedy=error.remedy,
        ) from error


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read_json(path: Path) -> dict[str, Any]:
    return read_json_object(path, remedy=_AGAIN)


def _layer_counts(content: object, at: str = "") -> Iterator[tuple[str, float]]:
    """Yield the numbers of layers in all sections of a configuration, each with its full key."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if _LAYERS.fullmatch(key):
            yield from ((at + key, one) for one in values if isinstance(one, int | float))
        for one in values:
            yield from _layer_counts(one, f"{at}{key}.")


def _header(path: Path) -> bytes:
    """The header of a safetensors file: 8 bytes of length, little endian, then JSON."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= LARGEST_HEADER else b""
    if not header or len(header) < length:
        raise UserError(
            f"{path.stat().st_size} bytes that do not start with a safetensors header",
            where=str(path),
            expected="a whole safetensors file",
            remedy="download the file again (a pointer of Git LFS is not the file itself)",
        )
    return header
