"""Scripts for torchrun and Slurm: sound shell, safe quotes, and what they do when they are run."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launch_fixtures import (
    TUNE,
    add_gates,
    build_file,
    make_job,
    open_gate,
    run_job_script,
    wait_for_line,
    wait_for_steps,
)
from tiny_task import TinyTask, read_losses

from finesight.errors import UserError
from finesight.launch.launch_job import LaunchJob, NodeSpec

NASTY = 'it\'s; $(touch stolen) `id` "x" \n *'


SCRIPTS = ("torchrun", "torchrun of many", "slurm", "slurm of many")


def build_script(name: str, folder: Path, python: str = sys.executable) -> str:
    recipe, overrides = Path(f"{NASTY}.yaml"), (f"data.system_prompt={NASTY}",)
    machines = NodeSpec(2, 4, 8) if name.endswith("of many") else NodeSpec(1, 1, 2)
    job = LaunchJob("run", recipe, overrides, folder / "run", folder, machines, python)
    if name.startswith("torchrun"):
        return build_file("torchrun", job)
    full = {"partition": "gpu,long", "account": "me", "time": "1-12:00:00"}
    return build_file("slurm", job, **(full if name.endswith("of many") else {}))


@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments_are_quoted_safely(name: str, tmp_path: Path) -> None:
    """Whatever stands in a path, a setting or a folder's name: nothing of it is carried out."""
    folder = tmp_path / NASTY
    folder.mkdir()
    python = folder / "python"
    code = "import json, os, sys; json.dump([sys.argv[1:], dict(os.environ)], open('seen', 'w'))"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    python.chmod(0o755)
    done = run_job_script(tmp_path, build_script(name, folder, str(python)), 1)
    output, _ = done.communicate(timeout=60)
    assert done.returncode == (75 if "slurm" in name else 0), output
    words, environment = json.loads((folder / "seen").read_text())
    last = ["-m", "finesight", "train", f"{NASTY}.yaml", f"data.system_prompt={NASTY}", "--resume"]
    assert words[-6:] == last
    assert not [*tmp_path.rglob("stolen")]
    if name == "torchrun of many":
        assert words[:3] == ["-m", "finesight.launch.torchrun", "--nnodes=2:4"]
        assert "--rdzv-endpoint=127.0.0.1:29400" in words
    elif name == "torchrun":
        assert words[2:5] == ["--standalone", "--nproc-per-node=2", "--max-restarts=3"]
    else:
        assert environment["MASTER_ADDR"] == "127.0.0.1"
        assert [environment[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]


def test_multi_node_script_needs_reachable_master_addr(tmp_path: Path) -> None:
    """The last name is not one of those with which a user selects the loopback interface."""
    text = build_script("torchrun of many", tmp_path)
    for given, message in (
        ({}, "MASTER_ADDR: must be the name of one node"),
        ({"MASTER_ADDR": "LOCALHOST"}, "MASTER_ADDR: LOCALHOST is 127.0.0.1 on this node"),
    ):
        command, environment = ["bash"], {"PATH": os.environ["PATH"]} | given
        done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment)
        assert done.returncode
        assert message in done.stderr


def test_slurm_directives(tmp_path: Path) -> None:
    text = build_script("slurm of many", tmp_path)
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


@pytest.mark.parametrize("value", ["a b", "a\n#SBATCH --uid=0", "", "$(id)", "-x", "a'"])
def test_invalid_directive_values_are_rejected(value: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="invalid name") as caught:
        build_file("slurm", make_job(TinyTask(tmp_path), "run", 1, 1), partition=value)
    assert caught.value.where == "--partition"


@pytest.mark.skipif(sys.platform != "linux", reason="bash and processes as on clusters")
def test_slurm_warning_requeues_and_run_completes(tmp_path: Path) -> None:
    """Train with two processes until the warning, then with three, and compare with one.

    Takes long: each of the two jobs starts torchrun, and ranks that import torch.
    """
    task = TinyTask(tmp_path / "task")
    text = build_file("slurm", make_job(task, "run", 2, epochs=20))
    # Otherwise, the run could end before the warning.
    text = add_gates(text, gates := tmp_path / "gates", 7)
    folder, result = task.folder / "run", tmp_path / "slurm" / "told"
    process = run_job_script(tmp_path, text, 2)
    wait_for_steps(folder, 4, process)
    process.send_signal(signal.SIGUSR1)
    wait_for_line(result, "signaled", process)
    open_gate(gates, 7)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert "stopped by SIGUSR1, checkpoint of step" in output
    stopped = max(step for step, _ in read_losses(folder))
    assert stopped < 55
    assert (folder / "checkpoints" / f"step-{stopped}").is_dir()
    assert result.read_text().splitlines()[-1] == f"scontrol requeue {os.getpid()}"
    result.unlink()
    process = run_job_script(tmp_path, text, 3)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert f"resuming after step {stopped} of 55" in output
    assert "scontrol requeue" not in result.read_text()
    assert json.loads((folder / "result.json").read_text())["steps"] == 55
    alone = task.run("train.epochs=20", "train.learning_rate=1e-3", name="alone", tune=TUNE)
    assert alone.steps == 55
    expected = dict(read_losses(task.folder / "alone"))
    assert dict(read_losses(folder)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="bash and processes as on clusters")
def test_failed_or_cancelled_jobs_are_not_requeued(tmp_path: Path) -> None:
    python = tmp_path / "python"
    for code in (2, 75, 1):
        python.write_text(f"#!/bin/sh\nexit {code}\n")
        python.chmod(0o755)
        process = run_job_script(tmp_path, build_script("slurm", tmp_path, str(python)), 2)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == code, output
    assert "scontrol requeue" not in (tmp_path / "slurm" / "told").read_text()
