"""Run the code blocks of documentation pages in one shell and one folder."""

from __future__ import annotations

import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

from docs_code_blocks import CodeBlock

BLOCK_TIMEOUT_S = 300.0
"""Timeout of one block."""

SERVER_COMMAND = re.compile(r"finesight (serve|web|studio)\b(?!.*&[ \t]*(#.*)?$)", re.MULTILINE)
"""Commands that run until Ctrl-C; the page continues in another terminal."""

START_SERVER = """\
{{ {command}
}} > {log} 2>&1 &
server=$!
until grep -Eq 'http://[a-z0-9.]+:[0-9]+' {log}; do
  kill -0 $server || {{ cat {log}; false; }}
  sleep 0.2
done
cat {log}
"""
INTERRUPT_SERVER = """\
if [ "$server" ]; then
  kill -INT -- -$server
  wait $server || [ $? = 130 ]
  server=
fi
"""

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
        self._number = 0
        self._shell = InteractiveProcess(["bash", "--norc"], folder, env)
        # A failed command ends the shell. Job control gives each job its own process group.
        self._shell.run_line(f"set -emo pipefail; server=; {_DONE_COMMAND} 0")

    @cached_property
    def _python(self) -> InteractiveProcess:
        command = [sys.executable, "-u", "-c", _PYTHON_LOOP]
        return InteractiveProcess(command, self.folder, self._env)

    def run_block(self, block: CodeBlock) -> str:
        """Run a block, or write it to the file in its caption."""
        if block.caption is not None:
            file = self.folder / block.caption
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
            return ""
        if block.language == "python":
            status, output = self._python.run_line(json.dumps(block.text))
            assert status == 0, f"{block}: {output}"
            return output
        if block.language == "console":
            # Run `$ COMMAND` with the lines after `> ` as input.
            command, *lines = block.text.splitlines()
            typed = [line.removeprefix("> ") for line in lines]
            return self._run_shell(block, "\n".join([f"{command[2:]} << 'END'", *typed, "END\n"]))
        return "".join(self._run_shell(block, text) for text in _split_commands(block.text))

    def _run_shell(self, block: CodeBlock, text: str) -> str:
        """Run commands. A server runs until the next one or the end of the page."""
        self._number += 1
        script = self.folder.with_name(f"{self.folder.name}-{self._number}.sh")
        if SERVER_COMMAND.match(text):
            start = START_SERVER.format(command=text.rstrip(), log=script.with_suffix(".log"))
            text = INTERRUPT_SERVER + start
        script.write_text(text, encoding="utf-8")
        status, output = self._shell.run_line(f". {script} < /dev/null; {_DONE_COMMAND} 0")
        assert status == 0, f"{block}: it ended in\n{text}\n{output[-3000:]}"
        return output

    def close(self) -> None:
        """Stop all processes."""
        status, output = self._shell.run_line(f"{INTERRUPT_SERVER}{_DONE_COMMAND} 0")
        self._shell.terminate()
        self._python.terminate()
        assert status == 0, output


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
