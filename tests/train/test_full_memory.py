"""Runs whose GPU is full at times: they go on with less, to the results that they would have had.

A card of little memory is played by a model that refuses packs of more than so many tokens.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_card import FULL, Refuses, small_card
from small_run import Task, final_files, losses, write_recipe
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from finesight import storage
from finesight.cli.app import run as command
from finesight.encode.pack import PackedBatch
from finesight.errors import Interrupted, UserError
from finesight.infer.rows import Rows
from finesight.model.network import VisionLanguageModel
from finesight.train import loop
from finesight.train.budget import Budget, FullMemory
from finesight.train.loader import Step
from finesight.train.prepare import Session
from finesight.train.recorded import Passes
from finesight.train.step import Taken


def over(tokens: int) -> Refuses:
    """No room for more than so many tokens, but for any one sample."""
    return lambda batch, model: len(batch.lengths) > 1 and sum(batch.lengths) > tokens


def steps_of(task: Task, name: str = "run") -> list[dict[str, Any]]:
    return [line for line in task.history(name) if "loss" in line]


def trained(task: Task, name: str = "run", step: int = 6) -> dict[str, torch.Tensor]:
    folder = task.folder / name / "checkpoints" / f"step-{step}"
    return load_file(folder / "trainable.safetensors")


def same_bits(task: Task, one: str, other: str) -> None:
    a, b = final_files(task.folder / one), final_files(task.folder / other)
    # What names the recipe's own budget differs.
    own = {name for name in a if name.endswith(("state.json", "sha256.json"))}
    assert {name: a[name] for name in a if name not in own} == {
        name: b[name] for name in b if name not in own
    }
    assert losses(task.folder / one) == losses(task.folder / other)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_goes_on_as_one_that_had_the_smaller_budget(task: Task, workers: int) -> None:
    setting = f"train.workers={workers}"
    with small_card(over(60)) as tried:
        result = task.run(setting)
    assert result.steps == 6
    assert task.screen.count("the GPU's memory is full") == 1
    assert "CUDA out of memory. Tried to allocate 2.00 GiB; going on with packs" in task.screen
    (found,) = {line["pack_tokens"] for line in steps_of(task)}
    assert found < 60 < tried[0] <= 100
    assert f"packs of at most {found} tokens instead of 100 (train.pack_tokens={found})" in (
        task.screen
    )
    assert all(tokens <= 60 for tokens in tried[1:])
    task.run(setting, f"train.pack_tokens={found}", name="small")
    same_bits(task, "run", "small")
    page = (task.folder / "run" / "report.html").read_text()
    assert f"went on with less: packs of at most {found} tokens from step 1 on." in page
    assert "went on with less" not in (task.folder / "small" / "report.html").read_text()


def test_results_stay_the_same_up_to_rounding(task: Task) -> None:
    tune = {"merger": "full", "language": "lora", "lora": {"rank": 4, "dropout": 0.0}}
    task.run(tune=tune, name="roomy")
    with small_card(over(60)):
        task.run(tune=tune)
    found, expected = trained(task), trained(task, "roomy")
    start = trained(task, "roomy", step=4)
    for name, value in expected.items():
        moved, off = (value - start[name]).norm(), (value - found[name]).norm()
        # AdamW makes as long a step of a gradient that is all rounding.
        assert off < 0.01 * moved, f"{name} is {off} off, and moved {moved} in two steps"
    for (_, loss), (_, other) in zip(
        losses(task.folder / "run"), losses(task.folder / "roomy"), strict=True
    ):
        assert loss == pytest.approx(other, rel=1e-4)


def recordings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Let there be recordings, as on a card; the list is empty once they are given back."""
    real, held = Passes.forget, [True]

    def forget(passes: Passes) -> bool:
        real(passes)
        return held.pop() if held else False

    monkeypatch.setattr(Passes, "forget", forget)
    return held


def test_memory_of_recordings_is_given_back_before_packs_become_smaller(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    recordings(monkeypatch)
    refused: list[int] = []

    def once(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        refused.append(len(batch.lengths))
        return len(refused) == 1

    with small_card(once):
        result = task.run()
    assert result.steps == 6
    assert "going on with the same packs, not recorded where memory was full" in task.screen
    assert {line["pack_tokens"] for line in steps_of(task)} == {100}
    task.run(name="roomy")
    same_bits(task, "run", "roomy")


def from_third_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[Session, Step], None]) -> None:
    """Do something before every try of the third step and of those after it."""
    real = loop.take_step

    def taking(session: Session, step: Step, *rest: Any) -> Taken:
        if step.number >= 2:
            act(session, step)
        return real(session, step, *rest)

    monkeypatch.setattr(loop, "take_step", taking)


