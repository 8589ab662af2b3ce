"""Tiny models with random weights and their own tokenizer.

Pretraining starts from them, and tests use them. The folder of a tiny model has the hub layout and
loads like a published model.
"""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from random_model import init_random_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import ByteLevel
from torch import Tensor, nn

from finesight.encode import tokenization
from finesight.encode.tokenization import PRETOKENIZE_PATTERN
from finesight.families.qwen.architecture import (
    RESAMPLER_HEAD_DIM,
    ResamplerAttention,
    VisionResampler,
)
from finesight.files.storage import write_folder
from finesight.model.hybrid_decoder import DepthwiseConv
from finesight.model.linear import FusedLinear
from finesight.model.weights_io import save_model
from finesight.model_folder import ModelFolder

TinyPreset = Literal["test", "small", "finesight-tiny"]


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of a tiny model.

    `vocab_size` is an upper limit that excludes special tokens. The head dimension must be a
    multiple of 4 in the vision encoder and of 8 in the decoder.

    `rope_theta` is the base of the decoder's rotary embedding (1e6 in published models). A small
    base rotates rows and columns of small images by larger angles, so that AdamW learns positions
    faster; but then no element of a head is nearly constant across positions, which makes retrieval
    by content harder to learn.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    vision_hidden_size: int
    num_vision_layers: int
    num_vision_heads: int
    rope_theta: float = 1e6


TINY_PRESETS: dict[TinyPreset, TinyConfig] = {
    "test": TinyConfig(384, 64, 2, 4, 2, 128, 32, 2, 2),
    "small": TinyConfig(512, 256, 3, 4, 2, 1152, 192, 2, 4, rope_theta=4.0),
    "finesight-tiny": TinyConfig(2034, 320, 5, 5, 1, 896, 256, 6, 4),
}
"""Presets by name: `test` has 0.2 M parameters, `small` 5 M and `finesight-tiny` 12.6 M."""

TinyFamily = Literal[
    "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "qwen"
]

_HYBRID_FAMILIES = ("qwen3_5", "qwen3_5_moe")

_QWEN3_FAMILIES = ("qwen3_vl", "qwen3_vl_moe", *_HYBRID_FAMILIES)


_BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

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
"""Special tokens in the order of the published tokenizers, with consecutive ids."""

_DEFAULT_SYSTEM_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
"""

_CHAT_TEMPLATE = """\
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


_NON_THINKING_CHAT_TEMPLATE = """\
{%- set questions = namespace(last=0) -%}
{%- for turn in messages -%}
{%- if turn['role'] == 'user' -%}{%- set questions.last = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for turn in messages -%}
{{ '<|im_start|>' + turn['role'] + '\\n' }}
{%- if turn['role'] == 'assistant' and loop.index0 > questions.last -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- set parts = turn['content'] -%}
{%- if parts is string -%}
{{ parts | trim }}
{%- else -%}
{%- set content -%}
{%- for part in parts -%}
{%- if part['type'] == 'image' -%}
{{ '<|vision_start|><|image_pad|><|vision_end|>' }}
{%- elif part['type'] == 'video' -%}
{{ '<|vision_start|><|video_pad|><|vision_end|>' }}
{%- else -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endset -%}
{{ content | trim }}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
"""


def create_tiny_model(
    target: Path,
    family: TinyFamily = "qwen2_vl",
    seed: int = 0,
    preset: TinyPreset | TinyConfig = "test",
    corpus: Iterable[str] | None = None,
) -> Path:
    """Create a folder with a tiny model and random fp32 weights.

    The same arguments give the same files. The tokenizer is trained on `corpus`, or on a built-in
    one if None. Raises UserError if `target` exists.
    """
    config = TINY_PRESETS[preset] if isinstance(preset, str) else preset
    texts = None if corpus is None else tuple(corpus)
    with write_folder(target) as folder:
        for name, content in _create_files(family, seed, config, texts).items():
            (folder / name).write_bytes(content)
    return target


