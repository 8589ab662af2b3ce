"""Check the files of model and adapter folders, and the requirements of recipes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from finesight.bounded_files import read_json, read_json_object
from finesight.config import Recipe
from finesight.doctor.diagnosis import (
    Diagnosis,
    has_errors,
    join_command,
    make_diagnosis,
    user_error_to_diagnosis,
)
from finesight.doctor.gpu_check import MIN_BF16_CAPABILITY, TorchInfo
from finesight.doctor.machine_check import GB, WriteLocation
from finesight.doctor.package_check import (
    EXTRA_DESCRIPTIONS,
    PACKAGE_NAME,
    InstalledPackages,
    install_command,
    install_extra_command,
)
from finesight.encode.renderer import FAMILIES
from finesight.errors import UserError
from finesight.model_folder import TINY_MODEL_FOLDER, ModelFolder, resolve_model_path
from finesight.storage import DIGESTS_FILE, verify_folder
from finesight.track.backends import TRACKERS

LFS_POINTER_PREFIX = b"version https://git-lfs.github.com/spec/"
"""First bytes of a Git LFS pointer, a small text file instead of the weights."""

PARTIAL_FILE_PATTERNS = ("*.incomplete", "*.partial", "*.part", "*.aria2", "*.crdownload")

ADAPTER_CONFIG_FILE, ADAPTER_WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
"""File names of PEFT adapters.

