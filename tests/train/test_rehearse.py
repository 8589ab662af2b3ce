"""Kernels compiled before a run's first step: it learns what it would have learned without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import Task

from finesight.train import rehearse as module
from finesight.train.loader import StepData

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TUNES: dict[str, dict[str, Any]] = {
    "lora": {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
    "nf4": {"nf4": ["language"], "lora": {"rank": 4, "alpha": 8}},
    "fp8": {"fp8": ["vision", "language"], "lora": {"rank": 4, "alpha": 8}},
    "full": dict.fromkeys(("vision", "merger", "language", "embeddings"), "full"),
}


def losses(task: Task, tune: dict[str, Any], name: str) -> list[float]:
    task.run("train.device=cuda", "train.precision=bf16", name=name, tune=tune)
    return [line["loss"] for line in task.history(name) if "loss" in line]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("tune", TUNES)
def test_nothing_of_it_is_learned(tune: str, task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "nothing_compiled", lambda: False)
    plain = losses(task, TUNES[tune], "plain")
    monkeypatch.setattr(module, "nothing_compiled", lambda: True)
    assert losses(task, TUNES[tune], "rehearsed") == pytest.approx(plain, rel=2e-3)


@pytest.mark.gpu
@GPU
def test_a_launch_compiles_and_writes_nothing(tmp_path: Path) -> None:
    from finesight.model.kernels import elementwise
    from finesight.model.kernels.together import compiled_together

    kernels = {id(k): k for k in vars(elementwise).values() if hasattr(k, "device_caches")}
    for kernel in kernels.values():
        # Of what other tests have launched in this process.
        kernel.device_caches[0][0].clear()
    x_TD = torch.randn(7, 48, device="cuda", dtype=torch.bfloat16)
    expected = elementwise.quick_gelu(x_TD)

    def compiled() -> int:
        return sum(len(kernel.device_caches[0][0]) for kernel in kernels.values())

    wide_TD, before = x_TD.half(), compiled()
    torch.cuda.empty_cache()
    with compiled_together(torch.device("cuda")):
        for _ in range(3):
            elementwise.quick_gelu(wide_TD)
    assert compiled() == before + 1
    found = elementwise.quick_gelu(wide_TD)
    assert compiled() == before + 1
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
@GPU
def test_what_waits_to_be_compiled_keeps_no_memory() -> None:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from finesight.model.kernels import elementwise
    from finesight.model.kernels.together import _kind, _stand_in, compiled_together

    held = torch.zeros(1 << 24, device="cuda", dtype=torch.bfloat16)
    for tensor in (held, held[1:], held[8:], held.float(), held.float()[1:], held.byte()[3:]):
        assert _kind(_stand_in(tensor)) == _kind(tensor)
        assert _stand_in(tensor).nbytes <= 16
    if torch.cuda.get_device_capability() >= (9, 0):
        described = TensorDescriptor.from_tensor(held.view(-1, 64), [128, 64])
        assert _kind(_stand_in(described)) == _kind(described)
        assert _stand_in(described).base.nbytes == 128 * 64 * held.itemsize
        assert _kind(TensorDescriptor.from_tensor(held.view(-1, 64), [64, 64])) != _kind(described)
        del described
    del held, tensor
    before = torch.cuda.memory_allocated()
    with compiled_together(torch.device("cuda")):
        elementwise.quick_gelu(torch.zeros(1 << 24, device="cuda", dtype=torch.float16))
        assert torch.cuda.memory_allocated() - before < 1 << 16


@pytest.mark.gpu
@GPU
def test_what_compiling_raises_is_raised_at_the_end() -> None:
    triton: Any = pytest.importorskip("triton")
    from finesight.model.kernels.together import compiled_together

    def wrong(x, block):  # type: ignore[no-untyped-def]
        x + no_such_name  # type: ignore[name-defined]  # noqa: F821

    kernel = triton.jit(wrong)
    x_D = torch.zeros(16, device="cuda")
    with pytest.raises(Exception, match="no_such_name"), compiled_together(x_D.device):
        kernel[(1,)](x_D, 16)


def test_a_cpu_rehearses_nothing(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("a step was read for its kernels")

    monkeypatch.setattr(StepData, "step", never)
    task.run()
    assert len([line for line in task.history() if "loss" in line]) == 6
