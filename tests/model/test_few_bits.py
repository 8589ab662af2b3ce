"""A model in few bits from the same folder: which layers, what it answers, and what is refused."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch
from asking import mixed_questions
from gptq import Way, publish, with_a_head
from oracle import distance
from torch import Tensor

from finesight.config import Eval, Tune, Weights
from finesight.data.jsonl import Located, read_samples
from finesight.encode.pack import PackedBatch, pack
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.evaluate.evaluate import evaluate
from finesight.hub import TINY, ModelFolder
from finesight.infer.load import load_answerer
from finesight.model import frozen, nf4
from finesight.model.adapter import write_adapter
from finesight.model.any_family import load_any
from finesight.model.few_bits import KINDS
from finesight.model.frozen import ROWS, TILE_ROWS, FrozenMatrix, frozen_weights
from finesight.model.linear import GroupedLinear
from finesight.model.lora import adapters
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning, part_of
from finesight.model.tiny import TinyFamily, make_tiny
from finesight.model.weights import hub_tensors, load_model
from finesight.synth.tasks import Task
from finesight.synth.writing import write_task

CPU = torch.device("cpu")
FEW: list[Weights] = [kind for kind in get_args(Weights) if kind != "auto"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES: list[TinyFamily] = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen"]
SIGNS, SAMPLES = Task("street", "built-in"), 24
ROOT = Path(__file__).parents[2]


def test_every_kind_that_may_be_named_is_there() -> None:
    assert set(KINDS) == set(FEW)


def tiny(folder: Path, family: TinyFamily = "qwen2_5_vl", head: bool = False) -> ModelFolder:
    if family == "qwen":
        pytest.importorskip("tiktoken")
    made = ModelFolder(make_tiny(folder / family, family))
    if not head:
        return made
    (folder / family / "sha256.json").unlink(missing_ok=True)
    return with_a_head(made)


def questions(folder: ModelFolder, tmp_path: Path) -> PackedBatch:
    renderer = Renderer(folder)
    batch = pack([renderer.prompt(question) for question in mixed_questions(tmp_path)])
    every_T = torch.arange(len(batch.ids_T))
    return dataclasses.replace(batch, predict_L=every_T, target_L=batch.ids_T)


@torch.no_grad()
def logits(model: VisionLanguageModel, batch: PackedBatch) -> Tensor:
    return model.eval().logits(model(batch))


def thawed(model: VisionLanguageModel) -> VisionLanguageModel:
    for module in model.modules():
        if isinstance(module, GroupedLinear):
            module.thaw()
    return model.requires_grad_(False)


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_decoder_and_nothing_else_is_quantised(
    kind: Weights, family: TinyFamily, tmp_path: Path
) -> None:
    model = load_model(tiny(tmp_path, family), torch.float32, CPU, (), kind)
    few = frozen_weights(model)
    linear = {
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, GroupedLinear)
    }
    assert {name for name in linear if part_of(name) == "language"} <= few.keys()
    parts = {part_of(name) for name in few}
    assert parts == {"language"} | ({"embeddings"} if model.lm_head is not None else set())
    kept = {type(matrix) for weight in few.values() for matrix in weight.matrices}
    assert kept == {KINDS[kind]}


@pytest.mark.parametrize("kind", FEW)
def test_a_head_of_its_own_is_quantised_and_a_table_is_not(kind: Weights, tmp_path: Path) -> None:
    own = load_model(tiny(tmp_path, head=True), torch.float32, CPU, (), kind)
    assert "lm_head.weight" in frozen_weights(own)
    tied = load_model(tiny(tmp_path / "tied"), torch.float32, CPU, (), kind)
    assert {part_of(name) for name in frozen_weights(tied)} == {"language"}


@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("dtype", TYPES[:2], ids=str)
def test_logits_are_those_of_the_dense_numbers(
    kind: Weights, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = tiny(tmp_path, head=True)
    batch = questions(folder, tmp_path)
    model = load_model(folder, dtype, CPU, (), kind)
    found = logits(model, batch)
    assert torch.equal(found, logits(thawed(model), batch))


@pytest.mark.parametrize("kind", FEW)
def test_weights_named_go_before_those_of_a_run(kind: Weights, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    model = load_model(folder, torch.float32, CPU, ("vision", "merger", "language"), kind)
    parts = {part_of(name) for name in frozen_weights(model)}
    assert parts == {"language"}


@pytest.mark.parametrize("kind", FEW)
def test_an_adapter_goes_on_top_unmerged(kind: Weights, tmp_path: Path) -> None:
    folder = tiny(tmp_path)
    batch = questions(folder, tmp_path)
    trained = load_model(folder, torch.float32, CPU)
    apply_tuning(trained, Tune.model_validate({"lora": {"rank": 2}}), 0)
    with torch.no_grad():
        for _, _, adapter in adapters(trained):
            for factor in adapter.parameters():
                factor.fill_(0.05)
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", trained, base=str(folder.path))
    answerer = load_answerer(str(tmp_path / "adapter"), "cpu", "fp32", kind)
    assert isinstance(answerer.model, VisionLanguageModel)
    assert frozen_weights(answerer.model)
    found = logits(answerer.model, batch)
    assert torch.equal(found, logits(thawed(answerer.model), batch))
    plain = load_answerer(str(folder.path), "cpu", "fp32", kind).model
    assert isinstance(plain, VisionLanguageModel)
    assert distance(found, logits(plain, batch)) > 0.01


@pytest.mark.parametrize("kind", FEW)
def test_loading_never_holds_a_matrix_in_a_wider_type(
    kind: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what is published in full, a few outputs at a time are made anew."""
    from test_qlora import Largest

    from finesight.model import int4

    for module in (frozen, int4):
        monkeypatch.setattr(module, "AT_ONCE", 64)
    # On a CPU bitsandbytes compares every number with all 16 values at once.
    monkeypatch.setattr(nf4, "AT_ONCE", 64)
    folder = tiny(tmp_path)
    with Largest() as seen:
        model = load_model(folder, torch.bfloat16, CPU, (), kind)
    assert seen.most <= max(t.numbers for t in hub_tensors(model))


