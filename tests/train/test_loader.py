"""Steps and their packs: the same for any number of workers, damaged pictures counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from small_run import make_task
from torch import Tensor

from finesight.config import DataFile, LongestSide, PixelRange
from finesight.data.headers import DamagedPicture
from finesight.data.sources import Corpus, load_sources
from finesight.encode.pack import PackedBatch
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.train.course import InOrder
from finesight.train.loader import Block, Form, Parcel, Step, StepData, read_steps
from finesight.train.workers import WorkerDied

RULE = PixelRange(min_pixels=784, max_pixels=7056)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_task(tmp_path)
    return tmp_path


def steps_of(
    folder: Path,
    unusable: Literal["drop", "refuse"] = "drop",
    budget: int = 100,
    rule: PixelRange | LongestSide = RULE,
) -> StepData:
    corpus: Corpus = load_sources((DataFile(path=folder / "train.jsonl"),))
    renderer = Renderer(ModelFolder(folder / "tiny"), rule)
    return StepData(corpus, renderer, InOrder(range(len(corpus)), 4), budget, unusable)


def numbers(batch: PackedBatch) -> list[object]:
    """All that a pack holds, its tensors as nested lists."""
    tensors = (
        *(batch.ids_T, batch.positions_3T, batch.bounds_S1, batch.patches_ND),
        *(batch.visual_at_M, batch.predict_L, batch.target_L),
    )
    held = [(str(tensor.dtype), tuple(tensor.shape), tensor.tolist()) for tensor in tensors]
    return [batch.sample_ids, batch.lengths, batch.grids, held]


def contents(steps: Sequence[Step]) -> list[object]:
    return [(step.number, step.dropped, *map(numbers, step.packs)) for step in steps]


def test_same_packs_for_any_number_of_workers(folder: Path) -> None:
    data = steps_of(folder)
    direct = contents([data.step(number) for number in range(len(data))])
    assert len(direct) == 3
    for workers in (0, 1, 2):
        assert contents(list(read_steps(data, 0, workers, pin=False))) == direct
        assert contents(list(read_steps(data, 1, workers, pin=False))) == direct[1:]


def test_every_sample_once_and_within_the_budget(folder: Path) -> None:
    steps = list(read_steps(steps_of(folder), 0, 0, pin=False))
    assert [step.samples for step in steps] == [4, 4, 3]
    names = [name for step in steps for batch in step.packs for name in batch.sample_ids]
    assert sorted(names) == sorted(f"train{i}" for i in range(11))
    assert all(sum(batch.lengths) <= 100 for step in steps for batch in step.packs)
    assert sum(step.tokens for step in steps) == sum(
        len(batch.ids_T) for step in steps for batch in step.packs
    )


def test_a_budget_counts_needed_tokens_alone(folder: Path) -> None:
    (whole,) = steps_of(folder, budget=10_000).step(0).packs
    needed = sum(whole.lengths)
    assert len(steps_of(folder, budget=needed).step(0).packs) == 1
    assert len(steps_of(folder, budget=needed - 1).step(0).packs) == 2


def test_what_a_step_begins_with_is_laid_once_in_each_pack(folder: Path) -> None:
    alone = [*read_steps(steps_of(folder), 0, 0, pin=False)]
    steps = [*read_steps(replace(steps_of(folder), branched=True), 0, 0, pin=False)]
    for step, other in zip(steps, alone, strict=True):
        assert sorted(sum(step.members, ())) == sorted(sum(other.members, ()))
        assert (step.samples, step.supervised) == (other.samples, other.supervised)
        assert step.tokens == other.tokens, "of samples, whatever they share"
        assert {batch.beginning for batch in step.packs if batch.samples > 1} == {15}
        assert {batch.beginning for batch in step.packs if batch.samples == 1} <= {0}
        assert all(len(batch.ids_T) <= 100 for batch in step.packs)
        assert sum(len(batch.ids_T) for batch in step.packs) < step.tokens


def test_parcel_gives_back_what_was_put_in_as_views_of_two_blocks(folder: Path) -> None:
    step, patches = steps_of(folder).laid(0)
    before = contents([step])
    parcel = Parcel.of(step, patches)
    for batch in parcel.step.packs:
        assert len(batch.ids_T) == 0
        assert len(batch.patches_ND) == 0
    opened = parcel.open()
    assert contents([opened]) == before
    base, other = (
        block.bytes_N.untyped_storage().data_ptr() for block in (parcel.pictures, parcel.others)
    )
    for batch, laid in zip(opened.packs, step.packs, strict=True):
        assert batch.patches_ND.untyped_storage().data_ptr() == base
        assert batch.patches_ND.data_ptr() == laid.patches_ND.data_ptr()
        assert batch.ids_T.untyped_storage().data_ptr() == other
        assert batch.ids_T.data_ptr() % 64 == other % 64


def test_shared_memory_that_is_full_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> None:
        raise RuntimeError(f"unable to resize file </torch_1> to the right size: {size}\nmore")

    monkeypatch.setattr("finesight.train.loader.get_worker_info", lambda: object())
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    found = steps_of(folder)[0]
    assert isinstance(found, WorkerDied), "the run saves a checkpoint before it ends"
    assert "no shared memory for" in str(found)
    assert "--shm-size" in str(found)


class Indices:
    """Knows of each sample its index, in bf16, and no picture of the sample 3."""

    def check(self, sample: int, places: int) -> None:
        assert places
        if sample == 3:
            raise DamagedPicture("gone")

    def form(self, members: Sequence[int]) -> Form:
        return torch.bfloat16, (len(members), 2)

    def lay(self, members: Sequence[int], room: Tensor) -> None:
        room.copy_(torch.tensor(members)[:, None].expand(-1, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_known_travels_in_place_of_pictures(folder: Path, workers: int) -> None:
    data = steps_of(folder).without_pictures(Indices())
    expected = contents([data.step(number) for number in range(len(data))])
    steps = list(read_steps(data, 0, workers, pin=False))
    assert contents(steps) == expected
    for step in steps:
        assert all(batch.grids == () and not len(batch.patches_ND) for batch in step.packs)
        for members, known in zip(step.members, step.known, strict=True):
            assert known.tolist() == [[index, index] for index in members]
    assert [dropped.id for step in steps for dropped in step.dropped] == ["train3"]


def test_parcel_of_a_step_without_packs() -> None:
    step = Step(3, (), (), ())
    assert Parcel.of(step, Block.of()).open() == step


def truncate(path: Path) -> None:
    """Its header stays whole: only decoding shows the damage."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 30])


