"""Model parts (vision, merger, language, embeddings) and their tuning modes in a recipe."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, get_args

from torch import nn

from finesight.errors import UserError
from finesight.model.linear import (
    FusedLinear,
    LoraConfig,
    LoraLinear,
    find_adaptable_layers,
    iter_adapters,
)
from finesight.model.quant.base import find_quantized_weights
from finesight.settings.config import LoraSettings, TuneMode, TuneSettings

ModelPart = Literal["vision", "merger", "language", "embeddings"]
MODEL_PARTS: tuple[ModelPart, ...] = get_args(ModelPart)

_NATIVE_PATTERNS: tuple[tuple[ModelPart, str], ...] = (
    ("merger", r"visual\.(merger|deepstack_merger_list)\."),
    ("vision", r"visual\.(patch_embed|pos_embed|ln_pre|blocks)\.|visual\.positional_embedding"),
    ("language", r"model\.(layers|norm)\."),
    ("embeddings", r"(model\.embed_tokens|lm_head)\."),
)
"""Parameter name patterns of native models by model part."""

EMBEDDING_SUFFIXES = (
    ".pos_embed",
    ".pos_embed.weight",
    ".positional_embedding",
    ".query",
    ".cls_token",
    ".position_embedding",
    ".position_embedding.weight",
    ".position_embeddings",
)
"""Name suffixes of additive embedding parameters, such as position embeddings. The token embedding
table is handled separately."""

CONV_SUFFIX = ".conv1d.weight"
"""Name suffix of the depthwise convolutions of linear attention layers."""

HF_PREFIX = "inner."
"""Parameter name prefix of models that run through transformers."""

_HF_PATTERNS: tuple[tuple[ModelPart, str], ...] = (
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
"""Parameter name patterns of transformers models by model part; the first match decides."""


def get_part(name: str) -> ModelPart:
    """Return the model part that a parameter or linear layer belongs to.

    The head belongs to the embeddings because many models tie the two. Unknown names of native
    models raise AssertionError, so that unknown parts cannot be trained by accident. Unknown names
    of transformers models raise UserError.
    """
    is_native = not name.startswith(HF_PREFIX)
    patterns = _NATIVE_PATTERNS if is_native else _HF_PATTERNS
    for part, pattern in patterns:
        if re.match(pattern, name):
            return part
    assert not is_native, f"the parameter {name} belongs to no part: {_NATIVE_PATTERNS}"
    raise UserError(
        f"the parameter {name.removeprefix(HF_PREFIX)} belongs to no known part",
        where="model",
        expected="vision encoder, merger, language model and embeddings, named as in transformers "
        "classes",
        remedy="choose another model; inference with this one works",
    )


def configure_tuning(model: nn.Module, tune: TuneSettings, seed: int) -> None:
    """Set `requires_grad` of every parameter and add LoRA adapters.

    The initial values of an adapter depend only on `seed` and the layer name.
    """
    assert not list(iter_adapters(model)), "the model already has adapters"
    tuning_modes = dict(tune)
    for part in map(get_part, find_quantized_weights(model)):
        if tuning_modes[part] == "full":
            raise UserError(
                f"{part} is full, but the model has 4-bit weights, which cannot be trained",
                where=f"tune.{part}",
                expected="frozen or lora",
                remedy="train the same model without quantization, or adapters on this one",
            )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tuning_modes[get_part(name)] == "full")
    adapted = [part for part in MODEL_PARTS if tuning_modes[part] == "lora"]
    if not adapted:
        return
    layers = find_adaptable_layers(model)
    names = _filter_parts(layers, adapted)
    lora_config = LoraConfig(tune.lora.rank, tune.lora.alpha)
    linears: dict[str, FusedLinear] = {}
    configs: dict[str, dict[str, LoraConfig]] = {}
    for name in _select_targets(names, adapted, tune.lora.target_modules):
        linear, path, output_name = layers[name]
        linears[path] = linear
        configs.setdefault(path, {})[output_name] = lora_config
    for path, linear in linears.items():
        adapter = LoraLinear(linear, configs[path], tune.lora.dropout)
        adapter.reset_parameters(seed, path)
        linear.adapter = adapter.train(linear.training)


def _select_targets(
    names: list[str], parts: Collection[ModelPart], targets: tuple[str, ...] | None
) -> list[str]:
    if targets is None:
        return names
    for target in targets:
        if _filter_targets(names, [target]):
            continue
        similar = sorted(
            _name_suffixes(names),
            key=lambda suffix: difflib.SequenceMatcher(None, target, suffix).ratio(),
            reverse=True,
        )
        raise UserError(
            f"{target!r} matches no linear layer of {' or '.join(parts)}",
            where="tune.lora.target_modules",
            expected=f"some of {', '.join(similar)}",
            remedy="correct the name, or remove target_modules to adapt every linear layer",
        )
    selected = _filter_targets(names, targets)
    for part in parts:
        if _filter_parts(selected, [part]):
            continue
        part_names = _filter_parts(names, [part])
        raise UserError(
            f"tune.{part} is lora, but it has no layer named {' or '.join(targets)}",
            where="tune.lora.target_modules",
            expected=f"also some of {', '.join(_name_suffixes(part_names))}",
            remedy=f"add a target module, or set tune.{part}=frozen",
        )
    return selected


def infer_tuning(
    model: nn.Module, configs: Mapping[str, LoraConfig], dropout: float
) -> TuneSettings | None:
    """Return the section `tune` with the adapters of given layers; None if there is none.

    Args:
        model: Model without adapters.
        configs: Rank and alpha of each adapted layer, by hub name.
    """
    first = next(iter(configs.values()))
    for one in configs.values():
        if one.rank != first.rank or not math.isclose(one.scale, first.scale):
            return None
    parts = {*map(get_part, configs)}
    if "embeddings" in parts:
        return None
    names = _filter_parts(find_adaptable_layers(model), parts)
    targets: tuple[str, ...] | None = None
    if {*names} != {*configs}:
        targets = tuple(_name_suffixes(configs))
        if {*_filter_targets(names, targets)} != {*configs}:
            return None
    modes: dict[str, TuneMode] = {"language": "frozen"}
    modes |= dict.fromkeys(parts, "lora")
    lora = LoraSettings(rank=first.rank, alpha=first.alpha, dropout=dropout, target_modules=targets)
    return TuneSettings.model_validate({**modes, "lora": lora})


def _filter_parts(names: Iterable[str], parts: Collection[ModelPart]) -> list[str]:
    """Return the names of the layers in some parts of a model."""
    return [name for name in names if get_part(name) in parts]


def _filter_targets(names: Iterable[str], targets: Iterable[str]) -> list[str]:
    """Return the layer names that end with one of the target modules."""
    suffixes = tuple(f".{target}" for target in targets)
    return [name for name in names if name.endswith(suffixes)]


def _name_suffixes(names: Iterable[str]) -> list[str]:
    """Return the distinct last components of layer names.

    The last two are returned for a name that ends with a number.
    """
    suffixes: dict[str, None] = {}
    for name in names:
        pieces = name.split(".")
        suffix = pieces[-1]
        if suffix.isdigit():
            suffix = ".".join(pieces[-2:])
        suffixes[suffix] = None
    return list(suffixes)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, in model order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
