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
    draft.set("tune.lora.rank", rank, given.default("lora_rank"))
    if given.flag("use_rslora"):
        comment = f"{alpha:g} over the root of the rank there (use_rslora)"
        draft.set("tune.lora.alpha", alpha * math.sqrt(rank), comment)
    else:
        draft.set("tune.lora.alpha", alpha, given.default("lora_alpha"))
    draft.set("tune.lora.dropout", given.number("lora_dropout"), given.default("lora_dropout"))


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


def set_targets(
    draft: Draft, family: Family, free: Free, key: str, targets: tuple[str, ...], whole: bool
) -> None:
    """Adapters on the layers that are named, in the parts that are free; a part in which none is,
    stays frozen. A name means layers that end in it, or with `whole` false those that hold it."""
    named = {target: _layers(family, target, whole) for target in targets}
    if lost := [target for target, layers in named.items() if not any(layers.values())]:
        text = f"no linear layer of {family.name} is called so: left out"
        draft.differs(key, ", ".join(lost), text)
    if longer := [target for target in targets if "." in target and target not in lost]:
        text = "every layer that ends in the last piece has adapters here"
        draft.differs(key, ", ".join(longer), text)
    found = {
        part: sorted(set().union(*(layers[part] for layers in named.values())))
        for part in ("language", "vision", "merger")
    }
    if not any(found.values()):
        text = "with none of them left, all linear layers of the language model have adapters"
        draft.note(key, ", ".join(targets), text)
        tune_adapters(draft, Free(False, False, free.language), None)
        return
    chosen = Free(
        free.vision and bool(found["vision"]),
        free.merger and bool(found["merger"]),
        free.language and bool(found["language"]),
    )
    used = (
        *(found["language"] if chosen.language else ()),
        *(found["vision"] if chosen.vision else ()),
        *(found["merger"] if chosen.merger else ()),
    )
    tune_adapters(draft, chosen, tuple(dict.fromkeys(used)))


def _layers(family: Family, target: str, whole: bool) -> dict[str, set[str]]:
    """The linear layers of each part that a target means, by the last pieces of their names."""
    parts = {"vision": family.vision, "merger": family.merger, "language": family.language}
    return {
        part: {
            layer
            for layer in layers
            if (layer == target or target.endswith(f".{layer}") if whole else target in layer)
        }
        for part, layers in parts.items()
    }
