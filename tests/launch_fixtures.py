"""Jobs of a tiny task, started on this machine as an engine would start them."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import fake_slurm
from tiny_task import TinyTask, read_losses, write_recipe

from finesight.launch.launch_job import LaunchJob, NodeSpec

# Drop-outs are a function of the process, too.
TUNE = {"merger": "full", "language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}


def run_job_script(folder: Path, text: str, tasks: int) -> subprocess.Popen[str]:
    """The script as Slurm runs it, with so many tasks on this machine."""
    commands = folder / "slurm"
    if not commands.exists():
        fake_slurm.install(commands)
    (folder / "job.sh").write_text(text)
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "FAKE_SLURM": str(commands),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_NTASKS": str(tasks),
        "MASTER_ADDR": "127.0.0.1",
    }
    return subprocess.Popen(
        ["bash", str(folder / "job.sh")],
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def make_job(
    task: TinyTask, name: str, tasks: int, epochs: int, save_every: int = 1000
) -> LaunchJob:
    output = {"output_dir": str(task.folder / name), "tune": TUNE}
    settings = {"learning_rate": 1e-3, "epochs": epochs, "save_every": save_every}
    path = write_recipe(task.folder / f"{name}.yaml", task.recipe | output, **settings)
    return LaunchJob.from_recipe(path, (), None, NodeSpec(1, 2, tasks))


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(read_losses(folder)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
