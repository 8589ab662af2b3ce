"""Non-finite losses and gradients, and loss spikes."""

import math

import pytest
import torch
import torch.distributed as dist
from multi_process_run import fork_ranks
from nonfinite_step import before_steps, corrupt_steps, train_with_corrupt_steps
from safetensors.torch import load_file
from tiny_task import TinyTask, read_final_files, read_losses, write_recipe
from vision_cache_fixtures import LORA, make_train_state

from finesight.errors import UserError
from finesight.train import trainer
from finesight.train.checkpoint import OPTIMIZER_FILE, WEIGHTS_FILE
from finesight.train.logging import MAX_CONSECUTIVE_NONFINITE
from finesight.train.state import TrainState
from finesight.train.step import train_step

FULL_FINETUNE = dict.fromkeys(("vision", "merger", "language", "embeddings"), "full")


def state_of(session: TrainState) -> dict[str, torch.Tensor]:
    masters = session.engine.optimizer
    return {
        name: tensor.clone()
        for name, tensor in (*masters.master_weights().items(), *masters.optimizer_state().items())
    }


@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "muon"])
@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_nonfinite_step_does_not_update_state(tmp_path, optimizer, kind):
    """Breaks: a loss is NaN, a gradient infinite. Survive: weights, moments, the optimiser's count,
    and the step after it, which is what it would have been."""
    tune = LORA | {"merger": "full"}
    broken, full = (
        make_train_state(tmp_path / "task", tune, optimizer=optimizer) for _ in range(2)
    )
    for session in (broken, full):
        train_step(session, session.engine.step_dataset.get_step(0))
    before = state_of(broken)
    with corrupt_steps(kind, [2]):
        figures = trainer.train_step(broken, broken.engine.step_dataset.get_step(1)).wait()
    assert not math.isfinite(sum(figures))
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(broken).items())
    for session in (broken, full):
        train_step(session, session.engine.step_dataset.get_step(2))
    expected = state_of(full)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(broken).items())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in expected.items())


def test_nonfinite_step_is_logged_and_run_continues(task: TinyTask) -> None:
    """Corrupt one of six steps. It is skipped and logged with its samples."""
    with corrupt_steps("loss", [3]):
        result = task.run()
    lines = [line for line in task.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines if math.isnan(line["loss"])] == [3]
    assert math.isnan(lines[2]["grad_norm"])
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 1, 1, 1]
    assert len(lines[2]["nonfinite_samples"]) == 4
    data = f"{task.folder / 'train.jsonl'}:"
    assert all(sample.startswith(data) for sample in lines[2]["nonfinite_samples"])
    assert not any(line["nonfinite_samples"] for line in lines if line["step"] != 3)
    assert "skipped non-finite step 3: loss nan" in task.console_output
    assert result.loss == lines[-1]["loss"]
    assert (task.folder / "run" / "report.html").is_file()


def test_repeated_nonfinite_steps_end_the_run(task: TinyTask) -> None:
    """Corrupt all steps from the second on; the run ends, and its checkpoint is finite."""
    with (
        corrupt_steps("gradient", range(2, 20)),
        pytest.raises(UserError, match=f"{MAX_CONSECUTIVE_NONFINITE} steps in a row") as caught,
    ):
        task.run("train.save_every=2", "train.epochs=4")
    steps = [step for step, _ in read_losses(task.folder / "run")]
    assert steps == list(range(1, MAX_CONSECUTIVE_NONFINITE + 2))
    assert f"{task.folder / 'train.jsonl'}:" in caught.value.what
    for folder in (task.folder / "run" / "checkpoints").glob("step-*"):
        values = load_file(folder / WEIGHTS_FILE) | load_file(folder / OPTIMIZER_FILE)
        assert all(value.isfinite().all() for value in values.values())


def test_nonfinite_step_count_survives_resume(task: TinyTask) -> None:
    """Stop a run between non-finite steps; count, samples and results survive the resume."""
    settings = ("train.save_every=1", "train.epochs=4")
    data = {"train": task.recipe["data"]["train"]}
    steps = range(2, 2 + MAX_CONSECUTIVE_NONFINITE)
    stop = 2 + MAX_CONSECUTIVE_NONFINITE // 2

    def interrupt() -> None:
        raise KeyboardInterrupt

    with corrupt_steps("loss", steps):
        with pytest.raises(UserError, match="steps in a row") as full:
            task.run(*settings, name="whole", data=data)
        with before_steps([stop + 1], interrupt), pytest.raises(KeyboardInterrupt):
            task.run(*settings, data=data)
        assert len(read_losses(task.folder / "run")) == stop
        with pytest.raises(UserError, match="steps in a row") as resumed:
            task.run(*settings, resume=True, data=data)
    assert resumed.value.what == full.value.what
    with corrupt_steps("loss", steps[:-1]):
        for name in ("run", "whole"):
            task.run(*settings, name=name, resume=True, data=data)
    task.run(*settings, name="again", resume=True, data=data)
    assert read_final_files(task.folder / "run") == read_final_files(task.folder / "whole")
    assert read_final_files(task.folder / "run") != read_final_files(task.folder / "again")


def test_all_ranks_skip_the_same_step(task: TinyTask, every_point: bool) -> None:
    """Corrupt a step of two ranks; both skip it, with the result of a single process."""
    figures = []
    for count, parallel in ((1, "ddp"), (2, "ddp"), (2, "zero2"), (2, "fsdp"))[
        : 4 if every_point else 2
    ]:
        name = f"{parallel}{count}"
        changed = {"output_dir": str(task.folder / name), "tune": FULL_FINETUNE}
        settings = {"learning_rate": 1e-3, "parallel": parallel}
        recipe = write_recipe(task.folder / f"{name}.yaml", task.recipe | changed, **settings)
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        outputs = [task.folder / f"{name}.rank{rank}.txt" for rank in range(count)]
        ranks = fork_ranks(store.port, outputs, train_with_corrupt_steps, "loss", [2], recipe)
        for rank, output in zip(ranks, outputs, strict=True):
            rank.join(300)
            assert rank.exitcode == 0, output.read_text()
        figures.append(dict(read_losses(task.folder / name)))
    assert [step for step in figures[0] if math.isnan(figures[0][step])] == [2]
    for other in figures[1:]:
        assert other == pytest.approx(figures[0], rel=1e-5, nan_ok=True)


def test_loss_jump_is_reported(task: TinyTask) -> None:
    """Increase the loss of one step; the run reports one spike and continues."""
    settings = ("train.learning_rate=1e-6", "train.epochs=8", "train.save_every=30")
    with corrupt_steps("jump", [19]):
        task.run(*settings)
    assert task.console_output.count("loss spike in step") == 1
    assert "loss spike in step 19: " in task.console_output
    lines = [line for line in task.read_metrics() if "loss" in line]
    assert [line["step"] for line in lines if line["loss_spike_samples"]] == [19]
    assert len(lines[18]["loss_spike_samples"]) == 4
