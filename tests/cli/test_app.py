"""The command as a whole: quick help, exit codes, and errors that need no traceback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import typer

from finesight.cli.app import app, data, run
from finesight.errors import Interrupted, UserError

COMMANDS = (
    ["quickstart"],
    ["download"],
    ["doctor"],
    ["train"],
    ["launch"],
    ["eval"],
    ["predict"],
    ["merge"],
    ["export"],
    ["report"],
    ["compare"],
    ["convert"],
    ["data", "check"],
    ["data", "import"],
    ["data", "export"],
    ["data", "migrate"],
    ["data", "plan"],
    ["data", "show"],
)
TALKING = (["chat"], ["web"], ["serve"])
"""Commands that go on until they are told to stop, and print no results."""

HEAVY = ("torch", "numpy", "PIL", "transformers", "rich", "tokenizers", "fastapi", "gradio")


def _words(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = run(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_all_commands_are_there(capsys):
    code, out, _ = _words("--help", capsys=capsys)
    assert code == 0
    registered = [*app.registered_commands, *data.registered_commands]
    names = [command.name or command.callback.__name__ for command in registered]
    known = (*COMMANDS, *TALKING)
    assert sorted(names) == sorted(command[-1] for command in known)
    assert all(command[0] in out for command in known)


@pytest.mark.parametrize("command", [[], ["data"], *COMMANDS, *TALKING], ids=" ".join)
def test_every_help_has_an_example(command, capsys):
    code, out, _ = _words(*command, "--help", capsys=capsys)
    assert code == 0
    assert "Example: finesight" in out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_that_print_results_speak_json(command, capsys):
    assert "--json" in _words(*command, "--help", capsys=capsys)[1]


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["--version"]], ids=" ".join)
def test_help_imports_nothing_heavy(command):
    code = (
        "import sys\n"
        "from finesight.cli.app import run\n"
        f"code = run({command!r})\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'imported {loaded}' if code or loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_module_is_the_command():
    command = [sys.executable, "-m", "finesight", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("finesight ")


def test_users_mistake_is_2_with_where_what_expected_remedy(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndata: {train: a.jsonl}\noutput: r\ntrain: {batchsize: 8}\n")
    code, out, err = _words("train", str(recipe), capsys=capsys)
    assert (code, out) == (2, "")
    assert err == (
        f"error: {recipe}:4: train.batchsize: unknown setting, given 8\n"
        "  expected: one of epochs, steps, batch, pack_tokens, optimizer, learning_rate, schedule,"
        " warmup, weight_decay, betas, clip, recompute, precision, device, seed, data_seed,"
        " workers, cache, parallel, save_every, keep\n"
        "  remedy: did you mean train.batch?\n"
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train"], "RECIPE"),
        (["trian"], "trian"),
        (["train", "--nonsense"], "--nonsense"),
        (["predict", "run", "--batch", "many"], "--batch"),
    ],
)
def test_wrong_usage_is_2(arguments, said, capsys):
    code, _, err = _words(*arguments, capsys=capsys)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def _commands(error: BaseException) -> typer.Typer:
    """Two commands, as a single one would not need its name; `fail` raises the error."""
    commands = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

    @commands.command()
    def fail() -> None:
        raise error

    @commands.command()
    def idle() -> None:
        pass

    return commands


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("no", where="here"), 2),
        (Interrupted("stopped by SIGTERM; checkpoint of step 3 written"), 75),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 0),
        (typer.Exit(3), 3),
    ],
    ids=["user", "interrupted", "ctrl-c", "pipe", "exit"],
)
def test_exit_codes(error, code, capsys):
    assert run(["fail"], _commands(error)) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    if isinstance(error, Interrupted):
        assert "step 3" in printed


def test_a_command_that_ends_well_is_0():
    assert run(["idle"], _commands(ValueError("never raised"))) == 0


def test_our_own_faults_keep_their_traceback():
    with pytest.raises(ZeroDivisionError, match="ours"):
        run(["fail"], _commands(ZeroDivisionError("ours")))


def test_a_reader_that_leaves_early_is_no_error():
    code = (
        "import sys, typer\n"
        "from finesight.cli.app import run\n"
        "commands = typer.Typer()\n"
        "commands.command('idle')(lambda: None)\n"
        "commands.command('many')(lambda: [typer.echo(str(n)) for n in range(200_000)])\n"
        "sys.exit(run(['many'], commands))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(), errors) == (0, b"")


@pytest.mark.parametrize(
    ("words", "found"), [("finesight tr", ["train"]), ("finesight data pl", ["plan"])]
)
def test_shells_complete_commands(words, found):
    surroundings = {
        "_FINESIGHT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-m", "finesight"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | surroundings)
    assert done.stdout.split() == found
