"""GPTQ weights: dequantized values, matmuls and complete models."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from engine_fixtures import compute_logits, pack_mixed_questions
from gptq_fixtures import (
    GPTQ_CONFIGS,
    GptqConfig,
    change_config,
    change_tensor,
    pack_weight,
    read_index,
    write_quantized_model,
)
from hf_reference import max_relative_error
from lora_fixtures import merge_to_folder
from safetensors.torch import load_file
from tiny_model import TinyFamily, create_tiny_model
from torch import Tensor

from finesight.errors import UserError
from finesight.model.linear import FusedLinear
from finesight.model.quant import base
from finesight.model.quant.base import PackedInput, find_quantized_weights, pack_inputs
from finesight.model.quant.int4 import DEFAULT_GROUP_SIZE, Int4Matrix, RtnInt4Matrix
from finesight.model.weights_io import DTYPES, load_model, save_model, stored_precision
from finesight.model_folder import ModelFolder

CPU = torch.device("cpu")
TYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(40, 64), (8, 128), (24, 96), (16, 200)]
RTN_SHAPES = [(40, 64), (8, 256), (24, 96), (5, 200), (3, 2)]
FAMILIES: list[TinyFamily] = ["qwen", "qwen2_vl", "qwen2_5_vl"]


def random_values(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_matrix(tensors: dict[str, Tensor], shape: tuple[int, int], way: GptqConfig) -> Int4Matrix:
    group = shape[1] if way.group == -1 else way.group
    matrix = Int4Matrix(*shape, group_size=group, where="a test")
    for name, values in tensors.items():
        matrix.load_tensor(name, values)
    return matrix


@pytest.mark.parametrize("way", GPTQ_CONFIGS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("at_once", [base.CHUNK_ELEMENTS, 300])
def test_dequantize_matches_reference(shape, way, at_once, monkeypatch):
    """Includes a smaller last group."""
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", at_once)
    tensors, expected = pack_weight(random_values(shape), way)
    matrix = make_matrix(tensors, shape, way)
    for dtype in TYPES:
        assert torch.equal(matrix.dequantize(dtype), expected.to(dtype))


def quantize(values: Tensor) -> RtnInt4Matrix:
    matrix = RtnInt4Matrix(*values.shape)
    matrix.quantize(values)
    return matrix


@pytest.mark.parametrize("shape", RTN_SHAPES)
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.4, 3.0])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e3])
@pytest.mark.parametrize("at_once", [base.CHUNK_ELEMENTS, 300])
def test_quantization_error_is_at_most_half_a_scale(shape, shift, size, at_once, monkeypatch):
    """Includes groups with one sign, a smaller last group, and zeros, which stay zero."""
    monkeypatch.setattr(base, "CHUNK_ELEMENTS", at_once)
    values = (random_values(shape) + shift) * size
    values[:, ::3] = 0
    matrix = quantize(values)
    found = matrix.dequantize(torch.float32)
    scales_OI = matrix.scales_OG.float().repeat_interleave(DEFAULT_GROUP_SIZE, 1)[:, : shape[1]]
    # An fp16 scale is off by 2^-11, 15 codes by 15 times that.
    assert bool(((found - values).abs() <= scales_OI * (0.5 + 15 * 2**-11)).all())
    assert not found[:, ::3].any()


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-6])
def test_tiny_values_have_small_error(size):
    values = random_values((4, 128)) * size
    found = quantize(values).dequantize(torch.float32)
    assert bool(found.isfinite().all())
    assert float((found - values).abs().max()) <= 2**-24 * 16


@pytest.fixture(scope="module", params=FAMILIES)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    if request.param == "qwen":
        pytest.importorskip("tiktoken")
    folder = tmp_path_factory.mktemp(request.param)
    return ModelFolder(create_tiny_model(folder / "tiny", request.param))


@pytest.mark.parametrize("config", GPTQ_CONFIGS)
def test_model_matches_dequantized_bit_exactly(source, config, tmp_path):
    """Every linear layer of the decoder is quantized, and no other. Other parts can use NF4."""
    four, dense = write_quantized_model(source, tmp_path, config)
    assert stored_precision(four) == stored_precision(dense) == "fp32"
    batch = pack_mixed_questions(source, tmp_path)
    for dtype in TYPES[:2]:
        found = load_model(four, dtype, CPU)
        groups = {n for n, m in found.named_modules() if isinstance(m, FusedLinear)}
        expected = {f"{name}.weight" for name in groups if name.startswith("model.layers.")}
        assert set(find_quantized_weights(found)) == expected
        assert torch.equal(
            compute_logits(found, batch), compute_logits(load_model(dense, dtype, CPU), batch)
        )
    if config == GPTQ_CONFIGS[0]:
        models = [load_model(folder, torch.float32, CPU, ("vision",)) for folder in (four, dense)]
        assert torch.equal(*(compute_logits(model, batch) for model in models))


def test_saved_weights_match_published(source, tmp_path):
    """The 4-bit weights remain those of the base next to trained parts."""
    four, _ = write_quantized_model(source, tmp_path, GptqConfig(act_order=True))
    model = load_model(four, torch.float32, CPU)
    again = tmp_path / "again"
    again.mkdir()
    save_model(model, four, again, torch.float32, max_shard_bytes=100_000)
    copy = load_model(ModelFolder(again), torch.float32, CPU)
    found, expected = copy.state_dict(), model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert ModelFolder(again).config["quantization_config"] == GptqConfig(act_order=True).config


@pytest.mark.parametrize(
    "changes",
    [
        {"bits": 8},
        {"bits": 3},
        {"quant_method": "awq"},
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"checkpoint_format": "gptq_v2"},
        {"group_size": 0},
        {"group_size": None},
    ],
    ids=str,
)
def test_other_quantization_settings_are_rejected(changes, tmp_path):
    source = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    change_config(source, quantization_config=GptqConfig().config | changes)
    named = f"{next(iter(changes))}': {next(iter(changes.values()))!r}"
    for read in (lambda f: load_model(f, torch.float32, CPU), stored_precision):
        with pytest.raises(UserError, match=re.escape(named)) as refused:
            read(ModelFolder(source.path))
        assert "four bits by GPTQ" in refused.value.expected


INT32 = torch.int32


@pytest.mark.parametrize(
    ("ending", "tensor", "message"),
    [
        ("qzeros", None, r"missing: .*\.qzeros"),
        ("scales", None, r"missing: .*\.scales"),
        ("g_idx", None, r"missing: .*\.g_idx"),
        ("qweight", None, r"unknown to this model: .*g_idx"),
        ("qweight", torch.zeros(3, 8, dtype=INT32), r"of another shape: .*\.qweight \(3, 8\)"),
        ("qzeros", torch.zeros(1, 8, dtype=INT32), r"of another shape: .*\.qzeros \(1, 8\)"),
        ("down_proj.bias", torch.ones(64, dtype=torch.float16), r"of layers without a bias: .*"),
        ("g_idx", torch.zeros(128, dtype=INT32), "group sizes in g_idx of a layer differ from 32"),
    ],
    ids=str,
)
def test_damaged_weights_are_rejected(ending, tensor, message, tmp_path):
    tiny = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    four, _ = write_quantized_model(tiny, tmp_path, GptqConfig(act_order=True))
    change_tensor(four, ending, tensor)
    with pytest.raises(UserError, match=message):
        load_model(four, torch.float32, CPU)


def test_fused_layers_must_share_quantization(tmp_path):
    tiny = ModelFolder(create_tiny_model(tmp_path / "tiny"))
    four, dense = write_quantized_model(tiny, tmp_path, GptqConfig())
    weights = load_file(dense.path / "model.safetensors")
    name = next(name for name in weights if name.endswith("up_proj.weight"))
    for ending in ("qweight", "qzeros", "scales", "g_idx"):
        change_tensor(four, name.removesuffix("weight") + ending, None)
    change_tensor(four, "model.norm.weight", weights["model.norm.weight"], {name: weights[name]})
    message = r"of the fused layers .*up_proj, .*gate_proj are quantized"
    with pytest.raises(UserError, match=message):
        load_model(four, torch.float32, CPU)


@pytest.mark.parametrize("precision", ["auto", "fp32"])
def test_dequantized_export_is_the_dense_model(source, precision, tmp_path):
    config = GptqConfig(act_order=True, symmetric=False)
    four, dense = write_quantized_model(source, tmp_path, config)
    merged = merge_to_folder(four, None, tmp_path / "merged", precision)
    layers = sum(name.endswith("qweight") for name in read_index(four))
    assert (merged.merged_layers, merged.dequantized_layers) == (0, layers)
    assert "quantization_config" not in ModelFolder(merged.folder).config
    found, expected = (
        load_file(folder / "model.safetensors") for folder in (merged.folder, dense.path)
    )
    dtype = DTYPES[merged.precision]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name].to(dtype)) for name in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("rows", [1, 3, 8, 9, 200])
@pytest.mark.parametrize(
    "way", [GptqConfig(), GptqConfig(64, True, False), GptqConfig(128)], ids=str
)
@pytest.mark.parametrize("shape", [(512, 1024), (40, 768), (96, 320)])
def test_gpu_products_match_dequantized(dtype, rows, way, shape):
    tensors, dense = pack_weight(random_values(shape), way)
    matrix = make_matrix(tensors, shape, way).cuda()
    assert torch.equal(matrix.dequantize(dtype).cpu(), dense.to(dtype))
    bias = random_values((shape[0],), dtype, seed=4).cuda()
    for given in (None, bias):
        x = random_values((rows, shape[1]), dtype, seed=2).cuda().requires_grad_()
        y = matrix(x, given)
        expected = x.detach().double() @ dense.cuda().double().T
        expected = expected if given is None else expected + given.double()
        bound = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert max_relative_error(y.detach().double(), expected) < bound
        y.float().square().sum().backward()
        back = (2 * y.detach()).double() @ dense.cuda().double()
        assert x.grad is not None
        assert max_relative_error(x.grad.double(), back) < bound


@pytest.mark.parametrize(
    "order", [None, *([(n + 1) % 8 for n in range(8)], [7, 6, 5, 4, 3, 2, 1, 0])]
)
@pytest.mark.parametrize("count", [1, 3])
def test_each_matrix_uses_its_input_permutation(order, count):
    """Only matrices without permuted columns share their input."""
    x_1I, packed = torch.arange(8.0).unsqueeze(0), []

    def pack_input(x_1I: Tensor, _: None, order: list[int] | None = None) -> PackedInput:
        packed.append(order)
        return PackedInput(x_1I if order is None else x_1I[:, order], None)

    orders = [None] * (count - 1) + [order]
    matrices = [
        SimpleNamespace(is_unpermuted=one is None, pack_input=partial(pack_input, order=one))
        for one in orders
    ]
    for one, words in zip(orders, pack_inputs(matrices, x_1I, None), strict=True):
        assert torch.equal(words.values_8N, x_1I if one is None else x_1I[:, one])
    assert len(packed) == (1 if order is None else count)
