"""Set the `tune` section of a converted recipe: trainable parts, LoRA and quantization."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finesight.convert.external_config import ExternalConfig
from finesight.convert.family_detection import FamilySettings
from finesight.convert.recipe_draft import RecipeDraft


@dataclass(frozen=True)
class TrainableParts:
    """Whether vision encoder, merger and language model are trained."""

    vision: bool
    merger: bool
    language: bool


def set_full_tuning(draft: RecipeDraft, trainable: TrainableParts) -> None:
    """Set full fine-tuning of the trainable parts.

    In ms-swift and LLaMA-Factory, embeddings and output head belong to the language model.
    """
    draft.set("tune.vision", "full" if trainable.vision else "frozen")
    draft.set("tune.merger", "full" if trainable.merger else "frozen")
    draft.set("tune.language", "full" if trainable.language else "frozen")
    if trainable.language:
        draft.set("tune.embeddings", "full", "part of the language model there")


def set_lora_tuning(
    draft: RecipeDraft, trainable: TrainableParts, targets: tuple[str, ...] | None
) -> None:
    """Set LoRA in the trainable parts, on all linear layers or those in `targets`."""
    draft.set("tune.vision", "lora" if trainable.vision else "frozen")
    draft.set("tune.merger", "lora" if trainable.merger else "frozen")
    draft.set("tune.language", "lora" if trainable.language else "frozen")
    if targets:
        draft.set("tune.lora.target_modules", list(targets))


def set_lora_config(config: ExternalConfig, draft: RecipeDraft, alpha: float) -> None:
    """Set rank, alpha and dropout of LoRA.

    Rank-stabilized LoRA (Kalajdzievski 2023) scales by alpha / sqrt(rank) instead of alpha / rank.
    It is converted to LoRA with alpha * sqrt(rank).
    """
    rank = config.get_int("lora_rank")
    if rank is None or rank < 1:
        raise config.build_error("lora_rank", "an integer above 0")
    draft.set("tune.lora.rank", rank, config.default_comment("lora_rank"))
    if config.get_bool("use_rslora"):
        comment = f"{alpha:g} / sqrt(rank) there (use_rslora)"
        draft.set("tune.lora.alpha", alpha * math.sqrt(rank), comment)
    else:
        draft.set("tune.lora.alpha", alpha, config.default_comment("lora_alpha"))
    draft.set(
        "tune.lora.dropout",
        config.get_float("lora_dropout"),
        config.default_comment("lora_dropout"),
    )


def set_modules_to_save(draft: RecipeDraft, key: str, names: tuple[str, ...]) -> None:
    """Set full training of modules in addition to LoRA.

    Recipes support it for embeddings and output head, which are trained together. Other modules in
    `names`, the value of the setting `key`, are reported as different.
    """
    embedding_modules = {"embed_tokens", "lm_head", "all-embedding", "wte"}
    if set(names) & embedding_modules:
        draft.set("tune.embeddings", "full", f"{key}: embeddings and head are trained together")
    if others := [name for name in names if name not in embedding_modules]:
        draft.add_difference(
            key,
            ", ".join(others),
            "remain frozen: only whole parts can be trained without adapters",
        )


def set_nf4(draft: RecipeDraft, parts: list[str], quant_type: str, is_double: bool) -> None:
    """Set NF4 quantization of the parts, and report a difference for another 4-bit format.

    Recipes support NF4 with double quantization only.
    """
    draft.set("tune.quantize.nf4", list[object](parts))
    if quant_type != "nf4" or not is_double:
        what = f"{quant_type}{'' if is_double else ' without double quantization'}"
        draft.add_difference(
            "quantization", what, "4-bit weights use NF4 with double quantization in finesight"
        )


def set_lora_targets(
    draft: RecipeDraft,
    family: FamilySettings,
    trainable: TrainableParts,
    key: str,
    targets: tuple[str, ...],
    match_suffix: bool,
) -> None:
    """Set LoRA on the layers that a list of names matches.

    Trainable parts without a matching layer are frozen.

    Args:
        draft: Recipe to fill.
        family: Layer names of the model.
        trainable: Parts that may have adapters.
        key: Setting with the names, for notes.
        targets: Layer names or parts of them.
        match_suffix: Whether a name must end with the name of the layer (ms-swift) or be contained
            in it (LLaMA-Factory).
    """
    layers_by_target = {target: _match_layers(family, target, match_suffix) for target in targets}
    if unmatched := [
        target for target, layers in layers_by_target.items() if not any(layers.values())
    ]:
        text = f"no linear layer of {family.name} has this name: ignored"
        draft.add_difference(key, ", ".join(unmatched), text)
    if dotted := [target for target in targets if "." in target and target not in unmatched]:
        text = "all layers with this last name component have adapters in finesight"
        draft.add_difference(key, ", ".join(dotted), text)
    matched = {
        part: sorted(set().union(*(layers[part] for layers in layers_by_target.values())))
        for part in ("language", "vision", "merger")
    }
    if not any(matched.values()):
        text = "no layers remain, so all linear layers of the language model have adapters"
        draft.add_note(key, ", ".join(targets), text)
        set_lora_tuning(draft, TrainableParts(False, False, trainable.language), None)
        return
    selected = TrainableParts(
        trainable.vision and bool(matched["vision"]),
        trainable.merger and bool(matched["merger"]),
        trainable.language and bool(matched["language"]),
    )
    used_layers = (
        *(matched["language"] if selected.language else ()),
        *(matched["vision"] if selected.vision else ()),
        *(matched["merger"] if selected.merger else ()),
    )
    set_lora_tuning(draft, selected, tuple(dict.fromkeys(used_layers)))


def _match_layers(family: FamilySettings, target: str, match_suffix: bool) -> dict[str, set[str]]:
    """Return the layers that match a target by part, as last name components."""
    layers_by_part = {
        "vision": family.vision_layers,
        "merger": family.merger_layers,
        "language": family.language_layers,
    }
    return {
        part: {
            layer
            for layer in layers
            if (
                layer == target or target.endswith(f".{layer}") if match_suffix else target in layer
            )
        }
        for part, layers in layers_by_part.items()
    }
