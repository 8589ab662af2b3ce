"""Weights that were published as pickles, converted to safetensors once."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.errors import UserError
from finesight.storage import write_folder

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"


def convert(files: Sequence[Path], target: Path) -> None:
    """Write the tensors of `files`, as torch.save wrote them, into the new folder `target`: a
    safetensors file for each and the index of all.

    A pickle can hold any code, and reading it runs that code. These are read by torch's loader of
    weights alone, which builds tensors and refuses everything else. Raises UserError for a file
    that asks for more than tensors, for a damaged one, and where `target` cannot be written.
    """
    # Imported here: torch is slow to import, and only old models need it for this.
    from safetensors.torch import save_file

    names: dict[str, str] = {}
    total = 0
    with write_folder(target) as folder:
        for number, file in enumerate(files, 1):
            # Tensors may share their memory in a pickle, never in safetensors.
            tensors = {name: tensor.clone() for name, tensor in _tensors(file).items()}
            name = f"model-{number:05}-of-{len(files):05}.safetensors"
            save_file(tensors, folder / name, metadata={"format": "pt"})
            names |= dict.fromkeys(tensors, name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(file: Path) -> dict[str, Tensor]:
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refusal(file, _reason(str(error))) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        lines = str(error).splitlines()
        raise _refusal(file, f"not whole ({lines[0] if lines else 'it is empty'})") from error
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in found.items()
    ):
        raise _refusal(file, f"a {type(found).__name__} that holds more than tensors by their name")
    return found


def _reason(message: str) -> str:
    """What a pickle asks for that no tensor needs, from the loader's long advice."""
    called = re.search(r"GLOBAL (\S+)", message)
    if called:
        return f"a pickle that would run {called[1]} when it is read"
    return f"no pickle of tensors ({message.splitlines()[0]})"


def _refusal(file: Path, why: str) -> UserError:
    return UserError(
        why,
        where=str(file),
        expected="a whole file of tensors, as torch.save writes them",
        remedy="download it again from the model's own page, or take the model as safetensors",
    )
