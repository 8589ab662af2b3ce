"""Commands of Slurm that a test puts on PATH; processes run on this machine.

Usage: python fake_slurm.py COMMAND ARGUMENTS..., with FAKE_SLURM the folder for what is told.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "scancel", "scontrol", "srun")


def install(folder: Path) -> Path:
    """Put the commands into a folder, which is to be the first of PATH."""
    folder.mkdir(parents=True)
    for name in COMMANDS:
        command = folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" {name} "$@"\n')
        command.chmod(0o755)
    return folder


def log_command(line: str) -> None:
    with (Path(os.environ["FAKE_SLURM"]) / "told").open("a") as file:
        file.write(f"{line}\n")


def srun(words: list[str]) -> int:
    """A process group for each task. The first that fails ends the others."""
    assert words[0] == "--kill-on-bad-exit=1", words
    count = int(os.environ["SLURM_NTASKS"])
    tasks = [
        subprocess.Popen(
            words[1:],
            start_new_session=True,
            env=os.environ | {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)},
        )
        for number in range(count)
    ]
    (Path(os.environ["FAKE_SLURM"]) / "tasks").write_text(" ".join(str(t.pid) for t in tasks))
    code = 0
    while any(task.poll() is None for task in tasks):
        code = code or max(abs(task.returncode or 0) for task in tasks)
        if code:
            kill_tasks(signal.SIGKILL)
        time.sleep(0.05)
    return code or max(abs(task.returncode) for task in tasks)


def kill_tasks(number: signal.Signals) -> None:
    """All processes of all tasks, as Slurm does it."""
    for group in (Path(os.environ["FAKE_SLURM"]) / "tasks").read_text().split():
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(group), number)


def main() -> int:
    name, *words = sys.argv[1:]
    log_command(" ".join([name, *words]))
    if name == "srun":
        return srun(words)
    if name == "scancel":
        assert words[0] == "--signal=USR1", words
        kill_tasks(signal.SIGUSR1)
        log_command("signaled")
    elif words[:2] == ["show", "hostnames"]:
        with contextlib.suppress(BrokenPipeError):
            print("127.0.0.1\nelsewhere", flush=True)
    elif name == "sbatch":
        print("Submitted batch job 7")
    return 0


if __name__ == "__main__":
    sys.exit(main())
