"""What layers are said to keep against what autograd really saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import allocated
from bare_kernels import launch_nothing
from small_run import make_task
from torch import Tensor

from finesight.config import DataFile, PixelRange, Tune
from finesight.data.sources import load_sources
from finesight.encode.pack import PackedBatch, pack
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.model.fp8 import Fp8Weight
from finesight.model.frozen import KERNELS
from finesight.model.language import DecoderLayer
from finesight.model.layers import GatedMlp
from finesight.model.linear import GroupedLinear
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning
from finesight.model.rowwise import Fp8Matrix
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.model.weights import load_model
from finesight.plan.activations import Activations
from finesight.plan.kept import Computing, Place
from finesight.plan.layer import of_layer
from finesight.plan.load import Load
from finesight.plan.mlp import of_mlp, passing
from finesight.plan.stack import Stack
from finesight.train.loss import label_loss

CPU = torch.device("cpu")
CARD = Computing(cuda=True, number=2, flash=True)
FAMILIES: tuple[TinyFamily, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen")
LORA = {"rank": 8, "dropout": 0.05}
TUNES: dict[str, dict[str, Any]] = {
    "lora": {"language": "lora", "lora": LORA},
    "lora without dropout": {"language": "lora", "lora": LORA | {"dropout": 0.0}},
    "lora everywhere": {"language": "lora", "vision": "lora", "merger": "lora", "lora": LORA},
    "language": {"language": "full"},
    "merger": {"language": "frozen", "merger": "full"},
    "vision": {"language": "frozen", "vision": "full"},
    "all": {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"},
}
CLOSE = 0.03
"""Runs of one picture are views of what others copy, and a mean in 16 bits is half as wide."""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    for family in FAMILIES:
        make_tiny(folder / family, family)
    return folder


def batch_of(task: Path, family: str) -> PackedBatch:
    rule = None if family == "qwen" else PixelRange(min_pixels=784, max_pixels=7056)
    renderer = Renderer(ModelFolder(task / family), rule)
    corpus = load_sources((DataFile(path=task / "train.jsonl"),))
    return pack([renderer.encode(sample) for sample in corpus.read()[:6]])


def model_of(
    task: Path, family: str, dtype: torch.dtype, tune: dict[str, Any]
) -> VisionLanguageModel:
    model = load_model(ModelFolder(task / family), dtype, CPU).train()
    apply_tuning(model, Tune.model_validate(tune), 0)
    return model


def saved(model: VisionLanguageModel, batch: PackedBatch) -> int:
    """Bytes of the memory behind everything that autograd keeps of a pack, but for the model and
    the pack itself."""
    inputs = (batch.ids_T, batch.positions_3T, batch.bounds_S1, batch.patches_ND)
    inputs += (batch.visual_at_M, batch.predict_L, batch.target_L)
    # Held: weights that are laid elsewhere would make room for what is counted.
    held = [t.untyped_storage() for t in (*model.parameters(), *model.buffers(), *inputs)]
    own = {memory.data_ptr() for memory in held}
    found: dict[int, int] = {}
    alive: list[Tensor] = []

    def count(tensor: Tensor) -> Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            found[memory.data_ptr()] = memory.nbytes()
        # While it lives, no other tensor comes to lie where it does.
        alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        one = torch.tensor(1.0, device=batch.ids_T.device)
        h_LD = model(batch, seed_1=one.int().reshape(1))
        label_loss(h_LD, model.head_weight, batch.target_L, one)
    return sum(found.values())


def angles(model: VisionLanguageModel, batch: PackedBatch, computing: Computing) -> int:
    """Cosines and sines of all tokens, which layers in few kernels hold without autograd's
    knowledge."""
    layers = model.model.layers
    if not (computing.fused and any(isinstance(y, DecoderLayer) and y.fusible for y in layers)):
        return 0
    return 2 * len(batch.ids_T) * model.geometry.language.head_width * computing.number


def told(model: VisionLanguageModel, batch: PackedBatch, dtype: torch.dtype, share: float) -> int:
    computing = Computing(cuda=False, number=dtype.itemsize, flash=False)
    load = Load(batch.lengths, batch.grids, batch.supervised)
    return Activations(model, computing, share).kept(load)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_that_autograd_saves(task: Path, family: str, dtype: torch.dtype) -> None:
    batch = batch_of(task, family)
    for name, tune in TUNES.items():
        for share in (0.0, 0.5):
            model = model_of(task, family, dtype, tune)
            model.recompute = share
            really = saved(model, batch)
            assert told(model, batch, dtype, share) == pytest.approx(really, rel=CLOSE), name


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["down_proj"]])
def test_some_layers_of_a_group_are_adapted(task: Path, targets: list[str]) -> None:
    batch, dtype = batch_of(task, "qwen2_vl"), torch.float32
    tune = {"language": "lora", "lora": LORA | {"targets": targets}}
    model = model_of(task, "qwen2_vl", dtype, tune)
    # But for how many numbers are dropped, which is drawn.
    assert told(model, batch, dtype, 0.0) == pytest.approx(saved(model, batch), rel=0.01)


def test_recomputed_layers_keep_their_input_and_what_all_layers_share(task: Path) -> None:
    batch, dtype = batch_of(task, "qwen2_vl"), torch.float32
    model = model_of(task, "qwen2_vl", dtype, TUNES["lora"])
    model.recompute = 1.0
    # Cosines and sines of all tokens, which the layers hold without autograd's knowledge.
    rotation = 2 * len(batch.ids_T) * model.geometry.language.head_width * 4
    sorting = 2 * len(batch.ids_T) * 8
    expected = saved(model, batch) + rotation + sorting
    assert told(model, batch, dtype, 1.0) == pytest.approx(expected, rel=0.001)


def test_on_a_card_a_layer_keeps_what_its_steps_need(task: Path) -> None:
    model = model_of(task, "qwen2_vl", torch.bfloat16, TUNES["lora"])
    size, tokens = model.geometry.language, 100
    kept = of_layer(model.model.layers[1], True, CARD)
    width, inner = size.width, size.mlp_width
    shared = size.kv_heads * size.head_width
    dropped = 2 + 1
    """Bytes of a dropped-out number: a copy, and a mask of one byte."""
    attention = 2 * width + 4 + dropped * width + 2 * 3 * 8
    attention += 2 * (width + 2 * shared) + 2 * width + 4 * size.heads + dropped * width + 2 * 8
    mlp = 2 * width + 4 + dropped * width + 2 * 2 * 8 + 2 * 2 * inner + dropped * inner + 2 * 8
    assert kept.of_pack(Place((60, 40), tokens, tokens)) == tokens * (attention + mlp)


def test_in_few_kernels_it_keeps_what_they_read_again(task: Path) -> None:
    model = model_of(task, "qwen2_vl", torch.bfloat16, TUNES["lora"])
    size, tokens, labels = model.geometry.language, 100, 30
    layers = Stack.of(model.model.layers, True, CARD, 0.0)
    width, shared = size.width, size.kv_heads * size.head_width
    attention = 2 * width + 4 + 2 * 3 * 8 + 2 * (width + 2 * shared) + 2 * width + 4 * size.heads
    mlp = 2 * width + 4 + 2 * 2 * size.mlp_width + 2 * 4 * 8
    place, last = Place((60, 40), tokens, tokens), Place((60, 40), tokens, labels)
    whole, part = layers.kept([place, last])
    assert whole == tokens * (attention + mlp)
    # Attention's output of those that are labelled, once more.
    assert part == tokens * attention + labels * (mlp + 2 * width)


@pytest.mark.skipif(KERNELS, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("in_fp8", [False, True], ids=["plain", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_makes_what_it_is_said_to(
    task: Path, family: str, in_fp8: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_nothing(monkeypatch)
    batch, model = batch_of(task, family), model_of(task, family, torch.float32, TUNES["lora"])
    if in_fp8:
        groups = [m for m in model.visual.blocks.modules() if isinstance(m, GroupedLinear)]
        for group in groups:
            group.freeze_as(Fp8Matrix, Fp8Weight)
    load = Load(batch.lengths, batch.grids, batch.supervised)
    activations = Activations(model, Computing(cuda=True, number=4, flash=True), 0.0)
    for embeds in (True, False):
        if not embeds:
            # Of so narrow a tower, the embedding of patches is the most.
            x_ND = torch.zeros(load.patches, model.geometry.vision.width)
            monkeypatch.setattr(model.visual.patch_embed, "forward", lambda _, x_ND=x_ND: x_ND)
            monkeypatch.setattr(Activations, "_embedding", lambda *_: 0)
        with torch.no_grad(), allocated() as really:
            model.see(batch.patches_ND, batch.grids)
        if embeds or family != "qwen":
            # Its resampler is so narrow that attention of its queries is the most.
            said = activations.looking(load).in_all
            assert said == pytest.approx(really.most, rel=0.01), f"{family} {embeds}"


@pytest.mark.skipif(KERNELS, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("learns", [True, False])
def test_an_odd_inner_width_has_columns_behind_it(
    learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_nothing(monkeypatch)
    monkeypatch.setattr(Computing, "kernels", True)
    computing, rows, width = Computing(cuda=True, number=4, flash=True), 300, 64
    mlp = GatedMlp(width, 140, bias=True).requires_grad_(learns)
    said = of_mlp(mlp, learns, computing)
    x_TD = torch.zeros(rows, width, requires_grad=learns)
    # The first pass makes what stays.
    mlp(x_TD)
    with torch.set_grad_enabled(learns), allocated() as really:
        y_TD = mlp(x_TD)
    if learns:
        # The caller has the input.
        assert said.copied == 4 * width * 144
        assert said.row * rows + said.copied - x_TD.nbytes == really.left - y_TD.nbytes
    else:
        assert said.stays == mlp.down_proj.weight.untyped_storage().nbytes() - 4 * width * 140
        assert really.most == rows * passing(mlp, width, computing)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_on_a_card_are_those_that_autograd_saves(task: Path, family: str) -> None:
    card, dtype = torch.device("cuda"), torch.bfloat16
    batch = batch_of(task, family)
    computing = Computing(cuda=True, number=2, flash=torch.cuda.get_device_capability() >= (8, 0))
    load = Load(batch.lengths, batch.grids, batch.supervised)
    for name, tune in TUNES.items():
        model = model_of(task, family, dtype, tune).to(card)
        really = saved(model, batch.to(card)) + angles(model, batch, computing)
        expected = Activations(model, computing, 0.0).kept(load)
        assert expected == pytest.approx(really, rel=CLOSE), name


@pytest.mark.skipif(KERNELS, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_bytes_in_few_kernels_are_those_that_autograd_saves(
    task: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_nothing(monkeypatch)
    batch = batch_of(task, family)
    computing = Computing(cuda=True, number=4, flash=True)
    load = Load(batch.lengths, batch.grids, batch.supervised)
    for name in ("lora", "lora without dropout", "language"):
        model = model_of(task, family, torch.float32, TUNES[name])
        really = saved(model, batch) + angles(model, batch, computing)
        assert Activations(model, computing, 0.0).kept(load) == pytest.approx(really, rel=0.01)
