"""Small random models of families without native code, made on the spot."""

import json
from pathlib import Path
from typing import Any

import torch
from case_files import load_cases
from PIL import Image
from tiny_model import create_tiny_model

from finesight.samples.sample import LocatedSample, Sample

_CASES = load_cases("hf_models")
CHAT_TEMPLATE, QWEN3_5_CHAT_TEMPLATE = _CASES["chat_template"], _CASES["qwen3_5_chat_template"]
VISION_CONFIG, LLAMA_CONFIG = _CASES["vision"], _CASES["llama"]
IMAGE_SIZE, PATCH = VISION_CONFIG["image_size"], VISION_CONFIG["patch_size"]


def make_llava(folder: Path, template: str = CHAT_TEMPLATE, tied: bool = False) -> Path:
    """Configure a LLaVA: a CLIP encoder of two layers, a projector, a Llama of two layers."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

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

    tiny = create_tiny_model(folder.parent / f"{folder.name} tokenizer")
    file = str(tiny / "tokenizer.json")
    tokens = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_file=file, **tokens)


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
    """Make a conversation of (question, answer) pairs; the last answer may be empty."""
    content = [{"type": "image", "image": write_image(folder, n)} for n in range(num_images)]
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        content.append({"type": "text", "text": question})
        messages.append({"role": "user", "content": content})
        content = []
        if answer:
            messages.append({"role": "assistant", "content": answer})
    text = json.dumps({"id": name, "messages": messages})
    return LocatedSample(Sample.model_validate_json(text), folder)


def write_image(folder: Path, number: int) -> str:
    color = (250 - 90 * number, 80 * number, 20)
    Image.new("RGB", (40 + 10 * number, 30), color).save(folder / f"{number}.png")
    return f"{number}.png"


def make_idefics3(folder: Path) -> Path:
    """Configure an Idefics3, like SmolVLM, which splits large images into tiles between tokens."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

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