They are repeated here because importing `finesight.model` would fail with a broken torch.
"""

MIN_FP8_CAPABILITY = (8, 9)
"""Minimum CUDA compute capability for FP8 matrix products."""


def check_model(path: Path, packages: InstalledPackages) -> list[Diagnosis]:
    """Check a model folder.

    If the folder has recorded digests, all of its files are read.
    """
    redownload = redownload_command(path)
    diagnoses = list(_check_download(path, redownload))
    if has_errors(diagnoses):
        return diagnoses
    folder = ModelFolder(path)
    try:
        family = folder.family
    except UserError as error:
        return [*diagnoses, user_error_to_diagnosis("model-config", error, redownload)]
    extra = "hf" if family not in FAMILIES else "qwen-vl" if family == "qwen" else None
    required = {"hf": "transformers", "qwen-vl": "tiktoken"}.get(extra or "")
    if extra and required and packages.get_version(required) is None:
        values = {"path": path, "family": family, "extra": extra}
        install = install_extra_command(extra)
        diagnoses.append(make_diagnosis("model-needs-extra", **values, install=install))
    diagnoses += _check_files(folder, redownload)
    diagnoses += _check_weights(folder, redownload)
    if (path / DIGESTS_FILE).is_file() and not has_errors(diagnoses):
        try:
            verify_folder(path)
        except UserError as error:
            diagnoses.append(user_error_to_diagnosis("model-changed", error, redownload))
    if not has_errors(diagnoses):
        diagnoses.insert(0, make_diagnosis("model", path=path, family=family))
    return diagnoses


def check_adapter(path: Path) -> Diagnosis:
    """Check the folder of a LoRA adapter that finesight or PEFT has written."""
    try:
        read_json(path / ADAPTER_CONFIG_FILE, expected="the original file")
        _read_tensor_names(path / ADAPTER_WEIGHTS_FILE)
        if (path / DIGESTS_FILE).is_file():
            verify_folder(path)
    except UserError as error:
        return user_error_to_diagnosis("adapter", error, join_command("ls", "-l", path))
    return make_diagnosis("adapter", path=path)


def find_hub_source(path: Path) -> str | None:
    """Return the hub name of a model in a download cache. Returns None for other folders."""
    if match := re.search(r"models--([^/]+?)--([^/]+)", str(path)):
        return f"{match[1]}/{match[2]}"
    pattern = r"finesight/(hf|modelscope)/(?:[^/]+/)?models/([^/]+/[^/]+)"
    match = re.search(pattern, str(path))
    return f"{match[1]}:{match[2]}" if match else None


def redownload_command(path: Path) -> str:
    """Return the shell command that downloads a model again.

    A model in a cache is replaced. The model of another folder is downloaded to a new folder next
    to it.
    """
    if path.resolve() == TINY_MODEL_FOLDER.resolve():
        return install_command("--force-reinstall", "--no-deps", PACKAGE_NAME)
    source = find_hub_source(path)
    if source is None:
        return join_command("finesight", "download", "OWNER/NAME", "--to", f"{path}-again")
    return f"{join_command('rm', '-r', path)} && {join_command('finesight', 'download', source)}"


def _check_download(path: Path, redownload: str) -> Iterator[Diagnosis]:
    """Detect Git LFS pointers and incomplete downloads."""
    pointers = []
    for file in sorted(path.iterdir()):
        if file.is_file():
            with file.open("rb") as stream:
                if stream.read(len(LFS_POINTER_PREFIX)) == LFS_POINTER_PREFIX:
                    pointers.append(file.name)
    if pointers:
        lfs_pull = join_command("git", "-C", path, "lfs", "pull")
        remedy = lfs_pull if (path / ".git").exists() else redownload
        names = ", ".join(pointers[:3])
        yield make_diagnosis("model-lfs-pointers", path=path, names=names, remedy=remedy)
    partial = sorted(file.name for pattern in PARTIAL_FILE_PATTERNS for file in path.glob(pattern))
    if partial:
        names = ", ".join(partial[:3])
        yield make_diagnosis("model-incomplete", path=path, names=names, remedy=redownload)


def _check_files(folder: ModelFolder, redownload: str) -> Iterator[Diagnosis]:
    """Detect a corrupt tokenizer or configuration."""
    if folder.family not in FAMILIES:
        return
    try:
        if folder.tokenizer_file.suffix == ".json":
            read_json(folder.tokenizer_file, expected="the original file")
        # Configurations are read on first access.
        assert folder.preprocessor_config is not None, "no image preprocessor configuration"
        assert folder.generation_config is not None, "no generation configuration"
    except UserError as error:
        yield user_error_to_diagnosis("model-files", error, redownload)


def _check_weights(folder: ModelFolder, redownload: str) -> Iterator[Diagnosis]:
    """Detect weight files that are missing, truncated or inconsistent with the index."""
    index = folder.path / "model.safetensors.index.json"
    pickle_names = ("pytorch_model.bin", "pytorch_model.bin.index.json")
    has_pickle = any(folder.find_file(name) for name in pickle_names)
    if has_pickle and not (folder.find_file("model.safetensors") or folder.find_file(index.name)):
        # Pickles are converted on first use. This check writes no files.
        remedy = join_command("df", "-h", folder.path)
        yield make_diagnosis("model-pickled", path=folder.path, remedy=remedy)
        return
    try:
        tensors_by_file = {file.name: _read_tensor_names(file) for file in folder.weight_files()}
    except UserError as error:
        yield user_error_to_diagnosis("model-weights", error, redownload)
        return
    weight_map = read_json_object(index)["weight_map"] if index.is_file() else {}
    missing = sorted(
        name for name, file in weight_map.items() if name not in tensors_by_file.get(file, ())
    )
    if missing:
        values = {"path": folder.path, "count": len(missing), "name": missing[0]}
        yield make_diagnosis("model-weights", **values, remedy=redownload)


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


def check_recipe(
    path: Path,
    recipe: Recipe,
    packages: InstalledPackages,
    torch_info: TorchInfo,
    location: WriteLocation,
) -> list[Diagnosis]:
    """Detect problems of a recipe and its output folder that stop training on this machine."""
    train_command = join_command("finesight", "train", path)
    diagnoses = [
        *_check_extras(recipe, packages),
        *_check_precision(train_command, recipe, torch_info),
    ]
    # A run writes checkpoints, predictions and a report.
    if not location.is_writable or location.free_bytes < GB:
        code = "disk-full.output" if location.is_writable else "not-writable.output"
        values = {"folder": location.folder, "free": location.free_bytes / GB}
        diagnoses.append(make_diagnosis(code, **values, train=train_command))
    for file in (*recipe.data.train, *recipe.data.eval):
        text = str(file.path)
        is_local_path = "://" not in text and not any(character in text for character in "*?[")
        if is_local_path and not os.path.exists(text):
            find = join_command("find", ".", "-name", Path(text).name)
            diagnoses.append(
                make_diagnosis("data-missing", file=text, folder=Path.cwd(), find=find)
            )
    if not recipe.data.eval:
        diagnoses.append(make_diagnosis("not-evaluated.recipe"))
    folder = resolve_model_path(recipe.model)
    if folder.is_dir() and (folder / "config.json").is_file():
        diagnoses += check_model(folder, packages)
    if not has_errors(diagnoses):
        diagnoses.insert(0, make_diagnosis("recipe", path=path))
    return diagnoses


def _check_extras(recipe: Recipe, packages: InstalledPackages) -> Iterator[Diagnosis]:
    """Detect missing extras that settings of the recipe require."""
    required = [("quant", "tune.quantize.nf4")] if recipe.tune.quantize.nf4 else []
    required += [("modelscope", "model")] if recipe.model.startswith("modelscope:") else []
    required += [(TRACKERS[one.kind].extra, f"track={one.kind}") for one in recipe.track]
    paths = [str(file.path) for file in (*recipe.data.train, *recipe.data.eval)]
    required += [("objects", path) for path in paths if "://" in path]
    required += [("hub", path) for path in paths if path.endswith(".parquet")]
    missing_by_extra = packages.find_missing_packages()
    for name, setting in required:
        if missing := missing_by_extra.get(name):
            yield make_diagnosis(
                "recipe-needs-extra",
                setting=setting,
                name=name,
                description=EXTRA_DESCRIPTIONS[name],
                missing=", ".join(missing),
                install=install_extra_command(name),
            )


def _check_precision(
    train_command: str, recipe: Recipe, torch_info: TorchInfo
) -> Iterator[Diagnosis]:
    if recipe.train.device == "cuda" and not torch_info.gpus:
        yield make_diagnosis("no-cuda", train=train_command)
    if recipe.train.device == "cpu" or not torch_info.gpus:
        return
    weakest = min(torch_info.gpus, key=lambda gpu: gpu.capability)
    capability = weakest.capability
    values = {"gpu": f"{weakest.name} ({'.'.join(map(str, capability))})", "train": train_command}
    if recipe.train.precision == "bf16" and capability < MIN_BF16_CAPABILITY:
        yield make_diagnosis("precision-unsupported.bf16", **values)
    if recipe.tune.quantize.fp8 and capability < MIN_FP8_CAPABILITY:
        yield make_diagnosis("precision-unsupported.fp8", **values)
