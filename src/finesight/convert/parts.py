"""Which parts of the model learn, and how: said in each program's words, decided here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finesight.convert.draft import Draft
from finesight.convert.families import Family
from finesight.convert.given import Given


@dataclass(frozen=True)
class Free:
    """The parts that the program does not freeze."""

    vision: bool
    merger: bool
    language: bool


def tune_full(draft: Draft, free: Free) -> None:
    """Whole weights of the parts that are free; both programs count embeddings and head as parts of
    the language model."""
    draft.set("tune.vision", "full" if free.vision else "frozen")
    draft.set("tune.merger", "full" if free.merger else "frozen")
    draft.set("tune.language", "full" if free.language else "frozen")
    if free.language:
        draft.set("tune.embeddings", "full", "of the language model there")


def tune_adapters(draft: Draft, free: Free, targets: tuple[str, ...] | None) -> None:
    """Adapters on the linear layers of the parts that are free."""
    draft.set("tune.vision", "lora" if free.vision else "frozen")
    draft.set("tune.merger", "lora" if free.merger else "frozen")
    draft.set("tune.language", "lora" if free.language else "frozen")
    if targets:
        draft.set("tune.lora.targets", list(targets))


def set_lora(given: Given, draft: Draft, alpha: float) -> None:
    """Rank, scale and dropout; the scale of rank-stabilised LoRA (Kalajdzievski 2023), alpha over
    the root of the rank, is that of another alpha."""
    rank = given.count("lora_rank")
    if rank is None or rank < 1:
        raise given.refused("lora_rank", "a whole number above 0")
    draft.set("tune.lora.rank", rank, _own(given, "lora_rank"))
    if given.flag("use_rslora"):
        comment = f"{alpha:g} over the root of the rank there (use_rslora)"
        draft.set("tune.lora.alpha", alpha * math.sqrt(rank), comment)
    else:
        draft.set("tune.lora.alpha", alpha, _own(given, "lora_alpha"))
    draft.set("tune.lora.dropout", given.number("lora_dropout"), _own(given, "lora_dropout"))


def _own(given: Given, key: str) -> str:
    return "" if given.has(key) else f"{given.program}'s default"


def modules_to_save(draft: Draft, key: str, names: tuple[str, ...]) -> None:
    """Modules that learn as a whole beside adapters: embeddings and head can, others cannot."""
    whole = {"embed_tokens", "lm_head", "all-embedding", "wte"}
    if set(names) & whole:
        draft.set("tune.embeddings", "full", f"{key}: table and head, whichever was named")
    if others := [name for name in names if name not in whole]:
        draft.differs(
            key, ", ".join(others), "stay frozen: only whole parts learn without adapters"
        )


def in_four_bits(draft: Draft, parts: list[str], kind: str, twice: bool) -> None:
    """Weights in NF4 with its scales quantised again, which is the one kind of four bits here."""
    draft.set("tune.nf4", list[object](parts))
    if kind != "nf4" or not twice:
        what = f"{kind}{'' if twice else ' without double quantisation'}"
        draft.differs("quantisation", what, "four bits are NF4 with double quantisation here")


def layers_named(family: Family, targets: tuple[str, ...], whole: bool) -> dict[str, set[str]]:
    """The linear layers of each part that target names mean: the last pieces of their names, or
    with `whole` false any piece that holds the target."""
    parts = {"vision": family.vision, "merger": family.merger, "language": family.language}
    found: dict[str, set[str]] = {}
    for part, layers in parts.items():
        found[part] = {
            layer
            for layer in layers
            for target in targets
            if (layer == target or target.endswith(f".{layer}") if whole else target in layer)
        }
    return found


def set_targets(
    draft: Draft, family: Family, free: Free, key: str, targets: tuple[str, ...], whole: bool
) -> None:
    """Adapters on layers that are named; a part in which none is, stays frozen. Where a name is
    in two parts, and only one should have it, the recipe cannot say so, which is told."""
    named = layers_named(family, targets, whole)
    known = set().union(*named.values())
    if lost := [
        t
        for t in targets
        if not layers_named(family, (t,), whole)["language"]
        | layers_named(family, (t,), whole)["vision"]
        | layers_named(family, (t,), whole)["merger"]
    ]:
        draft.differs(
            key, ", ".join(lost), f"no linear layer of {family.name} is called so: left out"
        )
    chosen = Free(
        free.vision and bool(named["vision"]),
        free.merger and bool(named["merger"]),
        free.language and bool(named["language"]),
    )
    if not known:
        chosen = Free(False, False, free.language)
    used = [
        *(sorted(named["language"]) if chosen.language else ()),
        *(sorted(named["vision"]) if chosen.vision else ()),
        *(sorted(named["merger"]) if chosen.merger else ()),
    ]
    tune_adapters(draft, chosen, tuple(dict.fromkeys(used)))
