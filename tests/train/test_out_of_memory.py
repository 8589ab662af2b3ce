"""Out-of-memory errors of the GPU: runs continue with smaller packs and the same results.

A model that refuses packs above a number of tokens simulates a GPU with little memory.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_oom import OOM_MESSAGE, OomPredicate, simulate_oom
from safetensors.torch import load_file
from tiny_task import TinyTask, read_final_files, read_losses, write_recipe
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from finesight import storage
from finesight.cli.app import run_command as command
from finesight.encode.packing import PackedBatch
from finesight.errors import TrainingInterrupted, UserError
from finesight.infer.model_runner import ModelRunner
from finesight.model.vlm import VisionLanguageModel
from finesight.train import trainer
from finesight.train.cuda_graphs import CudaGraphRunner
from finesight.train.dataloader import StepBatch
from finesight.train.oom import GpuOutOfMemoryError, MemoryBudget
from finesight.train.trainer import StepOutput, TrainState


def exceeds_tokens(tokens: int) -> OomPredicate:
    """Return a predicate that rejects packs above a token limit, except single samples."""
    return lambda batch, model: len(batch.lengths) > 1 and sum(batch.lengths) > tokens


def steps_of(task: TinyTask, name: str | Path = "run") -> list[dict[str, Any]]:
    return [line for line in task.read_metrics(name) if "loss" in line]


def read_trained(task: TinyTask, name: str = "run", step: int = 6) -> dict[str, torch.Tensor]:
    folder = task.folder / name / "checkpoints" / f"step-{step}"
    return load_file(folder / "trainable.safetensors")


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run without memory limit."""
    task = TinyTask(tmp_path_factory.mktemp("plain"))
    task.run()
    return task.folder / "run"


@pytest.fixture(scope="module")
def limited_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Uninterrupted run in which packs above 60 tokens exceed the memory."""
    task = TinyTask(tmp_path_factory.mktemp("limited"))
    with simulate_oom(exceeds_tokens(60)):
        task.run()
    return task.folder / "run"


def assert_bit_identical(task: TinyTask, one: str, other: str | Path) -> None:
    a, b = read_final_files(task.folder / one), read_final_files(task.folder / other)
    # What names the recipe's own budget differs.
    own = {name for name in a if name.endswith(("state.json", "sha256.json"))}
    assert {name: a[name] for name in a if name not in own} == {
        name: b[name] for name in b if name not in own
    }
    assert read_losses(task.folder / one) == read_losses(task.folder / other)


@pytest.mark.parametrize("workers", [0, 1])
def test_oom_run_matches_smaller_budget(task: TinyTask, workers: int) -> None:
    setting = f"train.num_workers={workers}"
    with simulate_oom(exceeds_tokens(60)) as tried:
        result = task.run(setting)
    assert result.steps == 6
    assert task.console_output.count("the GPU memory is full") == 1
    assert (
        "CUDA out of memory. Tried to allocate 2.00 GiB; continuing with packs"
        in task.console_output
    )
    (found,) = {line["pack_tokens"] for line in steps_of(task)}
    assert found < 60 < tried[0] <= 100
    assert f"packs of at most {found} tokens instead of 100 (train.pack_tokens={found})" in (
        task.console_output
    )
    assert all(tokens <= 60 for tokens in tried[1:])
    task.run(setting, f"train.pack_tokens={found}", name="small")
    assert_bit_identical(task, "run", "small")
    page = (task.folder / "run" / "report.html").read_text()
    assert f"continued with less: packs of at most {found} tokens from step 1." in page
    assert "continued with less" not in (task.folder / "small" / "report.html").read_text()


def test_results_match_up_to_rounding(task: TinyTask) -> None:
    tune = {"merger": "full", "language": "lora", "lora": {"rank": 4, "dropout": 0.0}}
    task.run(tune=tune, name="roomy")
    with simulate_oom(exceeds_tokens(60)):
        task.run(tune=tune)
    found, expected = read_trained(task), read_trained(task, "roomy")
    start = read_trained(task, "roomy", step=4)
    for name, value in expected.items():
        changed, off = (value - start[name]).norm(), (value - found[name]).norm()
        # AdamW makes as long a step of a gradient that is all rounding.
        assert off < 0.01 * changed, (
            f"{name} differs by {off} and changed by {changed} in two steps"
        )
    for (_, loss), (_, other) in zip(
        read_losses(task.folder / "run"), read_losses(task.folder / "roomy"), strict=True
    ):
        assert loss == pytest.approx(other, rel=1e-4)


def enable_fake_graphs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Simulate CUDA graphs on a CPU. The returned list is empty after their release."""
    real, graphs = CudaGraphRunner.release_graphs, [True]

    def forget(passes: CudaGraphRunner) -> bool:
        real(passes)
        return graphs.pop() if graphs else False

    monkeypatch.setattr(CudaGraphRunner, "release_graphs", forget)
    return graphs


