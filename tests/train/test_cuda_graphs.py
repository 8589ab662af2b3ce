"""CUDA graphs of small packs: selection, and equality with eager training."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_graph_fixtures import (
    CPU,
    FULL_FINETUNE,
    LORA,
    LORA_DROPOUT,
    VISION_LORA,
    encode_images,
    encode_samples,
    make_model,
    make_packs,
    pack_shared_prefix,
)
from tiny_model import create_tiny_model
from tiny_task import make_task
from torch import Tensor

from finesight.config import TuneSettings
from finesight.encode.packing import PackedBatch, pack
from finesight.encode.tokenization import EncodedSample
from finesight.model import attention
from finesight.model.trainable import configure_tuning, trainable_parameters
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.train import cuda_graphs, graph_buffers
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.graph_buffers import GraphInputs, GraphShape


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    make_task(folder)
    return folder


WAYS = [
    (LORA, True, 0.0),
    (LORA, True, 1.0),
    (LORA, False, 0.0),
    (LORA, False, 1.0),
    (VISION_LORA, False, 0.0),
    (VISION_LORA, False, 1.0),
    (FULL_FINETUNE, False, 0.0),
]
"""Tuned parts, whether features are cached, and the fraction of checkpointed layers."""


class FailingGraphCache:
    """Graph cache without memory for graphs; its error holds a tensor of the failed pass."""

    def __init__(self, device: torch.device) -> None:
        self.num_requests = 0

    def contains(self, key: int) -> bool:
        return False

    def run(self, key: int, function: Callable[[], Tensor]) -> Tensor:
        self.num_requests += 1
        waiting = torch.zeros(1)
        WAITING.append(weakref.ref(waiting))
        raise torch.OutOfMemoryError("out of memory during capture")


WAITING: list[weakref.ref[Tensor]] = []


class CountingGraphCache:
    """Graph cache that runs eagerly and counts its requests."""

    def __init__(self, device: torch.device) -> None:
        self.num_requests = 0

    def contains(self, key: int) -> bool:
        return False

    def run(self, key: int, function: Callable[[], Tensor]) -> Tensor:
        self.num_requests += 1
        return function()


class FakeGpu:
    """GPU whose events are usually finished, with a setting for free memory."""

    half_free = True
    ahead = 1_000_000
    num_requests = 0

    def query(self) -> bool:
        self.num_requests += 1
        return self.num_requests % self.ahead > 0


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    card = FakeGpu()
    monkeypatch.setattr(cuda_graphs, "is_capturable", lambda model, device: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", CountingGraphCache)
    monkeypatch.setattr(cuda_graphs, "record_event", lambda device: card)
    monkeypatch.setattr(cuda_graphs, "has_half_free", lambda device: card.half_free)
    return card


def make_runner(model: VisionLanguageModel) -> CudaGraphRunner:
    return CudaGraphRunner(model, list(trainable_parameters(model).values()))


def collect_grads(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    """Return the gradients, and clear them."""
    grads = [p.grad.float().clone() for p in parameters if p.grad is not None]
    for parameter in parameters:
        parameter.grad = None
    return grads


def assert_close(
    result: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]
) -> None:
    """Compare losses and gradients."""
    torch.testing.assert_close(result[0], expected[0], rtol=2e-3, atol=2e-3)
    for one, other in zip(result[1], expected[1], strict=True):
        assert float((one - other).norm()) <= 0.05 * float(other.norm()) + 1e-5


def test_larger_packs_are_captured_if_launch_bound(
    folder: Path, monkeypatch: pytest.MonkeyPatch, card: FakeGpu
) -> None:
    """Takes long: larger packs are captured only after many passes."""
    model = make_model(torch.float32, CPU, model_folder=ModelFolder(folder / "tiny")).eval()
    samples = encode_samples(folder, ModelFolder(folder / "tiny"))
    batch, longer = pack(samples[:4]), pack(samples[:12])
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS", len(batch.ids_T))
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS_STARVED", len(longer.ids_T) - 1)
    share = torch.tensor(0.25)

    def count_requests(packs: list[PackedBatch]) -> int:
        passes = make_runner(model)
        # Empty segments of static buffers require a GPU.
        monkeypatch.setattr(passes, "run_static", lambda static_inputs: share)
        found = passes.graphs
        for one in packs:
            passes.forward_backward(one, None, share)
        assert isinstance(found, CountingGraphCache)
        return found.num_requests

    larger = pack(samples[:8])
    assert len(batch.ids_T) < len(larger.ids_T) < len(longer.ids_T)
    several = cuda_graphs.MIN_STARVED_PACKS + cuda_graphs.NUM_WARMUP_PACKS + 2
    assert count_requests([batch] * (cuda_graphs.NUM_WARMUP_PACKS + 2)) == 2
    assert count_requests([larger] * several) == several - cuda_graphs.MIN_STARVED_PACKS
    assert count_requests([longer] * several) == 0, "too large for any card"
    card.half_free = False
    assert count_requests([larger] * several) == 0
    assert count_requests([batch] * (cuda_graphs.NUM_WARMUP_PACKS + 2)) == 2
    card.half_free, card.ahead, card.num_requests = True, cuda_graphs.MIN_STARVED_PACKS, 0
    assert count_requests([larger] * 4 * several) == 0, "not so often in a row"


def test_packs_share_graphs_if_launch_bound(
    folder: Path, monkeypatch: pytest.MonkeyPatch, card: FakeGpu
) -> None:
    model = make_model(torch.float32, CPU).eval()
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", cuda_graphs.MIN_STARVED_PACKS)
    packs = make_packs(encode_samples(folder), monkeypatch) * cuda_graphs.MIN_STARVED_PACKS
    share = torch.tensor(0.25)

    def count_graphs() -> tuple[int, int]:
        passes = make_runner(model)
        monkeypatch.setattr(passes, "run_static", lambda static_inputs: share)
        found = passes.graphs
        for one in packs:
            passes.forward_backward(one, None, share)
        assert isinstance(found, CountingGraphCache)
        return len(packs) - found.num_requests, len(passes.static_inputs)

    assert count_graphs() == (cuda_graphs.MIN_STARVED_PACKS, 1)
    # There may be hundreds of shapes: they are searched for each capture, not for each pack.
    monkeypatch.setattr(GraphShape, "widen", None)
    card.half_free = False
    assert count_graphs() == (2 * cuda_graphs.NUM_WARMUP_PACKS, 2), "each kind has its own"
    card.half_free, card.ahead, card.num_requests = True, 2, 0
    assert count_graphs() == (2 * cuda_graphs.NUM_WARMUP_PACKS, 2), (
        "the card had something left to do"
    )


def test_slow_shared_graphs_are_dropped(
    folder: Path, monkeypatch: pytest.MonkeyPatch, card: FakeGpu
) -> None:
    model = make_model(torch.float32, CPU).eval()
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 100)
    packs = make_packs(encode_samples(folder), monkeypatch)
    larger = max(packs, key=lambda batch: len(batch.ids_T))
    smaller = next(
        one for one in packs if GraphShape.from_batch(one) != GraphShape.from_batch(larger)
    )
    passes, share = make_runner(model), torch.tensor(0.25)
    monkeypatch.setattr(passes, "run_static", lambda static_inputs: share)
    found = passes.graphs
    assert isinstance(found, CountingGraphCache)
    for one in [smaller, larger] * cuda_graphs.MIN_STARVED_PACKS:
        passes.forward_backward(one, None, share)
    assert found.num_requests == cuda_graphs.MIN_STARVED_PACKS, "both kinds, once they were late"
    monkeypatch.setattr(passes.timer, "is_replay_faster", lambda tokens: False)
    for one in [smaller, larger] * 3:
        passes.forward_backward(one, None, share)
    assert found.num_requests == cuda_graphs.MIN_STARVED_PACKS, "it is of neither's own kind"
    monkeypatch.setattr(passes.timer, "is_replay_faster", lambda tokens: True)
    card.ahead, card.num_requests = 1, 0
    for one in [smaller, larger] * 3:
        passes.forward_backward(one, None, share)
    assert found.num_requests == cuda_graphs.MIN_STARVED_PACKS + 6, "however busy the card is"


def test_smallest_fitting_graph_is_used(folder: Path) -> None:
    passes = CudaGraphRunner(make_model(torch.float32, CPU), [torch.nn.Parameter(torch.zeros(1))])
    batch = pack(encode_samples(folder)[:4])
    kind = GraphShape.from_batch(batch)._replace(num_tokens=1024)
    sizes = [kind._replace(num_tokens=1088 + n, num_sequences=16) for n in (8, 0, 16)]
    for size in (*sizes, sizes[1]._replace(num_labels=2 * kind.num_labels)):
        passes.static_inputs[size] = GraphInputs.allocate(size, batch, None, passes.vision_encoder)
    found = passes.find_wider_inputs(kind)
    assert found.shape == sizes[1]


def test_capture_out_of_memory_disables_graphs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "is_capturable", lambda model, device: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", FailingGraphCache)
    model = make_model(torch.float32, CPU).eval()
    learning = list(trainable_parameters(model).values())
    passes, baseline = CudaGraphRunner(model, learning), CudaGraphRunner(model, learning)
    baseline.release_graphs()
    launch = passes.run_eager

    def launched(*inputs: Any) -> Tensor:
        assert [one() for one in WAITING] == [None] * len(WAITING), "memory is not given back yet"
        return launch(*inputs)

    monkeypatch.setattr(passes, "run_eager", launched)
    full = passes.graphs
    batch, share = pack(encode_samples(folder)[:4]), torch.tensor(0.25)
    found = []
    for own in (baseline, *[passes] * (cuda_graphs.NUM_WARMUP_PACKS + 2)):
        loss = own.forward_backward(batch, None, share)
        found.append((loss, collect_grads(learning)))
    assert isinstance(full, FailingGraphCache)
    assert full.num_requests == 1, "single shapes are not captured, and one failure disables graphs"
    assert passes.graphs is None
    (loss, grads), *others = found
    for loss_1, grads_1 in others:
        assert torch.equal(loss, loss_1)
        assert all(torch.equal(one, other) for one, other in zip(grads, grads_1, strict=True))


def test_text_only_packs_give_encoder_no_gradients(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among pictured packs there may be one of texts alone."""
    monkeypatch.setattr(cuda_graphs, "is_capturable", lambda model, device: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", FailingGraphCache)
    tune = TuneSettings.model_validate({"vision": "lora", "language": "frozen"})
    model = make_model(torch.float32, CPU, tune)
    learning = list(trainable_parameters(model).values())
    passes = CudaGraphRunner(model, learning)
    texts = replace(
        pack(encode_samples(folder)[:2]),
        grid_thw=(),
        patches_ND=torch.empty(0, 588, dtype=torch.uint8),
        visual_indices_M=torch.empty(0, dtype=torch.int64),
    )
    for _ in range(cuda_graphs.NUM_WARMUP_PACKS + 2):
        assert passes.forward_backward(texts, None, torch.tensor(1.0)) > 0
    assert all(parameter.grad is None for parameter in learning)
    assert isinstance(passes.graphs, FailingGraphCache)
    assert passes.graphs.num_requests == 0
    passes.forward_backward(pack(encode_samples(folder)[:2]), None, torch.tensor(1.0))
    assert any(parameter.grad is not None for parameter in learning)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_is_equal_in_graph_and_eager(folder: Path) -> None:
    """The vision encoder draws random numbers before the decoder seed."""
    cuda = torch.device("cuda")
    model = make_model(torch.bfloat16, cuda, LORA_DROPOUT)
    batch = pack(encode_samples(folder)[:3]).to(cuda)
    torch.manual_seed(5)
    inside = model(batch)
    torch.manual_seed(5)
    features = model.encode_images(batch.patches_ND, batch.grid_thw)
    torch.testing.assert_close(model(batch, features), inside)


def test_large_trainable_models_are_not_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model(torch.float32, CPU)
    assert cuda_graphs.has_few_trainable_params(model)
    monkeypatch.setattr(cuda_graphs, "MAX_TRAINABLE_PARAMS", 1000)
    assert not cuda_graphs.has_few_trainable_params(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("tune", "known", "checkpointed", "packed", "short"),
    [
        *((*way, pack, 256) for way in WAYS),
        *((*way, pack_shared_prefix, 256) for way in WAYS),
        # With the kernels of long sequences.
        *((*way, pack_shared_prefix, 0) for way in WAYS[:2]),
    ],
)
def test_graph_replay_matches_eager_training(
    folder: Path,
    tune: TuneSettings,
    known: bool,
    checkpointed: float,
    packed: Callable[[Sequence[EncodedSample]], PackedBatch],
    short: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda = torch.device("cuda")
    model = make_model(torch.bfloat16, cuda, tune)
    model.activation_checkpointing = checkpointed
    samples = encode_samples(folder)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 0)
    # So that some take their way by the hooks, and others not.
    monkeypatch.setattr(graph_buffers, "LARGE_PARAM_ELEMENTS", 10_000)
    monkeypatch.setattr(attention, "MAX_TRITON_SEQLEN", short)
    packs = [packed(samples[start : start + 4]).to(cuda) for start in (0, 4, 0, 4, 2, 0)]
    learning = list(trainable_parameters(model).values())
    passes = CudaGraphRunner(model, learning)

    def train_all(most: int) -> list[tuple[Tensor, list[Tensor]]]:
        monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS", most)
        results = []
        for number, batch in enumerate(packs):
            torch.manual_seed(number)
            features = encode_images(model, batch) if known else None
            share = torch.tensor(1.0 / batch.num_supervised_tokens, device=cuda)
            loss = passes.forward_backward(batch, features, share)
            results.append((loss, collect_grads(learning)))
        return results

    launched, first, again = train_all(0), train_all(6144), train_all(6144)
    assert passes.graphs is not None, "capture failed"
    assert len(passes.graphs), "nothing was captured"
    for eager, replayed, (loss, grads) in zip(launched, first, again, strict=True):
        assert_close(replayed, eager)
        # From the same seed, a replay gives the same bits.
        assert torch.equal(loss, replayed[0])
        assert all(torch.equal(one, other) for one, other in zip(grads, replayed[1], strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("prefix_length", [0, 70])
def test_graphs_of_linear_attention_match_eager_training(
    tmp_path: Path, prefix_length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs of several lengths in one graph, with and without a shared prefix."""
    cuda = torch.device("cuda")
    model = load_model(
        ModelFolder(create_tiny_model(tmp_path / "tiny", "qwen3_5")), torch.bfloat16, cuda
    )
    configure_tuning(model, TuneSettings.model_validate({"lora": {"rank": 8, "dropout": 0.0}}), 0)
    for name, parameter in trainable_parameters(model).items():
        if ".adapter.lora_B" in name:
            parameter.data.normal_(0, 0.1)
    model.train()
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 0)
    packs = [
        make_text_pack(lengths, prefix_length, seed).to(cuda)
        for seed, lengths in enumerate([(80, 65, 1, 130), (64, 100, 90, 20), (80, 65, 1, 130)])
    ]
    learning = list(trainable_parameters(model).values())
    passes = CudaGraphRunner(model, learning)

    def train_all(max_tokens: int) -> list[tuple[Tensor, list[Tensor]]]:
        monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS", max_tokens)
        results = []
        for batch in packs:
            share = torch.tensor(1.0 / batch.num_supervised_tokens, device=cuda)
            loss = passes.forward_backward(batch, None, share)
            results.append((loss, collect_grads(learning)))
        return results

    eager, first, again = train_all(0), train_all(6144), train_all(6144)
    assert passes.graphs is not None, "capture failed"
    assert len(passes.graphs), "nothing was captured"
    for expected, warm_up, replayed in zip(eager, first, again, strict=True):
        assert_close(warm_up, expected)
        assert_close(replayed, expected)


def make_text_pack(lengths: Sequence[int], prefix_length: int, seed: int) -> PackedBatch:
    """Create a pack of random tokens; each predicts the next one of its sequence."""
    generator = np.random.default_rng(seed)
    lengths = (prefix_length, *lengths) if prefix_length else tuple(lengths)
    starts = np.cumsum([0, *lengths])
    ids_T = torch.from_numpy(generator.integers(0, 90, sum(lengths)))
    positions_T = torch.cat([torch.arange(length) for length in lengths])
    if prefix_length:
        positions_T[prefix_length:] += prefix_length
    has_label_T = torch.ones(sum(lengths), dtype=torch.bool)
    has_label_T[torch.from_numpy(starts[1:] - 1)] = False
    logit_indices_L = has_label_T.nonzero().squeeze(1)
    return PackedBatch(
        sample_ids=tuple(map(str, range(len(lengths)))),
        lengths=lengths,
        grid_thw=(),
        ids_T=ids_T,
        position_ids_3T=positions_T.expand(3, -1),
        cu_seqlens_S1=torch.from_numpy(starts.astype(np.int32)),
        patches_ND=torch.empty(0, 1536, dtype=torch.uint8),
        visual_indices_M=torch.empty(0, dtype=torch.int64),
        logit_indices_L=logit_indices_L,
        labels_L=ids_T[logit_indices_L + 1],
        prefix_length=prefix_length,
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_shared_graph_matches_eager_training(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    model = make_model(torch.bfloat16, cuda, VISION_LORA)
    packs = [one.to(cuda) for one in make_packs(encode_samples(folder), monkeypatch)]
    learning = list(trainable_parameters(model).values())
    passes = CudaGraphRunner(model, learning)
    monkeypatch.setattr(cuda_graphs, "MIN_STARVED_PACKS", 0)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 100)
    monkeypatch.setattr(graph_buffers, "MAX_GRAPH_PATCHES", 0)
    # Of so few tokens a replay always is the sooner one; but a test hangs on no clock.
    monkeypatch.setattr(passes.timer, "is_replay_faster", lambda tokens: True)
    # Simulate that each shape has occurred, and none was captured.
    passes.shape_counts.update(GraphShape.from_batch(one) for one in packs)

    def train_all(most: int) -> list[tuple[Tensor, list[Tensor]]]:
        monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS_STARVED", most)
        results = []
        for batch in [*packs, *reversed(packs), *packs]:
            torch.manual_seed(len(batch.ids_T))
            share = torch.tensor(1.0 / batch.num_supervised_tokens, device=cuda)
            loss = passes.forward_backward(batch, None, share)
            results.append((loss, collect_grads(learning)))
        return results

    launched, shared = train_all(0), train_all(6144)
    assert passes.graphs is not None, "capture failed"
    assert len(passes.graphs) == len(passes.static_inputs) == 1
    for eager, replayed in zip(launched, shared, strict=True):
        assert_close(replayed, eager)
