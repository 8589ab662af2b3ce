"""Small random models of families without native code, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tiny_model import create_tiny_model
from tokenizers import Tokenizer

from finesight.data.sample import LocatedSample, Sample

CHAT_TEMPLATE = """\
{%- for turn in messages -%}
{{ '<|im_start|>' + turn['role'] + '\\n' }}
{%- for part in turn['content'] -%}
{{ '<|image_pad|>' if part['type'] == 'image' else part['text'] }}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"""

IMAGE_SIZE, PATCH = 28, 14

VISION_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH,
}
LLAMA_CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def make_llava(folder: Path, template: str = CHAT_TEMPLATE, tied: bool = False) -> Path:
    """Configure a LLaVA: a CLIP encoder of two layers, a projector, a Llama of two layers."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    try:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    except ImportError:  # where it still was the only one
        from transformers import CLIPImageProcessor as CLIPImageProcessorPil

    tokenizer = make_tokenizer(folder)
    image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **VISION_CONFIG},
        text_config={**LLAMA_CONFIG, "vocab_size": len(tokenizer)},
        image_token_index=image,
        tie_word_embeddings=tied,
        vision_feature_layer=-1,
    )
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<|image_pad|>",
        chat_template=template,
    )
    torch.manual_seed(0)
    save_model(folder, LlavaForConditionalGeneration(config), processor)
    return folder


def make_tokenizer(folder: Path) -> Any:
    """The small tokenizer of the native tests, for transformers."""
    from transformers import PreTrainedTokenizerFast

    create_tiny_model(folder.parent / f"{folder.name} tokenizer")
    file = folder.parent / f"{folder.name} tokenizer" / "tokenizer.json"
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(file)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


@torch.no_grad()
def save_model(folder: Path, model: Any, processor: Any) -> None:
    """Write both, with weights so large that images and words affect the answers."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0.0, 1.5 * parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def make_sample(
    folder: Path, *turns: tuple[str, str], num_images: int = 1, name: str = "s"
) -> LocatedSample:
    """Make a conversation of (question, answer) pairs with its images in the first turn.

    The last answer may be empty for a prompt.
    """
    messages = []
    for at, (question, answer) in enumerate(turns):
        shown = [
            {"type": "image", "image": write_image(folder, n)}
            for n in range(0 if at else num_images)
        ]
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        if answer:
            messages.append({"role": "assistant", "content": answer})
    return LocatedSample(
        Sample.model_validate_json(json.dumps({"id": name, "messages": messages})), folder
    )


def write_image(folder: Path, number: int) -> str:
    """Make an image of one color."""
    name = f"{number}.png"
    Image.new("RGB", (40 + 10 * number, 30), (250 - 90 * number, 80 * number, 20)).save(
        folder / name
    )
    return name


def make_idefics3(folder: Path) -> Path:
    """Configure an Idefics3, like SmolVLM, which splits large images into tiles between tokens."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor

    try:
        from transformers.models.idefics3.image_processing_pil_idefics3 import (
            Idefics3ImageProcessorPil,
        )
    except ImportError:
        from transformers import Idefics3ImageProcessor as Idefics3ImageProcessorPil

    tokenizer = make_tokenizer(folder)
    marks = ["<image>", "<fake_token_around_image>", "<global-img>"]
    tokenizer.add_tokens(marks, special_tokens=True)
    config = Idefics3Config(
        text_config={**LLAMA_CONFIG, "vocab_size": len(tokenizer)},
        vision_config={**VISION_CONFIG},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    processor = Idefics3Processor(
        image_processor=Idefics3ImageProcessorPil(
            size={"longest_edge": 2 * IMAGE_SIZE}, max_image_size={"longest_edge": IMAGE_SIZE}
        ),
        tokenizer=tokenizer,
        image_seq_len=1,
        chat_template=CHAT_TEMPLATE.replace("<|image_pad|>", "<image>"),
    )
    torch.manual_seed(0)
    save_model(folder, Idefics3ForConditionalGeneration(config), processor)
    return folder


QWEN3_5_CHAT_TEMPLATE = """\
{%- for turn in messages -%}
{{ '<|im_start|>' + turn['role'] + '\\n' }}
{%- if turn['role'] == 'assistant' and loop.last -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- for part in turn['content'] -%}
{%- if part['type'] == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n<think>\\n' }}
{{- '\\n</think>\\n\\n' if enable_thinking is defined and enable_thinking is false }}
{%- endif -%}
"""
"""Like those of published models that think: an earlier answer loses its empty thought."""
