"""Qwen-VL files: weight round trip, pickles, trainable parts, adapters."""

import pytest
import torch
from engine_fixtures import compute_logits, pack_mixed_questions
from lora_fixtures import edit_adapter_config, tune_with_lora
from safetensors.torch import load_file, save_file
from tiny_model import create_tiny_model

from finesight.encode.batch import PackedBatch
from finesight.errors import UserError
from finesight.model.lora.peft_io import ADAPTER_WEIGHTS_FILE, load_adapter, save_adapter
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model, save_model
from finesight.model_folder import ModelFolder
from finesight.settings.config import TuneSettings

pytest.importorskip("tiktoken")
CPU = torch.device("cpu")
OFFICIAL = {"target_modules": ["c_attn", "attn.c_proj", "w1", "w2"], "rank": 4, "alpha": 16}
POSITIONS = "transformer.visual.attn_pool.pos_embed"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(create_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen"))


def load_fp32(folder: ModelFolder) -> VisionLanguageModel:
    return load_model(folder, torch.float32, CPU)


@pytest.fixture(scope="module")
def batch(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    return pack_mixed_questions(tiny, tmp_path_factory.mktemp("asked"))


def test_weights_are_saved_under_published_names(tiny, tmp_path):
    save_model(load_fp32(tiny), tiny, tmp_path, torch.float32, 300_000)
    before = load_file(tiny.path / "model.safetensors")
    files = ModelFolder(tmp_path).weight_files()
    assert len(files) > 1
    after = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert before["transformer.visual.conv1.weight"].shape == (32, 3, 14, 14)
    assert all(name.startswith(("transformer.", "lm_head.")) for name in before)
    names = {path.name for path in tmp_path.iterdir() if path.suffix != ".safetensors"}
    assert names == {
        *("config.json", "qwen.tiktoken", "tokenizer_config.json", "generation_config.json"),
        "model.safetensors.index.json",
    }


def test_resampler_positions_are_not_trainable(tiny, tmp_path):
    model = load_fp32(tiny)
    parts = ("vision", "merger", "language", "embeddings")
    configure_tuning(model, TuneSettings.model_validate(dict.fromkeys(parts, "full")), 0)
    assert not any("pos_embed" in name for name in trainable_parameters(model))
    tensors = load_file(tiny.path / "model.safetensors")
    tensors[POSITIONS] = tensors[POSITIONS] + 1
    (tmp_path / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    table = load_fp32(ModelFolder(tmp_path)).get_buffer("visual.merger.attn_pool.pos_embed")
    assert torch.equal(table, tensors.pop(POSITIONS))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="pos_embed"):
        load_fp32(ModelFolder(tmp_path))


def test_official_lora_config(tiny, batch, tmp_path):
    model = tune_with_lora(load_fp32(tiny), {"lora": OFFICIAL})
    save_adapter(tmp_path, model, base_model=str(tiny.path))
    layer = "base_model.model.transformer.h.{}.{}.lora_{}.weight"
    layers = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    expected = {layer.format(n, name, side) for n in (0, 1) for name in layers for side in "AB"}
    assert load_file(tmp_path / ADAPTER_WEIGHTS_FILE).keys() == expected
    logits_TV = compute_logits(model, batch)
    for _ in range(2):
        again = load_fp32(tiny)
        load_adapter(again, tmp_path, base_folder=tiny)
        assert torch.equal(compute_logits(again, batch), logits_TV)
        # The published script names the layers as a list.
        edit_adapter_config(tmp_path, target_modules=OFFICIAL["target_modules"])