@lru_cache(8)  # tests create hundreds of equal models
def _create_files(
    family: TinyFamily, seed: int, config: TinyConfig, corpus: tuple[str, ...] | None
) -> dict[str, bytes]:
    """Return the contents of the files of a tiny model by name."""
    tokenizer = _build_tokenizer(
        config.vocab_size, tokenizer_corpus() if corpus is None else corpus
    )
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if family == "qwen":
            write_qwen_vl_files(folder, config, tokenizer)
        else:
            _write_model_files(folder, family, config, tokenizer)
        model_folder = ModelFolder(folder)
        cpu = torch.device("cpu")
        model = init_random_model(
            model_folder.config, seed, torch.float32, cpu, model_folder.preprocessor_config
        )
        rescale_weights(model)
        save_model(model, model_folder, folder, torch.float32)
        return {path.name: path.read_bytes() for path in folder.iterdir()}


def _write_model_files(
    folder: Path, family: TinyFamily, tiny_config: TinyConfig, tokenizer: Tokenizer
) -> None:
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    _write_json(folder / "config.json", _hf_config(family, tiny_config, tokenizer))
    template = _CHAT_TEMPLATE if family in _QWEN3_FAMILIES else _DEFAULT_SYSTEM_TEMPLATE
    if family in _HYBRID_FAMILIES:
        template = _NON_THINKING_CHAT_TEMPLATE
    elif family not in _QWEN3_FAMILIES:
        template += _CHAT_TEMPLATE
    _write_json(folder / "tokenizer_config.json", _tokenizer_config(tokenizer, template))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(family))
    _write_json(folder / "chat_template.json", {"chat_template": template})
    _write_json(folder / "generation_config.json", _generation_config(tokenizer))


@torch.no_grad()
def rescale_weights(model: nn.Module) -> None:
    """Rescale linear weights to a standard deviation of 1 / sqrt(in_features).

    The initialization uses 0.02, as published models do, which suits wide layers. Narrow layers
    would then transmit almost no image information and train many times slower.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | FusedLinear):
            assert isinstance(module.weight, nn.Parameter), "quantized weights cannot be rescaled"
            _rescale(module.weight)
        elif isinstance(module, ResamplerAttention):
            _rescale(module.in_proj_weight)
        elif isinstance(module, DepthwiseConv):
            _rescale(module.weight.squeeze(1))
        elif isinstance(module, VisionResampler):
            _rescale(module.proj)


def _rescale(weight: Tensor) -> None:
    weight.mul_(1 / (0.02 * weight.shape[1] ** 0.5))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _build_tokenizer(vocab_size: int, corpus: Iterable[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer (Sennrich et al. 2016).

    Non-ASCII characters and the most frequent words become tokens; all other words are encoded
    letter by letter. A small model reads text letter by letter, and partial merges would hide the
    letters.
    """
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_PATTERN), behavior="isolated")
    texts = list(corpus)
    merges: dict[tuple[str, str], None] = {}
    for character in sorted({sign for line in texts for sign in line if not sign.isascii()}):
        spelled = _to_byte_level(character)
        merges |= {(spelled[:end], spelled[end]): None for end in range(1, len(spelled))}
    word_counts = Counter(word for one in texts for word, _ in split.pre_tokenize_str(one))
    frequent_words = [
        _to_byte_level(word)
        for word, _ in word_counts.most_common()
        if len(word) > 1 and word.isascii()
    ]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = list(dict.fromkeys([*alphabet, *map("".join, merges), *frequent_words]))[:vocab_size]
    ids = {token: number for number, token in enumerate(tokens)}
    # Retain the order, so that the parts of each merge exist.
    valid_merges = [pair for pair in merges if "".join(pair) in ids]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=valid_merges, ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, _BYTE_LEVEL])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = ByteLevel(trim_offsets=False)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return tokenizer


def _to_byte_level(text: str) -> str:
    """Encode text in the byte-level BPE alphabet, one letter per byte."""
    return "".join(piece for piece, _ in _BYTE_LEVEL.pre_tokenize_str(text))


