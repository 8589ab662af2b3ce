"""Check the folder of a model or adapter for missing files, corrupt files and extras."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from finesight.bounded_files import read_json, read_json_object
from finesight.digests import DIGESTS_FILE, verify_folder
from finesight.doctor.diagnosis import (
    Diagnosis,
    format_command,
    make_error,
    make_ok,
    make_warning,
    user_error_to_diagnosis,
)
from finesight.doctor.extras_check import install_extra_command
from finesight.doctor.package_check import PACKAGE_NAME, PIP_COMMAND, InstalledPackages
from finesight.encode.family import FAMILIES
from finesight.errors import UserError
from finesight.model_folder import TINY_MODEL_FOLDER, ModelFolder

LFS_POINTER_PREFIX = b"version https://git-lfs.github.com/spec/"
"""First bytes of a Git LFS pointer, a small text file instead of the weights."""

PARTIAL_FILE_PATTERNS = ("*.incomplete", "*.partial", "*.part", "*.aria2", "*.crdownload")

QWEN_VL_FAMILY = "qwen"

ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""File names of PEFT adapters.

They are repeated here because importing `finesight.model` would fail with a broken torch.
"""


def check_model(path: Path, packages: InstalledPackages) -> list[Diagnosis]:
    """Check a model folder.

    If the folder has recorded digests, all of its files are read.
    """
    redownload = _redownload_command(path)
    diagnoses = [*_check_lfs_pointers(path, redownload), *_check_partial_files(path, redownload)]
    if any(diagnosis.severity == "error" for diagnosis in diagnoses):
        return diagnoses
    folder = ModelFolder(path)
    try:
        family = folder.family
    except UserError as error:
        return [*diagnoses, user_error_to_diagnosis("model-config", error, redownload)]
    diagnoses += [
        *_check_family_extra(folder, packages),
        *_check_small_files(folder, redownload),
        *_check_weights(folder, redownload),
    ]
    if (path / DIGESTS_FILE).is_file() and not any(
        diagnosis.severity == "error" for diagnosis in diagnoses
    ):
        diagnoses += _check_digests(path, redownload)
    if not any(diagnosis.severity == "error" for diagnosis in diagnoses):
        diagnoses.insert(0, make_ok("model", f"{path}: complete model of the family {family}"))
    return diagnoses


def check_adapter(path: Path) -> list[Diagnosis]:
    """Check the folder of a LoRA adapter that finesight or PEFT has written."""
    redownload = format_command("ls", "-l", str(path))
    weights = path / ADAPTER_WEIGHTS_FILE
    try:
        _parse_json(path / ADAPTER_CONFIG_FILE)
        _read_tensor_names(weights)
        if (path / DIGESTS_FILE).is_file():
            verify_folder(path)
    except UserError as error:
        return [user_error_to_diagnosis("adapter", error, redownload)]
    return [make_ok("adapter", f"{path}: complete adapter")]


def find_hub_source(path: Path) -> str | None:
    """Return the hub name of a model in a download cache.

    Returns None for other folders.
    """
    hub_cache_match = re.search(r"models--([^/]+?)--([^/]+)", str(path))
    if hub_cache_match:
        return f"{hub_cache_match[1]}/{hub_cache_match[2]}"
    assets_match = re.search(
        r"finesight/(hf|modelscope)/(?:[^/]+/)?models/([^/]+/[^/]+)", str(path)
    )
    if assets_match:
        return f"{assets_match[1]}:{assets_match[2]}"
    return None


def _redownload_command(path: Path) -> str:
    """Return the shell command that downloads a model again.

    A model in a cache is replaced. The model of another folder is downloaded to a new folder next
    to it.
    """
    source = find_hub_source(path)
    if path.resolve() == TINY_MODEL_FOLDER.resolve():
        return format_command(
            *PIP_COMMAND, "install", "--force-reinstall", "--no-deps", PACKAGE_NAME
        )
    if source is not None:
        remove = format_command("rm", "-r", str(path))
        return f"{remove} && {format_command('finesight', 'download', source)}"
    return format_command("finesight", "download", "OWNER/NAME", "--to", f"{path}-again")


