"""Data loading: independence from the number of workers, shared prefixes and shared memory."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from tiny_task import make_task
from torch import Tensor

from finesight.encode.renderer import NativeRenderer
from finesight.model_folder import ModelFolder
from finesight.samples.augmentation import Augmenter
from finesight.samples.corpus import load_corpus
from finesight.settings.config import DataSettings, PixelRange, TrainFileSettings
from finesight.train.prefetch import DataWorkerError, catch_user_error
from finesight.train.sampler import SequentialSampler
from finesight.train.step_batch import StepBatch
from finesight.train.step_dataset import StepDataset, read_steps


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_task(tmp_path)
    return tmp_path


def make_dataset(
    folder: Path, on_invalid_sample: Literal["skip", "fail"] = "skip", budget: int = 100
) -> StepDataset:
    corpus = load_corpus((TrainFileSettings(path=folder / "train.jsonl"),))
    image_rule = PixelRange(min_pixels=784, max_pixels=7056)
    renderer = NativeRenderer(ModelFolder(folder / "tiny"), image_rule)
    sampler = SequentialSampler(range(len(corpus)), 4)
    return StepDataset(corpus, renderer, sampler, budget, on_invalid_sample)


def read_all(dataset: StepDataset, start: int = 0, workers: int = 0) -> list[StepBatch]:
    return list(read_steps(dataset, start, workers, pin_memory=False))


def contents(steps: Sequence[StepBatch]) -> list[object]:
    """Return all values of steps, with tensors as nested lists."""
    packs = [
        {k: v.tolist() if isinstance(v, Tensor) else v for k, v in asdict(batch).items()}
        for step in steps
        for batch in step.packs
    ]
    return [[(step.step_index, step.skipped) for step in steps], packs]


@pytest.mark.parametrize("preset", [None, "strong"])
def test_packs_are_equal_for_any_worker_count(folder, preset):
    """Each sample occurs once, in packs within the token budget, with the same variant."""
    data = make_dataset(folder)
    if preset is not None:
        settings = DataSettings.model_validate({"train": "a.jsonl", "augment": preset}).augment
        data = replace(data, augmenter=Augmenter(settings, 0, describes_scenes=True))
        plain = make_dataset(folder).get_step(0).packs[0]
        assert not torch.equal(data.get_step(0).packs[0].patches_ND, plain.patches_ND)
        assert torch.equal(data.get_step(0).packs[0].ids_T, plain.ids_T)
    steps = [data.get_step(number) for number in range(len(data))]
    for workers in (0, 1, 2):
        assert contents(read_all(data, 0, workers)) == contents(steps)
        assert contents(read_all(data, 1, workers)) == contents(steps[1:])
    assert [step.num_samples for step in steps] == [4, 4, 3]
    packs = [batch for step in steps for batch in step.packs]
    names = [name for batch in packs for name in batch.sample_ids]
    assert sorted(names) == sorted(f"train{i}" for i in range(11))
    assert all(sum(batch.lengths) <= 100 for batch in packs)
    assert sum(step.num_tokens for step in steps) == sum(len(batch.ids_T) for batch in packs)


def test_budget_counts_only_required_tokens(folder):
    (full,) = make_dataset(folder, budget=10_000).get_step(0).packs
    needed = sum(full.lengths)
    for budget, num_packs in ((needed, 1), (needed - 1, 2), (1, 4)):
        packs = make_dataset(folder, budget=budget).get_step(0).packs
        assert len(packs) == num_packs, "a sample over the budget is packed alone"


def test_shared_prefix_is_stored_once_per_pack(folder):
    shared = replace(make_dataset(folder), use_shared_prefix=True)
    for step, other in zip(read_all(shared), read_all(make_dataset(folder)), strict=True):
        assert sorted(sum(step.sample_indices, ())) == sorted(sum(other.sample_indices, ()))
        assert step.num_supervised_tokens == other.num_supervised_tokens
        assert step.num_tokens == other.num_tokens, "of samples, whatever they share"
        for batch in step.packs:
            assert batch.prefix_length in ({15} if batch.num_samples > 1 else {0})
            assert len(batch.ids_T) <= 100
        assert sum(len(batch.ids_T) for batch in step.packs) < step.num_tokens


def test_full_shared_memory_is_reported(folder, monkeypatch):
    def full(size: int) -> None:
        raise RuntimeError(f"unable to resize file </torch_1> to the right size: {size}\nmore")

    monkeypatch.setattr("finesight.train.step_transfer.get_worker_info", lambda: object())
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)
    found = catch_user_error(make_dataset(folder).load_step, 0)
    assert isinstance(found, DataWorkerError), "the run saves a checkpoint before it ends"
    assert "--shm-size" in str(found)
