"""Tiny models: published file formats, reproducible, readable by transformers."""

from __future__ import annotations

import json

import pytest
import torch
from random_model import grow_model
from safetensors.torch import load_file
from tiny_model import (
    SPECIAL_TOKENS,
    TINY_PRESETS,
    TinyConfig,
    create_tiny_model,
    tokenizer_corpus,
)
from tokenizers import Tokenizer

from finesight.errors import UserError
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request, tmp_path_factory):
    return create_tiny_model(tmp_path_factory.mktemp("model") / "tiny", request.param)


def test_folder_has_the_published_files(tiny):
    assert {path.name for path in tiny.iterdir()} >= {
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "preprocessor_config.json",
        "chat_template.json",
        "generation_config.json",
        "model.safetensors",
    }


def test_equal_arguments_give_equal_bytes(tiny, tmp_path):
    family = ModelFolder(tiny).family
    again = create_tiny_model(tmp_path / "again", family, corpus=tokenizer_corpus())
    for path in tiny.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_seed_changes_only_the_weights(tiny, tmp_path):
    other = create_tiny_model(tmp_path / "other", ModelFolder(tiny).family, seed=1)
    different = {p.name for p in tiny.iterdir() if p.read_bytes() != (other / p.name).read_bytes()}
    assert different == {"model.safetensors", "sha256.json"}


def test_special_tokens_follow_text_tokens(tiny):
    config = json.loads((tiny / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    ids = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]
    language = config.get("text_config", config)
    assert ids == list(range(ids[0], language["vocab_size"]))
    assert config["image_token_id"] == tokenizer.token_to_id("<|image_pad|>")
    assert config["video_token_id"] == tokenizer.token_to_id("<|video_pad|>")
    assert language["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert config["vision_start_token_id"] == tokenizer.token_to_id("<|vision_start|>")


@pytest.mark.parametrize(
    "text", ["a red circle", "(12,345),(6,7)", "naïve 图片 \U0001f600", "  two  blanks\n\n"]
)
def test_text_roundtrip(tiny, text):
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_known_words_are_one_token_and_digits_are_separate(tmp_path):
    folder = create_tiny_model(tmp_path / "tiny", preset="small")
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert len(tokenizer.encode(" yellow triangle").ids) == 2
    assert len(tokenizer.encode("1000").ids) == 4


def test_parameter_counts(tmp_path):
    values = {}
    for name in TINY_PRESETS:
        weights = load_file(create_tiny_model(tmp_path / name, preset=name) / "model.safetensors")
        values[name] = sum(tensor.numel() for tensor in weights.values())
    assert 100_000 < values["test"] < 300_000
    assert 5e6 < values["small"] < 15e6


def test_linear_layers_preserve_scale(tiny):
    model = load_model(ModelFolder(tiny), torch.float32, torch.device("cpu"))
    weight = model.get_parameter("model.layers.1.self_attn.o_proj.weight")
    x = torch.randn(1000, weight.shape[1])
    assert (x @ weight.T).std().item() == pytest.approx(1.0, rel=0.1)


def test_custom_tiny_size(tmp_path):
    size = TinyConfig(300, 32, 1, 2, 1, 48, 16, 1, 2)
    folder = create_tiny_model(tmp_path / "own", "qwen2_5_vl", preset=size)
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == 300 + len(SPECIAL_TOKENS)
    assert sum(config["rope_scaling"]["mrope_section"]) == 32 // 2 // 2
    assert load_model(ModelFolder(folder), torch.float32, torch.device("cpu")) is not None


def test_existing_folder_is_unchanged(tiny):
    with pytest.raises(UserError, match="exists already"):
        create_tiny_model(tiny)


def test_transformers_loads_the_folder(tiny):
    transformers = pytest.importorskip("transformers")
    theirs, report = transformers.AutoModelForImageTextToText.from_pretrained(
        tiny, output_loading_info=True
    )
    assert theirs.config.model_type == ModelFolder(tiny).family
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    # AutoTokenizer would replace the merges of Qwen3.5.
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tiny)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
        tokenize=False,
    )
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    assert text == (
        ("" if theirs.config.model_type.startswith("qwen3_") else system)
        + "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n"
        "<|im_start|>assistant\n"
        + ("<think>\n\n</think>\n\n" if theirs.config.model_type.startswith("qwen3_5") else "")
    )
    ours = Tokenizer.from_file(str(tiny / "tokenizer.json")).encode(text).ids
    assert tokenizer(text)["input_ids"] == ours


def test_more_characters_than_tokens(tmp_path):
    """Characters without a token are encoded as bytes."""
    signs = "".join(chr(0x4E00 + 7 * number) for number in range(300))
    folder = create_tiny_model(tmp_path / "tiny", corpus=[signs])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 384 + len(SPECIAL_TOKENS)
    assert tokenizer.decode(tokenizer.encode(signs).ids) == signs
    assert 300 < len(tokenizer.encode(signs).ids) < 900
    assert len(tokenizer.encode("words are spelled").ids) == len("words are spelled")


def test_grown_model_computes_the_same_function(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = create_tiny_model(tmp_path / "tiny", "qwen2_vl")
    grown = grow_model(ModelFolder(folder), tmp_path / "grown")
    config = json.loads((folder / "config.json").read_text())
    ids = torch.tensor([[40, *[config["image_token_id"]] * 4, 50, 60]])
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": (ids == config["image_token_id"]).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 14 * 14),
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }
    logits = []
    for path in (folder, grown):
        model = transformers.AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
        logits.append(model(**inputs).logits)
    scale = logits[0].std().item()
    torch.testing.assert_close(logits[0], logits[1], atol=0.1 * scale, rtol=0.0)
