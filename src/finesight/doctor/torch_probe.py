"""Print properties of torch and its GPUs as a JSON line.

`finesight doctor` runs `python -m finesight.doctor.torch_probe` in a child process, since an
incompatible torch may crash.
"""

from __future__ import annotations

import importlib
import json
import warnings
from typing import Any

COMPILED_PACKAGES = ("numpy", "PIL", "safetensors", "tokenizers", "triton.language", "bitsandbytes")
"""Modules with compiled code that may be incompatible. Missing ones are ignored."""


def main() -> None:
    """Print the properties of torch and its GPUs as a JSON line."""
    print(json.dumps(_collect_torch_info()))


def _collect_torch_info() -> dict[str, Any]:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    return {
        "version": torch.__version__,
        "module_file": torch.__file__ or "",
        "cuda_version": torch.version.cuda,
        "arch_list": torch.cuda.get_arch_list() if available else [],
        "cuda_warnings": [] if available else [str(warning.message) for warning in caught],
        "gpus": [_probe_gpu(index) for index in range(torch.cuda.device_count())]
        if available
        else [],
        "broken_packages": _find_broken_packages(),
    }


def _probe_gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    gpu: dict[str, Any] = {
        "name": properties.name,
        "capability": [properties.major, properties.minor],
        "total_bytes": properties.total_memory,
        "free_bytes": None,
        "error": "",
    }
    try:
        gpu["free_bytes"] = torch.cuda.mem_get_info(index)[0]
        ones = torch.ones(16, 16, device=f"cuda:{index}")
        if (ones @ ones)[0, 0].item() != 16:
            gpu["error"] = "a product of two matrices is incorrect"
    except (RuntimeError, AssertionError) as error:
        gpu["error"] = str(error).strip().splitlines()[0]
    return gpu


def _find_broken_packages() -> dict[str, str]:
    """Return the installed modules that fail to import, each with its error."""
    broken = {}
    for name in COMPILED_PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name.partition(".")[0]:
                broken[name] = str(error)
        except Exception as error:  # packages may raise any exception
            broken[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    return broken


if __name__ == "__main__":
    main()