def _check_lfs_pointers(path: Path, redownload: str) -> Iterator[Diagnosis]:
    pointers = [
        file.name
        for file in sorted(path.iterdir())
        if file.is_file() and _starts_with(file, LFS_POINTER_PREFIX)
    ]
    if pointers:
        names = ", ".join(pointers[:3])
        is_git_clone = (path / ".git").exists()
        yield make_error(
            "model-lfs-pointers",
            f"{path}: {names} {'is a' if len(pointers) == 1 else 'are'} Git LFS"
            f" pointer{'' if len(pointers) == 1 else 's'} without weights",
            why="git cloned the repository without Git LFS",
            remedy=format_command("git", "-C", str(path), "lfs", "pull")
            if is_git_clone
            else redownload,
        )


def _starts_with(file: Path, prefix: bytes) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(prefix)) == prefix


def _check_partial_files(path: Path, redownload: str) -> Iterator[Diagnosis]:
    names = sorted(file.name for pattern in PARTIAL_FILE_PATTERNS for file in path.glob(pattern))
    if names:
        yield make_warning(
            "model-incomplete",
            f"{path}: incomplete downloads: {', '.join(names[:3])}",
            why="a download was interrupted",
            remedy=redownload,
        )


def _check_family_extra(folder: ModelFolder, packages: InstalledPackages) -> Iterator[Diagnosis]:
    extra = None
    if folder.family == QWEN_VL_FAMILY and packages.get_version("tiktoken") is None:
        extra = "qwen-vl"
    if folder.family not in FAMILIES and packages.get_version("transformers") is None:
        extra = "hf"
    if extra:
        yield make_error(
            "model-needs-extra",
            f"{folder.path}: the family {folder.family} requires the extra [{extra}]",
            why="the model cannot be loaded without it",
            remedy=install_extra_command(packages, extra),
        )


def _check_small_files(folder: ModelFolder, redownload: str) -> Iterator[Diagnosis]:
    if folder.family not in FAMILIES:
        return
    try:
        tokenizer_file = folder.tokenizer_file
        if tokenizer_file.suffix == ".json":
            _parse_json(tokenizer_file)
        # Configurations are read on first access.
        assert folder.preprocessor_config is not None, "no image preprocessor configuration"
        assert folder.generation_config is not None, "no generation configuration"
    except UserError as error:
        yield user_error_to_diagnosis("model-files", error, redownload)


def _parse_json(path: Path) -> None:
    """Raise UserError if a file is not valid JSON."""
    read_json(path, expected="the original file")


def _check_weights(folder: ModelFolder, redownload: str) -> Iterator[Diagnosis]:
    """Detect weight files that are missing, truncated or inconsistent with the index."""
    pickle_file = folder.find_file("pytorch_model.bin") or folder.find_file(
        "pytorch_model.bin.index.json"
    )
    safetensors_file = folder.find_file("model.safetensors") or folder.find_file(
        "model.safetensors.index.json"
    )
    if pickle_file and not safetensors_file:
        # Pickles are converted on first use. This check writes no files.
        yield make_warning(
            "model-pickled",
            f"{folder.path}: weights in pickle format",
            why="they are converted to safetensors on first use, which needs the same disk"
            " space again",
            remedy=format_command("df", "-h", str(folder.path)),
        )
        return
    try:
        tensors_by_file = {file.name: _read_tensor_names(file) for file in folder.weight_files()}
    except UserError as error:
        yield user_error_to_diagnosis("model-weights", error, redownload)
        return
    index = folder.path / "model.safetensors.index.json"
    weight_map = read_json_object(index)["weight_map"] if index.is_file() else {}
    missing_tensors = sorted(
        name for name, file in weight_map.items() if name not in tensors_by_file.get(file, ())
    )
    if missing_tensors:
        yield make_error(
            "model-weights",
            f"{folder.path}: {len(missing_tensors)} tensors are missing from the file in"
            f" the index: {missing_tensors[0]}, ...",
            why="the folder contains files of different models or versions",
            remedy=redownload,
        )


def _read_tensor_names(file: Path) -> frozenset[str]:
    """Return the tensor names in a safetensors file.

    Raises:
        UserError: The file is missing or truncated.
    """
    try:
        with safe_open(file, framework="numpy") as weights:
            return frozenset(weights.keys())
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"incomplete safetensors file ({error})",
            where=str(file),
            expected="a complete safetensors file",
        ) from error


def _check_digests(path: Path, redownload: str) -> Iterator[Diagnosis]:
    try:
        verify_folder(path)
    except UserError as error:
        yield user_error_to_diagnosis("model-changed", error, redownload)
