"""A small model of a family, made on the spot: real files, random weights, its own tokenizer.

It is what pretraining starts from and what the tests compute with. The folder has the hub's
layout, so everything that reads a published model reads this one too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel
from torch import Tensor, nn

from finesight.encode.rank_tokenizer import SPLIT
from finesight.hub import ModelFolder
from finesight.model import tiny_qwen_vl
from finesight.model.linear import GroupedLinear
from finesight.model.qwen_vl import CrossAttention, Resampler
from finesight.model.tiny_sizes import SIZES, SizeName, TinySize
from finesight.model.weights import random_model, save_model
from finesight.storage import write_folder

TinyFamily = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"]
_NEWEST = ("qwen3_vl", "qwen3_vl_moe")


_BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""In the order of the published tokenizers: their ids follow one another."""

_DEFAULT_SYSTEM = """\
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
"""

_TURNS = """\
{%- for turn in messages -%}
{{ '<|im_start|>' + turn['role'] + '\\n' }}
{%- set parts = turn['content'] -%}
{%- if parts is string -%}
{{ parts }}
{%- else -%}
{%- for part in parts -%}
{%- if part['type'] == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def make_tiny(
    target: Path,
    family: TinyFamily = "qwen2_vl",
    seed: int = 0,
    size: SizeName | TinySize = "test",
    text: Iterable[str] | None = None,
) -> Path:
    """Write a complete model folder with random fp32 weights at `target`, the same for the same
    arguments. The tokenizer learns from `text`, or from a built-in one. Raises UserError when
    `target` exists."""
    geometry = SIZES[size] if isinstance(size, str) else size
    with write_folder(target) as folder:
        tokenizer = _tokenizer(geometry.vocabulary, training_text() if text is None else text)
        if family == "qwen":
            tiny_qwen_vl.write_files(folder, geometry, tokenizer)
        else:
            _write_files(folder, family, geometry, tokenizer)
        made = ModelFolder(folder)
        cpu = torch.device("cpu")
        model = random_model(made.config, seed, torch.float32, cpu, made.preprocessor)
        spread(model)
        save_model(model, made, folder, torch.float32)
    return target


def _write_files(folder: Path, family: TinyFamily, size: TinySize, tokenizer: Tokenizer) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "config.json", _config(family, size, tokenizer))
    template = _TURNS if family in _NEWEST else _DEFAULT_SYSTEM + _TURNS
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, template))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(family))
    _write_json(folder / "chat_template.json", {"chat_template": template})
    _write_json(folder / "generation_config.json", _generation_config(tokenizer))


@torch.no_grad()
def spread(model: nn.Module) -> None:
    """Widen the weights of the linear layers to a deviation of 1 / sqrt(inputs).

    The families' 0.02 is made for wide layers: narrow ones hand almost nothing of a picture on,
    and learn many times slower.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | GroupedLinear):
            assert isinstance(module.weight, nn.Parameter), "weights in NF4 are not widened"
            _widen(module.weight)
        elif isinstance(module, CrossAttention):
            _widen(module.in_proj_weight)
        elif isinstance(module, Resampler):
            _widen(module.proj)


def _widen(weight: Tensor) -> None:
    weight.mul_(1 / (0.02 * weight.shape[1] ** 0.5))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tokenizer(vocabulary: int, text: Iterable[str]) -> Tokenizer:
    """Byte-level BPE (Sennrich et al. 2016), cut like the families'.

    Signs beyond ASCII are tokens, then the words that the text says most often; every other word
    is spelled. A small model learns to read letter by letter: syllables that happen to merge would
    only hide the letters.
    """
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    texts = list(text)
    merges: dict[tuple[str, str], None] = {}
    for sign in sorted({sign for one in texts for sign in one if not sign.isascii()}):
        spelled = _bytes(sign)
        merges |= {(spelled[:end], spelled[end]): None for end in range(1, len(spelled))}
    said = Counter(word for one in texts for word, _ in split.pre_tokenize_str(one))
    often = [_bytes(word) for word, _ in said.most_common() if len(word) > 1 and word.isascii()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = list(dict.fromkeys([*alphabet, *map("".join, merges), *often]))[:vocabulary]
    ids = {token: number for number, token in enumerate(tokens)}
    # In their order, so that what a merge is made of is there as well.
    known = [pair for pair in merges if "".join(pair) in ids]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=known, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, _BYTES])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _bytes(text: str) -> str:
    """The text in the alphabet of byte-level BPE, a letter for each byte."""
    return "".join(piece for piece, _ in _BYTES.pre_tokenize_str(text))


