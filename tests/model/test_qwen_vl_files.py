"""Qwen-VL in files: weights there and back, pickles, parts that learn, adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import mixed_questions
from safetensors.torch import load_file, save_file
from torch import Tensor

from finesight.config import Tune
from finesight.encode.pack import PackedBatch, pack
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.hub import CONVERTED, ModelFolder
from finesight.model.adapter import CONFIG, WEIGHTS, install_adapter, write_adapter
from finesight.model.lora import adapters
from finesight.model.merge import merge_folder
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning, part_of, trainable
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model, save_model, stored_precision
from finesight.train.loss import label_loss

pytest.importorskip("tiktoken")
CPU = torch.device("cpu")
OFFICIAL = {"targets": ["c_attn", "attn.c_proj", "w1", "w2"], "rank": 4, "alpha": 16}
POSITIONS = "transformer.visual.attn_pool.pos_embed"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return ModelFolder(make_tiny(tmp_path_factory.mktemp("model") / "tiny", "qwen"))


@pytest.fixture(scope="module")
def batch(tiny: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> PackedBatch:
    folder, renderer = tmp_path_factory.mktemp("asked"), Renderer(tiny)
    return pack([renderer.encode(question) for question in mixed_questions(folder)])


def _loaded(folder: ModelFolder) -> VisionLanguageModel:
    return load_model(folder, torch.float32, CPU)


@torch.no_grad()
def _hidden(model: VisionLanguageModel, batch: PackedBatch) -> Tensor:
    every_T = torch.arange(len(batch.ids_T))
    hidden_TD: Tensor = model.eval()(_asked(batch, every_T))
    return hidden_TD


def _asked(batch: PackedBatch, predict_L: Tensor) -> PackedBatch:
    return replace(batch, predict_L=predict_L, target_L=batch.ids_T)


def _tuned(model: VisionLanguageModel, **settings: Any) -> VisionLanguageModel:
    apply_tuning(model, Tune.model_validate({"language": "frozen"} | settings), 0)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            for factor in adapter.parameters():
                factor.normal_(0.0, 0.1, generator=generator)
    return model


def test_weights_come_back_under_their_published_names(tiny: ModelFolder, tmp_path: Path) -> None:
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


def test_pickled_weights_are_the_same_model(
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
    assert (tmp_path / CONVERTED).is_dir()
    model = _loaded(folder)
    assert torch.equal(_hidden(model, batch), _hidden(_loaded(tiny), batch))
    (tmp_path / "saved").mkdir()
    save_model(model, folder, tmp_path / "saved", torch.float32)
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert names == {"config.json", "qwen.tiktoken", "model.safetensors"}


def test_positions_of_the_resampler_are_read_and_never_learn(
    tiny: ModelFolder, tmp_path: Path
) -> None:
    whole = {"vision": "full", "merger": "full", "language": "full", "embeddings": "full"}
    model = _tuned(_loaded(tiny), **whole)
    assert not any("pos_embed" in name for name in trainable(model))
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
def test_a_part_alone_gets_its_gradients(tiny: ModelFolder, batch: PackedBatch, part: str) -> None:
    model = _tuned(_loaded(tiny), **{part: "full"}).train()
    asked = _asked(batch, torch.arange(len(batch.ids_T)))
    label_loss(model(asked), model.head_weight, asked.target_L, torch.tensor(1.0)).backward()
    for name, parameter in model.named_parameters():
        moves = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
        assert moves == (part_of(name) == part), name


def test_the_adapter_of_the_published_script(
    tiny: ModelFolder, batch: PackedBatch, tmp_path: Path
) -> None:
    model = _tuned(_loaded(tiny), language="lora", lora=OFFICIAL)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, model, base=str(tiny.path))
    layer = "base_model.model.transformer.h.{}.{}.lora_{}.weight"
    layers = ("attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2")
    expected = {layer.format(n, name, side) for n in (0, 1) for name in layers for side in "AB"}
    assert load_file(adapter / WEIGHTS).keys() == expected
    hidden_TD = _hidden(model, batch)
    again = _loaded(tiny)
    install_adapter(again, adapter, base=tiny)
    assert torch.equal(_hidden(again, batch), hidden_TD)
    # The published script names the layers as a list.
    config = json.loads((adapter / CONFIG).read_text(encoding="utf-8"))
    named = config | {"target_modules": OFFICIAL["targets"]}
    (adapter / CONFIG).write_text(json.dumps(named), encoding="utf-8")
    other = _loaded(tiny)
    install_adapter(other, adapter, base=tiny)
    assert torch.equal(_hidden(other, batch), hidden_TD)


def test_adapters_of_all_parts_merge_into_the_model(
    tiny: ModelFolder, batch: PackedBatch, tmp_path: Path
) -> None:
    parts = {"vision": "lora", "merger": "lora", "language": "lora", "lora": {"rank": 3}}
    model = _tuned(_loaded(tiny), **parts)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, model, base=str(tiny.path))
    assert "base_model.model.transformer.visual.attn_pool.kv_proj.lora_A.weight" in load_file(
        adapter / WEIGHTS
    )
    hidden_TD = _hidden(model, batch)
    again = _loaded(tiny)
    install_adapter(again, adapter, base=tiny)
    assert torch.equal(_hidden(again, batch), hidden_TD)
    merge_folder(tiny, adapter, tmp_path / "merged")
    merged_TD = _hidden(_loaded(ModelFolder(tmp_path / "merged")), batch)
    assert float((merged_TD - hidden_TD).abs().max()) <= 1e-4 * float(hidden_TD.abs().max())
