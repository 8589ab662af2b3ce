"""What torch says of this machine, as a line of JSON: run in a process of its own, as a torch that
does not fit may end its process without a word.

`python -m finesight.doctor.torch_child`
"""

from __future__ import annotations

import importlib
import json
import warnings
from typing import Any

COMPILED = ("numpy", "PIL", "safetensors", "tokenizers", "triton.language", "bitsandbytes")
"""Packages with compiled parts that break where versions do not fit; those that are not installed
are passed over."""


def main() -> None:
    """Print it."""
    print(json.dumps(_said()))


def _said() -> dict[str, Any]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "file": torch.__file__ or "",
        "cuda": torch.version.cuda,
        "kernels": torch.cuda.get_arch_list() if available else [],
        "unseen": [] if available else [str(one.message) for one in caught],
        "cards": [_card(index) for index in range(torch.cuda.device_count())] if available else [],
        "broken": _broken(),
    }


def _card(index: int) -> dict[str, Any]:
    import torch

    about = torch.cuda.get_device_properties(index)
    said: dict[str, Any] = {
        "name": about.name,
        "capability": [about.major, about.minor],
        "total": about.total_memory,
        "free": None,
        "problem": "",
    }
    try:
        said["free"] = torch.cuda.mem_get_info(index)[0]
        ones = torch.ones(16, 16, device=f"cuda:{index}")
        if (ones @ ones)[0, 0].item() != 16:
            said["problem"] = "a product of two matrices is wrong"
    except (RuntimeError, AssertionError) as error:
        said["problem"] = str(error).strip().splitlines()[0]
    return said


def _broken() -> dict[str, str]:
    """Packages that are there and cannot be imported, and what they end with."""
    found = {}
    for name in COMPILED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                found[name] = str(error)
        except Exception as error:  # whatever a foreign package raises
            found[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return found


if __name__ == "__main__":
    main()
