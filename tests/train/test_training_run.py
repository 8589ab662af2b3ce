"""Signals of a run, and the kernel warm-up before its first step."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_task import TinyTask

from finesight.errors import TrainingInterrupted
from finesight.model.kernels import runtime
from finesight.train import training_run as module
from finesight.train.state import PREEMPTION_SIGNALS, SIGNALS, StopRequest


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """The system may ignore SIGINT for a background process, and `nohup` ignores SIGHUP."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGHUP, hangup)


@pytest.mark.parametrize("number", SIGNALS)
def test_second_signal_uses_the_default_handler(number):
    """A scheduler may signal all processes: a first signal after a remote stop is recorded."""
    before = [signal.getsignal(one) for one in SIGNALS]
    stop = StopRequest()
    with stop.install_handlers():
        stop.raise_if_requested()
        if number == signal.SIGINT:
            stop.request(number)
        os.kill(os.getpid(), number)
        with pytest.raises(TrainingInterrupted):
            stop.raise_if_requested()
        if number in PREEMPTION_SIGNALS:
            os.kill(os.getpid(), number)  # the warning may repeat
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == number
    assert [signal.getsignal(one) for one in SIGNALS] == before


def test_nohup_keeps_ignoring_the_end_of_its_terminal():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest()
    with stop.install_handlers():
        os.kill(os.getpid(), signal.SIGHUP)
        stop.raise_if_requested()
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_other_threads_install_no_handlers():
    seen = []

    def listen() -> None:
        with StopRequest().install_handlers():
            seen.append([signal.getsignal(number) for number in SIGNALS])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert seen == [[signal.getsignal(number) for number in SIGNALS]]


TUNES: dict[str, dict[str, Any]] = {
    "lora": {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.1}},
    "nf4": {"quantize": {"nf4": ["language"]}, "lora": {"rank": 4, "alpha": 8}},
    "fp8": {"quantize": {"fp8": ["vision", "language"]}, "lora": {"rank": 4, "alpha": 8}},
    "full": dict.fromkeys(("vision", "merger", "language", "embeddings"), "full"),
}


def losses(task: TinyTask, tune: dict[str, Any], name: str) -> list[float]:
    task.run("train.device=cuda", "train.precision=bf16", name=name, tune=tune)
    return [line["loss"] for line in task.read_metrics(name) if "loss" in line]


@pytest.mark.gpu
@pytest.mark.parametrize("tune", TUNES)
def test_warmup_does_not_update_parameters(tune, task, monkeypatch):
    monkeypatch.setattr(module, "is_compile_cache_empty", lambda: False)
    baseline = losses(task, TUNES[tune], "plain")
    monkeypatch.setattr(module, "is_compile_cache_empty", lambda: True)
    assert losses(task, TUNES[tune], "rehearsed") == pytest.approx(baseline, rel=2e-3)


@pytest.mark.gpu
def test_compilation_launches_no_kernel(tmp_path):
    from finesight.model.kernels import elementwise
    from finesight.model.kernels.runtime import compile_in_parallel

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
    with compile_in_parallel(torch.device("cuda")):
        for _ in range(3):
            elementwise.quick_gelu(wide_TD)
    assert compiled() == before + 1
    found = elementwise.quick_gelu(wide_TD)
    assert compiled() == before + 1
    torch.testing.assert_close(found.float(), expected.float(), rtol=2e-2, atol=2e-2)


def test_compiled_kernels_are_loaded_one_after_another(monkeypatch):
    """Otherwise Triton 3.6 gives a kernel the launcher of another one."""
    events = []

    class Compiled:
        @property
        def run(self) -> None:
            events.append("begin")
            time.sleep(0.01)
            events.append("end")

    monkeypatch.setattr(runtime, "JITFunction", SimpleNamespace(run=lambda *a, **k: Compiled()))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    with runtime.compile_in_parallel(torch.device("cuda", 0)):
        for kernel in range(6):
            runtime._overrides.launch(kernel, grid=(1,), warmup=False)
    assert events == ["begin", "end"] * 6


@pytest.mark.gpu
def test_compilation_errors_are_raised_at_the_end():
    pytest.importorskip("triton")
    from finesight.model.kernels.runtime import compile_in_parallel, jit

    def wrong(x, block):  # type: ignore[no-untyped-def]
        x + no_such_name  # type: ignore[name-defined]  # noqa: F821

    kernel = jit(wrong)
    x_D = torch.zeros(16, device="cuda")
    with pytest.raises(Exception, match="no_such_name"), compile_in_parallel(x_D.device):
        kernel[(1,)](x_D, 16)
