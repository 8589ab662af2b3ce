"""Check the files of model and adapter folders."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from finesight.doctor.diagnosis import (
    Diagnosis,
    join_command,
    make_diagnosis,
    user_error_to_diagnosis,
)
from finesight.doctor.package_check import PACKAGE_NAME, InstalledPackages, install_command
from finesight.errors import Step, UserError
from finesight.family_components import FAMILIES
from finesight.files.bounded_files import read_json, read_json_object
from finesight.files.storage import DIGESTS_FILE, verify_folder
from finesight.model_folder import ModelFolder

LFS_POINTER_PREFIX = b"version https://git-lfs.github.com/spec/"
"""First bytes of a Git LFS pointer, a small text file instead of the weights."""

# Repeated here, because importing `finesight.model` would fail with a broken torch.
ADAPTER_CONFIG_FILE = "adapter_config.json"
"""Name of the configuration of a PEFT adapter."""

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
"""Name of the weights of a PEFT adapter."""


def check_model(path: Path, packages: InstalledPackages) -> list[Diagnosis]:
    """Check a model folder. If it has recorded digests, all of its files are read."""
    redownload = redownload_command(path)
    values = {"path": path, "redownload": redownload, "pull": join_command("git", "-C", path)}
    names = [file.name for file in sorted(path.iterdir()) if file.is_file() and _is_pointer(file)]
    if names:
        code = "model-lfs-pointers"
        if (path / ".git").exists():
            code = "model-lfs-pointers.clone"
        return [make_diagnosis(code, **values, names=", ".join(names[:3]))]
    folder = ModelFolder(path)
    diagnoses: list[Diagnosis] = []
    check = "model-config"
    try:
        family = folder.family
        check = "model-plugin"
        component = FAMILIES.get(family)
        extra = ""
        package = ""
        if component is None:
            extra = "hf"
            package = "transformers"
        elif component.needs_tiktoken:
            extra = "qwen-vl"
            package = "tiktoken"
        if extra and package not in packages:
            install = install_command(f"{PACKAGE_NAME}[{extra}]")
            needs = {"family": family, "extra": extra, "install": install}
            diagnoses.append(make_diagnosis("model-needs-extra", **values, **needs))
        check = "model-files"
        if family in FAMILIES:
            if folder.tokenizer_file.suffix == ".json":
                read_json(folder.tokenizer_file, expected="the original file")
            # Configurations are read on first access.
            assert folder.preprocessor_config is not None, "no image preprocessor configuration"
            assert folder.generation_config is not None, "no generation configuration"
        check = "model-weights"
        _check_weights(folder)
        check = "model-changed"
        if (path / DIGESTS_FILE).is_file():
            verify_folder(path)
    except UserError as error:
        remedy = redownload
        if check == "model-plugin":
            remedy = str(error.remedy)
        return [*diagnoses, user_error_to_diagnosis(check, error, remedy)]
    return diagnoses or [make_diagnosis("model", **values, family=family)]


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


def redownload_command(path: Path) -> str:
    """Return the shell command that downloads a model again.

    A model in a hub cache is replaced. The model of another folder is downloaded to a new folder
    next to it.
    """
    hf_cache = re.search(r"models--([^/]+?)--([^/]+)", str(path))
    cache = re.search(r"finesight/(hf|modelscope)/(?:[^/]+/)?models/([^/]+/[^/]+)", str(path))
    if hf_cache:
        source = f"{hf_cache[1]}/{hf_cache[2]}"
    elif cache:
        source = f"{cache[1]}:{cache[2]}"
    else:
        return str(Step("download", {"source": "OWNER/NAME", "to": f"{path}-again"}))
    return f"{join_command('rm', '-r', path)} && {Step('download', {'source': source})}"


def _is_pointer(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(LFS_POINTER_PREFIX)) == LFS_POINTER_PREFIX


def _check_weights(folder: ModelFolder) -> None:
    """Raise UserError for weight files that are missing, truncated or differ from the index."""
    index = folder.path / "model.safetensors.index.json"
    pickle = folder.find_file("pytorch_model.bin")
    pickle_index = folder.find_file("pytorch_model.bin.index.json")
    weights = folder.find_file("model.safetensors")
    has_pickles = bool(pickle or pickle_index)
    if has_pickles and not (weights or index.is_file()):
        return  # Pickles are converted on first use. This check writes no files.
    tensors_by_file = {file.name: _read_tensor_names(file) for file in folder.weight_files()}
    if not index.is_file():
        return
    for name, file in read_json_object(index)["weight_map"].items():
        if name not in tensors_by_file.get(file, ()):
            raise UserError(
                f"{file} does not contain {name}",
                where=str(index),
                expected="files of one model and version",
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
