"""Scripts for torchrun and Slurm: sound shell, safe quotes, and what they do when they are run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import fake_slurm
import pytest
from small_run import Task, losses, write_recipe

from finesight.errors import UserError
from finesight.launch.job import Job, Machines
from finesight.launch.scripts import Queue, slurm, torchrun

NASTY = 'it\'s; $(touch stolen) `id` "x" \n *'
TUNE = {"merger": "full", "language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}


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
    checked = subprocess.run(["shellcheck", "-"], input=text, capture_output=True, text=True)
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


@pytest.mark.parametrize("value", ["a b", "a\n#SBATCH --uid=0", "", "$(id)", "-x", "a'"])
def test_a_directive_has_no_quotes(value: str) -> None:
    with pytest.raises(UserError, match="is not a name") as caught:
        Queue(partition=value).directives()
    assert caught.value.where == "--partition"


def started(folder: Path, text: str, tasks: int) -> subprocess.Popen[str]:
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


def a_job(task: Task, name: str, tasks: int, epochs: int, save_every: int = 1000) -> Job:
    output = {"output": str(task.folder / name), "tune": TUNE}
    settings = {"learning_rate": 1e-3, "epochs": epochs, "save_every": save_every}
    path = write_recipe(task.folder / f"{name}.yaml", task.recipe | output, **settings)
    return Job.of(path, (), None, Machines(1, 2, tasks))


def wait_for_steps(folder: Path, count: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while len(losses(folder)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


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
    assert "stopped by SIGTERM, checkpoint of step" in said
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


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_torchrun_grows_and_starts_again_what_died(tmp_path: Path) -> None:
    """One machine learns until a second one comes; then a process of both is killed. Each time the
    run goes on from its newest checkpoint, and learns what one process learns."""
    task = Task(tmp_path / "task")
    text = torchrun(a_job(task, "run", 1, epochs=40, save_every=10))
    # Half a minute for more machines to come, else.
    text = text.replace("=c10d", "=c10d --rdzv-conf=last_call_timeout=1")
    text = text.replace("$MASTER_PORT", str(port := free_port())).replace("29400", str(port))
    folder = task.folder / "run"
    first = started(tmp_path, text, 1)
    wait_for_steps(folder, 4, first)
    second = started(tmp_path, text, 1)
    wait_for_processes(folder, [1, 2], first)
    os.kill(rank_of(second.pid), signal.SIGKILL)
    for process in (first, second):
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    assert processes(folder) == [1, 2, 2]
    assert json.loads((folder / "result.json").read_text())["steps"] == 110
    alone = task.run("train.epochs=40", "train.learning_rate=1e-3", name="alone", tune=TUNE)
    assert alone.steps == 110
    # Rounding grows from step to step.
    assert dict(losses(folder)) == pytest.approx(dict(losses(task.folder / "alone")), rel=1e-3)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def processes(folder: Path) -> list[int]:
    """How many learned together, each time that the run was begun or gone on with."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["processes"] for line in lines if "processes" in line]


def wait_for_processes(folder: Path, counts: list[int], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while processes(folder) != counts:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def rank_of(launcher: int) -> int:
    """The process that a launcher has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    ranks = [c for c in children if b"finesight" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return int(ranks[-1])
