"""The model of another family computes what transformers says it does, or is refused."""

from __future__ import annotations

from pathlib import Path

import borrowed
import pytest
import torch
from safetensors.torch import load_file, save_file

from finesight.config import Tune
from finesight.encode.pack import PackedBatch, pack
from finesight.encode.rendering import renderer_of
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.model.adapter import install_adapter, write_adapter
from finesight.model.any_family import load_any
from finesight.model.fallback import FallbackModel, load_fallback
from finesight.model.lora import adapters
from finesight.model.parts import apply_tuning, part_of, trainable
from finesight.train.loss import label_loss

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return borrowed.llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture
def model(folder: Path) -> FallbackModel:
    found = load_any(ModelFolder(folder), torch.float32, CPU)
    assert isinstance(found, FallbackModel)
    return found


@pytest.fixture
def batch(folder: Path, tmp_path: Path) -> PackedBatch:
    located = borrowed.sample(tmp_path, ("Which?", "red and blue"), ("Sure?", "yes"), pictures=2)
    return pack([renderer_of(ModelFolder(folder)).encode(located)])


def test_loss_and_gradients_are_those_of_transformers(
    model: FallbackModel, folder: Path, batch: PackedBatch
) -> None:
    from transformers import AutoModelForImageTextToText

    theirs = AutoModelForImageTextToText.from_pretrained(folder)
    labels = torch.full_like(batch.ids_T, -100)
    labels[batch.predict_L + 1] = batch.target_L
    expected = theirs(**model.inputs_of(batch), labels=labels[None]).loss
    share = torch.tensor(1 / batch.supervised)
    loss = label_loss(model(batch), model.head_weight, batch.target_L, share)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    gradients = {name.removeprefix("inner."): p.grad for name, p in model.named_parameters()}
    for name, parameter in theirs.named_parameters():
        # The tower ends before a norm of its own that LLaVA does not use.
        assert (parameter.grad is None) == (gradients[name] is None)
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_every_part_learns_as_it_is_told(model: FallbackModel) -> None:
    parts = {part_of(name) for name, _ in model.named_parameters()}
    assert parts == {"vision", "merger", "language", "embeddings"}
    apply_tuning(model, Tune(vision="lora", merger="full", language="frozen"), seed=0)
    learning = list(trainable(model))
    assert {part_of(name) for name in learning} == {"vision", "merger"}
    assert all(".adapter." in name for name in learning if part_of(name) == "vision")


def test_an_adapter_comes_back_from_its_files(
    model: FallbackModel, folder: Path, batch: PackedBatch, tmp_path: Path
) -> None:
    apply_tuning(model, Tune(vision="lora", merger="lora", language="lora"), seed=0)
    model.eval()
    with torch.no_grad():
        for _, _, adapter in adapters(model):
            for parameter in adapter.parameters():
                parameter.normal_(0.0, 0.1)
        expected = model(batch)
        (tmp_path / "adapter").mkdir()
        write_adapter(tmp_path / "adapter", model, base=str(folder))
        again = load_fallback(ModelFolder(folder), torch.float32, CPU)
        plain = again(batch)
        install_adapter(again, tmp_path / "adapter", base=ModelFolder(folder))
        assert torch.equal(again(batch), expected)
    assert not torch.allclose(plain, expected, atol=1e-2)


def test_logits_that_are_more_than_the_head_are_refused(
    model: FallbackModel, batch: PackedBatch
) -> None:
    model.inner.lm_head.register_forward_hook(lambda _, __, logits: 9 * torch.tanh(logits / 9))
    with pytest.raises(UserError, match="logits of llava differ"):
        model(batch)


def test_parameters_of_no_known_part_are_refused(model: FallbackModel) -> None:
    model.inner.model.audio_tower = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"model\.audio_tower\.weight belongs to no part"):
        apply_tuning(model, Tune(), seed=0)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.visual.blocks.0.attn.qkv.weight", "vision"),
        ("model.visual.merger.mlp.0.weight", "merger"),
        ("model.language_model.layers.3.linear_attn.in_proj_qkv.weight", "language"),
        ("model.language_model.embed_tokens.weight", "embeddings"),
        ("lm_head.weight", "embeddings"),
        ("model.connector.modality_projection.proj.weight", "merger"),
        ("model.text_model.norm.weight", "language"),
        ("model.vision_model.encoder.layers.0.layer_norm1.bias", "vision"),
        ("language_model.model.layers.0.mlp.up_proj.weight", "language"),
        ("model.image_newline", "merger"),
    ],
)
def test_parts_are_known_by_the_names_of_transformers(name: str, part: str) -> None:
    assert part_of(f"inner.{name}") == part


@pytest.mark.parametrize("how", ["missing", "another shape"])
def test_tensors_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, how: str) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    if how == "missing":
        del tensors[name]
    else:
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors are missing or of another shape.*up_proj"):
        load_fallback(ModelFolder(tmp_path), torch.float32, CPU)


def test_pickled_weights_are_converted_and_damage_is_found(
    model: FallbackModel, folder: Path, batch: PackedBatch, tmp_path: Path
) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    again = load_fallback(ModelFolder(tmp_path), torch.float32, CPU)
    assert torch.equal(again(batch), model(batch))
    (converted,) = ModelFolder(tmp_path).weight_files()
    content = bytearray(converted.read_bytes())
    content[-1] ^= 1
    converted.write_bytes(content)
    with pytest.raises(UserError, match="has changed since it was written"):
        load_fallback(ModelFolder(tmp_path), torch.float32, CPU)
