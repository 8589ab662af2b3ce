"""A job of two hosts: network and process namespaces of this machine, joined by a virtual cable."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from shutil import which

import psutil
import pytest
from launch_fixtures import add_gates, build_file, make_job, open_gate, wait_for_steps
from nonfinite_step import SHORT_TIMEOUT
from tiny_task import TinyTask, assert_same_run

NAMESPACES = ("unshare", "--net", "--uts", "--mount", "--pid", "--fork")
HAS_NAMESPACES = all(map(which, ("unshare", "nsenter", "ip"))) and not subprocess.call(
    [*NAMESPACES, "sh", "-c", "ip link add a0 type veth peer name b0"], stderr=subprocess.DEVNULL
)
ADDRESSES = {"host-a": "10.77.0.1", "host-b": "10.77.0.2"}
# Half an hour by default, and a quarter until the kernel gives up a connection.
SHORT_TIMEOUT_COMMAND = "nonfinite_step:train_with_short_timeout"


class Host:
    """Namespaces of a host, whose processes can be killed and started again."""

    def __init__(self, name: str, folder: Path, stack: ExitStack) -> None:
        self.name, self.log, self._stack = name, folder / f"{name}.log", stack
        # As on Debian: the name of the host is a loopback address.
        self._hosts = folder / f"{name}.hosts"
        self._hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        script = f"hostname {name} && ip link set lo up && exec sleep infinity"
        holder = subprocess.Popen(["unshare", "--net", "--uts", "sh", "-c", script])
        stack.callback(holder.kill)
        self.pid = holder.pid
        self._enter = ["nsenter", f"--target={holder.pid}", "--net", "--uts"]
        while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            time.sleep(0.01)

    def call(self, command: str) -> None:
        subprocess.run([*self._enter, "sh", "-c", command], check=True)

    def set_link(self, state: str) -> None:
        self.call(f"ip link set eth0 {state}")

    def start(self, script: Path) -> None:
        """Start a job script as the only process tree of the host."""
        setup = f'mount --bind "{self._hosts}" /etc/hosts && exec bash "{script}"'
        command = [*self._enter, *NAMESPACES[:1], *NAMESPACES[3:], "--mount-proc", "--kill-child"]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": ADDRESSES["host-a"]}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "sh", "-c", setup], env=environment, stdout=log, stderr=log, text=True
            )
        self._stack.callback(self.process.kill)

    def wait_for_output(self, text: str) -> None:
        deadline = time.monotonic() + 120
        while text not in self.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def kill(self) -> None:
        """Kill all processes: the namespace ends with its init process."""
        for process in psutil.Process(self.process.pid).children():
            process.kill()
        self.process.wait()


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    with ExitStack() as stack:
        a, b = (Host(name, folder, stack) for name in ADDRESSES)
        link = f"ip link add eth0 netns {a.pid} type veth peer name eth0 netns {b.pid}"
        subprocess.run(link.split(), check=True)
        for host in (a, b):
            host.call(f"ip addr add {ADDRESSES[host.name]}/24 dev eth0")
            host.call("echo 3 > /proc/sys/net/ipv4/tcp_retries2")
            host.set_link("up")
        try:
            yield a, b
        finally:
            for host in (a, b):
                print(host.name, host.log.read_text(), sep="\n")


def write_script(task: TinyTask, name: str, nodes: str, processes: int, *gates: int) -> Path:
    job = make_job(task, name, processes, epochs=16, save_every=10, nodes=nodes)
    text, script = build_file("torchrun", job), task.folder / f"{name}.sh"
    folder = task.folder / f"{name}-gates"
    script.write_text(add_gates(text, folder, *gates, command=SHORT_TIMEOUT_COMMAND))
    return script


def wait_for_success(*hosts: Host) -> None:
    for host in hosts:
        assert host.process.wait(200) == 0


@pytest.mark.skipif(not HAS_NAMESPACES, reason="namespaces need Linux, root, iproute2, util-linux")
def test_two_hosts_equal_one_after_failures(tmp_path: Path) -> None:
    """Kill a host, then cut the network; each time the host joins again. Compare bit for bit.

    Takes long: torchrun starts processes that import torch, and 44 steps twice.
    """
    task = TinyTask(tmp_path / "task")
    task.recipe["model"] = "finesight-tiny"
    with two_hosts(tmp_path) as (a, b):
        a.start(write_script(task, "one", "1", 2))
        wait_for_success(a)
        # The run waits for each failure.
        script, run = write_script(task, "two", "2", 1, 15, 28), task.folder / "two"
        gates = task.folder / "two-gates"
        for host in (a, b):
            host.start(script)
        wait_for_steps(run, 12, a.process)
        b.kill()
        open_gate(gates, 15)
        b.start(script)
        wait_for_steps(run, 25, a.process)
        a.set_link("down")
        open_gate(gates, 28)
        assert b.process.wait(120) != 0
        assert "The connection to the C10d store has failed" in b.log.read_text()
        assert not (run / "result.json").exists()
        a.wait_for_output(f"rank 1 of 2 did not respond within {SHORT_TIMEOUT}")
        a.set_link("up")
        b.start(script)
        wait_for_success(a, b)
    assert_same_run(run, task.folder / "one")
