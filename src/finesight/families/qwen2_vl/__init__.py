"""Qwen2-VL, and models with its code, such as QVQ and UI-TARS."""

from __future__ import annotations

from finesight.family_components import FamilyComponent, TrainerModels

COMPONENT = FamilyComponent(
    kind="families",
    name="qwen2_vl",
    title="Qwen2-VL",
    renderer="finesight.families.qwen2_vl.renderer:from_folder",
    architecture="finesight.families.qwen2_vl.architecture:ARCHITECTURE",
    hf_class="Qwen2VLForConditionalGeneration",
    processor_classes={
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
    },
    exports=("serving", "gguf", "quantize"),
    serves_v4_adapters=True,
    has_common_preprocessor=True,
    trainer_models=TrainerModels(
        names=("qwen2_vl", "qvq"),
        pattern="qwen2-?vl|qvq-",
        token_size=28,
        min_pixels=3136,
        max_length=32768,
        vision=("qkv", "proj", "fc1", "fc2"),
        merger=("mlp.0", "mlp.2"),
        language=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    position=10,
)
