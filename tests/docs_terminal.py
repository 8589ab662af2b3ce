"""Run the code blocks of documentation pages in one shell and one folder."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from docs_code_blocks import CodeBlock

BLOCK_TIMEOUT_S = 300.0
"""Timeout of one block."""

SERVER_COMMAND = re.compile(r"finesight (serve|web|studio)\b(?!.*&[ \t]*(#.*)?$)", re.MULTILINE)
"""Commands that run until Ctrl-C; the page continues in another terminal."""

_ADDRESS = re.compile(r"http://[\w.]+:\d+")

_DONE_COMMAND = r"printf '\n@done %s\n'"

_PYTHON_LOOP = """
import json, sys, traceback
told, names = sys.stdout, {"__name__": "__main__"}
for line in sys.stdin:
    try:
        exec(compile(json.loads(line), "<block>", "exec"), names)
        told.write("\\n@done 0\\n")
    except BaseException:
        traceback.print_exc()
        told.write("\\n@done 1\\n")
    told.flush()
"""


class InteractiveProcess:
    """A shell or interpreter that runs code blocks one after another."""

    def __init__(self, command: list[str], folder: Path, env: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            command,
            cwd=folder,
            env=dict(env),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run_line(self, line: str) -> tuple[int, str]:
        """Run one line and return its exit status and output."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        output, until = b"", time.monotonic() + BLOCK_TIMEOUT_S
        while not (done := re.search(rb"\n@done (\d+)\n", output)):
            left = until - time.monotonic()
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, left))
            piece = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                return -1, output.decode(errors="replace") + ("" if ready else "\n(still running)")
            output += piece
        return int(done[1]), output[: done.start()].decode(errors="replace")

    def terminate(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait()


class DocsTerminal:
    """Runs code blocks and returns their output. A failed block raises AssertionError."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self._env = env
        self._shell = InteractiveProcess(["bash", "--norc"], folder, env)
        # A failed command ends the shell. Job control gives each job its own process group.
        self._shell.run_line(f"set -emo pipefail; {_DONE_COMMAND} 0")
        self._python: InteractiveProcess | None = None
        self._running: Path | None = None
        self._number = 0

    def run_block(self, block: CodeBlock) -> str:
        """Run a block, or write it to the file in its caption."""
        if block.caption is not None:
            file = self.folder / block.caption
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
            return ""
        if block.language == "python":
            return self._run_python_block(block)
        if block.language == "console":
            return self._run_session_block(block)
        return "".join(self._run_shell_block(block, part) for part in _split_commands(block.text))

    def _run_shell_block(self, block: CodeBlock, text: str) -> str:
        self._number += 1
        script = self.folder.with_name(f"{self.folder.name}-{self._number}.sh")
        if SERVER_COMMAND.match(text):
            return self._start_server(block, script, text)
        script.write_text(text, encoding="utf-8")
        status, output = self._shell.run_line(_source_command(script))
        assert status == 0, f"{block}: it ended in\n{text}\n{output[-3000:]}"
        return output

    def _run_session_block(self, block: CodeBlock) -> str:
        """Run `$ COMMAND` with the lines after `> ` as input."""
        command, *lines = block.text.splitlines()
        assert command.startswith("$ ")
        self._number += 1
        typed = self.folder.with_name(f"{self.folder.name}-{self._number}.txt")
        typed.write_text("".join(line.removeprefix("> ") + "\n" for line in lines))
        status, output = self._shell.run_line(f"{command[2:]} < {typed}; {_DONE_COMMAND} 0")
        assert status == 0, f"{block}: {output}"
        return output

    def _start_server(self, block: CodeBlock, script: Path, text: str) -> str:
        """Start a server, which runs until the next server or the end of the page."""
        self.interrupt_server()
        log = script.with_suffix(".log")
        command = re.sub(r"\s#.*", "", text).rstrip()
        script.write_text(f"{command} > {log} 2>&1 & echo $! > {script}.pid\n")
        log.touch()
        self._shell.run_line(_source_command(script))
        self._running = script
        until = time.monotonic() + 120
        while time.monotonic() < until:
            output = log.read_text(errors="replace")
            if _ADDRESS.search(output):
                return output
            time.sleep(0.2)
        raise AssertionError(f"{block}: no address after\n{text}\n{log.read_text()}")

    def interrupt_server(self) -> None:
        """Interrupt the running server with SIGINT and check its exit status."""
        if self._running is None:
            return
        script, self._running = self._running, None
        pid = int(Path(f"{script}.pid").read_text())
        os.killpg(os.getpgid(pid), signal.SIGINT)
        status, output = self._shell.run_line(
            f"wait {pid} && ended=0 || ended=$?; {_DONE_COMMAND} $ended"
        )
        output += script.with_suffix(".log").read_text()
        assert status in (0, 130), f"{script.read_text()}\nended with {status}: {output}"

    def _run_python_block(self, block: CodeBlock) -> str:
        if self._python is None:
            command = [sys.executable, "-u", "-c", _PYTHON_LOOP]
            self._python = InteractiveProcess(command, self.folder, self._env)
        status, output = self._python.run_line(json.dumps(block.text))
        assert status == 0, f"{block}: {output}"
        return output

    def close(self) -> None:
        """Stop all processes."""
        try:
            self.interrupt_server()
        finally:
            self._shell.terminate()
            if self._python is not None:
                self._python.terminate()


def _source_command(script: Path) -> str:
    return f". {script} < /dev/null; {_DONE_COMMAND} 0"


def _split_commands(text: str) -> Iterator[str]:
    """Yield server commands alone, and the other commands in groups."""
    gathered = ""
    for line in text.splitlines(keepends=True):
        if SERVER_COMMAND.match(line):
            if gathered.strip():
                yield gathered
            yield line
            gathered = ""
        else:
            gathered += line
    if gathered.strip():
        yield gathered