def training_text() -> list[str]:
    """The sentences that the tiny tokenizer learns from: roles, pictures, shapes and formulas."""
    colours = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white", "grey")
    shapes = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "picture")
    places = ("top", "bottom", "left", "right", "middle", "above", "below", "beside")
    chat = [
        "system\nYou are a helpful assistant.\nuser\nassistant\n",
        "What is in this picture? Describe the picture. Read the formula. Name every shape.",
        "Where is the shape? Find it. How many are there? There are one, two, three, four, five.",
        '{"bbox_2d": [0, 0, 0, 0], "label": "shape"}\n(0,0),(0,0)',
        r"\frac { x } { y } = \sqrt { a } + \alpha _ { i } ^ { 2 } \left( \sum \right)",
    ]
    scenes = [
        f" a {colour} {shape} at the {place}, and a {shape} on {colour} in the {place}"
        for colour, shape, place in product(colours, shapes, places)
    ]
    # The chat's words must win merges against the many scenes.
    return chat * 200 + scenes


def _config(family: TinyFamily, size: TinySize, tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json` in the hub's style: flat, but for Qwen3-VL, whose language model has a part."""
    shared = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "tie_word_embeddings": True,
        "vision_config": _vision_config(family, size),
    }
    language = _language_config(size, tokenizer)
    half = size.width // size.heads // 2
    if family in _NEWEST:
        rows = half // 3
        rope = {"rope_type": "default", "mrope_interleaved": True}
        sections = {"mrope_section": [half - 2 * rows, rows, rows]}
        head = {"attention_bias": False, "head_dim": 2 * half, "rope_scaling": rope | sections}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        # No stack of them is square: an exchange of inputs and outputs would not be seen.
        experts |= {"moe_intermediate_size": size.inner // 4 + 8}
        text = language | head | (experts if family == "qwen3_vl_moe" else {})
        return shared | {"dtype": "float32", "text_config": text}
    temporal = half // 4
    rows = (half - temporal) // 2
    flat = {
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "max_window_layers": size.layers,
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [temporal, rows, half - temporal - rows],
        },
        "sliding_window": 32768,
        "use_sliding_window": False,
        "torch_dtype": "float32",
    }
    return shared | language | flat


def _language_config(size: TinySize, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": size.width,
        "initializer_range": 0.02,
        "intermediate_size": size.inner,
        "max_position_embeddings": 32768,
        "num_attention_heads": size.heads,
        "num_hidden_layers": size.layers,
        "num_key_value_heads": size.kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": size.theta,
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }


_ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}


def _vision_config(family: TinyFamily, size: TinySize) -> dict[str, Any]:
    common: dict[str, Any] = {
        "depth": size.vision_layers,
        "num_heads": size.vision_heads,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if family in _NEWEST:
        return common | {
            "in_channels": 3,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": size.vision_width,
            "intermediate_size": 4 * size.vision_width,
            "out_hidden_size": size.width,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [0],
        }
    common |= {"in_chans": 3, "spatial_patch_size": 14}
    if family == "qwen2_vl":
        return common | {
            "embed_dim": size.vision_width,
            "hidden_size": size.width,
            "mlp_ratio": 4,
        }
    return common | {
        "hidden_act": "silu",
        "hidden_size": size.vision_width,
        "intermediate_size": 2 * size.vision_width,
        "out_hidden_size": size.width,
        "window_size": 56,
        "fullatt_block_indexes": [size.vision_layers - 1],
        "tokens_per_second": 2,
    }


def _preprocessor_config(family: TinyFamily) -> dict[str, Any]:
    """The published values of each family, but a smaller limit on pixels."""
    processor = _ARCHITECTURES[family].replace("ForConditionalGeneration", "Processor")
    shared = {"merge_size": 2, "temporal_patch_size": 2, "processor_class": processor}
    if family in _NEWEST:
        return shared | {
            "size": {"shortest_edge": 64 * 64, "longest_edge": 512 * 512},
            "patch_size": 16,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
            "image_processor_type": "Qwen2VLImageProcessorFast",
        }
    return shared | {
        "min_pixels": 56 * 56,
        "max_pixels": 448 * 448,
        "patch_size": 14,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
    }


def _tokenizer_config(tokenizer: Tokenizer, chat_template: str) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(token)): {
                "content": token,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": True,
            }
            for token in SPECIAL_TOKENS
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": chat_template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": None,
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>")]
    return {"do_sample": False, "eos_token_id": ends, "pad_token_id": ends[1]}
