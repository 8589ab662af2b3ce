"""GPU specifications from vendor data sheets, for plans without access to the GPU.

- Memory: 10^9 bytes, as sold.
- FLOP/s: 10^12, for dense 16-bit matrix products with fp32 accumulation. If a data sheet states
  sparse FLOP/s, half of the value is used.
- Memory bandwidth: 10^9 bytes/s.
- Compute capability: major and minor version.

Sources by generation:

- T4, V100: NVIDIA T4 and V100 Tensor Core GPU data sheets.
- A10, A30, A40, A100, A6000: NVIDIA Ampere data sheets; RTX 30: GA102 whitepaper, appendix.
- L4, L40S, RTX 6000 Ada: NVIDIA Ada data sheets; RTX 40: AD102 whitepaper, appendix.
- H100, H200: NVIDIA Hopper data sheets. B200, B300: NVIDIA Blackwell data sheets; RTX 50: RTX
  Blackwell whitepaper, appendix.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from finesight.errors import UserError


@dataclass(frozen=True, slots=True)
class GpuSpec:
    """Data sheet values of a GPU model.

    Attributes:
        name: Name of the GPU model.
        memory_gb: Memory in 10^9 bytes.
        tflops: Dense 16-bit matrix products in 10^12 FLOP/s.
        gb_per_s: Memory bandwidth in 10^9 bytes/s.
        capability: CUDA compute capability, major and minor.
    """

    name: str
    memory_gb: float
    tflops: float
    gb_per_s: float
    capability: tuple[int, int]

    @property
    def supports_bf16(self) -> bool:
        """True if the GPU supports bf16 matrix products. Older GPUs use fp16."""
        return self.capability >= (8, 0)


GPU_SPECS: tuple[GpuSpec, ...] = (
    GpuSpec("T4", 16, 65, 320, (7, 5)),
    GpuSpec("V100-16GB", 16, 125, 900, (7, 0)),
    GpuSpec("V100-32GB", 32, 125, 900, (7, 0)),
    GpuSpec("RTX 3060", 12, 25.5, 360, (8, 6)),
    GpuSpec("RTX 3080", 10, 59.5, 760, (8, 6)),
    GpuSpec("RTX 3090", 24, 71, 936, (8, 6)),
    GpuSpec("RTX 4060", 8, 30.2, 272, (8, 9)),
    GpuSpec("RTX 4060 Ti 16GB", 16, 44.1, 288, (8, 9)),
    GpuSpec("RTX 4070", 12, 58.3, 504, (8, 9)),
    GpuSpec("RTX 4080", 16, 97.5, 717, (8, 9)),
    GpuSpec("RTX 4090", 24, 165.2, 1008, (8, 9)),
    GpuSpec("RTX 5080", 16, 112.6, 960, (12, 0)),
    GpuSpec("RTX 5090", 32, 209.5, 1792, (12, 0)),
    GpuSpec("RTX A6000", 48, 154.8, 768, (8, 6)),
    GpuSpec("RTX 6000 Ada", 48, 364.2, 960, (8, 9)),
    GpuSpec("A10", 24, 125, 600, (8, 6)),
    GpuSpec("A10G", 24, 70, 600, (8, 6)),
    GpuSpec("A30", 24, 165, 933, (8, 0)),
    GpuSpec("A40", 48, 149.7, 696, (8, 6)),
    GpuSpec("A100-40GB", 40, 312, 1555, (8, 0)),
    GpuSpec("A100-80GB", 80, 312, 2039, (8, 0)),
    GpuSpec("L4", 24, 121, 300, (8, 9)),
    GpuSpec("L40S", 48, 362, 864, (8, 9)),
    GpuSpec("H100", 80, 989, 3350, (9, 0)),
    GpuSpec("H100-PCIe", 80, 756, 2000, (9, 0)),
    GpuSpec("H200", 141, 989, 4800, (9, 0)),
    GpuSpec("B200", 180, 2250, 7700, (10, 0)),
    GpuSpec("B300", 288, 2250, 8000, (10, 3)),
)


def find_gpu_spec(name: str) -> GpuSpec:
    """Return the specification of a GPU model by name, in any spelling.

    Accepts, for example, `a100-80gb`, `A100 80 GB` and `NVIDIA GeForce RTX 4090`.

    Raises:
        UserError: The GPU is unknown. The message lists the most similar names.
    """
    by_key = {_normalize_name(spec.name): spec for spec in GPU_SPECS}
    key = _normalize_name(name)
    match = by_key.get(key)
    if match is not None:
        return match
    close_matches = difflib.get_close_matches(key, by_key, n=4, cutoff=0.5)
    prefix_matches = [
        candidate for candidate in by_key if key and (candidate in key or candidate.startswith(key))
    ]
    names = list(dict.fromkeys([*prefix_matches, *close_matches]))[:4] or list(by_key)
    raise UserError(
        f"unknown GPU {name!r}",
        where="--gpu",
        expected=f"one of {', '.join(by_key[candidate].name for candidate in names)}",
        remedy="choose the most similar GPU, or run without --gpu on the target machine to"
        " measure its GPU",
    )


def _normalize_name(name: str) -> str:
    """Remove vendor names and punctuation from a GPU name, for comparison."""
    stripped = re.sub(r"nvidia|geforce|tesla|rtx|tensor core|gpu|sxm\d?", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", stripped)
