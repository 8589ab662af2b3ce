"""A model's folder: is every file there and whole, and does its family need an extra?"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from finesight.bounded_files import read_json, read_json_object
from finesight.digests import DIGESTS, verify_folder
from finesight.doctor.extras import install_extra
from finesight.doctor.findings import Finding, fault, fine, hint, told, typed
from finesight.doctor.packages import PIP, SELF, Packages
from finesight.encode.family import FAMILIES
from finesight.errors import UserError
from finesight.hub import TINY_FOLDER, ModelFolder

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that git left in place of a large one."""

UNFINISHED = ("*.incomplete", "*.partial", "*.part", "*.aria2", "*.crdownload")

FIRST_QWEN = "qwen"

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""As PEFT calls them. `finesight.model` is not imported here: a broken torch would end all."""


def judge(path: Path, packages: Packages) -> list[Finding]:
    """What is wrong with the model folder at `path`; all of it is read where it has digests."""
    again = _again(path)
    found = [*_pointers(path, again), *_unfinished(path, again)]
    if any(one.severity == "fault" for one in found):
        return found
    folder = ModelFolder(path)
    try:
        family = folder.family
    except UserError as error:
        return [*found, told("model-config", error, again)]
    found += [*_family(folder, packages), *_small_files(folder, again), *_weights(folder, again)]
    if (path / DIGESTS).is_file() and not any(one.severity == "fault" for one in found):
        found += _digests(path, again)
    if not any(one.severity == "fault" for one in found):
        found.insert(0, fine("model", f"{path}: a whole model of the family {family}"))
    return found


def judge_adapter(path: Path) -> list[Finding]:
    """What is wrong with the folder of an adapter that finesight or PEFT wrote."""
    again = typed("ls", "-l", str(path))
    weights = path / ADAPTER_WEIGHTS
    try:
        _parse(path / ADAPTER_CONFIG)
        _names(weights)
        if (path / DIGESTS).is_file():
            verify_folder(path)
    except UserError as error:
        return [told("adapter", error, again)]
    return [fine("adapter", f"{path}: a whole adapter")]


def source_of(path: Path) -> str | None:
    """The hub's name of the model, where its folder lies in a cache."""
    cached = re.search(r"models--([^/]+?)--([^/]+)", str(path))
    if cached:
        return f"{cached[1]}/{cached[2]}"
    kept = re.search(r"finesight/(hf|modelscope)/(?:[^/]+/)?models/([^/]+/[^/]+)", str(path))
    if kept:
        return f"{kept[1]}:{kept[2]}"
    return None


def _again(path: Path) -> str:
    """The command that gets a sound copy: in a cache in its place, else beside the damaged one."""
    source = source_of(path)
    if path.resolve() == TINY_FOLDER.resolve():
        return typed(*PIP, "install", "--force-reinstall", "--no-deps", SELF)
    if source is not None:
        return f"{typed('rm', '-r', str(path))} && {typed('finesight', 'download', source)}"
    return typed("finesight", "download", "OWNER/NAME", "--to", f"{path}-again")


def _pointers(path: Path, again: str) -> Iterator[Finding]:
    pointers = [
        file.name for file in sorted(path.iterdir()) if file.is_file() and _begins(file, POINTER)
    ]
    if pointers:
        names = ", ".join(pointers[:3])
        git = (path / ".git").exists()
        yield fault(
            "model-pointers",
            f"{path}: {names} {'is' if len(pointers) == 1 else 'are'} no weights but pointers",
            why="it was cloned by git without its large files (git LFS)",
            remedy=typed("git", "-C", str(path), "lfs", "pull") if git else again,
        )


def _begins(file: Path, text: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(text)) == text


def _unfinished(path: Path, again: str) -> Iterator[Finding]:
    names = sorted(file.name for pattern in UNFINISHED for file in path.glob(pattern))
    if names:
        yield hint(
            "model-unfinished",
            f"{path}: {', '.join(names[:3])} were not finished",
            why="a download was cut off here",
            remedy=again,
        )


def _family(folder: ModelFolder, packages: Packages) -> Iterator[Finding]:
    extra = None
    if folder.family == FIRST_QWEN and packages.version("tiktoken") is None:
        extra = "qwen-vl"
    if folder.family not in FAMILIES and packages.version("transformers") is None:
        extra = "hf"
    if extra:
        yield fault(
            "model-needs-extra",
            f"{folder.path}: a model of the family {folder.family} needs the extra [{extra}]",
            why="without it the model cannot be loaded",
            remedy=install_extra(packages, extra),
        )


def _small_files(folder: ModelFolder, again: str) -> Iterator[Finding]:
    if folder.family not in FAMILIES:
        return
    try:
        tokens = folder.tokenizer_file
        if tokens.suffix == ".json":
            _parse(tokens)
        # Read when they are asked for.
        assert folder.preprocessor is not None, "no settings of pictures"
        assert folder.generation is not None, "no settings of answers"
    except UserError as error:
        yield told("model-files", error, again)


def _parse(path: Path) -> None:
    """Raise UserError for a file that is no JSON."""
    read_json(path, expected="the file as it was published")


def _weights(folder: ModelFolder, again: str) -> Iterator[Finding]:
    """Files that are missing, cut off, or hold other tensors than the index says."""
    pickled = folder.file("pytorch_model.bin") or folder.file("pytorch_model.bin.index.json")
    tensors = folder.file("model.safetensors") or folder.file("model.safetensors.index.json")
    if pickled and not tensors:
        # Converted at the first use, in as much room again: not here, where nothing is written.
        yield hint(
            "model-pickled",
            f"{folder.path}: weights as pickles",
            why="they are converted to safetensors at the first use, in as much room again",
            remedy=typed("df", "-h", str(folder.path)),
        )
        return
    try:
        held = {file.name: _names(file) for file in folder.weight_files()}
    except UserError as error:
        yield told("model-weights", error, again)
        return
    index = folder.path / "model.safetensors.index.json"
    wanted = read_json_object(index)["weight_map"] if index.is_file() else {}
    lost = sorted(name for name, file in wanted.items() if name not in held.get(file, ()))
    if lost:
        yield fault(
            "model-weights",
            f"{folder.path}: {len(lost)} tensors are not where the index says: {lost[0]}, ...",
            why="files of different models, or of different versions, lie mixed",
            remedy=again,
        )


def _names(file: Path) -> frozenset[str]:
    """The tensors of a file, whose length is compared with what its header says."""
    try:
        with safe_open(file, framework="numpy") as weights:
            return frozenset(weights.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"not a whole safetensors file ({error})",
            where=str(file),
            expected="a safetensors file as it was published",
        ) from error


def _digests(path: Path, again: str) -> Iterator[Finding]:
    try:
        verify_folder(path)
    except UserError as error:
        yield told("model-changed", error, again)
