"""Weights that were published as pickles, converted to safetensors once."""

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

INDEX = "model.safetensors.index.json"

SOURCES = "sources.json"
"""What the tensors were read from: name, size and time of the last change of each file."""


def convert_once(files: Sequence[Path], target: Path) -> None:
    """Write the tensors of `files`, as torch.save wrote them, into the folder `target`, unless it
    holds those already: a safetensors file for each and the index of all. Other processes wait
    meanwhile, and take what is there then.

    A pickle can hold any code, and reading it runs that code. These are read by torch's loader of
    weights alone, which builds tensors and refuses everything else. Raises UserError for a file
    that asks for more than tensors, for a damaged one, and where `target` cannot be written.
    """
    if _is_of(files, target):
        return
    with _alone(target.parent):
        if _is_of(files, target):
            return
        if target.exists():
            remove_folder(target)
        _convert(files, target)


def _sources(files: Sequence[Path]) -> list[list[Any]]:
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _is_of(files: Sequence[Path], target: Path) -> bool:
    """Whether the folder `target` was made of these files as they are now."""
    try:
        noted = read_json(target / SOURCES)
    except UserError:
        return False
    return bool(noted == _sources(files))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which ends with this process."""
    with FileLock(folder) as lock:
        with contextlib.suppress(OSError):  # some network file systems know no locks
            lock.acquire()
        yield


def _convert(files: Sequence[Path], target: Path) -> None:
    # Imported here: torch is slow to import, and only old models need it for this.
    import torch
    from safetensors.torch import save_file

    names: dict[str, str] = {}
    total = 0
    with write_folder(target) as folder:
        sources = _sources(files)
        for number, file in enumerate(files, 1):
            # Tensors may share their memory in a pickle and lie in any order, here in one only.
            tensors = {
                name: tensor.detach().clone(memory_format=torch.contiguous_format)
                for name, tensor in _tensors(file).items()
            }
            name = f"model-{number:05}-of-{len(files):05}.safetensors"
            save_file(tensors, folder / name, metadata={"format": "pt"})
            names |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        (folder / SOURCES).write_text(json.dumps(sources) + "\n", encoding="utf-8")


def _tensors(file: Path) -> dict[str, Tensor]:
    found = _read(file)
    import torch

    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise _refusal(file, f"a {type(found).__name__} that holds more than tensors by their name")
    for name, tensor in found.items():
        kind = _unusual(tensor)
        if kind:
            raise _refusal(file, f"{name} is {kind}")
    return found


def _read(file: Path) -> object:
    import torch

    try:
        with warnings.catch_warnings():
            # The loader's advice is to run what it refuses.
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(file, _reason(str(error))) from error
    except OSError as error:
        raise _refusal(file, f"cannot be read: {error.strerror}") from error
    except Exception as error:  # a damaged file can raise nearly anything inside torch
        raise _refusal(file, f"not whole, in its {file.stat().st_size} bytes") from error


def _unusual(tensor: Tensor) -> str:
    """What a tensor is, other than numbers of one file side by side; empty for usual ones."""
    import torch

    if tensor.is_nested or tensor.layout != torch.strided:
        return "a sparse or nested tensor"
    if tensor.is_quantized or tensor.is_complex():
        return f"a tensor of {str(tensor.dtype).removeprefix('torch.')}"
    if tensor.device.type != "cpu":
        return "a tensor without numbers"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return f"a tensor of {tensor.nbytes} bytes, of which the file has fewer"
    return ""


def _reason(message: str) -> str:
    """What a pickle asks for that no tensor needs, in own words: the loader's are long advice."""
    called = re.search(r"GLOBAL (\S+)", message)
    return (
        f"a pickle that would run {called[1]} when it is read" if called else "no pickle of tensors"
    )


def _refusal(file: Path, why: str) -> UserError:
    return UserError(
        why,
        where=str(file),
        expected="a whole file of tensors, as torch.save writes them",
        remedy="download it again from the model's own page, or take the model as safetensors",
    )
