"""Qwen2.5-VL."""

from __future__ import annotations

from finesight.family_components import FamilyComponent, TrainerModels

COMPONENT = FamilyComponent(
    kind="families",
    name="qwen2_5_vl",
    title="Qwen2.5-VL",
    renderer="finesight.families.qwen2_5_vl.renderer:Qwen25VL.from_folder",
    architecture="finesight.families.qwen2_5_vl.architecture:ARCHITECTURE",
    hf_class="Qwen2_5_VLForConditionalGeneration",
    processor_classes={
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    },
    exports=("serving", "gguf", "quantize"),
    serves_v4_adapters=True,
    has_common_preprocessor=True,
    trainer_models=TrainerModels(
        names=("qwen2_5_vl",),
        pattern="qwen2[.-]5-?vl",
        token_size=28,
        min_pixels=3136,
        max_length=128000,
        vision=("qkv", "proj", "gate_proj", "up_proj", "down_proj"),
        merger=("mlp.0", "mlp.2"),
        language=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    position=20,
)
