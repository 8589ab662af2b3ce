"""Register the commands of `finesight` and map errors to exit codes.

Exit codes: 0 success, 1 internal error (with a traceback), 2 invalid user input, 75 stopped after
writing a checkpoint, 130 interrupted. Commands import heavy packages inside their functions, so
that `--help` stays fast.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
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
from finesight.cli.openmp_spin import configure_openmp_spin
from finesight.cli.plain_help import PlainHelpCommand
from finesight.cli.predict import predict
from finesight.cli.quickstart import quickstart
from finesight.cli.report import report
from finesight.cli.serve import serve
from finesight.cli.train import train
from finesight.cli.web import web
from finesight.errors import TrainingInterrupted, UserError

EXIT_USER_ERROR = 2
EXIT_CHECKPOINTED = 75
EXIT_INTERRUPTED = 130

app = typer.Typer(
    name="finesight",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
data_app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Import, check and convert datasets.\n\nExample: finesight data import labels.csv mine"
    ' --map image=path --map answer=text --prompt "What is this?"',
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

    Start with quickstart. With your own images: data import, data check, data plan, train, predict.

    Example: finesight quickstart
    """


_add_command = partial(app.command, cls=PlainHelpCommand)
_add_data_command = partial(data_app.command, cls=PlainHelpCommand)

_add_command(short_help="Run the complete workflow on generated data, on a CPU.")(quickstart)
_add_command(short_help="Download a model or dataset from a hub.")(download)
_add_command(short_help="Diagnose a machine, a recipe, a model or a run.")(doctor)
app.add_typer(data_app, name="data", short_help="Import, check and convert datasets.")
_add_data_command("import", short_help="Import a dataset as samples.")(import_data)
_add_data_command(short_help="Validate samples.")(check)
_add_data_command("export", short_help="Export samples in the format of another program.")(
    export_data
)
_add_data_command(short_help="Print the tokenized samples of a recipe.")(show)
_add_data_command(short_help="Estimate memory and time of a run and suggest settings that fit.")(
    plan
)
_add_data_command(short_help="Convert the boxes of a file to another model family.")(migrate)
_add_command(short_help="Convert an ms-swift or LLaMA-Factory configuration to a recipe.")(convert)
_add_command(short_help="Fine-tune a model with a recipe.")(train)
_add_command(short_help="Write a training job for several GPUs or nodes.")(launch)
_add_command("eval", short_help="Evaluate a model or run on a dataset.")(evaluate)
_add_command(short_help="Write the HTML report of a run.")(report)
_add_command(short_help="Compare runs or evaluations on an HTML page.")(compare)
_add_command(short_help="Answer questions about images.")(predict)
_add_command(short_help="Start a chat in the terminal.")(chat)
_add_command(short_help="Start a chat UI in the browser.")(web)
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
        typer.echo(f"error: {error}", err=True)
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
