"""Results on the meta device are those of each single operation."""

from typing import get_args

import pytest
import torch
from plan_fixtures import Tune, make_tracer
from tiny_model import TinyFamily, create_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from finesight.model_folder import ModelFolder
from finesight.plan.dry_run import ComputeTarget, PlannedPack
from finesight.plan.meta_kernels import MetaKernels

CPU = ComputeTarget(is_cuda=False, dtype=torch.float32)
GPU = ComputeTarget(is_cuda=True, dtype=torch.bfloat16)
LORA: Tune = {"language": "lora", "vision": "lora", "lora": {"rank": 8, "dropout": 0.05}}
FULL: Tune = {"language": "full", "vision": "full", "merger": "full", "embeddings": "full"}


class RepeatedKernels(TorchDispatchMode):
    """Runs all operations of a block with `MetaKernels`."""

    def __init__(self):
        super().__init__()
        self.kernels = MetaKernels()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.kernels.run(func, args, kwargs or {})


def run_each(kernels, func, args, kwargs):
    return func(*args, **kwargs)


@pytest.mark.parametrize("family", get_args(TinyFamily))
@pytest.mark.parametrize(("compute", "tune"), [(CPU, FULL), (GPU, LORA), (GPU, FULL)])
def test_traces_equal_those_without_repeated_results(tmp_path, monkeypatch, family, compute, tune):
    folder = ModelFolder(create_tiny_model(tmp_path / "model", family))
    packs = [PlannedPack((40, 50), (), 30), PlannedPack((60,), (), 20)]
    if family != "qwen":
        packs.append(PlannedPack((60,), ((1, 4, 4),), 20))
    traces = []
    for is_repeated in (True, False, True):
        if not is_repeated:
            monkeypatch.setattr(MetaKernels, "run", run_each)
        tracer = make_tracer(folder, compute, tune)
        traces.append([tracer.trace(pack, share) for pack in packs for share in (0.0, 1.0)])
        monkeypatch.undo()
    # The first trace of a process also allocates what all models share.
    assert traces[1] == traces[2]


def test_equal_operands_repeat_new_tensors_only():
    x = torch.empty(4, 6, device="meta")
    with RepeatedKernels():
        results = [torch.mm(x, x.T) for _ in range(3)]
        views = [x[1:] for _ in range(2)]
        changed = [x.add_(1) for _ in range(2)]
        split = [torch.var_mean(x, dim=0) for _ in range(2)]
    assert len({id(one.untyped_storage()) for one in results}) == 3
    assert all(one.shape == (4, 4) for one in results)
    assert all(one.untyped_storage() is x.untyped_storage() for one in (*views, *changed))
    assert [one.shape for pair in split for one in pair] == [(6,)] * 4


@pytest.mark.parametrize(
    "numbers", [(1, 1.0), (True, 1), (2, 3)], ids=["float", "bool", "other value"]
)
def test_results_depend_on_the_types_of_numbers(numbers):
    x = torch.empty(3, dtype=torch.int64, device="meta")
    with RepeatedKernels():
        results = [torch.add(x, number) for number in numbers]
    assert [one.dtype for one in results] == [torch.add(x, number).dtype for number in numbers]


def test_results_depend_on_strides_and_data_types():
    x = torch.empty(4, 6, device="meta")
    operands = [x, x.T.contiguous().T, x.half(), torch.empty(8, 12, device="meta")[::2, ::2]]
    with RepeatedKernels():
        results = [one + 1 for one in operands for _ in range(2)]
    expected = [one + 1 for one in operands for _ in range(2)]
    for result, wanted in zip(results, expected, strict=True):
        assert (result.stride(), result.dtype) == (wanted.stride(), wanted.dtype)


def test_operations_on_data_are_run():
    x = torch.arange(3)
    with RepeatedKernels():
        results = [x + 1 for _ in range(2)]
    assert [one.tolist() for one in results] == [[1, 2, 3]] * 2
