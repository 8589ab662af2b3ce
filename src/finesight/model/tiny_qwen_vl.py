"""The files of a small first Qwen-VL beside its weights: see `model.tiny`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finesight.encode.rank_tokenizer import SPECIAL_TOKENS
from finesight.model.qwen_vl import HEAD_WIDTH
from finesight.model.tiny_sizes import TinySize

SIDE, QUERIES = 112, 16
"""Pixels of a picture each way, and its features: each stands for 2 x 2 patches, as published."""


def write_files(folder: Path, size: TinySize, tokenizer: Tokenizer) -> None:
    """Configuration and tokenizer; the family brings neither a chat template nor settings of
    pictures. The tokenizer's words become those of the family's own file."""
    (folder / "qwen.tiktoken").write_text(_ranks(tokenizer), encoding="ascii")
    words = tokenizer.get_vocab_size(with_added_tokens=False)
    config = _language_config(size, words)
    config["visual"] = _vision_config(size, words, config["hidden_size"])
    files: dict[str, dict[str, Any]] = {
        "config.json": config,
        "tokenizer_config.json": {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"},
        "generation_config.json": {"chat_format": "chatml", "eos_token_id": words},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _language_config(size: TinySize, words: int) -> dict[str, Any]:
    """The width is raised to what the resampler's heads need, and the decoder has heads of 64
    numbers where their number does not divide it."""
    width = -(-size.width // HEAD_WIDTH) * HEAD_WIDTH
    heads = size.heads if width % size.heads == 0 else width // 64
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        "attn_dropout_prob": 0.0,
        "emb_dropout_prob": 0.0,
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 2 * size.inner,
        "kv_channels": width // heads,
        "layer_norm_epsilon": 1e-6,
        "max_position_embeddings": 8192,
        "no_bias": True,
        "num_attention_heads": heads,
        "num_hidden_layers": size.layers,
        "rotary_emb_base": size.theta,
        "rotary_pct": 1.0,
        "scale_attn_weights": True,
        "seq_length": 2048,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_cache": True,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "vocab_size": words + len(SPECIAL_TOKENS),
    }


def _vision_config(size: TinySize, words: int, out_width: int) -> dict[str, Any]:
    return {
        "heads": size.vision_heads,
        "image_size": SIDE,
        "image_start_id": words + SPECIAL_TOKENS.index("<img>"),
        "layers": size.vision_layers,
        "mlp_ratio": 4.0,
        "n_queries": QUERIES,
        "output_dim": out_width,
        "patch_size": 14,
        "width": size.vision_width,
    }


def _ranks(tokenizer: Tokenizer) -> str:
    """A `qwen.tiktoken` with the words of a byte-level tokenizer, in the order of their ids."""
    bytes_of = {letter: byte for byte, letter in enumerate(_letters())}
    words = tokenizer.get_vocab(with_added_tokens=False)
    lines = []
    for rank, word in enumerate(sorted(words, key=words.__getitem__)):
        spelled = bytes(bytes_of[letter] for letter in word)
        lines.append(f"{base64.b64encode(spelled).decode()} {rank}\n")
    return "".join(lines)


def _letters() -> list[str]:
    """The letter of each byte in the alphabet of byte-level BPE (Radford et al. 2019): its own
    where that can be seen, else the next one from U+0100 on."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]
