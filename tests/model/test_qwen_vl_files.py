"""Qwen-VL files: weight round trip, pickles, trainable parts, adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_fixtures import make_mixed_questions
from lora_fixtures import merge_to_folder
from safetensors.torch import load_file, save_file
from tiny_model import create_tiny_model
from torch import Tensor

from finesight.config import TuneSettings
from finesight.encode.packing import PackedBatch, pack
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.model.linear import iter_adapters
from finesight.model.lora.peft_io import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_WEIGHTS_FILE,
    load_adapter,
    save_adapter,
)
from finesight.model.trainable import configure_tuning, get_part, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model, save_model, stored_precision
from finesight.model_folder import CONVERTED_FOLDER, ModelFolder
from finesight.train.loss import fused_linear_cross_entropy

pytest.importorskip("tiktoken")
CPU = torch.device("cpu")
OFFICIAL = {"target_modules": ["c_attn", "attn.c_proj", "w1", "w2"], "rank": 4, "alpha": 16}
POSITIONS = "transformer.visual.attn_pool.pos_embed"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(create_tiny_model(tmp_path_factory.mktemp("model") / "tiny", "qwen"))


@pytest.fixture(scope="module")
def batch(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    folder, renderer = tmp_path_factory.mktemp("asked"), NativeRenderer(tiny)
    return pack([renderer.encode(question) for question in make_mixed_questions(folder)])


def _loaded(folder: ModelFolder) -> VisionLanguageModel:
    return load_model(folder, torch.float32, CPU)


@torch.no_grad()
def _hidden(model: VisionLanguageModel, batch: PackedBatch) -> Tensor:
    every_T = torch.arange(len(batch.ids_T))
    hidden_TD: Tensor = model.eval()(_with_all_labels(batch, every_T))
    return hidden_TD


def _with_all_labels(batch: PackedBatch, logit_indices_L: Tensor) -> PackedBatch:
    return replace(batch, logit_indices_L=logit_indices_L, labels_L=batch.ids_T)


def _tuned(model: VisionLanguageModel, **settings: Any) -> VisionLanguageModel:
    configure_tuning(model, TuneSettings.model_validate({"language": "frozen"} | settings), 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, _, adapter in iter_adapters(model):
            for factor in adapter.parameters():
                factor.normal_(0.0, 0.1, generator=generator)
    return model


def test_weights_are_saved_under_published_names(tiny: ModelFolder, tmp_path: Path) -> None:
    save_model(_loaded(tiny), tiny, tmp_path, torch.float32, 300_000)
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


def test_pickled_weights_give_the_same_model(
    tiny: ModelFolder, batch: PackedBatch, tmp_path: Path
) -> None:
    for name in ("config.json", "qwen.tiktoken"):
        (tmp_path / name).write_bytes((tiny.path / name).read_bytes())
    tensors = load_file(tiny.path / "model.safetensors")
    names = sorted(tensors)
    shards = {f"pytorch_model-0000{n}-of-00002.bin": names[n - 1 :: 2] for n in (1, 2)}
    for shard, own in shards.items():
        torch.save({name: tensors[name] for name in own}, tmp_path / shard)
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    folder = ModelFolder(tmp_path)
    assert stored_precision(folder) == "fp32"
    assert (tmp_path / CONVERTED_FOLDER).is_dir()
    model = _loaded(folder)
    assert torch.equal(_hidden(model, batch), _hidden(_loaded(tiny), batch))
    (tmp_path / "saved").mkdir()
    save_model(model, folder, tmp_path / "saved", torch.float32)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "qwen.tiktoken", "model.safetensors"}


def test_resampler_positions_are_not_trainable(tiny: ModelFolder, tmp_path: Path) -> None:
    full = {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"}
    model = _tuned(_loaded(tiny), **full)
    assert not any("pos_embed" in name for name in trainable_parameters(model))
    tensors = load_file(tiny.path / "model.safetensors")
    tensors[POSITIONS] = tensors[POSITIONS] + 1
    (tmp_path / "config.json").write_bytes((tiny.path / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors")
    table = _loaded(ModelFolder(tmp_path)).get_buffer("visual.merger.attn_pool.pos_embed")
    assert torch.equal(table, tensors.pop(POSITIONS))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="pos_embed"):
        _loaded(ModelFolder(tmp_path))


@pytest.mark.parametrize("part", ["vision", "merger", "language", "embeddings"])
def test_each_part_gets_its_gradients(tiny: ModelFolder, batch: PackedBatch, part: str) -> None:
    model = _tuned(_loaded(tiny), **{part: "full"}).train()
    requested = _with_all_labels(batch, torch.arange(len(batch.ids_T)))
    fused_linear_cross_entropy(
        model(requested), model.lm_head_weight, requested.labels_L, torch.tensor(1.0)
    ).backward()
    for name, parameter in model.named_parameters():
        updates = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert updates == (get_part(name) == part), name


def test_official_lora_config(tiny: ModelFolder, batch: PackedBatch, tmp_path: Path) -> None:
    model = _tuned(_loaded(tiny), language="lora", lora=OFFICIAL)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, model, base_model=str(tiny.path))
    layer = "base_model.model.transformer.h.{}.{}.lora_{}.weight"
    layers = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    expected = {layer.format(n, name, side) for n in (0, 1) for name in layers for side in "AB"}
    assert load_file(adapter / ADAPTER_WEIGHTS_FILE).keys() == expected
    hidden_TD = _hidden(model, batch)
    again = _loaded(tiny)
    load_adapter(again, adapter, base_folder=tiny)
    assert torch.equal(_hidden(again, batch), hidden_TD)
    # The published script names the layers as a list.
    config = json.loads((adapter / ADAPTER_CONFIG_FILE).read_text(encoding="utf-8"))
    named = config | {"target_modules": OFFICIAL["target_modules"]}
    (adapter / ADAPTER_CONFIG_FILE).write_text(json.dumps(named), encoding="utf-8")
    other = _loaded(tiny)
    load_adapter(other, adapter, base_folder=tiny)
    assert torch.equal(_hidden(other, batch), hidden_TD)


def test_adapters_of_all_parts_merge(tiny: ModelFolder, batch: PackedBatch, tmp_path: Path) -> None:
    parts = {"vision": "lora", "merger": "lora", "language": "lora", "lora": {"rank": 3}}
    model = _tuned(_loaded(tiny), **parts)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_adapter(adapter, model, base_model=str(tiny.path))
    assert "base_model.model.transformer.visual.attn_pool.kv_proj.lora_A.weight" in load_file(
        adapter / ADAPTER_WEIGHTS_FILE
    )
    hidden_TD = _hidden(model, batch)
    again = _loaded(tiny)
    load_adapter(again, adapter, base_folder=tiny)
    assert torch.equal(_hidden(again, batch), hidden_TD)
    merge_to_folder(tiny, adapter, tmp_path / "merged")
    merged_TD = _hidden(_loaded(ModelFolder(tmp_path / "merged")), batch)
    assert float((merged_TD - hidden_TD).abs().max()) <= 1e-4 * float(hidden_TD.abs().max())
