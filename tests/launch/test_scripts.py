"""Scripts for torchrun and Slurm: sound shell, safe quotes, and what they do when they are run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import TUNE, a_job, started, wait_for_steps
from small_run import Task, losses

from finesight.errors import UserError
from finesight.launch.job import Job, Machines
from finesight.launch.scripts import Queue, slurm, torchrun

NASTY = 'it\'s; $(touch stolen) `id` "x" \n *'


def job(folder: Path, machines: Machines, python: str = sys.executable, output: str = "run") -> Job:
    recipe, overrides = Path(f"{NASTY}.yaml"), (f"data.system={NASTY}",)
    return Job("run", recipe, overrides, folder / output, folder, machines, python)


def scripts(folder: Path, python: str = sys.executable) -> dict[str, str]:
    one, many = Machines(1, 1, 2), Machines(2, 4, 8)
    return {
        "torchrun": torchrun(job(folder, one, python)),
        "torchrun of many": torchrun(job(folder, many, python)),
        "slurm": slurm(job(folder, one, python), Queue()),
        "slurm of many": slurm(job(folder, many, python), Queue("gpu,long", "me", "1-12:00:00")),
    }


@pytest.mark.parametrize("name", ["torchrun", "torchrun of many", "slurm", "slurm of many"])
def test_the_shell_can_read_it(name: str, tmp_path: Path) -> None:
    text = scripts(tmp_path / NASTY)[name]
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    assert not checked.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", ["torchrun", "torchrun of many", "slurm", "slurm of many"])
def test_shellcheck_finds_nothing(name: str, tmp_path: Path) -> None:
    text = scripts(tmp_path)[name]
    # Its notes are about quotes that are meant to be as they are.
    command = ["shellcheck", "--severity=warning", "-"]
    checked = subprocess.run(command, input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", ["torchrun", "torchrun of many", "slurm", "slurm of many"])
def test_words_arrive_as_they_were_given(name: str, tmp_path: Path) -> None:
    """Whatever stands in a path, a setting or a folder's name: nothing of it is carried out."""
    folder = tmp_path / NASTY
    folder.mkdir()
    python = folder / "python"
    code = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open('seen', 'w'))"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    done = started(tmp_path, scripts(folder, str(python))[name], 1)
    said, _ = done.communicate(timeout=60)
    assert done.returncode == (75 if "slurm" in name else 0), said
    words, environment = json.loads((folder / "seen").read_text())
    last = ["-m", "finesight", "train", f"{NASTY}.yaml", f"data.system={NASTY}", "--resume"]
    assert words[-6:] == last
    assert not [*tmp_path.rglob("stolen")]
    if name == "torchrun of many":
        assert words[:3] == ["-m", "torch.distributed.run", "--nnodes=2:4"]
        assert "--rdzv-endpoint=127.0.0.1:29400" in words
    elif name == "torchrun":
        assert words[2:5] == ["--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    else:
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert [environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]


def test_several_machines_have_to_know_one(tmp_path: Path) -> None:
    text = torchrun(job(tmp_path, Machines(2, 2, 1)))
    done = subprocess.run(
        ["bash"], input=text, capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode
    assert "MASTER_ADDR: has to name one of the machines" in done.stderr


def test_directives_are_slurms_own(tmp_path: Path) -> None:
    text = scripts(tmp_path)["slurm of many"]
    directives = [line for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert directives == [
        "#SBATCH --job-name=run",
        "#SBATCH --output=run-%j.log",
        "#SBATCH --open-mode=append",
        "#SBATCH --nodes=2-4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --requeue",
        "#SBATCH --signal=B:USR1@300",
        "#SBATCH --partition=gpu,long",
        "#SBATCH --account=me",
        "#SBATCH --time=1-12:00:00",
    ]


@pytest.mark.skipif(shutil.which("sbatch") is None, reason="Slurm is not installed")
@pytest.mark.parametrize("name", ["slurm", "slurm of many"])
def test_sbatch_takes_it(name: str, tmp_path: Path) -> None:
    """It reads all directives before it asks the cluster, which may have no such machines."""
    file = tmp_path / "run.sbatch"
    for text, known in (
        (scripts(tmp_path)[name], True),
        (scripts(tmp_path)[name].replace("--requeue", "--requeued"), False),
    ):
        file.write_text(text)
        command = ["sbatch", "--test-only", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        taken = done.returncode == 0 or "allocation failure" in done.stderr
        assert taken is known, done.stderr


@pytest.mark.parametrize("value", ["a b", "a\n#SBATCH --uid=0", "", "$(id)", "-x", "a'"])
def test_a_directive_has_no_quotes(value: str) -> None:
    with pytest.raises(UserError, match="is not a name") as caught:
        Queue(partition=value).directives()
    assert caught.value.where == "--partition"


@pytest.mark.skipif(sys.platform != "linux", reason="bash and processes as on clusters")
def test_slurm_warns_requeues_and_the_run_comes_to_its_end(tmp_path: Path) -> None:
    """Two processes learn until the warning, three after it: as if one had learned alone."""
    task = Task(tmp_path / "task")
    text = slurm(a_job(task, "run", 2, epochs=20), Queue())
    folder, told = task.folder / "run", tmp_path / "slurm" / "told"
    process = started(tmp_path, text, 2)
    wait_for_steps(folder, 4, process)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "stopped by SIGUSR1, checkpoint of step" in said
    stopped = max(step for step, _ in losses(folder))
    assert stopped < 55
    assert (folder / "checkpoints" / f"step-{stopped}").is_dir()
    assert told.read_text().splitlines()[-1] == f"scontrol requeue {os.getpid()}"
    told.unlink()
    process = started(tmp_path, text, 3)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert f"going on after step {stopped} of 55" in said
    assert "scontrol requeue" not in told.read_text()
    assert json.loads((folder / "result.json").read_text())["steps"] == 55
    alone = task.run("train.epochs=20", "train.learning_rate=1e-3", name="alone", tune=TUNE)
    assert alone.steps == 55
    assert dict(losses(folder)) == pytest.approx(dict(losses(task.folder / "alone")), rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="bash and processes as on clusters")
def test_slurm_does_not_requeue_what_fails_or_is_stopped_by_hand(tmp_path: Path) -> None:
    told = tmp_path / "slurm" / "told"
    python = tmp_path / "python"
    for code, ends in ((2, 2), (75, 75), (1, 1)):
        python.write_text(f"#!/bin/sh\nexit {code}\n")
        python.chmod(0o755)
        process = started(
            tmp_path, slurm(job(tmp_path, Machines(1, 1, 2), str(python)), Queue()), 2
        )
        said, _ = process.communicate(timeout=60)
        assert process.returncode == ends, said
    assert "scontrol requeue" not in told.read_text()