@pytest.mark.parametrize("kind", FEW)
def test_what_cannot_be_quantised_is_refused(kind: Weights, tmp_path: Path) -> None:
    experts = ModelFolder(make_tiny(tmp_path / "experts", "qwen3_vl_moe"))
    with pytest.raises(UserError, match=rf"in {kind}, and this model has experts") as refused:
        load_model(experts, torch.float32, CPU, (), kind)
    assert refused.value.where == "--weights"
    four, _ = publish(tiny(tmp_path), tmp_path, Way())
    with pytest.raises(UserError, match="is in four bits by GPTQ already"):
        load_model(four, torch.float32, CPU, (), kind)


def test_a_family_of_transformers_stays_as_published(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(
        UserError, match="weights in int8 of a model of the family llava"
    ) as refused:
        load_any(ModelFolder(tmp_path), torch.float32, CPU, (), "int8")
    assert refused.value.where == "--weights"


def test_kernels_as_triton_interprets_them(tmp_path: Path) -> None:
    """Every kind, cut in every way that is measured, against the matrix in full; on a CPU."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "few_bits.py", tmp_path / "found.json"],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    if "only 0-dimensional arrays" in done.stdout:
        pytest.skip("this Triton interprets nothing with this NumPy")
    lines = json.loads((tmp_path / "found.json").read_text())["lines"]
    assert {line["kind"] for line in lines} == set(FEW)
    assert not [line for line in lines if "failed" in line or line["error"] > 1e-3]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> list[Located]:
    """Words among clutter, in fonts that the package's own model has not seen."""
    file = write_task(tmp_path_factory.mktemp("drawn") / "street", SIGNS, SAMPLES, 7, "find")
    return [Located(sample, file.parent) for sample in read_samples(file)]


def accuracy(drawn: list[Located], kind: Weights) -> float:
    settings = Eval.model_validate({"metric": "grounding", "max_new_tokens": 40, "batch": SAMPLES})
    answerer = load_answerer(TINY, "cpu", "fp32", kind)
    return evaluate(answerer.model, answerer.renderer, drawn, settings).scores["accuracy_at_0.5"]


@pytest.fixture(scope="module")
def usual(drawn: list[Located]) -> float:
    return accuracy(drawn, "auto")


@pytest.mark.parametrize("kind", FEW)
def test_the_own_model_finds_words_as_well(
    kind: Weights, drawn: list[Located], usual: float
) -> None:
    """But for two of them."""
    assert usual > 0.8
    assert abs(accuracy(drawn, kind) - usual) <= 2 / SAMPLES + 1e-9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 2, ROWS, ROWS + 1, 40, TILE_ROWS, TILE_ROWS + 1])
@pytest.mark.parametrize("shape", [(512, 1024), (40, 768), (97, 384), (24, 200)], ids=str)
def test_products_on_a_card_are_those_of_the_dense_numbers(
    kind: str, dtype: torch.dtype, rows: int, shape: tuple[int, int]
) -> None:
    """Also where a kernel has parts of its blocks to leave out, and where there is none."""
    generator = torch.Generator().manual_seed(0)
    matrix: FrozenMatrix = KINDS[kind](*shape).cuda()
    (piece,) = matrix.pieces()
    piece.fill(torch.randn(shape, generator=generator).bfloat16())
    dense = matrix.dense(torch.float32).double()
    for bias in (None, torch.randn(shape[0], generator=generator).to("cuda", dtype)):
        x = torch.randn(rows, shape[1], generator=generator).to("cuda", dtype).requires_grad_()
        y = matrix(x, bias)
        expected = x.detach().double() @ dense.T + (0 if bias is None else bias.double())
        bound = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert distance(y.detach().double(), expected) < bound
        y.float().square().sum().backward()
        assert x.grad is not None
        assert distance(x.grad.double(), (2 * y.detach()).double() @ dense) < bound


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("kind", FEW)
@pytest.mark.parametrize("rows", [1, 5, TILE_ROWS])
def test_a_recorded_product_is_the_same(kind: str, rows: int) -> None:
    """And makes no matrix in full."""
    shape = (1024, 2048)
    matrix: FrozenMatrix = KINDS[kind](*shape).cuda()
    (piece,) = matrix.pieces()
    piece.fill(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(rows, shape[1], device="cuda", dtype=torch.bfloat16)
    expected = matrix(x, None)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    matrix(x, None)
    assert torch.cuda.max_memory_allocated() - before <= shape[0] * shape[1] // 4
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = matrix(x, None)
    graph.replay()
    assert torch.equal(found, expected)
