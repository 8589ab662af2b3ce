"""Local model folders in the hub layout: config, tokenizer, preprocessor and weights."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finesight.errors import Remedy, Step, UserError, shorten
from finesight.family_components import FAMILIES, FamilyComponent
from finesight.files.bounded_files import read_bytes, read_json, read_json_object, read_text
from finesight.files.hub_address import HubAddress, is_hub_address, parse_model_address
from finesight.files.storage import FileLock, remove_folder, write_folder
from finesight.satellites import load_satellite
from finesight.settings.manifest import MANIFEST_FILE, RECIPE_FILE

if TYPE_CHECKING:
    from torch import Tensor


SAFETENSORS_INDEX_FILE = "model.safetensors.index.json"

SOURCES_FILE = "sources.json"
"""File with the name, size and modification time of each converted file, to detect changes."""


def convert_pickled_weights(files: Sequence[Path], target: Path) -> None:
    """Convert weight files written by torch.save to safetensors files in the folder `target`.

    The folder contains one safetensors file per source file, and an index. It is reused if the
    source files did not change. Concurrent processes wait for one conversion.

    A pickle can execute code when it is loaded. The `weights_only` loader of torch prevents this:
    it builds tensors and rejects everything else.
    """
    with FileLock(target.parent) as lock:
        with contextlib.suppress(OSError):  # some network file systems know no locks
            lock.acquire()
        with contextlib.suppress(UserError):
            if read_json(target / SOURCES_FILE) == _describe_sources(files):
                return
        if target.exists():
            remove_folder(target)
        _convert(files, target)


def _describe_sources(files: Sequence[Path]) -> list[list[Any]]:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _convert(files: Sequence[Path], target: Path) -> None:
    # Imported here: torch is slow to import, and only old models need it for this.
    import torch
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    total_bytes = 0
    with write_folder(target) as folder:
        source_stats = _describe_sources(files)
        for shard_index, file in enumerate(files, 1):
            # Pickled tensors may share memory and have any strides; safetensors must be contiguous.
            tensors = {
                name: tensor.detach().clone(memory_format=torch.contiguous_format)
                for name, tensor in _load_tensors(file).items()
            }
            file_name = f"model-{shard_index:05}-of-{len(files):05}.safetensors"
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file_name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        text = json.dumps(index, indent=2) + "\n"
        (folder / SAFETENSORS_INDEX_FILE).write_text(text, encoding="utf-8")
        (folder / SOURCES_FILE).write_text(json.dumps(source_stats) + "\n", encoding="utf-8")


def _load_tensors(file: Path) -> dict[str, Tensor]:
    import torch

    try:
        with warnings.catch_warnings():
            # The warning recommends loading without `weights_only`, which executes code.
            warnings.simplefilter("ignore")
            state_dict = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = "not a pickle of tensors"
        if match := re.search(r"GLOBAL (\S+)", str(error)):
            reason = f"a pickle that would execute {match[1]} when it is read"
        raise _build_error(file, reason) from error
    except OSError as error:
        raise _build_error(file, f"cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged file can raise nearly anything inside torch
        raise _build_error(file, f"incomplete, in its {file.stat().st_size} bytes") from error
    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in state_dict.items()
    ):
        what = f"a {type(state_dict).__name__} with content other than named tensors"
        raise _build_error(file, what)
    for name, tensor in state_dict.items():
        if unsupported := _describe_unsupported(tensor):
            raise _build_error(file, f"{name} is {unsupported}")
    return state_dict


def _describe_unsupported(tensor: Tensor) -> str:
    """Describe why safetensors cannot store a tensor, such as its layout; empty if it can."""
    if tensor.is_nested or str(tensor.layout) != "torch.strided":
        return "a sparse or nested tensor"
    if tensor.is_quantized or tensor.is_complex():
        return f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return "a tensor without data"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"a tensor of {tensor.nbytes} bytes in a smaller file"
    return ""


def _build_error(file: Path, reason: str) -> UserError:
    return UserError(
        reason,
        where=str(file),
        expected="a complete file of tensors, as written by torch.save",
        remedy="download it again from the page of the model, or take the model as safetensors",
    )


DOWNLOAD_PATTERNS = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "*.txt",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
    "README.md",
)
"""Files to download from a hub repository: data, never code, and the card, which digests list."""

PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
"""Index of weights stored as pickles, for models without safetensors."""

CONVERTED_FOLDER = "finesight-safetensors"
"""Subfolder of a model folder for pickled weights that were converted to safetensors."""

PREPROCESSOR_DEFAULTS: Mapping[str, Any] = {
    "patch_size": 14,
    "merge_size": 2,
    "temporal_patch_size": 2,
    "min_pixels": 56 * 56,
    "max_pixels": 16384 * 28 * 28,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
"""Preprocessor settings of the published Qwen2-VL and Qwen2.5-VL folders, for folders without them.
Mean and standard deviation per channel are those of CLIP (Radford et al. 2021), for pixels scaled
to 0..1."""

PREPROCESSOR_FILE = "preprocessor_config.json"
VIDEO_PREPROCESSOR_FILE = "video_preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
"""Processor file of transformers 5, with the preprocessor settings under `image_processor`."""

TINY_MODEL = "finesight-tiny"

TINY_MODEL_FOLDER = Path(__file__).resolve().parent / "assets" / TINY_MODEL

MAX_HEADER_BYTES = 100_000_000

MAX_LAYERS = 1000
"""Maximum number of layers in a config. The largest models have about a hundred; each takes
milliseconds to build."""

_LAYERS = re.compile(r"(.*_)?(layers?|depths?)")

_MAX_LINK_BYTES = 1024
_DOWNLOAD_AGAIN = "download the file again"
_EXPECTED_MODEL = (
    "a model folder, a hub name such as Qwen/Qwen2-VL-2B-Instruct (optionally with prefix"
    f" modelscope: and suffix @REVISION), or {TINY_MODEL}"
)


@dataclass(frozen=True)
class ModelFolder:
    """Model folder on the local disk, in the hub layout.

    Files are read on access. `fetch_weights` downloads the weights of a hub model on access, and
    `require_space` raises an error before, if the disk has no space for them.
    """

    path: Path
    fetch_weights: Callable[[], object] = field(default=object, repr=False, compare=False)
    require_space: Callable[[], object] = field(default=object, repr=False, compare=False)

    @cached_property
    def config(self) -> dict[str, Any]:
        """Content of `config.json`.

        Raises UserError if it is missing, invalid, or has too many layers.
        """
        content = self._read_json_file("config.json")
        for key, count in _iter_layer_counts(content):
            if count > MAX_LAYERS:
                raise self._build_config_error(f"{key} is {count}", f"at most {MAX_LAYERS} layers")
        return content

    @cached_property
    def family(self) -> str:
        """Model family: `model_type` in the config, independent of the folder name."""
        family = self.config.get("model_type")
        if not isinstance(family, str):
            raise self._build_config_error(
                f"model_type is {family!r}",
                f"the name of the model's family, such as {next(iter(FAMILIES))}",
            )
        return family

    @property
    def family_component(self) -> FamilyComponent:
        """What other modules need to know of the family; defaults if it has no native code."""
        return FAMILIES.describe(self.family)

    @cached_property
    def preprocessor_config(self) -> dict[str, Any]:
        """Image preprocessor settings, with PREPROCESSOR_DEFAULTS for missing keys.

        They are read from preprocessor_config.json, or from the processor file of transformers 5.
        Pixel limits may be stored under `min_pixels` and `max_pixels`, or under `size`. Raises
        UserError for a folder without settings, unless all models of the family have the same
        settings.
        """
        name, settings = self._read_image_settings()
        merged = dict(PREPROCESSOR_DEFAULTS)
        size = settings.get("size")
        size_limits = size if isinstance(size, dict) else {}
        size_keys = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        for key, size_key in size_keys.items():
            if size_key in size_limits:
                merged[key] = size_limits[size_key]
        for key, value in settings.items():
            if value is not None:
                merged[key] = value
        for key in ("patch_size", "merge_size", "temporal_patch_size", *size_keys):
            self._check_count(key, merged[key], name, PREPROCESSOR_FILE)
        if merged["min_pixels"] > merged["max_pixels"]:
            what = f"min_pixels {merged['min_pixels']} is above max_pixels {merged['max_pixels']}"
            raise self._build_config_error(what, "a range of pixels", name, PREPROCESSOR_FILE)
        return merged

    def _read_image_settings(self) -> tuple[str, dict[str, Any]]:
        component = self.family_component
        read = component.read_image_settings
        if read is not None:
            settings = FAMILIES.call(self.family, read, self._read_count)
            if not isinstance(settings, dict):
                problem = f"returns {settings!r:.60} instead of a dictionary"
                raise FAMILIES.build_call_error(self.family, read, problem)
            return "config.json", settings
        if self.find_file(PREPROCESSOR_FILE) is not None:
            return PREPROCESSOR_FILE, self._read_json_file(PREPROCESSOR_FILE)
        nested = self._read_optional(PROCESSOR_FILE).get("image_processor")
        if isinstance(nested, dict):
            return PROCESSOR_FILE, nested
        if not component.has_common_preprocessor:
            self._require_file(PREPROCESSOR_FILE)
        return PREPROCESSOR_FILE, {}

    def _read_count(self, key: str, default: int) -> int:
        """Return an integer of at least 1 in config.json, at the keys that dots separate."""
        value: Any = self.config
        for name in key.split("."):
            value = value.get(name, default) if isinstance(value, dict) else default
        self._check_count(key, value)
        return int(value)

    @cached_property
    def chat_template(self) -> str:
        """Chat template of the first file that contains one, else an empty string."""
        template = self.find_file("chat_template.jinja")
        if template is not None:
            return read_text(template, expected="a Jinja template", remedy=_DOWNLOAD_AGAIN)
        for name in ("chat_template.json", "tokenizer_config.json"):
            template_text = self._read_optional(name).get("chat_template")
            if isinstance(template_text, str):
                return template_text
        return ""

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        """Content of `generation_config.json`, empty if the file is missing."""
        return self._read_optional("generation_config.json")

    @cached_property
    def video_preprocessor_config(self) -> dict[str, Any]:
        """Video preprocessor settings, empty for a folder without them."""
        if self.find_file(VIDEO_PREPROCESSOR_FILE) is not None:
            return self._read_json_file(VIDEO_PREPROCESSOR_FILE)
        nested = self._read_optional(PROCESSOR_FILE).get("video_processor")
        if isinstance(nested, dict):
            return nested
        return {}

    @cached_property
    def tokenizer_file(self) -> Path:
        """Path of the tokenizer file, for most families `tokenizer.json`.

        Raises UserError if the file is missing.
        """
        return self._require_file(self.family_component.tokenizer_file)

    def find_file(self, name: str) -> Path | None:
        """Return the path with the content of a file, or None if it is missing.

        Some folders share files through symbolic links. Checkouts without link support (git on
        Windows, some archives) contain a small text file with the target path instead, which is
        resolved like the link.
        """
        path = self.path / name
        if not path.is_file():
            return None
        if path.stat().st_size > _MAX_LINK_BYTES:
            return path
        text = path.read_text(encoding="utf-8", errors="replace")
        is_link = Path(text).name == name and "/" in text and "\n" not in text
        if is_link and (path.parent / text).is_file():
            return path.parent / text
        return path

    @property
    def is_local(self) -> bool:
        """True for a folder that no download completes."""
        return self.fetch_weights is object

    @property
    def has_pickled_weights(self) -> bool:
        """True if the weights are stored as pickles, which `weight_files` converts."""
        names = ("pytorch_model.bin", PICKLE_INDEX_FILE)
        safe_names = ("model.safetensors", SAFETENSORS_INDEX_FILE)
        return any(map(self.find_file, names)) and not any(map(self.find_file, safe_names))

    def weight_files(self) -> list[Path]:
        """Return the safetensors files with the weights, from the index if there is one.

        The weights of hub models are downloaded on access. Pickled weights are converted into
        CONVERTED_FOLDER, and again if they changed.
        """
        self.fetch_weights()
        if files := self._list_weights("model.safetensors", SAFETENSORS_INDEX_FILE):
            return files
        if pickle_files := self._list_weights("pytorch_model.bin", PICKLE_INDEX_FILE):
            converted = self.path / CONVERTED_FOLDER
            convert_pickled_weights(pickle_files, converted)
            return ModelFolder(converted).weight_files()
        raise UserError(
            f"a model folder without weights: {self.path.name} has no safetensors file",
            where=str(self.path),
            expected="model.safetensors, or model.safetensors.index.json and the files it names",
            remedy="download the model again, weights included",
        )

    def fingerprint(self, num_blocks: int = 0) -> str:
        """Return a SHA-256 fingerprint of the model, from the headers of its weight files.

        It covers the index and names, dtypes, shapes and offsets of all tensors, and the values of
        `num_blocks` blocks of each file, so that it takes milliseconds.
        """
        sha256 = hashlib.sha256()
        index = self.find_file(SAFETENSORS_INDEX_FILE)
        if index is not None:
            sha256.update(read_bytes(index, expected="an index of weights", remedy=_DOWNLOAD_AGAIN))
        for path in self.weight_files():
            sha256.update(path.name.encode())
            sha256.update(_read_header(path))
            with path.open("rb") as file:
                for number in range(num_blocks):
                    file.seek(number * path.stat().st_size // num_blocks)
                    sha256.update(file.read(4096))
        return sha256.hexdigest()

    def _list_weights(self, single_name: str, index_name: str) -> list[Path]:
        """List the files of an index, or else a single file; empty without both."""
        index = self.find_file(index_name)
        single = self.find_file(single_name)
        if index is not None:
            return [self._require_file(name) for name in self._read_shard_names(index)]
        return [] if single is None else [single]

    def _read_shard_names(self, index: Path) -> list[str]:
        weight_map = read_json_object(index, remedy=_DOWNLOAD_AGAIN).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not files or not all(isinstance(one, str) and Path(one).name == one for one in files):
            raise UserError(
                f"weight_map is {shorten(repr(weight_map), 60)}, not a mapping from names to files",
                where=str(index),
                expected='{"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}',
                remedy="download the index again",
            )
        return sorted(set(files))

    def _check_count(self, key: str, value: object, *files: str) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            what = f"{key} is {value!r}"
            raise self._build_config_error(what, "an integer of at least 1", *files)

    def _build_config_error(
        self, what: str, expected: str, name: str = "config.json", published: str = "config.json"
    ) -> UserError:
        remedy = f"use the {published} of the published model"
        return UserError(what, where=str(self.path / name), expected=expected, remedy=remedy)

    def _read_json_file(self, name: str) -> dict[str, Any]:
        return read_json_object(self._require_file(name), remedy=_DOWNLOAD_AGAIN)

    def _read_optional(self, name: str) -> dict[str, Any]:
        if self.find_file(name) is None:
            return {}
        return self._read_json_file(name)

    def _require_file(self, name: str) -> Path:
        path = self.find_file(name)
        if path is None:
            raise UserError(
                f"no {name}",
                where=str(self.path),
                expected="a model folder with config.json, tokenizer.json and safetensors weights",
                remedy="download the model again, or correct the path",
            )
        return path


def locate_model(name_or_path: str) -> ModelFolder:
    """Return the bundled model, a local model folder, or a hub model.

    The small files of a hub model are downloaded at once, its weights (of the same commit) on
    access. The bare name `finesight-tiny` is always the bundled model, so that recipes and runs do
    not depend on the working directory; a folder of that name is `./finesight-tiny`. An existing
    folder takes precedence over a hub model of the same name, without network access.
    """
    path = resolve_model_path(name_or_path)
    if name_or_path == TINY_MODEL and not any(path.glob("*.safetensors")):
        raise UserError(
            f"finesight is installed without its model {TINY_MODEL}",
            where=str(path),
            expected="the bundled model folder",
            remedy="reinstall finesight from its wheel, its source archive or a checkout"
            " (pip install -e .)",
        )
    address = check_model_path(name_or_path)
    if address is None:
        return ModelFolder(path)
    # Imported here: it is slow to import, and local folders never need it.
    open_hub_model = load_satellite("finesight.hub.hub_model:open_hub_model")
    folder: ModelFolder = open_hub_model(name_or_path, address)
    return folder


def check_model_path(name: str) -> HubAddress | None:
    """Return the hub address of a model that is no local folder, without network access.

    A name such as `runs/mine` is a path if the folder `runs` exists, even if `mine` does not.

    Raises:
        UserError: The name is a missing path or a file.
    """
    path = resolve_model_path(name)

    def reject(what: str, remedy: Remedy, expected: str = _EXPECTED_MODEL) -> UserError:
        return UserError(what, where="model", expected=expected, remedy=remedy)

    # os.path accepts invalid paths: unknown home folders, names that are too long.
    if name and os.path.isdir(path):
        if not any((path / file).exists() for file in ("config.json", MANIFEST_FILE)):
            runs = sorted(file.parent for file in path.glob(f"*/{MANIFEST_FILE}"))
            if runs:
                listed = ", ".join(run.name for run in runs)
                what = f"{name} is no model, but contains {listed}"
                raise reject(what, f"did you mean {runs[0]}?")
        return None
    if os.path.isfile(path):
        raise reject(f"{name} is a file", f"give the folder, {path.parent}")
    address = parse_model_address(name)
    if address is not None and (is_hub_address(name) or not path.parent.is_dir()):
        return address
    names: list[str] = []
    with contextlib.suppress(OSError, ValueError):
        names = sorted(entry.name for entry in os.scandir(path.parent) if entry.is_dir())
    known = [*names, TINY_MODEL] if path.parent == Path() else names
    similar = difflib.get_close_matches(path.name, known, n=1, cutoff=0.5)
    what = f"no folder {name}"
    recipe = path.parent / RECIPE_FILE
    if path.name == "run" and recipe.is_file():
        # The folder of a new recipe.
        raise reject(what, Step("train", {"recipe": str(recipe)}, "train it first"))
    remedy = "correct the path"
    if similar:
        remedy = f"use {path.parent / similar[0]}"
    if address is None:
        raise reject(what, remedy)
    expected = f"a folder in {path.parent}/: {', '.join(names[:8]) or 'it has none'}"
    raise reject(what, f"{remedy}, or give hf:{name} for a model of the hub", expected)


def resolve_model_path(name_or_path: str) -> Path:
    """Return the local path of a model name, which need not exist.

    The bare name `finesight-tiny` is the bundled folder; `~` is the home folder.
    """
    if name_or_path == TINY_MODEL:
        return TINY_MODEL_FOLDER
    return Path(os.path.expanduser(name_or_path))


def get_portable_name(folder: ModelFolder) -> str:
    """Return the absolute path, or `finesight-tiny` for the bundled model of any installation."""
    path = folder.path.resolve()
    if path == TINY_MODEL_FOLDER.resolve():
        return TINY_MODEL
    return str(path)


def _iter_layer_counts(content: object, at: str = "") -> Iterator[tuple[str, float]]:
    """Yield all layer counts in a config and its sections, with their full keys."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        values = value if isinstance(value, list) else [value]
        if _LAYERS.fullmatch(key):
            for one in values:
                if isinstance(one, int | float):
                    yield at + key, one
        for one in values:
            yield from _iter_layer_counts(one, f"{at}{key}.")


def _read_header(path: Path) -> bytes:
    """Read the JSON header of a safetensors file, which follows its length in 8 bytes."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = b""
        if length <= MAX_HEADER_BYTES:
            header = file.read(length)
    if not header or len(header) < length:
        raise UserError(
            f"{path.stat().st_size} bytes that do not start with a safetensors header",
            where=str(path),
            expected="a complete safetensors file",
            remedy="download the file again (a pointer of Git LFS is not the file itself)",
        )
    return header


def list_model_files(folder: ModelFolder) -> dict[str, Path]:
    """List the weights, configuration and tokenizer files of a model by name.

    Code and unrelated files are excluded.
    """
    weight_files = folder.weight_files()
    files = {}
    for name, path in list_files(folder.path).items():
        file = folder.find_file(name)
        # Weights that are not in the index belong to another model.
        if path.suffix != ".safetensors" or file in weight_files:
            files[name] = file or path
    return files


def list_files(folder: Path) -> dict[str, Path]:
    """List the data files of a model or adapter folder by name, without code."""
    files = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and any(fnmatchcase(path.name, one) for one in DOWNLOAD_PATTERNS):
            files[path.name] = path
    return files
