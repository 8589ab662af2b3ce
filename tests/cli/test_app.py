"""Tests of the command line: help, exit codes, error messages."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys

import pytest
import typer
from case_files import load_cases

from finesight.cli.app import app, data_app, run_command
from finesight.errors import TrainingInterrupted, UserError

CASES = load_cases("app")

COMMANDS = (
    ["init"],
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
    ["check"],
    ["import"],
    ["data", "export"],
    ["data", "convert-boxes"],
    ["plan"],
    ["show"],
)
INTERACTIVE_COMMANDS = (["chat"], ["web"], ["serve"], ["studio"], ["label"])
"""Commands that run until they are stopped and print no results."""

HEAVY = ("torch", "numpy", "PIL", "transformers", "rich", "tokenizers", "fastapi", "gradio")


def run_captured(*arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = run_command(arguments)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_all_commands_are_registered(capsys):
    code, out, _ = run_captured("--help", capsys=capsys)
    assert code == 0
    registered = [*app.registered_commands, *data_app.registered_commands]
    names = [command.name or command.callback.__name__ for command in registered]
    known = (*COMMANDS, *INTERACTIVE_COMMANDS)
    assert sorted(names) == sorted(command[-1] for command in known)
    assert all(command[0] in out for command in known)


@pytest.mark.parametrize("command", [[], ["data"], *COMMANDS, *INTERACTIVE_COMMANDS], ids=" ".join)
def test_every_help_text_has_an_example(command, capsys):
    code, out, _ = run_captured(*command, "--help", capsys=capsys)
    assert code == 0
    assert "Example: finesight" in out


@pytest.mark.parametrize("command", [*COMMANDS, *INTERACTIVE_COMMANDS], ids=" ".join)
def test_help_texts_have_plain_placeholders(command, capsys):
    """Python types, and paths of pages that an installed package lacks, are not shown."""
    _, out, _ = run_captured(*command, "--help", capsys=capsys)
    assert not re.search(r"<(int|float|str|path|file|dir|list)|[{][A-Z]|\]\.\.\.\]|docs/", out)


def test_usage_shows_required_and_repeated_arguments(capsys):
    _, out, _ = run_captured("train", "--help", capsys=capsys)
    assert "finesight train [OPTIONS] RECIPE [KEY=VALUE]..." in out
    _, out, _ = run_captured("compare", "--help", capsys=capsys)
    assert "finesight compare [OPTIONS] RUN..." in out


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_result_commands_support_json(command, capsys):
    assert "--json" in run_captured(*command, "--help", capsys=capsys)[1]


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["--version"]], ids=" ".join)
def test_help_does_not_import_heavy_packages(command):
    code = (
        "import sys\n"
        "from finesight.cli.app import run_command\n"
        f"code = run_command({command!r})\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "sys.exit(f'imported {loaded}' if code or loaded else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_python_module_is_the_command():
    command = [sys.executable, "-m", "finesight", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("finesight ")


def test_user_error_exits_with_2_and_message(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: m\ndata: {train: a.jsonl}\noutput_dir: r\ntrain: {batchsize: 8}\n")
    code, out, err = run_captured("train", str(recipe), capsys=capsys)
    assert (code, out) == (2, "")
    assert err == (
        f"error: {recipe}:4: train.batchsize: unknown setting, given 8\n"
        "  expected: one of epochs, steps, batch_size, pack_tokens, optimizer, learning_rate,"
        " lr_schedule, warmup, weight_decay, betas, max_grad_norm, activation_checkpointing,"
        " precision, device, seed, data_seed, num_workers, vision_cache, parallel, save_every,"
        " keep_checkpoints\n"
        "  remedy: did you mean train.batch_size?\n"
    )


@pytest.mark.parametrize(
    ("options", "option", "remedy"), CASES["test_option_of_another_trainer_is_replaced"]
)
def test_option_of_another_trainer_is_replaced(options, option, remedy, capsys):
    code, _, err = run_captured("train", "recipe.yaml", *options, capsys=capsys)
    assert code == 2
    assert f"no such option: {option}\n" in err
    assert "as KEY=VALUE, without --" in err
    assert f"remedy: {remedy}" in err


@pytest.mark.parametrize(("arguments", "output"), CASES["test_usage_error_exits_with_2"])
def test_usage_error_exits_with_2(arguments, output, capsys):
    code, _, err = run_captured(*arguments, capsys=capsys)
    assert code == 2
    assert output in err
    assert "Traceback" not in err


def make_test_app(error: BaseException) -> typer.Typer:
    """Make an app with two commands; a single command would not need its name. `fail` raises the
    error."""
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
        (TrainingInterrupted("stopped by SIGTERM; checkpoint of step 3 written"), 75),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 0),
        (typer.Exit(3), 3),
    ],
    ids=["user", "interrupted", "ctrl-c", "pipe", "exit"],
)
def test_exit_codes(error, code, capsys):
    assert run_command(["fail"], make_test_app(error)) == code
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    if isinstance(error, TrainingInterrupted):
        assert "step 3" in printed


def test_successful_command_exits_with_0():
    assert run_command(["idle"], make_test_app(ValueError("never raised"))) == 0


def test_internal_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError, match="ours"):
        run_command(["fail"], make_test_app(ZeroDivisionError("ours")))


def test_broken_pipe_is_no_error():
    code = (
        "import sys, typer\n"
        "from finesight.cli.app import run_command\n"
        "commands = typer.Typer()\n"
        "commands.command('idle')(lambda: None)\n"
        "commands.command('many')(lambda: [typer.echo(str(n)) for n in range(200_000)])\n"
        "sys.exit(run_command(['many'], commands))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(), errors) == (0, b"")


@pytest.mark.parametrize(
    ("words", "found"), [("finesight tr", ["train"]), ("finesight data ex", ["export"])]
)
def test_shell_completion(words, found):
    surroundings = {
        "_FINESIGHT_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    command = [sys.executable, "-m", "finesight"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | surroundings)
    assert done.stdout.split() == found
