"""CUDA graphs of small packs: selection, timing, and equality with eager training."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_graph_fixtures import (
    CPU,
    FULL_FINETUNE,
    LORA,
    VISION_LORA,
    EagerGraphCache,
    collect_grads,
    encode_images,
    encode_samples,
    make_model,
    make_runner,
    make_text_pack,
    pack_shared_prefix,
    run_pack,
)
from tiny_model import create_tiny_model
from tiny_task import make_task
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import pack
from finesight.encode.tokenization import EncodedSample
from finesight.model import attention
from finesight.model.vlm import VisionLanguageModel
from finesight.model_folder import ModelFolder
from finesight.settings.config import TuneSettings
from finesight.train import cuda_graphs, graph_buffers
from finesight.train.cuda_graphs import MIN_STARVED_PACKS, CudaGraphRunner, GraphTimer
from finesight.train.graph_buffers import GraphShape

GraphStep = tuple[Tensor, list[Tensor | None]]
"""Loss and gradients of a pack."""
WEIGHT = torch.tensor(0.25)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("graphs")
    make_task(folder)
    return folder


def make_packs(
    samples: Sequence[EncodedSample], monkeypatch: pytest.MonkeyPatch
) -> list[PackedBatch]:
    """Make small packs that share a CUDA graph, but differ in size by more than an eighth."""
    monkeypatch.setattr(graph_buffers, "MAX_PADDING_DIVISOR", 2)
    packs = [pack(samples[:4]), pack(samples[2:8]), pack(samples[4:8]), pack(samples[1:7])]
    shapes = [GraphShape.from_batch(one) for one in packs]
    assert len({*shapes}) == 2
    assert all(shapes[0].widen(shapes).fits(shape) for shape in shapes)
    return packs


class FakeGpu:
    """GPU with a setting for free memory, whose events are finished except each `ahead`th one."""

    half_free = True
    ahead = 1_000_000
    num_queries = 0

    def query(self) -> bool:
        self.num_queries += 1
        return self.num_queries % self.ahead > 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    gpu = FakeGpu()
    monkeypatch.setattr(cuda_graphs, "is_capturable", lambda model, device: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", EagerGraphCache)
    monkeypatch.setattr(cuda_graphs, "record_event", lambda device: gpu)
    monkeypatch.setattr(cuda_graphs, "has_half_free", lambda device: gpu.half_free)
    # Empty segments of static buffers require a GPU.
    monkeypatch.setattr(CudaGraphRunner, "run_static", lambda *_: WEIGHT)
    return gpu


def run_packs(runner: CudaGraphRunner, packs: Sequence[PackedBatch]) -> int:
    before = len(runner.graphs.keys)
    for batch in packs:
        run_pack(runner, batch, None, WEIGHT)
    return len(runner.graphs.keys) - before


def test_larger_packs_are_captured_if_launch_bound(folder, monkeypatch, gpu):
    """Takes long: larger packs are captured only after many passes."""
    model_folder = ModelFolder(folder / "tiny")
    model = make_model(torch.float32, CPU, model_folder=model_folder).eval()
    samples = encode_samples(folder, model_folder)
    small, larger, longest = (pack(samples[:count]) for count in (4, 8, 12))
    assert len(small.ids_T) < len(larger.ids_T) < len(longest.ids_T)
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS", len(small.ids_T))
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS_STARVED", len(longest.ids_T) - 1)
    several = MIN_STARVED_PACKS + cuda_graphs.NUM_WARMUP_PACKS + 2
    few = cuda_graphs.NUM_WARMUP_PACKS + 2
    assert run_packs(make_runner(model), [small] * few) == 2
    assert run_packs(make_runner(model), [larger] * several) == several - MIN_STARVED_PACKS
    assert run_packs(make_runner(model), [longest] * several) == 0, "too large for any card"
    gpu.half_free = False
    assert run_packs(make_runner(model), [larger] * several) == 0
    assert run_packs(make_runner(model), [small] * few) == 2
    gpu.half_free, gpu.ahead, gpu.num_queries = True, MIN_STARVED_PACKS, 0
    assert run_packs(make_runner(model), [larger] * 4 * several) == 0, "not so often in a row"


class FailingGraphCache(EagerGraphCache):
    """Graph cache without memory for graphs; its error holds a tensor of the failed pass."""

    leaked: weakref.ref[Tensor] | None = None

    def run(self, key: int, function: Callable[[], Tensor]) -> Tensor:
        self.keys.append(key)
        tensor = torch.zeros(1)
        FailingGraphCache.leaked = weakref.ref(tensor)
        raise torch.OutOfMemoryError("out of memory during capture")


def test_capture_out_of_memory_disables_graphs(folder, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "is_capturable", lambda model, device: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", FailingGraphCache)
    model = make_model(torch.float32, CPU).eval()
    runner, baseline = make_runner(model), make_runner(model)
    baseline.release_graphs()
    cache = runner.graphs

    def check_release(*_: Any) -> None:
        leaked = FailingGraphCache.leaked
        assert leaked is None or leaked() is None, "the memory of the capture is not freed"

    model.register_forward_pre_hook(check_release)
    batch = pack(encode_samples(folder)[:4])
    found = []
    for own in (baseline, *[runner] * (cuda_graphs.NUM_WARMUP_PACKS + 2)):
        found.append((run_pack(own, batch, None, WEIGHT), collect_grads(model)))
    assert len(cache.keys) == 1, "single shapes are not captured, one failure disables graphs"
    assert runner.graphs is None
    for (loss, grads), (other_loss, other_grads) in pairwise(found):
        assert torch.equal(loss, other_loss)
        assert all(torch.equal(one, other) for one, other in zip(grads, other_grads, strict=True))


def test_text_only_packs_give_encoder_no_gradients(folder, monkeypatch):
    """A batch with images may have a pack of texts only."""
    monkeypatch.setattr(cuda_graphs, "is_capturable", lambda model, device: True)
    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", FailingGraphCache)
    tune = TuneSettings.model_validate({"vision": "lora", "language": "frozen"})
    model = make_model(torch.float32, CPU, tune)
    runner, batch = make_runner(model), pack(encode_samples(folder)[:2])
    patches, indices = batch.patches_ND[:0], batch.visual_indices_M[:0]
    texts = replace(batch, grid_thw=(), patches_ND=patches, visual_indices_M=indices)
    for _ in range(cuda_graphs.NUM_WARMUP_PACKS + 2):
        assert run_pack(runner, texts, None, WEIGHT) > 0
    assert all(grad is None for grad in collect_grads(model))
    assert runner.graphs.keys == []
    run_pack(runner, batch, None, WEIGHT)
    assert any(grad is not None for grad in collect_grads(model))


class FakeEvent:
    clock, is_finished = 0.0, False

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = FakeEvent.clock

    def query(self) -> bool:
        return FakeEvent.is_finished

    def elapsed_time(self, other: "FakeEvent") -> float:
        return 1000 * (other.at - self.at)


@pytest.fixture
def timer(monkeypatch: pytest.MonkeyPatch) -> GraphTimer:
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    FakeEvent.clock, FakeEvent.is_finished = 0.0, False
    return GraphTimer()


def replay(timer: GraphTimer, tokens: int, seconds: float) -> None:
    with timer.time_replay(tokens):
        FakeEvent.clock += seconds


def test_fastest_launch_and_replay_are_compared(timer):
    """The time of a replay is known after the GPU finishes."""
    replay(timer, 1000, 0.06)
    for seconds in (3.0, 0.05, 0.2):
        assert timer.is_replay_faster(1000) is None
        timer.record_launch(seconds)
    assert timer.is_replay_faster(1000) is None
    replay(timer, 1000, 9.0)  # before the first one has finished
    FakeEvent.is_finished = True
    assert timer.is_replay_faster(1000) is False
    replay(timer, 2000, 0.04)
    assert [timer.is_replay_faster(tokens) for tokens in (1000, 2400, 2600)] == [True, True, False]
    replay(timer, 1000, 0.06)
    assert timer.is_replay_faster(1000) is True


def test_launches_and_replays_are_timed(folder, monkeypatch, gpu, timer):
    class ReplayingGraphCache(EagerGraphCache):
        def contains(self, key: int) -> bool:
            return len(self.keys) > 1

        def run(self, key: int, function: Callable[[], Tensor]) -> Tensor:
            FakeEvent.clock += 1.0
            return super().run(key, function)

    monkeypatch.setattr(cuda_graphs, "CudaGraphCache", ReplayingGraphCache)
    FakeEvent.is_finished = True
    batch = pack(encode_samples(folder)[:4])
    runner = make_runner(make_model(torch.float32, CPU).eval())
    run_packs(runner, [batch] * (cuda_graphs.NUM_WARMUP_PACKS + 2))
    assert runner.timer.is_replay_faster(1) is None, "eager launches and captures are no replays"
    run_packs(runner, [batch])
    tokens = GraphShape.from_batch(batch).num_tokens
    assert runner.timer.is_replay_faster(100 * tokens) is False
    assert runner.timer.replay_s_per_token == 1 / tokens
    assert 0 < runner.timer.launch_s < 100
    runner.warm_up(batch)
    assert runner.timer.is_replay_faster(tokens) is None


@pytest.mark.gpu
def test_dropout_is_equal_in_graph_and_eager(folder):
    """The vision encoder draws random numbers before the decoder seed."""
    cuda = torch.device("cuda")
    tune = VISION_LORA.model_copy(update={"lora": LORA.lora})
    model = make_model(torch.bfloat16, cuda, tune)
    batch = pack(encode_samples(folder)[:3]).to(cuda)
    torch.manual_seed(5)
    inside = model(batch)
    torch.manual_seed(5)
    features = model.encode_images(batch.patches_ND, batch.grid_thw)
    torch.testing.assert_close(model(batch, features), inside)


def train_packs(
    model: VisionLanguageModel,
    runner: CudaGraphRunner,
    packs: Sequence[PackedBatch],
    has_cache: bool = False,
) -> list[GraphStep]:
    results = []
    for number, batch in enumerate(packs):
        torch.manual_seed(number)
        features = encode_images(model, batch) if has_cache else None
        weight = torch.tensor(1.0 / batch.num_supervised_tokens, device="cuda")
        loss = run_pack(runner, batch, features, weight)
        results.append((loss, collect_grads(model)))
    return results


def assert_close(result: GraphStep, expected: GraphStep) -> None:
    torch.testing.assert_close(result[0], expected[0], rtol=2e-3, atol=2e-3)
    for one, other in zip(result[1], expected[1], strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert float((one - other).norm()) <= 0.05 * float(other.norm()) + 1e-5


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


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tune", "has_cache", "checkpointed", "packed", "max_triton_seqlen"),
    [
        *((*way, pack, 256) for way in WAYS),
        *((*way, pack_shared_prefix, 256) for way in WAYS),
        # With the kernels of long sequences.
        *((*way, pack_shared_prefix, 0) for way in WAYS[:2]),
    ],
)
def test_graph_replay_matches_eager_training(
    folder, tune, has_cache, checkpointed, packed, max_triton_seqlen, monkeypatch
):
    cuda = torch.device("cuda")
    model = make_model(torch.bfloat16, cuda, tune)
    model.activation_checkpointing = checkpointed
    samples = encode_samples(folder)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 0)
    # Some parameters are large, others are not.
    monkeypatch.setattr(graph_buffers, "LARGE_PARAM_ELEMENTS", 10_000)
    monkeypatch.setattr(attention, "MAX_TRITON_SEQLEN", max_triton_seqlen)
    packs = [packed(samples[start : start + 4]).to(cuda) for start in (0, 4, 0, 4, 2, 0)]
    runner, results = make_runner(model), []
    for max_tokens in (0, 6144, 6144):
        monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS", max_tokens)
        results.append(train_packs(model, runner, packs, has_cache))
    assert runner.graphs is not None, "capture failed"
    assert len(runner.graphs), "nothing was captured"
    for eager, replayed, (loss, grads) in zip(*results, strict=True):
        assert_close(replayed, eager)
        # From the same seed, a replay gives the same bits.
        assert torch.equal(loss, replayed[0])
        for one, other in zip(grads, replayed[1], strict=True):
            assert one is other is None or torch.equal(one, other)


@pytest.mark.gpu
@pytest.mark.parametrize("prefix_length", [0, 70])
def test_graphs_of_linear_attention_match_eager_training(tmp_path, prefix_length, monkeypatch):
    """Packs of several lengths in one graph, with and without a shared prefix."""
    cuda = torch.device("cuda")
    tune = TuneSettings.model_validate({"lora": {"rank": 8, "dropout": 0.0}})
    model_folder = ModelFolder(create_tiny_model(tmp_path / "tiny", "qwen3_5"))
    model = make_model(torch.bfloat16, cuda, tune, model_folder)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 0)
    lengths = [(80, 65, 1, 130), (64, 100, 90, 20), (80, 65, 1, 130)]
    packs = [make_text_pack(one, prefix_length, seed).to(cuda) for seed, one in enumerate(lengths)]
    runner, results = make_runner(model), []
    for max_tokens in (0, 6144, 6144):
        monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS", max_tokens)
        results.append(train_packs(model, runner, packs))
    assert runner.graphs is not None, "capture failed"
    assert len(runner.graphs), "nothing was captured"
    for expected, warm_up, replayed in zip(*results, strict=True):
        assert_close(warm_up, expected)
        assert_close(replayed, expected)


@pytest.mark.gpu
def test_shared_graph_matches_eager_training(folder, monkeypatch):
    cuda = torch.device("cuda")
    model = make_model(torch.bfloat16, cuda, VISION_LORA)
    packs = [one.to(cuda) for one in make_packs(encode_samples(folder), monkeypatch)]
    runner, results = make_runner(model), []
    monkeypatch.setattr(cuda_graphs, "MIN_STARVED_PACKS", 0)
    monkeypatch.setattr(cuda_graphs, "NUM_WARMUP_PACKS", 100)
    monkeypatch.setattr(graph_buffers, "MAX_GRAPH_PATCHES", 0)
    # A replay of so few tokens is always faster; but the test must not depend on the clock.
    monkeypatch.setattr(runner.timer, "is_replay_faster", lambda tokens: True)
    # Simulate that each shape has occurred, and none was captured.
    runner.shape_counts.update(GraphShape.from_batch(one) for one in packs)
    for max_tokens in (0, 6144):
        monkeypatch.setattr(cuda_graphs, "MAX_GRAPH_TOKENS_STARVED", max_tokens)
        results.append(train_packs(model, runner, [*packs, *reversed(packs), *packs]))
    assert runner.graphs is not None, "capture failed"
    assert len(runner.graphs) == len(runner.static_inputs) == 1
    for eager, replayed in zip(*results, strict=True):
        assert_close(replayed, eager)
