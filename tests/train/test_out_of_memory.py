"""Out-of-memory errors, of models that refuse large packs: smaller packs, the same results."""

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_task import TinyTask, act_before_step, read_final_files, read_losses, write_recipe
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from finesight.cli.app import run_command
from finesight.encode.batch import PackedBatch
from finesight.errors import TrainingInterrupted, UserError
from finesight.files import storage
from finesight.infer.model_runner import ModelRunner
from finesight.model.layers import GatedMlp
from finesight.model.vlm import VisionLanguageModel
from finesight.train import trainer
from finesight.train.cuda_graphs import CudaGraphRunner

OOM_MESSAGE = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB left. And more.\nSee also"
)
OomPredicate = Callable[[PackedBatch, VisionLanguageModel], bool]


@contextmanager
def simulate_oom(should_fail: OomPredicate) -> Iterator[list[int]]:
    """Raise the error at the end of selected backward passes; yield the tokens of tried packs."""
    tried: list[int] = []
    is_failing = False

    def before_forward(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        nonlocal is_failing
        if isinstance(module, VisionLanguageModel):
            is_failing = torch.is_grad_enabled() and should_fail(inputs[0], module)
            if torch.is_grad_enabled():
                tried.append(sum(inputs[0].lengths))

    def raise_oom(gradient: torch.Tensor) -> None:
        raise torch.OutOfMemoryError(OOM_MESSAGE)

    def after_forward(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> None:
        nonlocal is_failing
        # The first layer, whose gradients are computed last.
        if is_failing and isinstance(module, GatedMlp) and output.requires_grad:
            is_failing = False
            output.register_hook(raise_oom)

    before = register_module_forward_pre_hook(before_forward)
    after = register_module_forward_hook(after_forward)
    try:
        yield tried
    finally:
        before.remove()
        after.remove()


def exceeds_60_tokens(batch: PackedBatch, model: VisionLanguageModel) -> bool:
    return len(batch.lengths) > 1 and sum(batch.lengths) > 60


def read_steps(task: TinyTask, name: str | Path = "run") -> list[dict[str, Any]]:
    return [line for line in task.read_metrics(name) if "loss" in line]


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    task = TinyTask(tmp_path_factory.mktemp("plain"))
    task.run()
    return task.folder / "run"


@pytest.fixture(scope="module")
def limited_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted run in which packs above 60 tokens exceed the memory."""
    task = TinyTask(tmp_path_factory.mktemp("limited"))
    with simulate_oom(exceeds_60_tokens):
        task.run()
    return task.folder / "run"


def assert_bit_identical(task: TinyTask, other: str | Path) -> None:
    """Compare all but the files with the budget of the recipe."""
    found, expected = (
        {
            name: content
            for name, content in read_final_files(folder).items()
            if not name.endswith(("state.json", "sha256.json"))
        }
        for folder in (task.folder / "run", task.folder / other)
    )
    assert found == expected
    assert read_losses(task.folder / "run") == read_losses(task.folder / other)


@pytest.mark.parametrize("workers", [0, 1])
def test_oom_run_matches_smaller_budget(task, workers):
    setting = f"train.num_workers={workers}"
    with simulate_oom(exceeds_60_tokens) as tried:
        assert task.run(setting).steps == 6
    output = task.console_output
    assert output.count("the GPU memory is full") == 1
    assert "CUDA out of memory. Tried to allocate 2.00 GiB; continuing with packs" in output
    (found,) = {line["pack_tokens"] for line in read_steps(task)}
    assert found < 60 < tried[0] <= 100
    budget = f"train.pack_tokens={found}"
    assert f"packs of at most {found} tokens instead of 100 ({budget})" in output
    assert all(tokens <= 60 for tokens in tried[1:])
    task.run(setting, budget, name="small")
    assert_bit_identical(task, "small")
    page, other = ((task.folder / name / "report.html").read_text() for name in ("run", "small"))
    assert f"continued with less: packs of at most {found} tokens from step 1." in page
    assert "continued with less" not in other


def enable_fake_graphs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Simulate CUDA graphs on a CPU. The returned list is empty after their release."""
    real, graphs = CudaGraphRunner.release_graphs, [True]

    def release(runner: CudaGraphRunner) -> bool:
        real(runner)
        return graphs.pop() if graphs else False

    monkeypatch.setattr(CudaGraphRunner, "release_graphs", release)
    return graphs


def test_graph_memory_is_freed_before_packs_shrink(task, plain_run, monkeypatch):
    enable_fake_graphs(monkeypatch)
    failures = iter([True])
    with simulate_oom(lambda *_: next(failures, False)):
        assert task.run().steps == 6
    assert "continuing with the same packs without CUDA graphs" in task.console_output
    assert {line["pack_tokens"] for line in read_steps(task)} == {100}
    assert_bit_identical(task, plain_run)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_failed_pack_frees_its_tensors(task, checkpointed):
    outputs: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def record(module: torch.nn.Module, inputs: object, output: object) -> None:
        if len(tried) == 1 and isinstance(output, torch.Tensor):
            outputs.append(weakref.ref(output))

    def should_fail(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        alive.append(sum(reference() is not None for reference in outputs))
        return exceeds_60_tokens(batch, model)

    settings = ("train.steps=1", "train.epochs=null")
    with simulate_oom(should_fail) as tried:
        hook = register_module_forward_hook(record)
        try:
            task.run(*settings, f"train.activation_checkpointing={checkpointed}")
        finally:
            hook.remove()
    assert len(tried) > 2
    assert len(outputs) > 20
    assert alive == [0] * len(tried)


@pytest.mark.parametrize("call", [2, 5, 9, 13, 17])
def test_resumed_oom_run_equals_uninterrupted(task, limited_run, call):
    """Interrupt the step that fails, its second attempt, and later steps; with dropout."""
    num_calls = 0

    def stop_and_fail(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        nonlocal num_calls
        num_calls += 1
        if num_calls == call:
            os.kill(os.getpid(), 15)
        return exceeds_60_tokens(batch, model)

    with simulate_oom(stop_and_fail), pytest.raises(TrainingInterrupted):
        task.run()
    before = read_steps(task)
    with simulate_oom(exceeds_60_tokens) as tried:
        task.run(resume=True)
    if before:
        assert all(tokens <= 60 for tokens in tried), "the smaller budget was forgotten"
    assert_bit_identical(task, limited_run)
    budgets, expected = (
        [line["pack_tokens"] for line in read_steps(task, name)] for name in ("run", limited_run)
    )
    assert budgets == expected


def test_single_oversized_sample_enables_checkpointing(task):
    def should_fail(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        return sum(batch.lengths) > 30 and not model.activation_checkpointing

    with simulate_oom(should_fail):
        task.run()
    first, *_, last = read_steps(task)
    assert last["activation_checkpointing"]
    assert last["pack_tokens"] == first["pack_tokens"] < 60
    setting = "train.activation_checkpointing=true"
    assert f"continuing with activation checkpointing ({setting})" in task.console_output
    task.run(f"train.pack_tokens={last['pack_tokens']}", setting, name="same")
    assert_bit_identical(task, "same")
    run = task.folder / "run"
    (run / "result.json").unlink()
    storage.remove_folder(run / "checkpoints" / "step-6")
    with simulate_oom(should_fail) as tried:
        task.run(resume=True)
    assert len(tried) < 10, "no try of what was known to be too much"
    assert_bit_identical(task, "same")
    assert "and activation checkpointing from step 1." in (run / "report.html").read_text()


def test_sample_that_never_fits_ends_with_checkpoint(task, monkeypatch, capsys):
    is_full = False

    def fill() -> None:
        nonlocal is_full
        is_full = True

    act_before_step(monkeypatch, 2, fill)
    recipe = task.recipe | {"output_dir": str(task.folder / "run")}
    path = write_recipe(task.folder / "recipe.yaml", recipe, save_every=6)
    with simulate_oom(lambda *_: is_full):
        assert run_command(["train", str(path)]) == 2
    output = capsys.readouterr().err
    for text in ("error: sample train", " patches: the GPU memory is full", "data.max_length"):
        assert text in output
    assert "numbers of GPUs that fit: finesight plan RECIPE" in output
    assert [path.name for path in (task.folder / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert len(read_steps(task)) == 2
    # The memory of other processes is free again.
    assert run_command(["train", str(path), "--resume"]) == 0
    lines = read_steps(task)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["activation_checkpointing"] for line in lines] == [False] * 2 + [True] * 4


@contextmanager
def limit_evaluation_memory(
    tokens: int, while_captured: Sequence[bool] = (True,)
) -> Iterator[None]:
    """Limit the tokens of evaluation packs while `while_captured` has entries."""

    def raise_oom(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        is_evaluated = isinstance(module, VisionLanguageModel) and not torch.is_grad_enabled()
        if is_evaluated and while_captured and sum(inputs[0].lengths) > tokens:
            raise torch.OutOfMemoryError(OOM_MESSAGE)

    hook = register_module_forward_pre_hook(raise_oom)
    try:
        yield
    finally:
        hook.remove()


def test_validation_loss_uses_smaller_packs(task, plain_run):
    """Training packs stay unchanged."""
    with limit_evaluation_memory(60):
        task.run()
    assert task.console_output.count("the GPU memory is full") == 4, "once per evaluation"
    assert {line["pack_tokens"] for line in read_steps(task)} == {100}
    assert read_losses(task.folder / "run") == read_losses(plain_run)
    losses, expected = (
        [line["validation_loss"] for line in task.read_metrics(name) if "validation_loss" in line]
        for name in ("run", plain_run)
    )
    assert losses == pytest.approx(expected, rel=1e-5)


def test_evaluation_frees_graph_memory(task, plain_run, monkeypatch):
    graphs = enable_fake_graphs(monkeypatch)
    with limit_evaluation_memory(0, while_captured=graphs):
        result = task.run()
    assert graphs == []
    assert task.console_output.count("the GPU memory is full") == 1
    assert "continuing with the same packs without CUDA graphs" in task.console_output
    (first, *_) = (line for line in task.read_metrics(plain_run) if "validation_loss" in line)
    assert result.before.validation_loss == first["validation_loss"]


def test_oversized_validation_sample_ends_with_checkpoint(task, monkeypatch):
    checkpoints = task.folder / "run" / "checkpoints"
    with limit_evaluation_memory(1):
        with pytest.raises(UserError, match=r"sample eval\d, \d+ tokens and \d+ patches"):
            task.run()
        assert not checkpoints.exists()
    real, limits = trainer.run_evaluation, iter([10_000])

    def evaluate_with_limit(*args: Any) -> Any:
        with limit_evaluation_memory(next(limits, 1)):
            return real(*args)

    monkeypatch.setattr(trainer, "run_evaluation", evaluate_with_limit)
    with pytest.raises(UserError, match="sufficient memory for one sample at a time\n"):
        task.run("train.save_every=3", resume=True)
    assert [path.name for path in checkpoints.iterdir()] == ["step-3"]


def test_generation_that_never_fits_ends_with_checkpoint(task, monkeypatch):
    task.recipe["eval"] = {"metric": "ocr", "max_new_tokens": 4}
    checkpoints, real = task.folder / "run" / "checkpoints", ModelRunner.decode

    def decode(self: ModelRunner, rows: int, longest: int) -> torch.Tensor:
        if checkpoints.exists():
            raise torch.OutOfMemoryError(OOM_MESSAGE)
        return real(self, rows, longest)

    monkeypatch.setattr(ModelRunner, "decode", decode)
    with pytest.raises(UserError, match=r"evaluation: the GPU memory[\s\S]*max_new_tokens"):
        task.run()
    reduction = "memory is full: continuing with a batch of 1 answer\n"
    assert task.console_output.count(reduction) == 1
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-4", "step-6"]


@pytest.mark.gpu
def test_real_gpu_out_of_memory(task, monkeypatch):
    """Images of a thousand tokens; from the third step on, half of the memory is available."""
    settings = ("train.device=cuda", "train.num_workers=2", "train.pack_tokens=16384")
    settings += ("train.batch_size=11", "train.epochs=6")
    tune = {"merger": "full", "language": "lora", "lora": {"rank": 4, "dropout": 0.0}}
    task.recipe |= {"image": {"min_pixels": 784_000, "max_pixels": 800_000}, "tune": tune}
    is_limited = False

    def limit_memory() -> None:
        nonlocal is_limited
        if is_limited:
            return
        torch.cuda.synchronize()
        used = torch.cuda.memory_allocated()
        needed = torch.cuda.max_memory_allocated() - used
        torch.cuda.empty_cache()
        # Limit this process only: other tests may share the GPU.
        limit = torch.cuda.memory_reserved() + needed // 2
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
        is_limited = True

    task.run(*settings, name="unlimited")
    # The peak of a training step alone: evaluations may need more memory.
    act_before_step(monkeypatch, 1, torch.cuda.reset_peak_memory_stats)
    act_before_step(monkeypatch, 2, limit_memory)
    try:
        task.run(*settings)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert is_limited
    budgets = [line["pack_tokens"] for line in read_steps(task)]
    assert budgets[0] == budgets[1] == 16384 > 2 * budgets[-1]
    # Kernels that add in no fixed order.
    found, expected = (dict(read_losses(task.folder / name)) for name in ("run", "unlimited"))
    assert found == pytest.approx(expected, rel=0.02)
