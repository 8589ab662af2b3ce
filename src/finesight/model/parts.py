"""The four parts of a model: what belongs to each, and how a recipe lets each learn."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, get_args

from torch import nn

from finesight.config import Lora, Tune
from finesight.errors import UserError
from finesight.model.frozen import frozen_weights
from finesight.model.lora import LoraGroup, LowRank, adaptable_layers, adapters

Part = Literal["vision", "merger", "language", "embeddings"]
PARTS: tuple[Part, ...] = get_args(Part)

_PREFIXES: tuple[tuple[str, Part], ...] = (
    ("visual.merger.", "merger"),
    ("visual.deepstack_merger_list.", "merger"),
    ("visual.patch_embed.", "vision"),
    ("visual.pos_embed.", "vision"),
    ("visual.positional_embedding", "vision"),
    ("visual.ln_pre.", "vision"),
    ("visual.blocks.", "vision"),
    ("model.layers.", "language"),
    ("model.norm.", "language"),
    ("model.embed_tokens.", "embeddings"),
    ("lm_head.", "embeddings"),
)

TABLES = (
    *(".pos_embed", ".pos_embed.weight", ".positional_embedding", ".query", ".cls_token"),
    *(".position_embedding", ".position_embedding.weight", ".position_embeddings"),
)
"""Endings of the names of parameters that are added, and multiplied with nothing. Beside them only
the table of embeddings is."""

INNER = "inner."
"""How names begin in a model that transformers computes."""

_PIECES: tuple[tuple[Part, str], ...] = (
    (
        "merger",
        r".*\.(merger|deepstack_merger_list|multi_modal_projector|mm_projector|connector|aligner"
        r"|projector|vision_projection|vision_adapter|embed_vision|qformer|query_tokens"
        r"|language_projection|image_to_text_projection|resampler_model|image_newline"
        r"|visual_embeddings_table)(\.|$)",
    ),
    (
        "vision",
        r".*\.(visual|vision_tower|vision_model|vision_encoder|vision_embed_tokens|image_tower"
        r"|image_encoder|video_tower)\.",
    ),
    ("embeddings", r".*\.(embed_tokens|embed_tokens_per_layer|lm_head|wte|embed_in|embed_out)\."),
    ("language", r".*\.(language_model|text_model)\.|inner\.(model\.)?(layers|norm)\."),
)
"""How names look in the classes of transformers; the first row that fits decides."""


def _borrowed_part(name: str) -> Part:
    for part, pattern in _PIECES:
        if re.match(pattern, name):
            return part
    raise UserError(
        f"the parameter {name.removeprefix(INNER)} belongs to no part that is known",
        where="model",
        expected="vision tower, merger, language model and embeddings by the names that classes of"
        " transformers give them",
        remedy="choose another model; answering with this one works",
    )


def part_of(name: str) -> Part:
    """The one part that a parameter or a linear layer of this (native or hub) name belongs to.

    The head goes with the embeddings: many models tie the two. An unknown name is refused, so
    that a model with more to it cannot be trained in part by accident; UserError where
    transformers computes it.
    """
    if name.startswith(INNER):
        return _borrowed_part(name)
    for prefix, part in _PREFIXES:
        if name.startswith(prefix):
            return part
    raise AssertionError(f"the parameter {name} belongs to no part: {[p for p, _ in _PREFIXES]}")


def apply_tuning(model: nn.Module, tune: Tune, seed: int) -> None:
    """Set what learns: `requires_grad` of every parameter, and new adapters where asked.

    The adapters of a `lora` part cover its linear layers, narrowed by `tune.lora.targets`; their
    starting values depend on `seed` and on each layer's name only. Raises UserError for a target
    that no layer of these parts has, for a part that the targets leave without any, and for weights
    in few bits that are to learn.
    """
    assert not list(adapters(model)), "the model carries adapters already"
    modes = _modes(tune)
    _refuse_in_full(model, modes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(modes[part_of(name)] == "full")
    adapted = [part for part in PARTS if modes[part] == "lora"]
    if adapted:
        places = adaptable_layers(model)
        chosen = _targeted([n for n in places if part_of(n) in adapted], adapted, tune.lora.targets)
        low = LowRank(tune.lora.rank, tune.lora.alpha)
        _install(model, dict.fromkeys(chosen, low), tune.lora, seed)


def _refuse_in_full(model: nn.Module, modes: Mapping[Part, str]) -> None:
    for name in frozen_weights(model):
        part = part_of(name)
        if modes[part] == "full":
            raise UserError(
                f"{part} is full, and the model has its weights in four bits, which cannot be"
                " trained",
                where=f"tune.{part}",
                expected="frozen or lora",
                remedy="train the same model without quantisation, or adapters on this one",
            )


def _modes(tune: Tune) -> dict[Part, str]:
    return {
        "vision": tune.vision,
        "merger": tune.merger,
        "language": tune.language,
        "embeddings": tune.embeddings,
    }


def _install(model: nn.Module, layers: dict[str, LowRank], lora: Lora, seed: int) -> None:
    places = adaptable_layers(model)
    for path in dict.fromkeys(places[name].path for name in layers):
        own = [name for name in layers if places[name].path == path]
        group = places[own[0]].group
        adapter = LoraGroup(group, {places[n].output: layers[n] for n in own}, lora.dropout)
        adapter.start(seed, path)
        adapter.train(group.training)
        group.adapter = adapter


def _targeted(
    names: list[str], parts: Collection[Part], targets: tuple[str, ...] | None
) -> list[str]:
    if targets is None:
        return names
    for target in targets:
        if not any(_is_target(name, target) for name in names):
            raise UserError(
                f"{target!r} names no linear layer of {' or '.join(parts)}",
                where="tune.lora.targets",
                expected=f"some of {', '.join(_nearest(target, _pieces(names)))}",
                remedy="correct the name, or leave targets out to adapt every linear layer",
            )
    chosen = [name for name in names if any(_is_target(name, target) for target in targets)]
    for part in parts:
        if not any(part_of(name) == part for name in chosen):
            own = [name for name in names if part_of(name) == part]
            raise UserError(
                f"tune.{part} is lora, but none of {', '.join(targets)} is a layer of it",
                where="tune.lora.targets",
                expected=f"also some of {', '.join(_pieces(own))}",
                remedy=f"add a target, or set tune.{part}=frozen",
            )
    return chosen


def _is_target(name: str, target: str) -> bool:
    return name.endswith(f".{target}")


def _pieces(names: Iterable[str]) -> list[str]:
    """The shortest telling endings: the last piece, or the last two where it is a number."""
    endings: dict[str, None] = {}
    for name in names:
        pieces = name.split(".")
        endings[".".join(pieces[-2:]) if pieces[-1].isdigit() else pieces[-1]] = None
    return list(endings)


def _nearest(word: str, names: list[str]) -> list[str]:
    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, word, name).ratio()

    return sorted(names, key=likeness, reverse=True)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that learn, by native name, in the model's order; a tied one once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
