"""Probe torch and its GPUs in a child process, because the import may crash.

`python -m finesight.doctor.probes` prints the properties as a JSON line.
"""

from __future__ import annotations

import importlib
import json
import warnings
from typing import Any

COMPILED_PACKAGES = ("numpy", "PIL", "safetensors", "tokenizers", "triton.language", "bitsandbytes")
"""Modules with compiled code that may be incompatible. Missing ones are ignored."""


def probe_torch() -> dict[str, Any]:
    """Return the properties of torch and its GPUs."""
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
        "gpus": [_probe_gpu(i) for i in range(torch.cuda.device_count())] if available else [],
        "broken_packages": _find_broken_packages(),
    }


def _probe_gpu(index: int) -> tuple[str, tuple[int, int], int, int, str]:
    """Return the fields of `GpuInfo`."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    free_bytes, error = 0, ""
    try:
        free_bytes = torch.cuda.mem_get_info(index)[0]
        ones = torch.ones(16, 16, device=f"cuda:{index}")
        if (ones @ ones)[0, 0].item() != 16:
            error = "a product of two matrices is incorrect"
    except (RuntimeError, AssertionError) as failure:
        error = str(failure).strip().splitlines()[0]
    capability = (properties.major, properties.minor)
    return properties.name, capability, properties.total_memory, free_bytes, error


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
    print(json.dumps(probe_torch()))
