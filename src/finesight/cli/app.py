"""The command `finesight`: its commands by name, and what their errors become.

Exit codes: 0 done, 2 the user's input, 1 our fault (with a traceback), 75 stopped after writing a
checkpoint, 130 stopped otherwise. Commands import what they compute with when they run, so that
help stays quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import TextIOWrapper
from typing import Annotated

import typer

from finesight import __version__
from finesight.cli.chat import chat
from finesight.cli.compare import compare
from finesight.cli.convert import convert
from finesight.cli.data_check import check
from finesight.cli.data_export import export_data
from finesight.cli.data_import import import_data
from finesight.cli.data_migrate import migrate
from finesight.cli.data_plan import plan
from finesight.cli.data_show import show
from finesight.cli.doctor import doctor
from finesight.cli.download import download
from finesight.cli.evaluate import evaluate
from finesight.cli.export import export
from finesight.cli.launch import launch
from finesight.cli.merge import merge
from finesight.cli.predict import predict
from finesight.cli.quickstart import quickstart
from finesight.cli.report import report
from finesight.cli.serve import serve
from finesight.cli.spinning import set_spinning
from finesight.cli.train import train
from finesight.cli.web import web
from finesight.errors import Interrupted, UserError

BAD_INPUT = 2
STOPPED_WITH_CHECKPOINT = 75
STOPPED = 130

app = typer.Typer(
    name="finesight",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
data = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Import data, and look at it.\n\nExample: finesight data show recipe.yaml",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"finesight {__version__}")
        raise typer.Exit


@app.callback()
def finesight(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Teach a Qwen vision-language model your own task, from pictures to a tuned model.

    Example: finesight quickstart
    """


app.command(short_help="The whole path in minutes, on a CPU.")(quickstart)
app.command(short_help="Fetch a model or data set from a hub.")(download)
app.command(short_help="Find what is wrong with a machine, a model or a run.")(doctor)
app.add_typer(data, name="data", short_help="Import data, and look at it.")
data.command("import", short_help="Turn pictures with labels into samples.")(import_data)
data.command(short_help="Find what is wrong with samples.")(check)
data.command("export", short_help="Write samples in another program's format.")(export_data)
data.command(short_help="Print every token of a recipe's samples.")(show)
data.command(short_help="Count what a run will take, and choose settings that fit.")(plan)
data.command(short_help="Write a file's boxes for another family.")(migrate)
app.command(short_help="Write a recipe from ms-swift's or LLaMA-Factory's settings.")(convert)
app.command(short_help="Tune a model as a recipe says.")(train)
app.command(short_help="Train a recipe by torchrun, Slurm, SkyPilot or Kubeflow.")(launch)
app.command("eval", short_help="Measure a model or run on held-out samples.")(evaluate)
app.command(short_help="Make the page of a run again.")(report)
app.command(short_help="Compare runs on one page.")(compare)
app.command(short_help="Answer questions about pictures.")(predict)
app.command(short_help="Talk with a model in the terminal.")(chat)
app.command(short_help="Talk with a model in a browser.")(web)
app.command(short_help="Serve a model over HTTP, as OpenAI's clients speak it.")(serve)
app.command(short_help="Add an adapter into its base model.")(merge)
app.command(short_help="Upload a model, convert it, or print how to serve it.")(export)


def run(arguments: Sequence[str], commands: typer.Typer = app) -> int:
    """Carry out one command line; gives the exit code. Only our own faults raise."""
    set_spinning()
    try:
        commands(args=list(arguments), prog_name="finesight")
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        return BAD_INPUT
    except Interrupted as interruption:
        typer.echo(str(interruption), err=True)
        return STOPPED_WITH_CHECKPOINT
    except SystemExit as end:
        # Typer turns Ctrl-C and a reader that has seen enough (| head) into exits with code 1.
        if isinstance(end.__context__, typer.Abort):
            return STOPPED
        if isinstance(end.__context__, BrokenPipeError):
            return 0
        return end.code if isinstance(end.code, int) else 0
    return 0


def main() -> None:
    """The entry point of the installed command."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8
    sys.exit(run(sys.argv[1:]))