def tokenizer_corpus() -> list[str]:
    """Return the built-in tokenizer corpus: roles, images, shapes and formulas."""
    colours = ("red", "green", "blue", "yellow", "orange", "purple", "black", "white", "grey")
    shapes = ("circle", "square", "triangle", "star", "cross", "ring", "diamond", "picture")
    positions = ("top", "bottom", "left", "right", "middle", "above", "below", "beside")
    chat = [
        "system\nYou are a helpful assistant.\nuser\nassistant\n",
        "What is in this picture? Describe the picture. Read the formula. Name every shape.",
        "Where is the shape? Find it. How many are there? There are one, two, three, four, five.",
        '{"bbox_2d": [0, 0, 0, 0], "label": "shape"}\n(0,0),(0,0)',
        r"\frac { x } { y } = \sqrt { a } + \alpha _ { i } ^ { 2 } \left( \sum \right)",
    ]
    scenes = [
        f" a {colour} {shape} at the {position}, and a {shape} on {colour} in the {position}"
        for colour, shape, position in product(colours, shapes, positions)
    ]
    # Repeated so that the words of the chat are more frequent than those of the scenes.
    return chat * 200 + scenes


def _hf_config(family: TinyFamily, tiny_config: TinyConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Build config.json in the hub layout: flat, except for Qwen3-VL's text_config."""
    shared = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "tie_word_embeddings": True,
        "vision_config": _vision_config(family, tiny_config),
    }
    language = _language_config(tiny_config, tokenizer)
    half = tiny_config.hidden_size // tiny_config.num_heads // 2
    if family in _QWEN3_FAMILIES:
        rows = half // 3
        rope = {"rope_type": "default", "mrope_interleaved": True}
        sections = {"mrope_section": [half - 2 * rows, rows, rows]}
        head = {"attention_bias": False, "head_dim": 2 * half, "rope_scaling": rope | sections}
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
        # No stacked expert weight is square, so that swapped axes would be detected.
        experts |= {"moe_intermediate_size": tiny_config.intermediate_size // 4 + 8}
        if family in _HYBRID_FAMILIES:
            head = _hybrid_config(half)
            del language["rope_theta"]
            experts["shared_expert_intermediate_size"] = tiny_config.intermediate_size // 4
        text = language | head | (experts if family.endswith("_moe") else {})
        return shared | {"dtype": "float32", "text_config": text}
    temporal = half // 4
    rows = (half - temporal) // 2
    flat = {
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "max_window_layers": tiny_config.num_layers,
        "rope_scaling": {
            "type": "mrope",
            "mrope_section": [temporal, rows, half - temporal - rows],
        },
        "sliding_window": 32768,
        "use_sliding_window": False,
        "torch_dtype": "float32",
    }
    return shared | language | flat


def _hybrid_config(half: int) -> dict[str, Any]:
    """Build the keys of attention in text_config of Qwen3.5; half of a head is rotated."""
    rows = half // 2 // 3
    return {
        "attention_bias": False,
        "attn_output_gate": True,
        "head_dim": 2 * half,
        "full_attention_interval": 2,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 2 * half,
        "linear_value_head_dim": 2 * half,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.5,
            "mrope_interleaved": True,
            "mrope_section": [half // 2 - 2 * rows, rows, rows],
        },
    }


def _language_config(tiny_config: TinyConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": tiny_config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": tiny_config.intermediate_size,
        "max_position_embeddings": 32768,
        "num_attention_heads": tiny_config.num_heads,
        "num_hidden_layers": tiny_config.num_layers,
        "num_key_value_heads": tiny_config.num_kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": tiny_config.rope_theta,
        "use_cache": True,
        "vocab_size": tokenizer.get_vocab_size(),
    }


_ARCHITECTURES = {
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_5": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
}


def _vision_config(family: TinyFamily, tiny_config: TinyConfig) -> dict[str, Any]:
    common: dict[str, Any] = {
        "depth": tiny_config.num_vision_layers,
        "num_heads": tiny_config.num_vision_heads,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if family in _QWEN3_FAMILIES:
        return common | {
            "in_channels": 3,
            "patch_size": 16,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": tiny_config.vision_hidden_size,
            "intermediate_size": 4 * tiny_config.vision_hidden_size,
            "out_hidden_size": tiny_config.hidden_size,
            "num_position_embeddings": 49,
            "deepstack_visual_indexes": [] if family in _HYBRID_FAMILIES else [0],
        }
    common |= {"in_chans": 3, "spatial_patch_size": 14}
    if family == "qwen2_vl":
        return common | {
            "embed_dim": tiny_config.vision_hidden_size,
            "hidden_size": tiny_config.hidden_size,
            "mlp_ratio": 4,
        }
    return common | {
        "hidden_act": "silu",
        "hidden_size": tiny_config.vision_hidden_size,
        "intermediate_size": 2 * tiny_config.vision_hidden_size,
        "out_hidden_size": tiny_config.hidden_size,
        "window_size": 56,
        "fullatt_block_indexes": [tiny_config.num_vision_layers - 1],
        "tokens_per_second": 2,
    }


def _preprocessor_config(family: TinyFamily) -> dict[str, Any]:
    """Return the published preprocessor settings of a family, with a smaller pixel limit."""
    # Qwen3.5 has the processor of Qwen3-VL.
    model_class = _ARCHITECTURES["qwen3_vl" if family in _HYBRID_FAMILIES else family]
    processor = model_class.replace("ForConditionalGeneration", "Processor")
    shared = {"merge_size": 2, "temporal_patch_size": 2, "processor_class": processor}
    if family in _QWEN3_FAMILIES:
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


IMAGE_SIZE, NUM_QUERIES = 112, 16
"""Image side in pixels, and number of image features. Each feature covers 2 x 2 patches, as in the
published model."""


def write_qwen_vl_files(folder: Path, tiny_config: TinyConfig, tokenizer: Tokenizer) -> None:
    """Write the config and tokenizer files of a tiny Qwen-VL model.

    The family has neither a chat template nor a preprocessor config. The vocabulary is written in
    the family's own tokenizer format.
    """
    (folder / "qwen.tiktoken").write_text(_tiktoken_ranks(tokenizer), encoding="ascii")
    vocab_size = tokenizer.get_vocab_size(with_added_tokens=False)
    hf_config = _qwen_vl_language_config(tiny_config, vocab_size)
    hf_config["visual"] = _qwen_vl_vision_config(tiny_config, vocab_size, hf_config["hidden_size"])
    files: dict[str, dict[str, Any]] = {
        "config.json": hf_config,
        "tokenizer_config.json": {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"},
        "generation_config.json": {"chat_format": "chatml", "eos_token_id": vocab_size},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _qwen_vl_language_config(tiny_config: TinyConfig, vocab_size: int) -> dict[str, Any]:
    """Build the language model's keys of config.json.

    The hidden size is rounded up to a multiple of the resampler's head dimension.
    """
    hidden_size = -(-tiny_config.hidden_size // RESAMPLER_HEAD_DIM) * RESAMPLER_HEAD_DIM
    num_heads = (
        tiny_config.num_heads if hidden_size % tiny_config.num_heads == 0 else hidden_size // 64
    )
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": 2 * tiny_config.intermediate_size,
        "kv_channels": hidden_size // num_heads,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192,
        "no_bias": True,
        "num_attention_heads": num_heads,
        "num_hidden_layers": tiny_config.num_layers,
        "rotary_emb_base": tiny_config.rope_theta,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "vocab_size": vocab_size + len(tokenization.SPECIAL_TOKENS),
    }


def _qwen_vl_vision_config(
    tiny_config: TinyConfig, vocab_size: int, out_hidden_size: int
) -> dict[str, Any]:
    return {
        "heads": tiny_config.num_vision_heads,
        "image_size": IMAGE_SIZE,
        "image_start_id": vocab_size + tokenization.SPECIAL_TOKENS.index("<img>"),
        "layers": tiny_config.num_vision_layers,
        "mlp_ratio": 4.0,
        "n_queries": NUM_QUERIES,
        "output_dim": out_hidden_size,
        "patch_size": 14,
        "width": tiny_config.vision_hidden_size,
    }


def _tiktoken_ranks(tokenizer: Tokenizer) -> str:
    """Convert a byte-level tokenizer to the content of `qwen.tiktoken`, ordered by token id."""
    bytes_of = {letter: byte for byte, letter in enumerate(_byte_alphabet())}
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    lines = []
    for rank, word in enumerate(sorted(vocab, key=vocab.__getitem__)):
        spelled = bytes(bytes_of[letter] for letter in word)
        lines.append(f"{base64.b64encode(spelled).decode()} {rank}\n")
    return "".join(lines)


def _byte_alphabet() -> list[str]:
    """Return the byte-level BPE character of each byte (Radford et al. 2019).

    Printable bytes map to themselves, the others to characters from U+0100 on.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
