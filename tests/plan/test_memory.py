"""What stays and what comes and goes, against what a step really allocates on a CPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocations import allocated
from bare_kernels import launch_nothing
from small_run import make_task

from finesight.config import DataFile, PixelRange, Train, Tune
from finesight.data.sources import load_sources
from finesight.encode.pack import PackedBatch, beginning_of, pack
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.model.frozen import KERNELS
from finesight.model.lora import stacked
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import apply_tuning, trainable
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model
from finesight.plan.activations import Activations
from finesight.plan.gradients import Come
from finesight.plan.kept import Computing
from finesight.plan.load import Load
from finesight.plan.memory import CONTEXT, LIBRARIES, PROCESS, Standing, peak_of, standing
from finesight.plan.model import shapes
from finesight.train.loss import label_loss
from finesight.train.optimizer import Masters

CPU = torch.device("cpu")
LORA = {"language": "lora", "lora": {"rank": 8, "dropout": 0.05}}
ALL_BUT_VISION = {"language": "full", "embeddings": "full"}
ALL = ALL_BUT_VISION | {"vision": "full", "merger": "full"}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("task")
    make_task(folder)
    make_tiny(folder / "deep", "qwen2_vl", size="finesight-tiny")
    return folder


def batch_of(task: Path, *, once: bool = False) -> PackedBatch:
    """What all samples begin with is laid `once`, or as often."""
    renderer = Renderer(ModelFolder(task / "deep"), PixelRange(min_pixels=784, max_pixels=7056))
    corpus = load_sources((DataFile(path=task / "train.jsonl"),))
    samples = [renderer.encode(sample) for sample in corpus.read()]
    return pack(samples, beginning=beginning_of([one.outline for one in samples]) if once else 0)


def tuned(task: Path, dtype: torch.dtype, tune: dict[str, Any]) -> VisionLanguageModel:
    model = load_model(ModelFolder(task / "deep"), dtype, CPU).train()
    apply_tuning(model, Tune.model_validate(tune), 0)
    return model


def learned_from(model: VisionLanguageModel, batch: PackedBatch) -> None:
    """The batch forwards and backwards, as a run does it."""
    h_LD = model(batch, seed_1=torch.ones(1, dtype=torch.int32))
    loss = label_loss(h_LD, model.head_weight, batch.target_L, torch.tensor(1.0))
    loss.backward()  # type: ignore[no-untyped-call]


class InFewKernels(Computing):
    """A card, in wider numbers than are computed with there."""

    kernels = True


def fullest(
    task: Path,
    batch: PackedBatch,
    computing: Computing,
    tune: dict[str, Any],
    share: float,
) -> tuple[int, int]:
    """Most bytes that this pack, forwards and backwards, is said to have beside what was there
    before, and those that it has, its gradients among them."""
    model = tuned(task, torch.float32 if computing.number == 4 else torch.bfloat16, tune)
    model.recompute = share
    learned_from(model, batch)
    model.zero_grad(set_to_none=True)
    with allocated() as really:
        learned_from(model, batch)
    load = Load(batch.lengths, batch.grids, batch.supervised, batch.beginning)
    activations = Activations(model, computing, share)
    moments = activations.moments(load, activations.come())
    return max(moment.in_all for moment in moments), really.most


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("once", [False, True])
def test_the_fullest_moment_of_a_pack_is_within_an_eighth(
    task: Path, once: bool, dtype: torch.dtype, tune: dict[str, Any], share: float
) -> None:
    computing = Computing(cuda=False, number=dtype.itemsize, flash=False)
    said, really = fullest(task, batch_of(task, once=once), computing, tune, share)
    assert said == pytest.approx(really, rel=0.125)


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
def test_so_it_is_where_scores_of_a_long_sequence_are_the_most(
    task: Path, tune: dict[str, Any], share: float
) -> None:
    batch = batch_of(task)
    tokens = sum(batch.lengths)
    bounds_S1 = torch.tensor([0, tokens], dtype=torch.int32)
    long = replace(batch, lengths=(tokens,), bounds_S1=bounds_S1)
    computing = Computing(cuda=False, number=2, flash=False)
    said, really = fullest(task, long, computing, tune, share)
    # What oneDNN lays anew on each thread is counted roughly.
    assert said == pytest.approx(really, rel=0.06)


@pytest.mark.skipif(KERNELS, reason="where Triton is, kernels are launched")
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("tune", [LORA, ALL_BUT_VISION], ids=["lora", "all but vision"])
@pytest.mark.parametrize("once", [False, True])
def test_so_it_is_in_few_kernels(
    task: Path, once: bool, tune: dict[str, Any], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    launch_nothing(monkeypatch)
    computing = InFewKernels(cuda=True, number=4, flash=True)
    said, really = fullest(task, batch_of(task, once=once), computing, tune, share)
    assert said == pytest.approx(really, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("tune", [LORA, ALL], ids=["lora", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_stays_is_what_a_run_has(
    task: Path, dtype: torch.dtype, tune: dict[str, Any], optimizer: str
) -> None:
    train = Train.model_validate({"optimizer": optimizer})
    bare = shapes(ModelFolder(task / "deep"), dtype, (), ())
    apply_tuning(bare, Tune.model_validate(tune), 0)
    said = standing(bare, train, Computing(cuda=False, number=dtype.itemsize, flash=False))
    model = tuned(task, dtype, tune)
    masters = Masters(trainable(model), train, stacked(model))
    assert said.weights == sum(p.nbytes for p in model.parameters())
    groups = masters.groups
    wide = dtype == torch.float32
    numbers = sum(len(group.masters) for group in groups)
    assert said.numbers == pytest.approx(numbers, rel=0.01)
    assert said.masters == (0 if wide else 2 * said.numbers)
    learned_from(model, batch_of(task))
    came = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    masters.add_up()
    sums = sum(g.nbytes for group in groups for g in group.gradients.of_each() if g is not None)
    # Large gradients go into sums that are there already, and leave nothing behind.
    come = Come.of(bare, said.taken[False])
    assert come.at_end == came
    assert said.always + said.sums == pytest.approx(sums, rel=0.05)
    moments = masters.moments()
    kept = sum(tensor.nbytes for name, tensor in moments.items() if name != "steps")
    assert said.moments == pytest.approx(kept, rel=0.01)


def test_parts_add_up_and_a_run_does_not_see_all(task: Path) -> None:
    model = tuned(task, torch.bfloat16, LORA)
    sizes = {"weights": 10, "masters": 20, "always": 30, "sums": 7, "moments": 40, "stepping": 5}
    stays = Standing(numbers=3, **sizes)
    computing = Computing(cuda=True, number=2, flash=True)
    activations = Activations(model, computing, 0.0)
    none = stays, activations, [], computing, 4
    no_pack = peak_of(*none, several=False)
    parts = 105 + activations.stays + sum(p.nbytes for p in trainable(model).values())
    assert no_pack.in_all == parts + LIBRARIES + CONTEXT
    assert no_pack.allocated == parts + LIBRARIES
    assert peak_of(*none, several=True).in_all == no_pack.in_all + 7
    computing = Computing(cuda=False, number=2, flash=False)
    no_pack = peak_of(stays, Activations(model, computing, 0.0), [], computing, 4, several=False)
    assert no_pack.allocated == no_pack.in_all == parts - activations.stays + PROCESS
