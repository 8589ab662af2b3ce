"""Four bits as GPTQ publishes them: the numbers, products and models that they stand for."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import mixed_questions
from gptq import WAYS, Way, change_config, change_tensor, index_of, packed, publish
from oracle import distance
from safetensors.torch import load_file
from torch import Tensor

from finesight.config import Precision, Tune
from finesight.encode.pack import PackedBatch, pack
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.model import int4
from finesight.model.adapter import install_adapter, write_adapter
from finesight.model.frozen import frozen_weights
from finesight.model.int4 import Int4Matrix
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup, LowRank, adapters
from finesight.model.merge import merge_folder
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.model.weights import DTYPES, load_model, save_model, stored_precision

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(40, 64), (8, 128), (24, 96), (16, 200)]
FAMILIES: list[TinyFamily] = ["qwen", "qwen2_vl", "qwen2_5_vl"]

on_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def numbers(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(tensors: dict[str, Tensor], shape: tuple[int, int], way: Way) -> Int4Matrix:
    group = shape[1] if way.group == -1 else way.group
    matrix = Int4Matrix(*shape, group=group, where="a test")
    for name, values in tensors.items():
        matrix.take(name, values)
    return matrix


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("at_once", [int4.AT_ONCE, 300])
def test_dense_is_what_the_bits_stand_for(
    shape: tuple[int, int], way: Way, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last group is smaller than the others."""
    monkeypatch.setattr(int4, "AT_ONCE", at_once)
    tensors, expected = packed(numbers(shape), way)
    matrix = filled(tensors, shape, way)
    for dtype in TYPES:
        assert torch.equal(matrix.dense(dtype), expected.to(dtype))


def test_a_number_takes_about_four_bits() -> None:
    shape = (256, 1024)
    way = Way(group=128, act_order=True)
    matrix = filled(packed(numbers(shape), way)[0], shape, way)
    taken = sum(buffer.nbytes for buffer in matrix.buffers())
    # 24 bits of scale and zero for 128 numbers, and where each column belongs.
    assert 8 * taken / matrix.numbers == pytest.approx(4 + 24 / 128 + 32 / 256)
    assert not matrix._taken


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_outputs_and_gradients_are_those_of_the_dense_numbers(
    dtype: torch.dtype, adapted: bool
) -> None:
    way = Way(act_order=True, symmetric=False)
    widths, results = {"q": 40, "k": 16}, []
    for dense in (False, True):
        group = GroupedLinear(64, widths, bias=True).to(dtype).requires_grad_(False)
        assert group.bias is not None
        group.bias.copy_(numbers((56,), seed=7))
        group.freeze_as(partial(Int4Matrix, group=32, where="a test"))
        for seed, matrix in enumerate(frozen_weights(group)["weight"].matrices):
            pieces, _ = packed(numbers((matrix.outputs, 64), seed=seed), way, seed)
            for piece in matrix.pieces():
                piece.fill(pieces[piece.name])
        if dense:
            group.thaw()
            group.requires_grad_(False)
        if adapted:
            group.adapter = LoraGroup(group, dict.fromkeys(widths, LowRank(3, 8.0)), 0.0)
            for seed, factor in enumerate(group.adapter.parameters()):
                factor.data.copy_(numbers(tuple(factor.shape), seed=10 + seed))
        x = numbers((5, 64), dtype, seed=3).requires_grad_()
        outputs = group(x)
        torch.stack([(y.float() ** 2).sum() for y in outputs]).sum().backward()
        learned = [p.grad for p in group.parameters() if p.requires_grad]
        results.append([*(y.detach() for y in outputs), x.grad, *learned])
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    if request.param == "qwen":
        pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    return ModelFolder(make_tiny(folder / "tiny", request.param))


def questions(folder: ModelFolder, tmp_path: Path) -> PackedBatch:
    renderer = Renderer(folder)
    batch = pack([renderer.encode(question) for question in mixed_questions(tmp_path)])
    every_T = torch.arange(len(batch.ids_T))
    return dataclasses.replace(batch, predict_L=every_T, target_L=batch.ids_T)


