"""Cards by name: what their makers' data sheets say.

Memory in 10^9 bytes as sold, products of 16-bit numbers summed up in fp32, dense, in 10^12
operations a second (half of what is printed where that counts sparse matrices), memory bandwidth in
10^9 bytes a second, and compute capability. Sources, by generation:

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
class Card:
    """One kind of card, in the units of this module."""

    name: str
    memory_gb: float
    tflops: float
    gb_per_s: float
    capability: tuple[int, int]

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16; older ones take fp16."""
        return self.capability >= (8, 0)


CARDS: tuple[Card, ...] = (
    Card("T4", 16, 65, 320, (7, 5)),
    Card("V100-16GB", 16, 125, 900, (7, 0)),
    Card("V100-32GB", 32, 125, 900, (7, 0)),
    Card("RTX 3060", 12, 25.5, 360, (8, 6)),
    Card("RTX 3080", 10, 59.5, 760, (8, 6)),
    Card("RTX 3090", 24, 71, 936, (8, 6)),
    Card("RTX 4060", 8, 30.2, 272, (8, 9)),
    Card("RTX 4060 Ti 16GB", 16, 44.1, 288, (8, 9)),
    Card("RTX 4070", 12, 58.3, 504, (8, 9)),
    Card("RTX 4080", 16, 97.5, 717, (8, 9)),
    Card("RTX 4090", 24, 165.2, 1008, (8, 9)),
    Card("RTX 5080", 16, 112.6, 960, (12, 0)),
    Card("RTX 5090", 32, 209.5, 1792, (12, 0)),
    Card("RTX A6000", 48, 154.8, 768, (8, 6)),
    Card("RTX 6000 Ada", 48, 364.2, 960, (8, 9)),
    Card("A10", 24, 125, 600, (8, 6)),
    Card("A10G", 24, 70, 600, (8, 6)),
    Card("A30", 24, 165, 933, (8, 0)),
    Card("A40", 48, 149.7, 696, (8, 6)),
    Card("A100-40GB", 40, 312, 1555, (8, 0)),
    Card("A100-80GB", 80, 312, 2039, (8, 0)),
    Card("L4", 24, 121, 300, (8, 9)),
    Card("L40S", 48, 362, 864, (8, 9)),
    Card("H100", 80, 989, 3350, (9, 0)),
    Card("H100-PCIe", 80, 756, 2000, (9, 0)),
    Card("H200", 141, 989, 4800, (9, 0)),
    Card("B200", 180, 2250, 7700, (10, 0)),
    Card("B300", 288, 2250, 8000, (10, 3)),
)


def card(name: str) -> Card:
    """The card of this name, however it is spelled: `a100-80gb`, `A100 80 GB`, `NVIDIA GeForce RTX
    4090`. Raises UserError for one that is not known, with the nearest names."""
    by_key = {_key(card.name): card for card in CARDS}
    key = _key(name)
    found = by_key.get(key)
    if found is not None:
        return found
    nearest = difflib.get_close_matches(key, by_key, n=4, cutoff=0.5)
    begun = [other for other in by_key if key and (other in key or other.startswith(key))]
    names = list(dict.fromkeys([*begun, *nearest]))[:4] or list(by_key)
    raise UserError(
        f"no card {name!r} is known",
        where="--gpu",
        expected=f"one of {', '.join(by_key[other].name for other in names)}",
        remedy="choose the most alike, or leave --gpu out on the machine with the card: it is"
        " measured",
    )


def _key(name: str) -> str:
    """Letters and digits that tell cards apart."""
    plain = re.sub(r"nvidia|geforce|tesla|rtx|tensor core|gpu|sxm\d?", "", name.lower())
    return re.sub(r"[^a-z0-9]", "", plain)
