"""Tests of the command `finesight train`: exit codes, signals, files on disk."""

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import IO
from unittest.mock import patch

import pytest
import torch
from fake_hub_servers import TOKEN, ModelScopeHandler, run_hub_server
from hub_fixtures import cache
from tiny_task import make_task, read_final_files, read_losses, write_recipe

from finesight.cli.app import run_command
from finesight.files import storage
from finesight.hub import repository
from finesight.launch import trial_search
from finesight.plan import run_plan, step_time
from finesight.train import setup

__all__ = ["cache"]

COMMAND = [sys.executable, "-c", "from finesight.cli.app import main; main()", "train"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


@pytest.fixture(autouse=True, scope="module")
def use_one_thread() -> Iterator[None]:
    """On some CPUs, two threads sum in another order than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    return write_recipe(folder / "recipe.yaml", make_task(folder / "task"))


def test_json_result(recipe, tmp_path, cli):
    result = cli("train", recipe, f"output_dir={tmp_path / 'run'}", "--json").json
    assert result["steps"] == 6
    assert result["after"]["validation_loss"] < result["before"]["validation_loss"]
    trained = {row["part"] for row in result["param_changes"] if row["is_trained"]}
    assert trained == {"merger", "language"}
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*.*")}
    umask = os.umask(0)
    os.umask(umask)
    assert modes <= {0o666 & ~umask, 0o777 & ~umask}


def test_run_that_stops_after_some_steps_equals_uninterrupted_run(recipe, tmp_path, cli):
    cli("train", recipe, f"output_dir={tmp_path / 'whole'}")
    words = ("train", recipe, f"output_dir={tmp_path / 'run'}", "--resume")
    for steps, expected in ((0.3, 2), (4, 4), (2, 4)):
        assert f"step {expected} is reached" in cli(*words, f"--stop-after={steps}", code=75).err
        assert [step for step, _ in read_losses(tmp_path / "run")][-1] == expected
    cli(*words)
    assert read_losses(tmp_path / "run") == read_losses(tmp_path / "whole")
    assert read_final_files(tmp_path / "run") == read_final_files(tmp_path / "whole")
    without = ("data.eval=[]", f"output_dir={tmp_path / 'other'}", "--stop-after=1")
    assert "step 1 is reached" in cli("train", recipe, *without, code=75).err


class CalledCommand:
    """Replacement of `subprocess.Popen` for finesight: a call, since torch is imported here."""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: IO[bytes], **_: object):
        assert command[:3] == [sys.executable, "-m", "finesight"]
        log = open(stdout.fileno(), "w", closefd=False)  # noqa: SIM115
        with patch.dict(os.environ, env), log, redirect_stdout(log), redirect_stderr(log):
            self.code = run_command(command[3:])

    def wait(self) -> int:
        return self.code


def test_search_trains_and_resumes_trials(tmp_path, cli, monkeypatch):
    """Train the recipe itself to all rungs."""
    monkeypatch.setattr(trial_search, "MIN_SPLIT_SAMPLES", 40)
    monkeypatch.setattr(trial_search, "subprocess", SimpleNamespace(Popen=CalledCommand))
    task = make_task(tmp_path / "task", 40) | {"eval": {"metric": "classification"}}
    recipe, out = write_recipe(tmp_path / "recipe.yaml", task, epochs=1), tmp_path / "search"
    words = ("search", recipe, "--out", out, "--trials", 1, f"output_dir={tmp_path / 'run'}")
    result = cli(*words, "--json").json
    assert result["trials"][0]["state"] == "complete"
    assert [rung["rung"] for rung in result["trials"][0]["rungs"]] == [1, 9]
    assert cli("train", out / "trials/000", "--resume", "--json").json["steps"] == 8
    assert 0 <= result["test"]["0"] <= 1
    text = cli(*words).text
    assert "trial  state" in text
    assert f"next: finesight train {out}/best.yaml" in text
    assert "other settings, ranges or data" in cli(*words, "train.epochs=2", code=2).err


def test_finished_run_is_pushed(recipe, tmp_path, cache, cli, monkeypatch):
    output_dir, address = tmp_path / "receipts", "modelscope:me/receipts"
    train = ("train", recipe, f"output_dir={output_dir}", "tune.merger=frozen", "--push")
    cli(*train, f"{address}@main", code=2)
    cli(*train, "hf:me/receipts", "tune.merger=full", code=2)
    for offline, words in (("1", "HF_HUB_OFFLINE is set"), ("0", "MODELSCOPE_API_TOKEN: no token")):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert words in cli(*train, address, code=2).err
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    with run_hub_server(ModelScopeHandler) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        server.repositories["models/me/receipts"] = {}
        assert "exists and is public" in cli(*train, address, code=2).err
        assert not output_dir.exists()
        del server.repositories["models/me/receipts"]
        with monkeypatch.context() as patch:
            patch.setattr(repository, "publish_model", lambda *_, **__: 1 / 0)
            printed = cli(*train, address, "--json", code=1)
        assert printed.json["steps"] == 6
        assert "upload failed, but the run is complete: division by zero" in printed.err
        assert printed.err.endswith(f": finesight export {output_dir} {address} --yes\n")
        assert "uploaded: " in cli(*train, address, "--resume").err
        sent = server.repositories["models/me/receipts"]
    weights = {"adapter_config.json", "adapter_model.safetensors"}
    assert sent.keys() == {"README.md", "manifest.json"} | weights
    assert str(tmp_path) not in sent["manifest.json"].decode()
    card = sent["README.md"].decode()
    assert "## Evaluation" in card
    assert "6 steps." in card
    assert str(tmp_path) not in card


def test_run_folder_is_resumed_by_its_recipe(recipe, tmp_path, cli, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = recipe.parent / "task"
    labels = shutil.copy(data / "train.jsonl", data / "labels.jsonl")
    (data / "sources.json").write_text('["removed"]')
    overrides = ("output_dir=runs/one", f"data.train={labels}")
    messages = cli("train", recipe, *overrides, "--resume").err
    assert "runs/one: no run to resume; a new run starts" in messages
    assert messages.endswith("\n  finesight label runs/one IMAGES\n")
    messages = cli("train", "runs/one", "--resume").err
    assert "runs/one: the run is already complete, so nothing was trained" in messages
    assert "model=runs/one output_dir=runs/one-2" in messages
    shutil.copytree("runs/one", "runs/copy")
    error = cli("train", "runs/copy", "--resume", code=2).err
    assert "output_dir is runs/one, another folder" in error
    assert "a folder without recipe.yaml" in cli("train", "runs", "--resume", code=2).err
    cli("train", "runs/copy", "output_dir=runs/copy", "--resume")


def test_full_disk_is_reported(recipe, tmp_path, cli):
    """A file size limit of 100 KB, less than a checkpoint, causes a real system error."""
    output = tmp_path / "run"
    done = subprocess.run(
        [*COMMAND, str(recipe), f"output_dir={output}", "train.num_workers=0"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "cannot be written: file too large" in done.stderr
    assert "remedy: " in done.stderr
    assert "Traceback" not in done.stderr
    assert list((output / "checkpoints").iterdir()) == []
    cli("train", recipe, f"output_dir={output}", "--resume")
    assert [step for step, _ in read_losses(output)] == [1, 2, 3, 4, 5, 6]


KILLER_PROGRAM = f"""
import os, signal, sys, threading, time
from contextlib import suppress
from pathlib import Path
sys.path[:] = {sys.path}
from finesight.cli.app import main
from nonfinite_step import before_steps

def kill_workers():
    children = Path(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children")
    while True:
        with suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        time.sleep(0.005)

with before_steps([7], threading.Thread(target=kill_workers, daemon=True).start):
    main()
"""
"""Command line that kills its data loader workers from its seventh step on."""


def test_killed_data_workers_leave_a_checkpoint(recipe, tmp_path, cli):
    """Worker deaths are detected between two steps: the run saves a checkpoint and can resume.

    Takes long: two runs of 66 steps, as many workers die only during a run of many steps.
    """
    settings = ["train.epochs=24", "train.num_workers=2", "train.save_every=0", "data.eval=[]"]
    killed, full = tmp_path / "killed", tmp_path / "whole"
    program = [sys.executable, "-c", KILLER_PROGRAM, "train", recipe, *settings]
    done = subprocess.run(
        [*program, f"output_dir={killed}"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert "error: train.num_workers: a data loader worker died" in done.stderr
    assert "Traceback" not in done.stderr
    finished = len(read_losses(killed))
    assert finished < 66
    storage.verify_folder(killed / "checkpoints" / f"step-{finished}")
    cli("train", recipe, *settings, f"output_dir={killed}", "--resume")
    cli("train", recipe, *settings, f"output_dir={full}")
    assert read_final_files(killed) == read_final_files(full)


@pytest.mark.parametrize(
    ("memory_gb", "flops", "warning"),
    [
        (0.5, 1e12, "warning: the predicted peak memory is"),
        (64, 1e4, "warning: 6 training steps on this CPU take about"),
    ],
)
def test_forced_and_long_runs_are_warned_about(
    recipe, tmp_path, cli, monkeypatch, memory_gb, flops, warning
):
    monkeypatch.setattr(run_plan, "MIN_CHECKED_PARAMS", 0)
    monkeypatch.setattr(step_time, "total_memory", lambda: round(memory_gb * 1e9))
    monkeypatch.setattr(setup, "measure_peak_flops", lambda device, dtype: flops)
    arguments = (recipe, "data.eval=[]", f"output_dir={tmp_path / 'run'}", "--force")
    assert warning in cli("train", *arguments).err


def test_failed_prediction_does_not_fail_the_run(recipe, tmp_path, cli, monkeypatch):
    def fail(*arguments: object) -> None:
        raise RuntimeError("no estimate")

    monkeypatch.setattr(run_plan, "build_meta_model", fail)
    cli("train", recipe, f"output_dir={tmp_path / 'run'}")


def test_epochs_with_an_empty_section(tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    recipe = "model: finesight-tiny\ndata: {train: missing.jsonl}\ntrain:\noutput_dir: run\n"
    Path("recipe.yaml").write_text(recipe)
    error = cli("train", "recipe.yaml", "train.epochs=1", code=2).err
    assert "missing.jsonl: no such file" in error
