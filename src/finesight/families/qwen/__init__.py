"""The first Qwen-VL (2023): square images of one size, a tiktoken tokenizer, no chat template."""

from __future__ import annotations

import math
from typing import Any

from finesight.family_components import CountReader, FamilyComponent, TrainerModels


def read_image_settings(read_count: CountReader) -> dict[str, Any]:
    """Return the preprocessor settings for square images of `image_size` pixels."""
    image_size = read_count("visual.image_size", 0)
    patch_size = read_count("visual.patch_size", 0)
    num_queries = read_count("visual.n_queries", 256)
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "merge_size": max(1, image_size // patch_size // math.isqrt(num_queries)),
        "temporal_patch_size": 1,
        "min_pixels": image_size**2,
        "max_pixels": image_size**2,
    }


# Neither llama.cpp nor vLLM and SGLang support its vision encoder.
COMPONENT = FamilyComponent(
    kind="families",
    name="qwen",
    title="Qwen-VL",
    renderer="finesight.families.qwen.renderer:from_folder",
    architecture="finesight.families.qwen.architecture:ARCHITECTURE",
    tokenizer_file="qwen.tiktoken",
    has_chat_template=False,
    read_image_settings=read_image_settings,
    trainer_models=TrainerModels(
        names=("qwen_vl",),  # qwen means a text model in other trainers
        pattern="qwen-?vl",
        token_size=0,
        min_pixels=0,
        max_length=8192,
        vision=("in_proj", "out_proj", "c_fc", "c_proj"),
        merger=("kv_proj", "out_proj"),
        required_key="visual",
        language=("c_attn", "c_proj", "w1", "w2"),
    ),
    depends_on_length=True,
    position=70,
)
