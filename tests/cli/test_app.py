"""Tests of the command line: help, exit codes, error messages, threads."""

import errno
import inspect
import os
import re
import subprocess
import sys

import click
import pytest
from case_files import load_cases

from finesight.cli import app as app_module
from finesight.cli.app import (
    configure_openmp_spin,
    run_command,
)
from finesight.errors import TrainingInterrupted, UserError
from finesight.operations import OPERATIONS, find_operation
from finesight.operations.operation import list_parameters

CASES = load_cases("app")
INTERACTIVE_COMMANDS = ("chat", "web", "serve", "studio", "label")
"""Commands that run until they are stopped and print no results."""

PYTHON_PARAMETERS = {"callbacks", "ask", "on_record", "has_main_guard", "settings"}
"""Parameters of operations that are no options of commands."""

HEAVY = ("torch", "numpy", "PIL", "transformers", "rich", "tokenizers", "fastapi", "gradio")


def test_every_command_has_a_plain_help_text_with_an_example(cli):
    """Python types, and paths of pages that an installed package lacks, are not shown."""
    overview = cli("--help").out
    assert "Example: finesight" in cli("data", "--help").out
    for name in (name for group in OPERATIONS.values() for name in group):
        text = cli(*name.split(), "--help").out
        assert "Example: finesight" in text, name
        assert not re.search(r"<(int|float|str|path|file|dir|list)|[{][A-Z]|\]\.\.\.\]", text)
        assert "docs/" not in text
        assert "--json" in text or name in INTERACTIVE_COMMANDS, name
        assert name.partition(" ")[0] in overview
        operation = find_operation(name)
        given = inspect.signature(operation).parameters.values()
        own = {one.name for one in given if one.kind is not one.VAR_KEYWORD} - PYTHON_PARAMETERS
        assert own <= {one.name for one in list_parameters(operation)}, name
    assert "finesight train [OPTIONS] RECIPE [KEY=VALUE]..." in cli("train", "--help").out
    assert "finesight compare [OPTIONS] RUN..." in cli("compare", "--help").out


def test_help_does_not_import_heavy_packages():
    code = (
        "import sys\n"
        "from finesight.cli.app import run_command\n"
        "codes = [run_command(one) for one in (['--help'], ['train', '--help'], ['--version'])]\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'imported {loaded}' if any(codes) or loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("finesight ")


@pytest.mark.parametrize(
    ("options", "option", "remedy"), CASES["test_option_of_another_trainer_is_replaced"]
)
def test_option_of_another_trainer_is_replaced(options, option, remedy, cli):
    error = cli("train", "recipe.yaml", *options, code=2).err
    assert f"no such option: {option}\n" in error
    assert "as KEY=VALUE, without --" in error
    assert f"remedy: {remedy}" in error


@pytest.mark.parametrize(("arguments", "output"), CASES["test_usage_error_exits_with_2"])
def test_usage_error_exits_with_2(arguments, output, cli):
    assert output in cli(*arguments, code=2).err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (UserError("no", where="here"), 2),
        (TrainingInterrupted("stopped by SIGTERM; checkpoint of step 3 written"), 75),
        (KeyboardInterrupt(), 130),
        (click.Abort(), 130),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 0),
        (click.exceptions.Exit(3), 3),
        (ZeroDivisionError("internal"), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_exit_codes(error, code, capsys):
    """An internal error keeps its traceback."""

    @click.command()
    def fail() -> None:
        if error is not None:
            raise error

    if code is None:
        with pytest.raises(ZeroDivisionError, match="internal"):
            run_command([], fail)
        return
    assert run_command([], fail) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    if isinstance(error, TrainingInterrupted):
        assert "step 3" in printed


def test_broken_pipe_is_no_error():
    code = (
        "import sys, click\n"
        "from finesight.cli.app import run_command\n"
        "many = click.command('many')(lambda: [click.echo(str(n)) for n in range(200_000)])\n"
        "sys.exit(run_command([], many))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(), errors) == (0, b"")


def test_shell_completion():
    surroundings = {"COMP_WORDS": "finesight data ex", "COMP_CWORD": "2"}
    surroundings |= {"_FINESIGHT_COMPLETE": "bash_complete"}
    command = [sys.executable, "-m", "finesight"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | surroundings)
    assert done.stdout.split() == ["plain,export"]


@pytest.mark.parametrize(
    ("loadavg", "cores", "variables", "expected"),
    CASES["test_openmp_threads_spin_long_only_on_idle_cores"],
)
def test_openmp_threads_spin_long_only_on_idle_cores(
    loadavg, cores, variables, expected, tmp_path, monkeypatch
):
    """Only currently running threads count, not the load average."""
    if loadavg is not None:
        (tmp_path / "loadavg").write_text(loadavg)
    monkeypatch.setattr(app_module, "LOADAVG_PATH", tmp_path / "loadavg")
    monkeypatch.setattr(app_module, "num_allowed_cpus", lambda: cores)
    monkeypatch.setattr(os, "environ", variables)
    configure_openmp_spin()
    assert os.environ["GOMP_SPINCOUNT"] == str(expected)


GPU_EXIT = """
import atexit, sys, threading, time
from finesight.cli import app
app._has_cuda_context = lambda: True
atexit.register(print, "exit function")
if "thread" in sys.argv:
    main = threading.main_thread()
    threading.Thread(target=lambda: (main.join(), time.sleep(0.2), print("thread"))).start()
sys.argv[1:] = ["eval", "--help"] if "thread" in sys.argv else ["eval"]
app.main()
"""


@pytest.mark.parametrize(("words", "code", "end"), [
    ((), 2, "exit function\n"), (("thread",), 0, "thread\nexit function\n")
])  # fmt: skip
def test_exit_of_a_gpu_process_loses_no_output(words, code, end):
    """Exit functions run, and other threads end first."""
    command = [sys.executable, "-c", GPU_EXIT, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith(end)
    assert bool(done.stderr) == bool(code)


def test_exit_of_a_gpu_process_without_output():
    command = [sys.executable, "-c", GPU_EXIT.replace('["eval"]', '["--version"]')]
    words = "import os, sys; os.close(1); os.execv(sys.argv[1], sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", words, *command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
