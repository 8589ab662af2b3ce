"""Qwen3.5, Qwen3.6 and Qwen3.8 with experts."""

from __future__ import annotations

from finesight.family_components import FamilyComponent, TrainerModels

COMPONENT = FamilyComponent(
    kind="families",
    name="qwen3_5_moe",
    title="Qwen3.5 MoE",
    renderer="finesight.families.qwen3_5.renderer:from_folder",
    architecture="finesight.families.qwen3_5_moe.architecture:ARCHITECTURE",
    hf_class="Qwen3_5MoeForConditionalGeneration",
    # The converter of llama.cpp supports it since its pull request 19468.
    exports=("serving", "gguf"),
    has_experts=True,
    reasoning_parser="qwen3",
    trainer_models=TrainerModels(
        names=("qwen3_5_moe",),
        pattern=r"qwen3\.[568]-.*-a\d+b",
        token_size=32,
        min_pixels=65536,
        max_length=262144,
        vision=("qkv", "proj", "linear_fc1", "linear_fc2"),
        merger=("linear_fc1", "linear_fc2"),
        language=(
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "in_proj_qkv",
            "in_proj_z",
            "in_proj_b",
            "in_proj_a",
            "out_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
            "shared_expert_gate",
        ),
    ),
    position=60,
)
