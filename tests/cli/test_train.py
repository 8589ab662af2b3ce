"""Tests of the command `finesight train`: exit codes, signals, files on disk."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from fake_hub_servers import TOKEN, run_hub_server
from fake_upload_servers import UploadModelScopeHandler, UploadStorageHandler
from hub_fixtures import cache
from tiny_task import make_task, read_final_files, read_losses, write_recipe

from finesight import storage
from finesight.cli.app import run_command
from finesight.hub import repository
from finesight.plan import run_plan, target_device
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


def test_json_result(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["train", str(recipe), f"output_dir={tmp_path / 'run'}", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 6
    assert result["after"]["validation_loss"] < result["before"]["validation_loss"]
    assert {row["part"] for row in result["param_changes"] if row["is_trained"]} == {
        "merger",
        "language",
    }
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "run").rglob("*.*")}
    umask = os.umask(0)
    os.umask(umask)
    assert modes <= {0o666 & ~umask, 0o777 & ~umask}


def test_finished_run_is_pushed(
    recipe: Path,
    tmp_path: Path,
    cache: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output_dir = f"output_dir={tmp_path / 'receipts'}"
    arguments = ["train", str(recipe), output_dir, "tune.merger=frozen", "--push"]
    assert run_command([*arguments, "modelscope:me/receipts@main"]) == 2
    assert run_command([*arguments, "hf:me/receipts", "tune.merger=full"]) == 2
    for offline, words in (("1", "HF_HUB_OFFLINE is set"), ("0", "MODELSCOPE_API_TOKEN: no token")):
        monkeypatch.setenv("HF_HUB_OFFLINE", offline)
        assert run_command([*arguments, "modelscope:me/receipts"]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    with run_hub_server(UploadModelScopeHandler, UploadStorageHandler) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        server.repositories["models/me/receipts"] = {}
        assert run_command([*arguments, "modelscope:me/receipts"]) == 2
        assert "exists and is public" in capsys.readouterr().err
        assert not (tmp_path / "receipts").exists()
        del server.repositories["models/me/receipts"]
        with monkeypatch.context() as patch:
            patch.setattr(repository, "publish_model", lambda *_, **__: 1 / 0)
            assert run_command([*arguments, "modelscope:me/receipts", "--json"]) == 1
        output = capsys.readouterr()
        assert json.loads(output.out)["steps"] == 6
        assert "upload failed, but the run is complete: division by zero" in output.err
        command = f"finesight export {tmp_path / 'receipts'} modelscope:me/receipts --yes"
        assert output.err.endswith(f"to upload it again: {command}\n")
        assert run_command([*arguments, "modelscope:me/receipts", "--resume"]) == 0
        sent = server.repositories["models/me/receipts"]
    assert "uploaded: " in capsys.readouterr().err
    assert sent.keys() == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    card = sent["README.md"].decode()
    assert "## Evaluation" in card
    assert "6 steps." in card
    assert str(tmp_path) not in card


def test_run_folder_is_resumed_by_its_recipe(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = recipe.parent / "task"
    labels = shutil.copy(data / "train.jsonl", data / "labels.jsonl")
    (data / "sources.json").write_text('["removed"]')
    overrides = ["output_dir=runs/one", f"data.train={labels}"]
    assert run_command(["train", str(recipe), *overrides, "--resume"]) == 0
    messages = capsys.readouterr().err
    assert "runs/one: no run to resume; a new run starts" in messages
    assert messages.endswith("to label further images: finesight label runs/one IMAGES\n")
    assert run_command(["train", "runs/one", "--resume"]) == 0
    messages = capsys.readouterr().err
    assert "runs/one: the run is already complete, so nothing was trained" in messages
    assert "model=runs/one output_dir=runs/one-2" in messages
    shutil.copytree("runs/one", "runs/copy")
    for folder, words in (
        ("runs/copy", "output_dir is runs/one, another folder"),
        ("runs", "a folder without recipe.yaml"),
    ):
        assert run_command(["train", folder, "--resume"]) == 2
        assert words in capsys.readouterr().err
    assert run_command(["train", "runs/copy", "output_dir=runs/copy", "--resume"]) == 0


def wait_for_lines(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    while not path.exists() or path.read_text().count("\n") < count:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)


LONG_RUN = ["train.epochs=60", "train.num_workers=2", "train.save_every=50"]


@pytest.fixture(scope="module")
def uninterrupted_run(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert run_command(["train", str(recipe), *LONG_RUN, f"output_dir={output}"]) == 0
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_checkpoint_and_exits_with_75(
    recipe: Path, tmp_path: Path, uninterrupted_run: Path, number: signal.Signals
) -> None:
    """The process group receives the signal, as from a terminal; the resumed run is identical.

    Takes long: the signal is to arrive before the last of 165 steps.
    """
    stopped = tmp_path / "stopped"
    arguments = [str(recipe), *LONG_RUN, f"output_dir={stopped}"]
    process = subprocess.Popen(
        [*COMMAND, *arguments],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for_lines(stopped / "metrics.jsonl", 7, process)
    os.killpg(process.pid, number)
    _, printed_text = process.communicate()
    assert process.returncode == 75, printed_text
    assert "Traceback" not in printed_text
    assert f"stopped by {number.name}" in printed_text
    assert "--resume" in printed_text
    finished = len(read_losses(stopped))
    assert 4 <= finished < 165
    storage.verify_folder(stopped / "checkpoints" / f"step-{finished}")
    done = subprocess.run(
        [*COMMAND, *arguments, "--resume"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {finished} of 165" in done.stderr
    assert read_final_files(stopped) == read_final_files(uninterrupted_run)
    assert read_losses(stopped) == read_losses(uninterrupted_run)


def test_full_disk_is_reported(recipe: Path, tmp_path: Path) -> None:
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
    assert run_command(["train", str(recipe), f"output_dir={output}", "--resume"]) == 0
    assert [step for step, _ in read_losses(output)] == [1, 2, 3, 4, 5, 6]


def test_killed_data_workers_leave_a_checkpoint(recipe: Path, tmp_path: Path) -> None:
    """Worker deaths are detected between two steps: the run saves a checkpoint and can resume.

    Takes long: 330 steps, as many workers die only during a run of many steps.
    """
    settings = [str(recipe), "train.epochs=60", "train.num_workers=2", "train.save_every=0"]
    killed, full = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [*COMMAND, *settings, "data.eval=[]", f"output_dir={killed}"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_lines(killed / "metrics.jsonl", 5, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    while process.poll() is None:
        with suppress(OSError):
            for child in children.read_text().split():
                os.kill(int(child), signal.SIGKILL)
        time.sleep(0.005)
    _, printed_text = process.communicate()
    assert process.returncode == 2, printed_text
    assert "error: train.num_workers: a data loader worker died" in printed_text
    assert "Traceback" not in printed_text
    finished = len(read_losses(killed))
    assert finished < 165
    storage.verify_folder(killed / "checkpoints" / f"step-{finished}")
    for output, more in ((killed, ["--resume"]), (full, [])):
        assert run_command(["train", *settings, "data.eval=[]", f"output_dir={output}", *more]) == 0
    assert read_final_files(killed) == read_final_files(full)


@pytest.mark.parametrize(
    ("memory_gb", "flops", "option", "exit_code", "words"),
    [
        (0.5, 1e12, [], 2, "error: model"),
        (0.5, 1e12, ["--force"], 0, "warning: the predicted peak memory is"),
        (64, 1e4, [], 0, "warning: 6 training steps on this CPU take about"),
        (64, 1e12, [], 0, "data.train: 11 samples"),
    ],
    ids=["does-not-fit", "forced", "long", "fits"],
)
def test_prediction_before_weights_are_loaded(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    memory_gb: float,
    flops: float,
    option: list[str],
    exit_code: int,
    words: str,
) -> None:
    monkeypatch.setattr(run_plan, "MIN_CHECKED_PARAMS", 0)
    monkeypatch.setattr(target_device, "total_memory", lambda: round(memory_gb * 1e9))
    monkeypatch.setattr(setup, "measure_peak_flops", lambda device, dtype: flops)
    command = ["train", str(recipe), f"output_dir={tmp_path / 'run'}", *option]
    assert run_command(command) == exit_code
    messages = capsys.readouterr().err
    assert words in messages
    assert ("train.precision=bf16, smaller images" in messages) == (exit_code == 2)
    assert ("start anyway with --force" in messages) == (exit_code == 2)
    assert (tmp_path / "run").exists() == (exit_code == 0)
    assert ("warning" in words) == ("warning" in messages)


def test_failed_prediction_does_not_fail_the_run(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no estimate")

    monkeypatch.setattr(run_plan, "build_meta_model", fail)
    assert run_command(["train", str(recipe), f"output_dir={tmp_path / 'run'}"]) == 0


def test_epochs_with_an_empty_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = "model: finesight-tiny\ndata: {train: missing.jsonl}\ntrain:\noutput_dir: run\n"
    Path("recipe.yaml").write_text(recipe)
    assert run_command(["train", "recipe.yaml", "train.epochs=1"]) == 2
    assert "missing.jsonl: no such file" in capsys.readouterr().err
