"""Qwen3-VL without experts."""

from __future__ import annotations

from finesight.family_components import FamilyComponent, TrainerModels

COMPONENT = FamilyComponent(
    kind="families",
    name="qwen3_vl",
    title="Qwen3-VL",
    renderer="finesight.families.qwen3_vl.renderer:from_folder",
    architecture="finesight.families.qwen3_vl.architecture:ARCHITECTURE",
    hf_class="Qwen3VLForConditionalGeneration",
    exports=("serving", "gguf", "quantize"),
    reasoning_parser="qwen3",
    trainer_models=TrainerModels(
        names=("qwen3_vl", "qwen3_vl_nothink"),
        pattern=r"qwen3-?vl(?!.*-a\d+b)",
        token_size=32,
        min_pixels=65536,
        max_length=262144,
        vision=("qkv", "proj", "linear_fc1", "linear_fc2"),
        merger=("linear_fc1", "linear_fc2"),
        language=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    position=30,
)