def test_what_a_pack_has_left_behind_when_it_broke_off_is_gone(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same as with a budget that is small from the third step on without any refusal."""
    late = False

    def begin(session: Session, step: Step) -> None:
        nonlocal late
        late = True

    def shrink(session: Session, step: Step) -> None:
        if session.progress.budget.pack_tokens == 100:
            below = Budget(pack_tokens=found, recompute=False)
            raise FullMemory("told beforehand", below=below)

    from_third_step(monkeypatch, begin)
    with small_card(lambda batch, model: late and over(60)(batch, model)):
        task.run()
    budgets = [line["pack_tokens"] for line in steps_of(task)]
    found = budgets[-1]
    assert budgets == [100, 100, found, found, found, found]
    monkeypatch.undo()
    from_third_step(monkeypatch, shrink)
    task.run(name="told")
    assert [line["pack_tokens"] for line in steps_of(task, "told")] == budgets
    same_bits(task, "run", "told")


@pytest.mark.parametrize("recompute", [False, True])
def test_nothing_that_a_refused_pack_held_is_alive_when_the_next_one_begins(
    task: Task, recompute: bool
) -> None:
    refused: list[weakref.ref[torch.Tensor]] = []
    alive: list[int] = []

    def holds(module: torch.nn.Module, inputs: object, output: object) -> None:
        if tried and len(tried) == 1 and isinstance(output, torch.Tensor):
            refused.append(weakref.ref(output))

    def refuses(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        alive.append(sum(kept() is not None for kept in refused))
        return over(60)(batch, model)

    hook = register_module_forward_hook(holds)
    try:
        with small_card(refuses) as tried:
            task.run("train.steps=1", "train.epochs=null", f"train.recompute={recompute}")
    finally:
        hook.remove()
    assert len(tried) > 2
    assert len(refused) > 20
    assert alive == [0] * len(tried)


@pytest.mark.parametrize("call", [2, 5, 9, 13, 17])
def test_a_resumed_run_equals_an_uninterrupted_one(task: Task, call: int) -> None:
    """Stopped in a step that is refused, in the one that is done again, and later; with dropout."""
    with small_card(over(60)):
        task.run(name="whole")
    calls = 0

    def stopping(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), 15)
        return over(60)(batch, model)

    with small_card(stopping), pytest.raises(Interrupted):
        task.run()
    before = steps_of(task)
    with small_card(over(60)) as tried:
        task.run(resume=True)
    if len(before):
        assert all(tokens <= 60 for tokens in tried), "the smaller budget was forgotten"
    same_bits(task, "run", "whole")
    assert [line["pack_tokens"] for line in steps_of(task)] == [
        line["pack_tokens"] for line in steps_of(task, "whole")
    ]


def test_a_sample_that_is_too_much_alone_is_computed_twice(task: Task) -> None:
    def refuses(batch: PackedBatch, model: VisionLanguageModel) -> bool:
        return sum(batch.lengths) > 30 and not model.recompute

    with small_card(refuses):
        task.run()
    first, last = steps_of(task)[0], steps_of(task)[-1]
    assert last["recompute"]
    assert last["pack_tokens"] == first["pack_tokens"] < 60
    assert "going on with activations computed twice (train.recompute=true)" in task.screen
    same = f"train.pack_tokens={last['pack_tokens']}"
    task.run(same, "train.recompute=true", name="twice")
    same_bits(task, "run", "twice")
    (task.folder / "run" / "result.json").unlink()
    storage.remove_folder(task.folder / "run" / "checkpoints" / "step-6")
    with small_card(refuses) as tried:
        task.run(resume=True)
    assert len(tried) < 10, "no try of what was known to be too much"
    same_bits(task, "run", "twice")
    page = (task.folder / "run" / "report.html").read_text()
    assert "and activations computed twice from step 1 on." in page


def test_a_sample_that_never_fits_ends_the_run_and_nothing_is_lost(
    task: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = False

    def begin(session: Session, step: Step) -> None:
        nonlocal full
        full = True

    from_third_step(monkeypatch, begin)
    recipe = task.recipe | {"output": str(task.folder / "run")}
    path = write_recipe(task.folder / "recipe.yaml", recipe, save_every=6)
    with small_card(lambda batch, model: full):
        assert command(["train", str(path)]) == 2
    told = capsys.readouterr().err
    assert "error: sample train" in told
    assert "tokens and 4 patches" in told or "patches: the GPU's memory is full: CUDA out" in told
    assert "room for one sample at a time whose activations are computed twice" in told
    assert "data.max_length" in told
    assert [path.name for path in (task.folder / "run" / "checkpoints").iterdir()] == ["step-2"]
    assert len(steps_of(task)) == 2
    # Memory that others took is free again.
    assert command(["train", str(path), "--resume"]) == 0
    lines = steps_of(task)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["recompute"] for line in lines] == [False] * 2 + [True] * 4


@contextmanager
def no_room_to_measure(tokens: int, while_held: Sequence[bool] = (True,)) -> Iterator[None]:
    """Within the block there is no room for more tokens at once, where nothing is learned, as long
    as there is something in `while_held`."""

    def refuse(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, VisionLanguageModel) and not torch.is_grad_enabled():
            batch = inputs[0]
            if while_held and sum(batch.lengths) > tokens:
                raise torch.OutOfMemoryError(FULL)

    hook = register_module_forward_pre_hook(refuse)
    try:
        yield
    finally:
        hook.remove()


def test_the_held_out_loss_takes_smaller_packs(task: Task) -> None:
    with no_room_to_measure(60):
        result = task.run()
    assert task.screen.count("the GPU's memory is full") == 4, "once for each measurement"
    # Learning had room.
    assert {line["pack_tokens"] for line in steps_of(task)} == {100}
    plain = task.run(name="plain")
    assert result.before is not None
    assert plain.before is not None
    assert result.before.held_out_loss == pytest.approx(plain.before.held_out_loss, rel=1e-5)
    assert losses(task.folder / "run") == losses(task.folder / "plain")


def test_measuring_may_have_the_memory_of_recordings(
    task: Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = recordings(monkeypatch)
    with no_room_to_measure(0, while_held=held):
        result = task.run()
    assert held == []
    assert task.screen.count("the GPU's memory is full") == 1
    assert "going on with the same packs, not recorded where memory was full" in task.screen
    plain = task.run(name="plain")
    assert result.before is not None
    assert plain.before is not None
    assert result.before.held_out_loss == plain.before.held_out_loss


def test_a_held_out_sample_that_is_too_much_ends_the_run_with_a_checkpoint(task: Task) -> None:
    task.run("train.save_every=6", name="plain")
    with no_room_to_measure(1):
        with pytest.raises(UserError, match=r"sample eval\d, \d+ tokens and \d+ patches"):
            task.run()
        assert not (task.folder / "run" / "checkpoints").exists()
    real, calls = loop.measure, 0

    def measuring(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            return real(*args)
        with no_room_to_measure(1):
            return real(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "measure", measuring)
        with pytest.raises(UserError, match="room for one sample at a time\n"):
            task.run("train.save_every=3", resume=True)
    assert [path.name for path in (task.folder / "run" / "checkpoints").iterdir()] == ["step-3"]


@pytest.mark.parametrize("room", [1, 0])
def test_answers_are_made_with_fewer_at_once(
    task: Task, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    measuring = {"metric": "ocr", "max_new_tokens": 4}
    task.run(eval=measuring, name="plain")
    real = Rows.step

    def step(self: Rows, rows: int, longest: int) -> torch.Tensor:
        # Before the first step all fit.
        if rows > (room if (task.folder / "run" / "checkpoints").exists() else 3):
            raise torch.OutOfMemoryError(FULL)
        return real(self, rows, longest)

    monkeypatch.setattr(Rows, "step", step)
    if not room:
        with pytest.raises(UserError, match=r"measuring: the GPU's memory[\s\S]*max_new_tokens"):
            task.run(eval=measuring)
        checkpoints = task.folder / "run" / "checkpoints"
        assert sorted(path.name for path in checkpoints.iterdir()) == ["step-4", "step-6"]
        return
    task.run(eval=measuring)
    assert task.screen.count("memory is full: going on with 1 answers at once (eval.batch)") == 1
    answers = [task.folder / name / "predictions" / "after.jsonl" for name in ("run", "plain")]
    assert answers[0].read_bytes() == answers[1].read_bytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_that_is_really_full(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of a thousand tokens each, and from the third step on half the room of the first."""
    card = ("train.device=cuda", "train.workers=2")
    settings = (*card, "train.pack_tokens=16384", "train.batch=11", "train.epochs=6")
    large = {"min_pixels": 784_000, "max_pixels": 800_000}
    tune = {"merger": "full", "language": "lora", "lora": {"rank": 4, "dropout": 0.0}}
    taking_all: list[torch.Tensor] = []

    def fill(session: Session, step: Step) -> None:
        if taking_all:
            return
        torch.cuda.synchronize()
        used = torch.cuda.memory_allocated()
        needed = torch.cuda.max_memory_allocated() - used
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info()
        taking_all.append(torch.empty(free - needed // 2, dtype=torch.uint8, device="cuda"))

    torch.cuda.reset_peak_memory_stats()
    task.run(*settings, picture=large, tune=tune, name="roomy")
    from_third_step(monkeypatch, fill)
    task.run(*settings, picture=large, tune=tune)
    assert len(taking_all) == 1
    taking_all.clear()
    torch.cuda.empty_cache()  # others may share the card
    budgets = [line["pack_tokens"] for line in steps_of(task)]
    assert budgets[0] == budgets[1] == 16384 > 2 * budgets[-1]
    roomy = losses(task.folder / "roomy")
    # Kernels that add in no fixed order.
    for (step, loss), (_, expected) in zip(losses(task.folder / "run"), roomy, strict=True):
        assert loss == pytest.approx(expected, rel=0.02), step