def test_graph_memory_is_freed_before_packs_shrink(
    task: TinyTask, plain_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enable_fake_graphs(monkeypatch)
    refused: list[int] = []

    def once(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        refused.append(len(batch.lengths))
        return len(refused) == 1

    with simulate_oom(once):
        result = task.run()
    assert result.steps == 6
    assert "continuing with the same packs without CUDA graphs" in task.console_output
    assert {line["pack_tokens"] for line in steps_of(task)} == {100}
    assert_bit_identical(task, "run", plain_run)


def from_third_step(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[TrainState, StepBatch], None]
) -> None:
    """Do something before every try of the third step and of those after it."""
    real = trainer.train_step

    def taking(session: TrainState, step: StepBatch, *rest: Any) -> StepOutput:
        if step.step_index >= 2:
            act(session, step)
        return real(session, step, *rest)

    monkeypatch.setattr(trainer, "train_step", taking)


def test_failed_pack_leaves_no_gradients(task: TinyTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as with a budget that is small from the third step on without any refusal."""
    late = False

    def begin(session: TrainState, step: StepBatch) -> None:
        nonlocal late
        late = True

    def shrink(session: TrainState, step: StepBatch) -> None:
        if session.progress.budget.pack_tokens == 100:
            below = MemoryBudget(pack_tokens=found, activation_checkpointing=False)
            raise GpuOutOfMemoryError("told beforehand", next_budget=below)

    from_third_step(monkeypatch, begin)
    with simulate_oom(lambda batch, model: late and exceeds_tokens(60)(batch, model)):
        task.run()
    budgets = [line["pack_tokens"] for line in steps_of(task)]
    found = budgets[-1]
    assert budgets == [100, 100, found, found, found, found]
    monkeypatch.undo()
    from_third_step(monkeypatch, shrink)
    task.run(name="told")
    assert [line["pack_tokens"] for line in steps_of(task, "told")] == budgets
    assert_bit_identical(task, "run", "told")


@pytest.mark.parametrize("checkpointed", [False, True])
def test_failed_pack_frees_its_tensors(task: TinyTask, checkpointed: bool) -> None:
    refused: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def holds(module: torch.nn.Module, inputs: object, output: object) -> None:
        if tried and len(tried) == 1 and isinstance(output, torch.Tensor):
            refused.append(weakref.ref(output))

    def refuses(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        alive.append(sum(reference() is not None for reference in refused))
        return exceeds_tokens(60)(batch, model)

    hook = register_module_forward_hook(holds)
    try:
        with simulate_oom(refuses) as tried:
            task.run(
                "train.steps=1",
                "train.epochs=null",
                f"train.activation_checkpointing={checkpointed}",
            )
    finally:
        hook.remove()
    assert len(tried) > 2
    assert len(refused) > 20
    assert alive == [0] * len(tried)


@pytest.mark.parametrize("call", [2, 5, 9, 13, 17])
def test_resumed_oom_run_equals_uninterrupted(task: TinyTask, limited_run: Path, call: int) -> None:
    """Stopped in a step that is refused, in the one that is done again, and later; with dropout."""
    calls = 0

    def stopping(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), 15)
        return exceeds_tokens(60)(batch, model)

    with simulate_oom(stopping), pytest.raises(TrainingInterrupted):
        task.run()
    before = steps_of(task)
    with simulate_oom(exceeds_tokens(60)) as tried:
        task.run(resume=True)
    if len(before):
        assert all(tokens <= 60 for tokens in tried), "the smaller budget was forgotten"
    assert_bit_identical(task, "run", limited_run)
    assert [line["pack_tokens"] for line in steps_of(task)] == [
        line["pack_tokens"] for line in steps_of(task, limited_run)
    ]


def test_single_oversized_sample_enables_checkpointing(task: TinyTask) -> None:
    def refuses(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        return sum(batch.lengths) > 30 and not model.activation_checkpointing

    with simulate_oom(refuses):
        task.run()
    first, last = steps_of(task)[0], steps_of(task)[-1]
    assert last["activation_checkpointing"]
    assert last["pack_tokens"] == first["pack_tokens"] < 60
    assert (
        "continuing with activation checkpointing (train.activation_checkpointing=true)"
        in task.console_output
    )
    same = f"train.pack_tokens={last['pack_tokens']}"
    task.run(same, "train.activation_checkpointing=true", name="twice")
    assert_bit_identical(task, "run", "twice")
    (task.folder / "run" / "result.json").unlink()
    storage.remove_folder(task.folder / "run" / "checkpoints" / "step-6")
    with simulate_oom(refuses) as tried:
        task.run(resume=True)
    assert len(tried) < 10, "no try of what was known to be too much"
    assert_bit_identical(task, "run", "twice")
    page = (task.folder / "run" / "report.html").read_text()
    assert "and activation checkpointing from step 1." in page


def test_sample_that_never_fits_ends_with_checkpoint(
    task: TinyTask, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = False

    def begin(session: TrainState, step: StepBatch) -> None:
        nonlocal full
        full = True

    from_third_step(monkeypatch, begin)
    recipe = task.recipe | {"output_dir": str(task.folder / "run")}
    path = write_recipe(task.folder / "recipe.yaml", recipe, save_every=6)
    with simulate_oom(lambda batch, model: full):
        assert command(["train", str(path)]) == 2
    result = capsys.readouterr().err
    assert "error: sample train" in result
    assert "tokens and 4 patches" in result or "patches: the GPU memory is full: CUDA out" in result
    assert "sufficient memory for one sample at a time with activation checkpointing" in result
    assert "data.max_length" in result
    assert [path.name for path in (task.folder / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert len(steps_of(task)) == 2
    # Memory that others took is free again.
    assert command(["train", str(path), "--resume"]) == 0
    lines = steps_of(task)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["activation_checkpointing"] for line in lines] == [False] * 2 + [True] * 4


@contextmanager
def limit_evaluation_memory(
    tokens: int, while_captured: Sequence[bool] = (True,)
) -> Iterator[None]:
    """Limit the tokens of evaluation packs while `while_captured` has entries."""

    def refuse(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, VisionLanguageModel) and not torch.is_grad_enabled():
            batch = inputs[0]
            if while_captured and sum(batch.lengths) > tokens:
                raise torch.OutOfMemoryError(OOM_MESSAGE)

    hook = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def test_validation_loss_uses_smaller_packs(task: TinyTask) -> None:
    with limit_evaluation_memory(60):
        result = task.run()
    assert task.console_output.count("the GPU memory is full") == 4, "once for each measurement"
    # Training packs stay unchanged.
    assert {line["pack_tokens"] for line in steps_of(task)} == {100}
    baseline = task.run(name="plain")
    assert result.before.validation_loss == pytest.approx(baseline.before.validation_loss, rel=1e-5)
    assert read_losses(task.folder / "run") == read_losses(task.folder / "plain")


def test_evaluation_frees_graph_memory(task: TinyTask, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = enable_fake_graphs(monkeypatch)
    with limit_evaluation_memory(0, while_captured=graphs):
        result = task.run()
    assert graphs == []
    assert task.console_output.count("the GPU memory is full") == 1
    assert "continuing with the same packs without CUDA graphs" in task.console_output
    baseline = task.run(name="plain")
    assert result.before.validation_loss == baseline.before.validation_loss


def test_oversized_validation_sample_ends_with_checkpoint(task: TinyTask) -> None:
    task.run("train.save_every=6", name="plain")
    with limit_evaluation_memory(1):
        with pytest.raises(UserError, match=r"sample eval\d, \d+ tokens and \d+ patches"):
            task.run()
        assert not (task.folder / "run" / "checkpoints").exists()
    real, calls = trainer.run_evaluation, 0

    def evaluate_with_limit(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(*args)
        with limit_evaluation_memory(1):
            return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "run_evaluation", evaluate_with_limit)
        with pytest.raises(UserError, match="sufficient memory for one sample at a time\n"):
            task.run("train.save_every=3", resume=True)
    assert [path.name for path in (task.folder / "run" / "checkpoints").iterdir()] == ["step-3"]


@pytest.mark.parametrize("capacity", [1, 0])
def test_evaluation_batch_size_is_reduced(
    task: TinyTask, monkeypatch: pytest.MonkeyPatch, capacity: int
) -> None:
    eval_settings = {"metric": "ocr", "max_new_tokens": 4}
    task.run(eval=eval_settings, name="plain")
    real = ModelRunner.decode

    def step(self: ModelRunner, rows: int, longest: int) -> torch.Tensor:
        # Before the first step all fit.
        if rows > (capacity if (task.folder / "run" / "checkpoints").exists() else 3):
            raise torch.OutOfMemoryError(OOM_MESSAGE)
        return real(self, rows, longest)

    monkeypatch.setattr(ModelRunner, "decode", step)
    if not capacity:
        with pytest.raises(UserError, match=r"evaluation: the GPU memory[\s\S]*max_new_tokens"):
            task.run(eval=eval_settings)
        checkpoints = task.folder / "run" / "checkpoints"
        assert sorted(path.name for path in checkpoints.iterdir()) == ["step-4", "step-6"]
        return
    task.run(eval=eval_settings)
    assert (
        task.console_output.count(
            "memory is full: continuing with a batch of 1 answers (eval.batch_size)"
        )
        == 1
    )
    answers = [task.folder / name / "predictions" / "after.jsonl" for name in ("run", "plain")]
    assert answers[0].read_bytes() == answers[1].read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_real_gpu_out_of_memory(task: TinyTask, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images of a thousand tokens; from the third step on, half of the memory is available."""
    card = ("train.device=cuda", "train.num_workers=2")
    settings = (*card, "train.pack_tokens=16384", "train.batch_size=11", "train.epochs=6")
    large = {"min_pixels": 784_000, "max_pixels": 800_000}
    tune = {"merger": "full", "language": "lora", "lora": {"rank": 4, "dropout": 0.0}}
    is_limited = False

    def limit_memory(session: TrainState, step: StepBatch) -> None:
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

    torch.cuda.reset_peak_memory_stats()
    task.run(*settings, image=large, tune=tune, name="unlimited")
    from_third_step(monkeypatch, limit_memory)
    try:
        task.run(*settings, image=large, tune=tune)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert is_limited
    budgets = [line["pack_tokens"] for line in steps_of(task)]
    assert budgets[0] == budgets[1] == 16384 > 2 * budgets[-1]
    unlimited = read_losses(task.folder / "unlimited")
    # Kernels that add in no fixed order.
    for (step, loss), (_, expected) in zip(
        read_losses(task.folder / "run"), unlimited, strict=True
    ):
        assert loss == pytest.approx(expected, rel=0.02), step
