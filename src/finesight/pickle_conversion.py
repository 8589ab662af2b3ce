"""Convert pickled model weights (pytorch_model.bin) to safetensors, once per model folder."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finesight.bounded_files import read_json
from finesight.child_processes import FileLock
from finesight.errors import UserError
from finesight.storage import remove_folder, write_folder

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

    Raises:
        UserError: A file requires more than tensors or is corrupt, or `target` cannot be written.
    """
    if _is_up_to_date(files, target):
        return
    with _lock_folder(target.parent):
        if _is_up_to_date(files, target):
            return
        if target.exists():
            remove_folder(target)
        _convert(files, target)


def _describe_sources(files: Sequence[Path]) -> list[list[Any]]:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _is_up_to_date(files: Sequence[Path], target: Path) -> bool:
    """Return whether the folder `target` was converted from the current content of the files."""
    try:
        recorded_sources = read_json(target / SOURCES_FILE)
    except UserError:
        return False
    return bool(recorded_sources == _describe_sources(files))


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Hold a lock on a folder for the `with` block.

    It is released at the latest when this process ends.
    """
    with FileLock(folder) as lock:
        with contextlib.suppress(OSError):  # some network file systems know no locks
            lock.acquire()
        yield


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
                file_name: tensor.detach().clone(memory_format=torch.contiguous_format)
                for file_name, tensor in _load_tensors(file).items()
            }
            file_name = f"model-{shard_index:05}-of-{len(files):05}.safetensors"
            save_file(tensors, folder / file_name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, file_name)
            total_bytes += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        (folder / SAFETENSORS_INDEX_FILE).write_text(
            json.dumps(index, indent=2) + "\n", encoding="utf-8"
        )
        (folder / SOURCES_FILE).write_text(json.dumps(source_stats) + "\n", encoding="utf-8")


def _load_tensors(file: Path) -> dict[str, Tensor]:
    state_dict = _torch_load(file)
    import torch

    if not isinstance(state_dict, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in state_dict.items()
    ):
        raise _build_error(
            file, f"a {type(state_dict).__name__} with content other than named tensors"
        )
    for name, tensor in state_dict.items():
        unsupported = _describe_unsupported(tensor)
        if unsupported:
            raise _build_error(file, f"{name} is {unsupported}")
    return state_dict


def _torch_load(file: Path) -> object:
    import torch

    try:
        with warnings.catch_warnings():
            # The warning recommends loading without `weights_only`, which executes code.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _build_error(file, _describe_unpickling_error(str(error))) from error
    except OSError as error:
        raise _build_error(file, f"cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged file can raise nearly anything inside torch
        raise _build_error(file, f"incomplete, in its {file.stat().st_size} bytes") from error


def _describe_unsupported(tensor: Tensor) -> str:
    """Describe why a tensor cannot be written to safetensors, such as a sparse layout.

    Returns an empty text for supported tensors.
    """
    import torch

    if tensor.is_nested or tensor.layout != torch.strided:
        return "a sparse or nested tensor"
    if tensor.is_quantized or tensor.is_complex():
        return f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return "a tensor without data"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"a tensor of {tensor.nbytes} bytes in a smaller file"
    return ""


def _describe_unpickling_error(message: str) -> str:
    """Shorten the message with which the loader of torch rejects a pickle."""
    match = re.search(r"GLOBAL (\S+)", message)
    return (
        f"a pickle that would execute {match[1]} when it is read"
        if match
        else "not a pickle of tensors"
    )


def _build_error(file: Path, reason: str) -> UserError:
    return UserError(
        reason,
        where=str(file),
        expected="a complete file of tensors, as written by torch.save",
        remedy="download it again from the page of the model, or take the model as safetensors",
    )
