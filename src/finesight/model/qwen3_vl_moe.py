"""Qwen3-VL with a mixture of experts in every decoder layer; all else is the dense model's."""

from __future__ import annotations

from dataclasses import replace

from finesight.model import qwen3_vl
from finesight.model.architecture import TRANSFORMERS_5, Architecture
from finesight.model.geometry import ExpertGeometry, LanguageGeometry, Settings, text_settings


def language(config: Settings) -> LanguageGeometry:
    """From `text_config`."""
    text = text_settings(config)
    text.require("decoder_sparse_step", 1, (1,))
    text.require("mlp_only_layers", (), ((), []))
    text.require("norm_topk_prob", True, (True,))
    experts = ExpertGeometry(
        # The second is transformers 5's name.
        number=text.whole("num_experts" if text.has("num_experts") else "num_local_experts"),
        chosen=text.whole("num_experts_per_tok"),
        width=text.whole("moe_intermediate_size"),
    )
    if experts.chosen > experts.number:
        text.refuse("num_experts_per_tok", f"at most the {experts.number} experts")
    if experts.width % 8 or text.whole("hidden_size") % 8:
        text.refuse("moe_intermediate_size", "a multiple of 8, as hidden_size, for its products")
    return replace(qwen3_vl.language(config), experts=experts)


ARCHITECTURE = Architecture(language, qwen3_vl.vision_tower, TRANSFORMERS_5)
