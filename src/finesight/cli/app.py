"""Register the commands of `finesight` and map errors to exit codes.

Exit codes: 0 success, 1 internal error (with a traceback) or failed upload, 2 invalid user input,
75 stopped after writing a checkpoint, 130 interrupted. Commands import heavy packages inside their
functions, so that `--help` stays fast.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Collection, Sequence
from functools import partial
from io import TextIOWrapper
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from finesight import __version__
from finesight.cli.chat import chat
from finesight.cli.data import check, convert_boxes, export_data, import_data, plan, show
from finesight.cli.init import init
from finesight.cli.label import label
from finesight.cli.models import download, export, merge
from finesight.cli.results import compare, doctor, evaluate, predict, report
from finesight.cli.servers import serve, studio, web
from finesight.cli.training import convert, launch, quickstart, train
from finesight.errors import TrainingInterrupted, UserError, format_command
from finesight.host_memory import num_allowed_cpus

EXIT_USER_ERROR = 2
EXIT_CHECKPOINTED = 75
EXIT_INTERRUPTED = 130

LONG_SPIN_COUNT, SHORT_SPIN_COUNT = 20_000, 2_000
"""Spin counts (GOMP_SPINCOUNT). On two cores of a Xeon, LONG_SPIN_COUNT shortens a LoRA step by 20
%. Two concurrent runs on the same cores take twice as long with LONG_SPIN_COUNT as with
SHORT_SPIN_COUNT, and many times as long with the default of 300,000."""

LOADAVG_PATH = Path("/proc/loadavg")

_PLACEHOLDERS = {
    "int": "INTEGER",
    "float": "NUMBER",
    "str": "TEXT",
    "path": "PATH",
    "file": "FILE",
    "dir": "FOLDER",
}
"""Placeholder of each Python type that typer prints, such as `<int range>`."""

COMMAND_GROUPS = {
    "Start": ("init", "quickstart", "studio", "doctor", "download"),
    "Data": ("import", "check", "label", "show", "data"),
    "Training": ("plan", "train", "launch", "convert"),
    "Evaluation": ("eval", "report", "compare"),
    "Inference": ("predict", "chat", "web", "serve"),
    "Deployment": ("merge", "export"),
}
"""Sections of the top-level help with their commands."""

_TYPE_NAME = re.compile(rf"<(?:list\[)?({'|'.join(_PLACEHOLDERS)})(?: range)?\]?>", re.IGNORECASE)


class PlainHelpCommand(TyperCommand):
    """A command whose help shows `RECIPE [KEY=VALUE]...` and `--limit INTEGER`.

    Typer prints names of Python types instead, such as `{RECIPE} <path>` and `--limit <int range>`.
    """

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Return the words of the usage line after the command."""
        arguments = [p for p in self.get_params(ctx) if p.param_type_name == "argument"]
        return [str(self.options_metavar), *map(_format_argument, arguments)]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words after the command; reject options that are settings of a recipe."""
        params = self.get_params(ctx)
        known = {option for param in params for option in param.opts}
        if any(param.name == "overrides" for param in params):
            for word, following in zip_longest(args, args[1:], fillvalue=""):
                option, _, value = word.partition("=")
                if option.startswith("--") and option not in known:
                    _reject_setting(option, value or following)
        else:
            _reject_override(args, known)
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the sections of arguments and options."""
        sections: dict[str, list[tuple[str, str]]] = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            name, text = record
            if param.param_type_name == "argument":
                sections["Arguments"].append((_format_argument(param), text))
            else:
                name = _TYPE_NAME.sub(lambda match: _PLACEHOLDERS[match[1].lower()], name)
                sections["Options"].append((name, text))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


def _reject_setting(option: str, value: str) -> None:
    """Raise UserError for an option that names a setting of a trainer."""
    from finesight.recipe import suggest_override

    is_flag = not value or value.startswith("--")
    remedy = suggest_override(option.removeprefix("--"), "true" if is_flag else value)
    if remedy is not None:
        raise UserError(
            f"no such option: {option}",
            where="command line",
            expected="settings of the recipe as KEY=VALUE, without --",
            remedy=remedy,
        )


def _reject_override(args: list[str], options: Collection[str]) -> None:
    """Raise UserError for a setting of a recipe after a command that takes none."""
    for name, separator, value in (word.partition("=") for word in args):
        section, _, last = name.rpartition(".")
        if not (separator and section) or os.path.exists(f"{name}={value}"):
            continue
        from finesight.recipe import list_setting_names

        if name in list_setting_names():
            option = f"--{last.replace('_', '-')}"
            names = ", ".join(sorted(one for one in options if one.startswith("--")))
            raise UserError(
                f"{name} is a setting of a recipe, and this command takes options only",
                where="command line",
                expected=names,
                remedy=f"use {option} {value}" if option in options else "remove it",
            )


def _format_argument(param: Any) -> str:
    """Format an argument: `NAME` if required, else `[NAME]`, with `...` for several values."""
    name = param.metavar or param.name.upper()
    return (name if param.required else f"[{name}]") + ("..." if param.nargs != 1 else "")


