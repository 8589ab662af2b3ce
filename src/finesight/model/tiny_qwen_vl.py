"""Config and tokenizer files of tiny models of the first Qwen-VL family, see `model.tiny`."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from finesight.encode.tokenizer import SPECIAL_TOKENS
from finesight.model.families.qwen_vl import RESAMPLER_HEAD_DIM
from finesight.model.tiny_config import TinyConfig

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
    hf_config = _language_config(tiny_config, vocab_size)
    hf_config["visual"] = _vision_config(tiny_config, vocab_size, hf_config["hidden_size"])
    files: dict[str, dict[str, Any]] = {
        "config.json": hf_config,
        "tokenizer_config.json": {"model_max_length": 8192, "tokenizer_class": "QWenTokenizer"},
        "generation_config.json": {"chat_format": "chatml", "eos_token_id": vocab_size},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _language_config(tiny_config: TinyConfig, vocab_size: int) -> dict[str, Any]:
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
        "vocab_size": vocab_size + len(SPECIAL_TOKENS),
    }


def _vision_config(
    tiny_config: TinyConfig, vocab_size: int, out_hidden_size: int
) -> dict[str, Any]:
    return {
        "heads": tiny_config.num_vision_heads,
        "image_size": IMAGE_SIZE,
        "image_start_id": vocab_size + SPECIAL_TOKENS.index("<img>"),
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
