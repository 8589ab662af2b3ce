"""Data loading: independence from the number of workers, and corrupt images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from tiny_task import make_task
from torch import Tensor

from finesight.config import LongestSide, PixelRange, TrainFileSettings
from finesight.data.corpus import Corpus, load_corpus
from finesight.data.image_header import CorruptImageError
from finesight.encode.packing import PackedBatch
from finesight.encode.renderer import NativeRenderer
from finesight.model_folder import ModelFolder
from finesight.train.dataloader import (
    DataWorkerError,
    StepBatch,
    StepDataset,
    StepTransfer,
    TensorBlock,
    TensorSpec,
    catch_user_error,
    read_steps,
)
from finesight.train.sampler import SequentialSampler

RULE = PixelRange(min_pixels=784, max_pixels=7056)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_task(tmp_path)
    return tmp_path


def steps_of(
    folder: Path,
    on_invalid_sample: Literal["skip", "fail"] = "skip",
    budget: int = 100,
    rule: PixelRange | LongestSide = RULE,
) -> StepDataset:
    corpus: Corpus = load_corpus((TrainFileSettings(path=folder / "train.jsonl"),))
    renderer = NativeRenderer(ModelFolder(folder / "tiny"), rule)
    return StepDataset(
        corpus, renderer, SequentialSampler(range(len(corpus)), 4), budget, on_invalid_sample
    )


def to_nested_lists(batch: PackedBatch) -> list[object]:
    """All that a pack holds, its tensors as nested lists."""
    tensors = (
        *(batch.ids_T, batch.position_ids_3T, batch.cu_seqlens_S1, batch.patches_ND),
        *(batch.visual_indices_M, batch.logit_indices_L, batch.labels_L),
    )
    held = [(str(tensor.dtype), tuple(tensor.shape), tensor.tolist()) for tensor in tensors]
    return [batch.sample_ids, batch.lengths, batch.grid_thw, held]


def contents(steps: Sequence[StepBatch]) -> list[object]:
    return [(step.step_index, step.skipped, *map(to_nested_lists, step.packs)) for step in steps]


def test_packs_are_equal_for_any_worker_count(folder: Path) -> None:
    data = steps_of(folder)
    direct = contents([data.get_step(number) for number in range(len(data))])
    assert len(direct) == 3
    for workers in (0, 1, 2):
        assert contents(list(read_steps(data, 0, workers, pin_memory=False))) == direct
        assert contents(list(read_steps(data, 1, workers, pin_memory=False))) == direct[1:]


def test_each_sample_once_within_token_budget(folder: Path) -> None:
    steps = list(read_steps(steps_of(folder), 0, 0, pin_memory=False))
    assert [step.num_samples for step in steps] == [4, 4, 3]
    names = [name for step in steps for batch in step.packs for name in batch.sample_ids]
    assert sorted(names) == sorted(f"train{i}" for i in range(11))
    assert all(sum(batch.lengths) <= 100 for step in steps for batch in step.packs)
    assert sum(step.num_tokens for step in steps) == sum(
        len(batch.ids_T) for step in steps for batch in step.packs
    )


def test_budget_counts_only_required_tokens(folder: Path) -> None:
    (full,) = steps_of(folder, budget=10_000).get_step(0).packs
    needed = sum(full.lengths)
    assert len(steps_of(folder, budget=needed).get_step(0).packs) == 1
    assert len(steps_of(folder, budget=needed - 1).get_step(0).packs) == 2


def test_shared_prefix_is_stored_once_per_pack(folder: Path) -> None:
    alone = [*read_steps(steps_of(folder), 0, 0, pin_memory=False)]
    steps = [*read_steps(replace(steps_of(folder), use_shared_prefix=True), 0, 0, pin_memory=False)]
    for step, other in zip(steps, alone, strict=True):
        assert sorted(sum(step.sample_indices, ())) == sorted(sum(other.sample_indices, ()))
        assert (step.num_samples, step.num_supervised_tokens) == (
            other.num_samples,
            other.num_supervised_tokens,
        )
        assert step.num_tokens == other.num_tokens, "of samples, whatever they share"
        assert {batch.prefix_length for batch in step.packs if batch.num_samples > 1} == {15}
        assert {batch.prefix_length for batch in step.packs if batch.num_samples == 1} <= {0}
        assert all(len(batch.ids_T) <= 100 for batch in step.packs)
        assert sum(len(batch.ids_T) for batch in step.packs) < step.num_tokens


def test_shared_memory_transfer_roundtrip(folder: Path) -> None:
    step, patches = steps_of(folder).build_step(0)
    before = contents([step])
    parcel = StepTransfer.from_step(step, patches)
    for batch in parcel.step_batch.packs:
        assert len(batch.ids_T) == 0
        assert len(batch.patches_ND) == 0
    opened = parcel.unpack()
    assert contents([opened]) == before
    base, other = (
        block.bytes_N.untyped_storage().data_ptr()
        for block in (parcel.image_block, parcel.tensor_block)
    )
    for batch, packed in zip(opened.packs, step.packs, strict=True):
        assert batch.patches_ND.untyped_storage().data_ptr() == base
        assert batch.patches_ND.data_ptr() == packed.patches_ND.data_ptr()
        assert batch.ids_T.untyped_storage().data_ptr() == other
        assert batch.ids_T.data_ptr() % 64 == other % 64


def test_full_shared_memory_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int) -> None:
        raise RuntimeError(f"unable to resize file </torch_1> to the right size: {size}\nmore")

    monkeypatch.setattr("finesight.train.dataloader.get_worker_info", lambda: object())
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    found = catch_user_error(steps_of(folder).load_step, 0)
    assert isinstance(found, DataWorkerError), "the run saves a checkpoint before it ends"
    assert "no shared memory for" in str(found)
    assert "--shm-size" in str(found)


class IndexFeatures:
    """Cache whose features are the sample indices in bf16; sample 3 is corrupt."""

    def check(self, sample: int, num_features: int) -> None:
        assert num_features
        if sample == 3:
            raise CorruptImageError("gone")

    def tensor_spec(self, sample_indices: Sequence[int]) -> TensorSpec:
        return torch.bfloat16, (len(sample_indices), 2)

    def write_to(self, sample_indices: Sequence[int], buffer: Tensor) -> None:
        buffer.copy_(torch.tensor(sample_indices)[:, None].expand(-1, 2))


@pytest.mark.parametrize("workers", [0, 1])
def test_cached_features_replace_images(folder: Path, workers: int) -> None:
    data = steps_of(folder).with_vision_cache(IndexFeatures())
    expected = contents([data.get_step(number) for number in range(len(data))])
    steps = list(read_steps(data, 0, workers, pin_memory=False))
    assert contents(steps) == expected
    for step in steps:
        assert all(batch.grid_thw == () and not len(batch.patches_ND) for batch in step.packs)
        for members, known in zip(step.sample_indices, step.cache_inputs, strict=True):
            assert known.tolist() == [[index, index] for index in members]
    assert [dropped.id for step in steps for dropped in step.skipped] == ["train3"]


def test_transfer_of_step_without_packs() -> None:
    step = StepBatch(3, (), (), ())
    assert StepTransfer.from_step(step, TensorBlock.allocate()).unpack() == step


def truncate(path: Path) -> None:
    """Truncate an image after its header, so that only decoding fails."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 30])


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_is_skipped_and_named(folder: Path, workers: int) -> None:
    truncate(folder / "train5.png")
    steps = list(read_steps(steps_of(folder), 0, workers, pin_memory=False))
    assert [step.num_samples for step in steps] == [4, 3, 3]
    assert [dropped.id for step in steps for dropped in step.skipped] == ["train5"]
    assert "train5.png" in steps[1].skipped[0].reason


@pytest.mark.parametrize("workers", [0, 2])
def test_corrupt_image_raises_in_fail_mode(folder: Path, workers: int) -> None:
    truncate(folder / "train5.png")
    with pytest.raises(CorruptImageError, match=r"train5\.png"):
        list(read_steps(steps_of(folder, "fail"), 0, workers, pin_memory=False))


def test_step_with_only_corrupt_images(folder: Path) -> None:
    for number in range(4):
        truncate(folder / f"train{number}.png")
    step = steps_of(folder).get_step(0)
    assert (step.packs, step.num_samples, step.num_supervised_tokens) == ((), 0, 0)
    assert len(step.skipped) == 4


def test_sample_over_budget_is_packed_alone(folder: Path) -> None:
    step = steps_of(folder, budget=1).get_step(0)
    assert [len(batch.lengths) for batch in step.packs] == [1, 1, 1, 1]
    assert torch.equal(
        step.packs[0].cu_seqlens_S1, torch.tensor([0, step.packs[0].lengths[0]]).int()
    )