@torch.no_grad()
def logits(model: VisionLanguageModel, batch: PackedBatch) -> Tensor:
    return model.logits(model.eval()(batch))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_model_computes_as_with_the_dense_numbers_to_the_last_bit(
    source: ModelFolder, way: Way, tmp_path: Path
) -> None:
    four, dense = publish(source, tmp_path, way)
    batch = questions(source, tmp_path)
    for dtype in TYPES[:2]:
        found = load_model(four, dtype, CPU)
        assert all(name.startswith("model.layers.") for name in frozen_weights(found))
        assert torch.equal(logits(found, batch), logits(load_model(dense, dtype, CPU), batch))
    # Every linear layer of the decoder, and nothing else.
    groups = {n for n, m in found.named_modules() if isinstance(m, GroupedLinear)}
    expected = {f"{name}.weight" for name in groups if name.startswith("model.layers.")}
    assert set(frozen_weights(found)) == expected


def tuned(model: VisionLanguageModel, **settings: Any) -> VisionLanguageModel:
    apply_tuning(model, Tune.model_validate({"language": "frozen"} | settings), 0)
    return model


def test_what_is_saved_is_as_published(source: ModelFolder, tmp_path: Path) -> None:
    """Beside an adapter, a part that learned in full: the four bits stay those of the base."""
    four, _ = publish(source, tmp_path, Way(act_order=True))
    model = load_model(four, torch.float32, CPU)
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, four, again, torch.float32, max_shard_bytes=100_000)
    copy = load_model(ModelFolder(again), torch.float32, CPU)
    found, expected = copy.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ModelFolder(again).config["quantization_config"] == Way(act_order=True).config


def test_weights_in_four_bits_are_not_trained_in_full(source: ModelFolder, tmp_path: Path) -> None:
    four, _ = publish(source, tmp_path, Way())
    with pytest.raises(UserError, match="language is full, and the model has its weights in four"):
        tuned(load_model(four, torch.float32, CPU), language="full")
    model = tuned(load_model(four, torch.float32, CPU), language="lora", merger="full")
    batch = questions(source, tmp_path)
    model.train()(batch).square().sum().backward()
    reached = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()]
    assert any(".adapter." in name for name in reached)
    assert any(name.startswith("visual.merger.") for name in reached)