class GroupedHelp(TyperGroup):
    """Top-level help that lists the commands by stage of the workflow."""

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write one section per group of COMMAND_GROUPS."""
        for title, commands in COMMAND_GROUPS.items():
            rows = [
                (name, command.get_short_help_str(limit=100))
                for name in commands
                if (command := self.get_command(ctx, name)) is not None
            ]
            with formatter.section(title):
                formatter.write_dl(rows)


app = typer.Typer(
    name="finesight",
    cls=GroupedHelp,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
data_app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Export samples and convert boxes.\n\nExample: finesight data export mine/train.jsonl out"
    " --to llava",
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"finesight {__version__}")
        raise typer.Exit


@app.callback()
def configure_cli(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Fine-tune Qwen vision-language models on your own images.

    Start with quickstart. With your own images: init, train, predict.

    Example: finesight init photos/captions.csv
    """


_add_command = partial(app.command, cls=PlainHelpCommand)
_add_data_command = partial(data_app.command, cls=PlainHelpCommand)

_add_command(short_help="Run the complete workflow on generated data, on a CPU.")(quickstart)
_add_command(short_help="Import a dataset, and write a recipe that fits this machine.")(init)
_add_command(short_help="Download a model or dataset from a hub.")(download)
_add_command(short_help="Diagnose a machine, a model or a run.")(doctor)
_add_command("import", short_help="Import a dataset as samples.")(import_data)
_add_command(short_help="Validate samples.")(check)
_add_command(short_help="Label images with suggestions of a model.")(label)
_add_command(short_help="Print the tokenized samples of a recipe.")(show)
app.add_typer(data_app, name="data", short_help="Export samples and convert boxes.")
_add_data_command("export", short_help="Export samples in the format of another program.")(
    export_data
)
_add_data_command(
    "convert-boxes", short_help="Convert the boxes of a file to another model family."
)(convert_boxes)
_add_command(short_help="Convert a configuration or script of another trainer to a recipe.")(
    convert
)
_add_command(short_help="Estimate memory and time of a run and suggest settings that fit.")(plan)
_add_command(short_help="Fine-tune a model with a recipe.")(train)
_add_command(short_help="Write a training job for several GPUs or nodes.")(launch)
_add_command("eval", short_help="Evaluate a model or run on a dataset.")(evaluate)
_add_command(short_help="Write the HTML report of a run.")(report)
_add_command(short_help="Compare runs or evaluations on an HTML page.")(compare)
_add_command(short_help="Answer questions about images.")(predict)
_add_command(short_help="Start a chat in the terminal.")(chat)
_add_command(short_help="Start a chat UI in the browser.")(web)
_add_command(short_help="Start a page in the browser, from images to a served model.")(studio)
_add_command(short_help="Start an OpenAI-compatible HTTP server.")(serve)
_add_command(short_help="Merge an adapter into its base model.")(merge)
_add_command(short_help="Upload a model, convert it to GGUF, or print serving commands.")(export)


def run_command(arguments: Sequence[str], typer_app: typer.Typer = app) -> int:
    """Run one command line and return its exit code.

    Internal errors propagate, so that Python prints their traceback and exits with code 1.

    Args:
        arguments: Words of the command line after `finesight`.
        typer_app: Commands to run; tests replace them.
    """
    configure_openmp_spin()
    try:
        typer_app(args=list(arguments), prog_name="finesight")
    except UserError as error:
        names = "|".join(name for names in COMMAND_GROUPS.values() for name in names)
        program = format_command().replace("\\", r"\\")
        typer.echo(re.sub(rf"\bfinesight(?= (?:{names})\b)", program, f"error: {error}"), err=True)
        return EXIT_USER_ERROR
    except TrainingInterrupted as interrupt:
        typer.echo(str(interrupt), err=True)
        return EXIT_CHECKPOINTED
    except SystemExit as system_exit:
        # Typer exits with code 1 on Ctrl-C and on a closed pipe (`| head`).
        if isinstance(system_exit.__context__, typer.Abort):
            return EXIT_INTERRUPTED
        if isinstance(system_exit.__context__, BrokenPipeError):
            return 0
        return system_exit.code if isinstance(system_exit.code, int) else 0
    return 0


def main() -> None:
    """Run the command line of this process; the entry point of the `finesight` script."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8
    sys.exit(run_command(sys.argv[1:]))


def configure_openmp_spin() -> None:
    """Set the OpenMP spin count for this process and its children, before torch loads libgomp.

    Idle threads spin before they sleep. A long spin shortens training steps on an idle machine, and
    slows down concurrent processes on a busy one. The count is short if other threads use half of
    the CPUs, if their number is unknown (macOS), or if this process is one of several ranks.
    Unrelated processes that start at the same moment are not detected.
    """
    is_idle = False
    with contextlib.suppress(OSError, ValueError, IndexError):
        # The fourth field of proc_loadavg(5) includes this thread.
        num_running = int(LOADAVG_PATH.read_text().split()[3].partition("/")[0]) - 1
        is_single_process = os.environ.get("WORLD_SIZE", "1") == "1"
        is_idle = is_single_process and 2 * num_running < num_allowed_cpus()
    spin_count = LONG_SPIN_COUNT if is_idle else SHORT_SPIN_COUNT
    os.environ.setdefault("GOMP_SPINCOUNT", str(spin_count))
