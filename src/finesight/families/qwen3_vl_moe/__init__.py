"""Qwen3-VL with experts."""

from __future__ import annotations

from finesight.family_components import FamilyComponent, TrainerModels

COMPONENT = FamilyComponent(
    kind="families",
    name="qwen3_vl_moe",
    title="Qwen3-VL MoE",
    renderer="finesight.families.qwen3_vl.renderer:from_folder",
    architecture="finesight.families.qwen3_vl_moe.architecture:ARCHITECTURE",
    hf_class="Qwen3VLMoeForConditionalGeneration",
    exports=("serving", "gguf"),
    has_experts=True,
    reasoning_parser="qwen3",
    trainer_models=TrainerModels(
        names=("qwen3_vl_moe", "qwen3_moe_vl"),
        pattern=r"qwen3-?vl.*-a\d+b",
        token_size=32,
        min_pixels=65536,
        max_length=262144,
        vision=("qkv", "proj", "linear_fc1", "linear_fc2"),
        merger=("linear_fc1", "linear_fc2"),
        language=("q_proj", "k_proj", "v_proj", "o_proj"),
    ),
    position=40,
)
