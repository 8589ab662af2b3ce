"""Jobs of a tiny task, started on this machine as an engine would start them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import fake_slurm
from nonfinite_step import before_steps
from tiny_task import TinyTask, read_losses, write_recipe

from finesight.launch.job_file import build_job_text
from finesight.launch.launch_job import LaunchJob, NodeSpec
from finesight.launch.launcher_component import LAUNCHERS

# Drop-outs are a function of the process, too.
TUNE = {"merger": "full", "language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}


def build_file(launcher: str, job: LaunchJob, **options: str) -> str:
    """Build the job file of a launcher."""
    return build_job_text(LAUNCHERS[launcher], job, options)


def run_job_script(folder: Path, text: str, tasks: int) -> subprocess.Popen[str]:
    """The script as Slurm runs it, with so many tasks on this machine."""
    commands = folder / "slurm"
    if not commands.exists():
        fake_slurm.install(commands)
    (folder / "job.sh").write_text(text)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "FAKE_SLURM": str(commands)}
    environment |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]"}
    environment |= {"SLURM_NTASKS": str(tasks)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = ["bash", str(folder / "job.sh")]
    return subprocess.Popen(command, env=os.environ | environment, start_new_session=True, **pipes)


NASTY = 'it\'s $(touch stolen) `id` "x"'

TRAIN = ["-m", "finesight", "train", f"{NASTY}.yaml", f"data.system_prompt={NASTY}", "--resume"]
"""Words after torchrun for the job of `make_nasty_job`."""


def make_nasty_job(
    nodes: str = "2", recipe: str = f"{NASTY}.yaml", output: str = "runs/first"
) -> LaunchJob:
    """Make a job with names that a shell would execute."""
    overrides = (f"data.system_prompt={NASTY}",)
    node_spec = NodeSpec.parse(nodes, 8)
    return LaunchJob("first", Path(recipe), overrides, Path(output), Path(), node_spec)


def run_container_script(shell: str, folder: Path, **environment: str) -> list[str]:
    """Run shell code of a container with a fake torchrun, and return the arguments of that."""
    torchrun = folder / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$SEEN"\n')
    torchrun.chmod(0o755)
    environment |= {"PATH": f"{folder}:/usr/bin:/bin", "SEEN": str(folder / "seen")}
    command = ["bash", "-c", shell.replace("/finesight", str(folder))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not [*folder.rglob("stolen")]
    return (folder / "seen").read_text().split("\0")[:-1]


def make_job(
    task: TinyTask, name: str, tasks: int, epochs: int, save_every: int = 1000, nodes: str = "1:2"
) -> LaunchJob:
    output = {"output_dir": str(task.folder / name), "tune": TUNE}
    settings = {"learning_rate": 1e-3, "epochs": epochs, "save_every": save_every}
    path = write_recipe(task.folder / f"{name}.yaml", task.recipe | output, **settings)
    return LaunchJob.from_recipe(path, (), None, NodeSpec.parse(nodes, tasks))


GATED_PROGRAM = """import sys
sys.path[:] = {path}
from launch_fixtures import wait_at_gates
from {module} import {function}
with wait_at_gates({folder!r}):
    sys.exit({function}({words}))
"""


def add_gates(
    text: str, folder: Path, *steps: int, command: str = "finesight.cli.app:run_command"
) -> str:
    """Return a job script whose ranks wait before each of these steps until `open_gate`.

    Args:
        command: Module and function with the arguments of `finesight`.
    """
    folder.mkdir()
    for step in steps:
        (folder / str(step)).touch()
    module, function = command.split(":")
    words = "sys.argv[1:]" if module.startswith("finesight") else "*sys.argv[2:]"
    values = {"path": sys.path, "folder": str(folder), "module": module, "words": words}
    program = folder.with_suffix(".py")
    program.write_text(GATED_PROGRAM.format(function=function, **values))
    return text.replace("-m finesight train", f"{program} train")


def open_gate(folder: Path, step: int) -> None:
    (folder / str(step)).unlink()


@contextmanager
def wait_at_gates(folder: str) -> Iterator[None]:
    with ExitStack() as stack:
        for gate in Path(folder).iterdir():
            stack.enter_context(before_steps([int(gate.name)], partial(wait_at_gate, gate)))
        yield


def wait_at_gate(gate: Path) -> None:
    while gate.exists():
        time.sleep(0.01)


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: len(read_losses(folder)) >= count, process)


def wait_for_line(file: Path, line: str, process: subprocess.Popen[str]) -> None:
    wait_for(lambda: line in file.read_text().splitlines(), process)


def wait_for(happened: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)