@pytest.mark.parametrize("workers", [0, 2])
def test_picture_damaged_after_its_header_is_dropped_and_named(folder: Path, workers: int) -> None:
    truncate(folder / "train5.png")
    steps = list(read_steps(steps_of(folder), 0, workers, pin=False))
    assert [step.samples for step in steps] == [4, 3, 3]
    assert [dropped.id for step in steps for dropped in step.dropped] == ["train5"]
    assert "train5.png" in steps[1].dropped[0].reason


@pytest.mark.parametrize("workers", [0, 2])
def test_picture_damaged_after_its_header_is_refused_on_demand(folder: Path, workers: int) -> None:
    truncate(folder / "train5.png")
    with pytest.raises(DamagedPicture, match=r"train5\.png"):
        list(read_steps(steps_of(folder, "refuse"), 0, workers, pin=False))


def test_step_of_damaged_pictures_only(folder: Path) -> None:
    for number in range(4):
        truncate(folder / f"train{number}.png")
    step = steps_of(folder).step(0)
    assert (step.packs, step.samples, step.supervised) == ((), 0, 0)
    assert len(step.dropped) == 4


def test_sample_over_the_budget_stands_alone(folder: Path) -> None:
    step = steps_of(folder, budget=1).step(0)
    assert [len(batch.lengths) for batch in step.packs] == [1, 1, 1, 1]
    assert torch.equal(step.packs[0].bounds_S1, torch.tensor([0, step.packs[0].lengths[0]]).int())
