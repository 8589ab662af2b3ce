"""A reader at a terminal: types what a page has in its blocks, in one folder, one shell."""

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

from docs_blocks import Block

LIMIT_S = 300.0
"""For what a block has to say until it is done."""

STAYS = re.compile(r"finesight (serve|web)\b(?!.*&[ \t]*(#.*)?$)", re.MULTILINE)
"""Commands that answer until Ctrl-C; the reader goes on in another terminal."""

_ADDRESS = re.compile(r"http://[\w.]+:\d+")

_DONE = r"printf '\n@done %s\n'"

_PYTHON = """
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


class Process:
    """A shell or an interpreter that is told one block after the other, and says how each ended."""

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

    def tell(self, line: str) -> tuple[int, str]:
        """How what the line asks for ended, and what it said."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        said, until = b"", time.monotonic() + LIMIT_S
        while not (done := re.search(rb"\n@done (\d+)\n", said)):
            left = until - time.monotonic()
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, left))
            piece = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not piece:
                return -1, said.decode(errors="replace") + ("" if ready else "\n(still running)")
            said += piece
        return int(done[1]), said[: done.start()].decode(errors="replace")

    def end(self) -> None:
        """Of all that it has started."""
        self._process.kill()
        self._process.wait()


class Reader:
    """Types blocks. What a block prints is returned; one that fails raises AssertionError."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        self.folder = folder
        self._env = env
        self._shell = Process(["bash", "--norc"], folder, env)
        # A command that fails ends the shell. Jobs are groups of their own, as at a terminal.
        self._shell.tell(f"set -emo pipefail; {_DONE} 0")
        self._python: Process | None = None
        self._running: Path | None = None
        self._number = 0

    def types(self, block: Block) -> str:
        """Type a block, or write the file that it is."""
        if block.caption is not None:
            file = self.folder / block.caption
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
            return ""
        if block.language == "python":
            return self._runs(block)
        if block.language == "console":
            return self._talks(block)
        return "".join(self._types(block, part) for part in _parts(block.text))

    def _types(self, block: Block, text: str) -> str:
        self._number += 1
        script = self.folder.with_name(f"{self.folder.name}-{self._number}.sh")
        if STAYS.match(text):
            return self._starts(block, script, text)
        script.write_text(text, encoding="utf-8")
        status, said = self._shell.tell(_sourced(script))
        assert status == 0, f"{block}: it ended in\n{text}\n{said[-3000:]}"
        return said

    def _talks(self, block: Block) -> str:
        """`$ COMMAND`, and after `> ` what is typed to it."""
        command, *lines = block.text.splitlines()
        assert command.startswith("$ ")
        self._number += 1
        typed = self.folder.with_name(f"{self.folder.name}-{self._number}.txt")
        typed.write_text("".join(line.removeprefix("> ") + "\n" for line in lines))
        status, said = self._shell.tell(f"{command[2:]} < {typed}; {_DONE} 0")
        assert status == 0, f"{block}: {said}"
        return said

    def _starts(self, block: Block, script: Path, text: str) -> str:
        """A server, which stays until the next one or the page's end."""
        self.interrupts()
        log = script.with_suffix(".log")
        command = re.sub(r"\s#.*", "", text).rstrip()
        script.write_text(f"{command} > {log} 2>&1 & echo $! > {script}.pid\n")
        log.touch()
        self._shell.tell(_sourced(script))
        self._running = script
        until = time.monotonic() + 120
        while time.monotonic() < until:
            said = log.read_text(errors="replace")
            if _ADDRESS.search(said):
                return said
            time.sleep(0.2)
        raise AssertionError(f"{block}: no address after\n{text}\n{log.read_text()}")

    def interrupts(self) -> None:
        """Ctrl-C for what still answers; it ends as one that was told to."""
        if self._running is None:
            return
        script, self._running = self._running, None
        pid = int(Path(f"{script}.pid").read_text())
        os.killpg(os.getpgid(pid), signal.SIGINT)
        status, said = self._shell.tell(f"wait {pid} && ended=0 || ended=$?; {_DONE} $ended")
        said += script.with_suffix(".log").read_text()
        assert status in (0, 130), f"{script.read_text()}\nended with {status}: {said}"

    def _runs(self, block: Block) -> str:
        if self._python is None:
            command = [sys.executable, "-u", "-c", _PYTHON]
            self._python = Process(command, self.folder, self._env)
        status, said = self._python.tell(json.dumps(block.text))
        assert status == 0, f"{block}: {said}"
        return said

    def leaves(self) -> None:
        """Stop what runs."""
        try:
            self.interrupts()
        finally:
            self._shell.end()
            if self._python is not None:
                self._python.end()


def _sourced(script: Path) -> str:
    return f". {script} < /dev/null; {_DONE} 0"


def _parts(text: str) -> Iterator[str]:
    """The commands that stay by themselves, and what stands between them together."""
    gathered = ""
    for line in text.splitlines(keepends=True):
        if STAYS.match(line):
            if gathered.strip():
                yield gathered
            yield line
            gathered = ""
        else:
            gathered += line
    if gathered.strip():
        yield gathered
