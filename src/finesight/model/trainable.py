"""Model parts (vision, merger, language, embeddings) and their tuning modes in a recipe."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Literal, get_args

from torch import nn

from finesight.config import LoraSettings, TuneSettings
from finesight.errors import UserError
from finesight.model.lora.layer import LoraConfig, LoraLinear, find_adaptable_layers, iter_adapters
from finesight.model.quant.base import find_quantized_weights

ModelPart = Literal["vision", "merger", "language", "embeddings"]
MODEL_PARTS: tuple[ModelPart, ...] = get_args(ModelPart)

_NATIVE_PREFIXES: tuple[tuple[str, ModelPart], ...] = (
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

EMBEDDING_SUFFIXES = (
    *(".pos_embed", ".pos_embed.weight", ".positional_embedding", ".query", ".cls_token"),
    *(".position_embedding", ".position_embedding.weight", ".position_embeddings"),
)
"""Name suffixes of additive embedding parameters, such as position embeddings. The token embedding
table is handled separately."""

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


def _hf_part(name: str) -> ModelPart:
    for part, pattern in _HF_PATTERNS:
        if re.match(pattern, name):
            return part
    raise UserError(
        f"the parameter {name.removeprefix(HF_PREFIX)} belongs to no known part",
        where="model",
        expected="vision encoder, merger, language model and embeddings, named as in transformers "
        "classes",
        remedy="choose another model; inference with this one works",
    )


def get_part(name: str) -> ModelPart:
    """Return the model part that a parameter or linear layer belongs to.

    The head belongs to the embeddings because many models tie the two. Unknown names of native
    models raise AssertionError, so that unknown parts cannot be trained by accident. Unknown names
    of transformers models raise UserError.
    """
    if name.startswith(HF_PREFIX):
        return _hf_part(name)
    for prefix, part in _NATIVE_PREFIXES:
        if name.startswith(prefix):
            return part
    raise AssertionError(
        f"the parameter {name} belongs to no part: {[p for p, _ in _NATIVE_PREFIXES]}"
    )


def configure_tuning(model: nn.Module, tune: TuneSettings, seed: int) -> None:
    """Set `requires_grad` of every parameter and add LoRA adapters."""
    assert not list(iter_adapters(model)), "the model already has adapters"
    tuning_modes = _tuning_modes(tune)
    _check_quantized_parts(model, tuning_modes)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(tuning_modes[get_part(name)] == "full")
    adapted = [part for part in MODEL_PARTS if tuning_modes[part] == "lora"]
    if adapted:
        layers = find_adaptable_layers(model)
        targeted = _select_targets(
            [n for n in layers if get_part(n) in adapted], adapted, tune.lora.target_modules
        )
        lora_config = LoraConfig(tune.lora.rank, tune.lora.alpha)
        apply_lora(model, dict.fromkeys(targeted, lora_config), tune.lora, seed)


def _check_quantized_parts(model: nn.Module, tuning_modes: Mapping[ModelPart, str]) -> None:
    for name in find_quantized_weights(model):
        part = get_part(name)
        if tuning_modes[part] == "full":
            raise UserError(
                f"{part} is full, but the model has 4-bit weights, which cannot be trained",
                where=f"tune.{part}",
                expected="frozen or lora",
                remedy="train the same model without quantization, or adapters on this one",
            )


def _tuning_modes(tune: TuneSettings) -> dict[ModelPart, str]:
    return {
        "vision": tune.vision,
        "merger": tune.merger,
        "language": tune.language,
        "embeddings": tune.embeddings,
    }


def apply_lora(
    model: nn.Module, configs: dict[str, LoraConfig], lora: LoraSettings, seed: int
) -> None:
    layers = find_adaptable_layers(model)
    for path in dict.fromkeys(layers[name].path for name in configs):
        layer_names = [name for name in configs if layers[name].path == path]
        linear = layers[layer_names[0]].linear
        adapter = LoraLinear(
            linear, {layers[n].output_name: configs[n] for n in layer_names}, lora.dropout
        )
        adapter.reset_parameters(seed, path)
        adapter.train(linear.training)
        linear.adapter = adapter


def _select_targets(
    names: list[str], parts: Collection[ModelPart], targets: tuple[str, ...] | None
) -> list[str]:
    if targets is None:
        return names
    for target in targets:
        if not any(_is_target(name, target) for name in names):
            raise UserError(
                f"{target!r} matches no linear layer of {' or '.join(parts)}",
                where="tune.lora.target_modules",
                expected=f"some of {', '.join(_sort_by_similarity(target, _name_suffixes(names)))}",
                remedy="correct the name, or remove target_modules to adapt every linear layer",
            )
    selected = [name for name in names if any(_is_target(name, target) for target in targets)]
    for part in parts:
        if not any(get_part(name) == part for name in selected):
            part_names = [name for name in names if get_part(name) == part]
            raise UserError(
                f"tune.{part} is lora, but it has no layer named {' or '.join(targets)}",
                where="tune.lora.target_modules",
                expected=f"also some of {', '.join(_name_suffixes(part_names))}",
                remedy=f"add a target module, or set tune.{part}=frozen",
            )
    return selected


def _is_target(name: str, target: str) -> bool:
    return name.endswith(f".{target}")


def _name_suffixes(names: Iterable[str]) -> list[str]:
    """Return the distinct name suffixes of linear layers."""
    suffixes: dict[str, None] = {}
    for name in names:
        pieces = name.split(".")
        suffixes[".".join(pieces[-2:]) if pieces[-1].isdigit() else pieces[-1]] = None
    return list(suffixes)


def _sort_by_similarity(target: str, names: list[str]) -> list[str]:
    def similarity(name: str) -> float:
        return difflib.SequenceMatcher(None, target, name).ratio()

    return sorted(names, key=similarity, reverse=True)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name, in model order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