def test_other_parts_may_be_in_nf4_beside(source: ModelFolder, tmp_path: Path) -> None:
    four, dense = publish(source, tmp_path, Way())
    batch = questions(source, tmp_path)
    models = [load_model(folder, torch.float32, CPU, ("vision",)) for folder in (four, dense)]
    assert torch.equal(*(logits(model, batch) for model in models))
    with pytest.raises(UserError, match="is in four bits by GPTQ already"):
        load_model(four, torch.float32, CPU, ("language",))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bits": 8}, r"'bits': 8"),
        ({"bits": 3}, r"'bits': 3"),
        ({"bits": 2}, r"'bits': 2"),
        ({"quant_method": "awq"}, r"'quant_method': 'awq'"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, r"bitsandbytes"),
        ({"checkpoint_format": "gptq_v2"}, r"'checkpoint_format': 'gptq_v2'"),
        ({"group_size": 0}, r"'group_size': 0"),
        ({"group_size": None}, r"'group_size': None"),
    ],
    ids=str,
)
def test_what_is_quantised_otherwise_is_refused(
    changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    source = ModelFolder(make_tiny(tmp_path / "tiny"))
    change_config(source, quantization_config=Way().config | changes)
    for read in (lambda f: load_model(f, torch.float32, CPU), stored_precision):
        with pytest.raises(UserError, match=told) as refused:
            read(ModelFolder(source.path))
        assert "four bits by GPTQ" in refused.value.expected
        assert "without quantisation" in refused.value.remedy


@pytest.mark.parametrize(
    ("ending", "tensor", "told"),
    [
        ("qzeros", None, r"missing: .*\.qzeros"),
        ("scales", None, r"missing: .*\.scales"),
        ("g_idx", None, r"missing: .*\.g_idx"),
        ("qweight", None, r"unknown to this model: .*g_idx"),
        (
            "qweight",
            torch.zeros(3, 8, dtype=torch.int32),
            r"of another shape: .*\.qweight \(3, 8\)",
        ),
        ("qzeros", torch.zeros(1, 8, dtype=torch.int32), r"of another shape: .*\.qzeros \(1, 8\)"),
        ("down_proj.bias", torch.ones(64, dtype=torch.float16), r"of layers without a bias: .*"),
    ],
    ids=str,
)
def test_damaged_weights_are_refused(
    ending: str, tensor: Tensor | None, told: str, tmp_path: Path
) -> None:
    four, _ = publish(ModelFolder(make_tiny(tmp_path / "tiny")), tmp_path, Way())
    change_tensor(four, ending, tensor)
    with pytest.raises(UserError, match=told):
        load_model(four, torch.float32, CPU)


def test_layers_of_one_input_are_quantised_alike(tmp_path: Path) -> None:
    four, dense = publish(ModelFolder(make_tiny(tmp_path / "tiny")), tmp_path, Way())
    weights = load_file(dense.path / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    for ending in ("qweight", "qzeros", "scales", "g_idx"):
        change_tensor(four, name.removesuffix("weight") + ending, None)
    change_tensor(four, "model.norm.weight", weights["model.norm.weight"], {name: weights[name]})
    with pytest.raises(UserError, match=r"of the layers .*up_proj, .*gate_proj are quantised"):
        load_model(four, torch.float32, CPU)


def test_groups_of_another_size_are_refused(tmp_path: Path) -> None:
    four, _ = publish(ModelFolder(make_tiny(tmp_path / "tiny")), tmp_path, Way(act_order=True))
    change_tensor(four, "g_idx", torch.zeros(128, dtype=torch.int32))
    with pytest.raises(UserError, match=r"g_idx of a layer has groups of other sizes than 32"):
        load_model(four, torch.float32, CPU)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_written_in_full_it_is_the_dense_model(
    source: ModelFolder, precision: Precision, tmp_path: Path
) -> None:
    four, dense = publish(source, tmp_path, Way(act_order=True, symmetric=False))
    merged = merge_folder(four, None, tmp_path / "merged", precision)
    layers = sum(name.endswith("qweight") for name in index_of(four))
    assert (merged.layers, merged.thawed) == (0, layers)
    folder = ModelFolder(merged.folder)
    assert "quantization_config" not in folder.config
    (found,), (expected,) = (
        [load_file(path) for path in one.weight_files()] for one in (folder, dense)
    )
    dtype = DTYPES[merged.precision]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)
    assert not frozen_weights(load_model(folder, torch.float32, CPU))


def test_an_adapter_is_merged_into_what_the_bits_stand_for(
    source: ModelFolder, tmp_path: Path
) -> None:
    four, _ = publish(source, tmp_path, Way())
    batch = questions(source, tmp_path)
    model = tuned(load_model(four, torch.float32, CPU), language="lora", lora={"rank": 2})
    with torch.no_grad():
        for _, _, group_adapter in adapters(model):
            for factor in group_adapter.parameters():
                factor.copy_(numbers(tuple(factor.shape)) / 10)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    write_adapter(adapter, model, base=str(four.path), base_fingerprint=four.fingerprint())
    again = load_model(four, torch.float32, CPU)
    install_adapter(again, adapter, base=four)
    assert torch.equal(logits(again, batch), logits(model, batch))
    merged = merge_folder(four, adapter, tmp_path / "merged", "fp32")
    assert merged.layers == merged.thawed
    found = logits(load_model(ModelFolder(merged.folder), torch.float32, CPU), batch)
    assert distance(found, logits(model, batch)) <= 1e-5


def test_the_stored_precision_is_that_of_what_is_not_quantised(
    source: ModelFolder, tmp_path: Path
) -> None:
    four, dense = publish(source, tmp_path, Way())
    assert stored_precision(four) == stored_precision(dense) == "fp32"


@on_card
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 200])
@pytest.mark.parametrize("way", [Way(), Way(64, True, False), Way(128)], ids=str)
@pytest.mark.parametrize("shape", [(512, 1024), (40, 768), (96, 320)], ids=str)
def test_products_on_a_card_are_those_of_the_dense_numbers(
    dtype: torch.dtype, rows: int, way: Way, shape: tuple[int, int]
) -> None:
    tensors, dense = packed(numbers(shape), way)
    matrix = filled(tensors, shape, way).cuda()
    assert torch.equal(matrix.dense(dtype).cpu(), dense.to(dtype))
    bias = numbers((shape[0],), dtype, seed=4).cuda()
    for given in (None, bias):
        x = numbers((rows, shape[1]), dtype, seed=2).cuda().requires_grad_()
        y = matrix(x, given)
        expected = x.detach().double() @ dense.cuda().double().T
        expected = expected if given is None else expected + given.double()
        bound = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert distance(y.detach().double(), expected) < bound
        y.float().square().sum().backward()
        back = (2 * y.detach()).double() @ dense.cuda().double()
        assert x.grad is not None
        assert distance(x.grad.double(), back) < bound
