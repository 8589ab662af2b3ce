"""Register the commands of `finesight` and map errors to exit codes.

Exit codes: 0 success, 1 internal error (with a traceback) or failed upload, 2 invalid user input,
4 unreadable input was skipped, 75 stopped after writing a checkpoint, 130 interrupted. Commands
import heavy packages inside their functions, so that `--help` stays fast.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import gc
import inspect
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from io import TextIOWrapper
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

import click

from finesight import __version__
from finesight.errors import (
    EXIT_CHECKPOINTED,
    EXIT_CODES_VARIABLE,
    Step,
    TrainingInterrupted,
    TrainingStopped,
    UserError,
    escape_surrogates,
    escape_unprintable,
)
from finesight.host_memory import num_allowed_cpus
from finesight.operations import OPERATIONS, find_operation, is_installed
from finesight.operations.first_guesses import find_option, suggest_command, suggest_value
from finesight.operations.operation import (
    OUTCOME_VARIABLE,
    Outcome,
    Parameter,
    format_command,
    list_parameters,
)

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

MAX_RESULT_CHARS = 100_000
"""Maximum length of the data of a result in the report of a command."""

TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Environment variable of processes that torchrun has started."""

# Spin counts (GOMP_SPINCOUNT). On two cores of a Xeon, LONG_SPIN_COUNT shortens a LoRA step by
# 20 %. Two concurrent runs on the same cores take twice as long with LONG_SPIN_COUNT as with
# SHORT_SPIN_COUNT, and many times as long with the default of 300,000.
LONG_SPIN_COUNT = 20_000
SHORT_SPIN_COUNT = 2_000

GARBAGE_THRESHOLD = 150_000
"""New objects between searches for garbage. The imports of torch create 200,000 objects to keep."""

LOADAVG_PATH = Path("/proc/loadavg")


class OperationCommand(click.Command):
    """A command that explains settings of recipes and of other trainers among its words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words after the command; reject settings that are no words of it.

        Raises UserError with a proposal for an unknown option, and for a value that is no choice.
        """
        params = self.get_params(ctx)
        known = set(_list_words(params))
        command = ctx.command_path.partition(" ")[2]
        has_overrides = any(param.name == "overrides" for param in params)
        for word, following in zip_longest(args, args[1:], fillvalue=""):
            if has_overrides:
                _reject_option(command, word, following, known)
            else:
                _reject_override(word, known)
        words = [*args]  # which the parser consumes
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name == "-h":
                click.echo(ctx.get_help())
                ctx.exit()
            raise self._build_option_error(ctx, error.option_name, words) from error
        except click.BadParameter as error:
            raise _build_choice_error(error) or error from error

    def _build_option_error(
        self, ctx: click.Context, option: str, words: Sequence[str]
    ) -> UserError:
        """Build the error for an unknown option among words, with the right ones."""
        params = self.get_params(ctx)
        options = [word for word in _list_words(params) if word.startswith("-")]
        arguments = [str(param.name) for param in params if isinstance(param, click.Argument)]
        value = ""
        for word, following in zip_longest(words, words[1:], fillvalue=""):
            given, _, attached = word.partition("=")
            if given == option:
                value = attached or following
                break
            # The value of a short option may be part of its word.
            if len(option) == 2 and word.startswith(option):
                value = word[2:].removeprefix("=")
                break
        if value.startswith("-"):
            value = ""
        command = ctx.command_path.partition(" ")[2]
        guess = find_option(command, option, value, options, arguments)
        remedy = f"see {ctx.command_path} --help"
        if guess is not None:
            remedy = guess.format(option)
            if guess.kind == "argument":
                usage = " ".join(self.collect_usage_pieces(ctx))
                remedy += f": {ctx.command_path} {usage}"
        return UserError(
            f"no such option: {option}",
            where="command line",
            expected=f"one of {', '.join(options)}",
            remedy=remedy,
        )


def _list_words(params: Sequence[click.Parameter]) -> list[str]:
    """Return the options of a command with their opposites, and the names of its arguments."""
    words: list[str] = []
    for param in params:
        words += param.opts
        words += param.secondary_opts
    return words


def _build_choice_error(error: click.BadParameter) -> UserError | None:
    """Build the error for a value that is no choice; None without a similar choice."""
    param = error.param
    match = re.match("'(.*)' is not one of ", error.message)
    if param is None or match is None or not isinstance(param.type, click.Choice):
        return None
    choices = [*map(str, param.type.choices)]
    value = suggest_value(str(param.name), match[1], choices)
    if not value:
        return None
    return UserError(
        f"{param.opts[0]} is {match[1]!r}",
        where="command line",
        expected=f"one of {', '.join(choices)}",
        remedy=f"use {param.opts[0]} {value}",
    )


def _reject_option(command: str, word: str, following: str, known: Collection[str]) -> None:
    """Raise UserError for an option that names a setting of a trainer."""
    option, _, value = word.partition("=")
    if not option.startswith("--") or option in known:
        return
    from finesight.settings.recipe import suggest_override

    value = value or following
    if value.startswith("--"):  # the next option: this one is a flag
        value = ""
    guess = find_option(command, option, value, (), ["overrides", "recipe"])
    remedy: str | None
    if guess is None:
        remedy = suggest_override(option.removeprefix("--"), value or "true")
    else:
        remedy = guess.format(option)
    if remedy is not None:
        raise UserError(
            f"no such option: {option}",
            where="command line",
            expected="settings of the recipe as KEY=VALUE, without --",
            remedy=remedy,
        )


def _reject_override(word: str, known: Collection[str]) -> None:
    """Raise UserError for a setting of a recipe that is an option of the command."""
    name, _, value = word.partition("=")
    option = f"--{name.rpartition('.')[2].replace('_', '-')}"
    if "." in name and value and option in known:
        raise UserError(
            f"{name} is a setting of a recipe",
            where="command line",
            expected="options",
            remedy=f"use {option} {value}",
        )


def build_command(name: str, function: Callable[..., Any]) -> click.Command:
    """Build the command of an operation. Its help is the docstring of the operation."""
    parameters = list_parameters(function)
    params = list(map(_build_param, parameters))
    if "ask" in inspect.signature(function).parameters:
        text = "Ask no questions: use the detected settings."
        params.append(click.Option(["use_defaults", "--yes"], is_flag=True, help=text))
    if inspect.signature(function).return_annotation != "None":
        text = "Print JSON on standard output, one object per line; messages go to standard error."
        params.append(click.Option(["as_json", "--json"], is_flag=True, help=text))
    callback = partial(_run, function, parameters)
    return OperationCommand(name, callback=callback, params=params, help=_read_help(function))


def _read_help(function: Callable[..., Any]) -> str:
    """Return the docstring of an operation without the sections for callers in Python.

    Each option shows its own line of `Args`. Results and errors concern callers in Python.
    """
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    sections = ("Args:", "Returns:", "Raises:")
    return "\n\n".join(text for text in paragraphs if not text.startswith(sections))


def _run(
    function: Callable[..., Any],
    parameters: Sequence[Parameter],
    as_json: bool = False,
    use_defaults: bool = False,
    **given: Any,
) -> None:
    """Run an operation, and print its outcome."""
    arguments: dict[str, Any] = {}
    for parameter in parameters:
        value = given[parameter.name]
        if parameter.is_multiple and not value and parameter.is_optional:
            value = None
        arguments[parameter.name] = parameter.convert(value)
    accepted = inspect.signature(function).parameters
    if as_json and "on_record" in accepted:
        arguments["on_record"] = _print_json
    if "has_main_guard" in accepted:
        arguments["has_main_guard"] = True
    if "ask" in accepted and not use_defaults:
        if is_interactive():
            arguments["ask"] = partial(click.prompt, err=True)
        else:
            text = "standard input is not a terminal: no questions, as with --yes"
            click.echo(text, err=True)
    outcome: Outcome[object] | None = function(**arguments)
    if outcome is None:
        return  # a server that was stopped
    _print_outcome(outcome, as_json=as_json)
    if outcome.exit_code:
        raise click.exceptions.Exit(outcome.exit_code)


def _print_outcome(outcome: Outcome[object], *, as_json: bool) -> None:
    """Print an outcome, and record its next steps and data in the report of `run_command`."""
    if as_json:
        records = outcome.data if isinstance(outcome.data, list) else [outcome.data]
        for record in records:
            _print_json(record)
    elif outcome.lines:
        click.echo("\n".join(map(escape_unprintable, outcome.lines)))
    for note in outcome.notes:
        click.echo(escape_unprintable(note), err=True)
    next_steps = [step for step in outcome.next_steps if is_installed(step.operation)]
    if (report := click.get_current_context().obj) is not None:
        report["next_steps"] = next_steps
        report["result"] = select_result(outcome.data)
    commands = list(map(_format_next_step, next_steps))
    if commands and not as_json and report is None:
        separator = " " if len(commands) == 1 else "\n  "
        click.echo(separator.join(["next:", *commands]), err=True)


def select_result(data: object) -> object:
    """Return the data of a result for a report.

    It is empty for a list of records and for large data. Non-UTF-8 bytes of names become question
    marks, as in the report.
    """
    from finesight.samples.sample import to_json_data

    if isinstance(data, dict):
        text = json.dumps(to_json_data(data), ensure_ascii=False)
        if len(text) <= MAX_RESULT_CHARS:
            return json.loads(text.encode(errors="replace"))
    return {}


def _format_next_step(step: Step) -> str:
    command = format_command(step)
    if step.purpose:
        return f"{command}  # {step.purpose}"
    return command


def is_interactive() -> bool:
    """Return whether questions can be answered on standard input."""
    return sys.stdin.isatty()


def _print_json(data: object) -> None:
    """Print data as one line of JSON, without NaN and with escaped non-UTF-8 bytes."""
    click.echo(_format_json(data))


def _format_json(data: object) -> str:
    from finesight.samples.sample import to_json_data

    return escape_surrogates(json.dumps(to_json_data(data), ensure_ascii=False))


def _build_param(parameter: Parameter) -> click.Parameter:
    common: dict[str, Any] = {"required": parameter.is_required, "help": parameter.help}
    if not parameter.is_required:
        common["default"] = parameter.default
    if parameter.is_positional:
        return _build_argument(parameter, common)
    names = [parameter.name, parameter.option]
    if parameter.kind == "flag":
        # The default of a flag without a name for its opposite is clear.
        return click.Option(names, is_flag=True, show_default="/" in parameter.option, **common)
    return click.Option(
        names,
        type=_build_type(parameter),
        metavar=_get_metavar(parameter),
        multiple=parameter.is_multiple,
        show_default=True,
        **common,
    )


def _build_argument(parameter: Parameter, common: dict[str, Any]) -> click.Argument:
    metavar = parameter.metavar or parameter.name.upper()
    if parameter.is_required:
        common["help"] += "  [required]"
    else:
        metavar = f"[{metavar}]"
    nargs = 1
    if parameter.is_multiple:
        metavar = f"{metavar}..."
        nargs = -1
    param_type = _build_type(parameter)
    return click.Argument([parameter.name], type=param_type, nargs=nargs, metavar=metavar, **common)


def _get_metavar(parameter: Parameter) -> str | None:
    """Return the name of the value of an option in the help, None for that of its choices."""
    if parameter.metavar:
        return parameter.metavar
    kind: str = parameter.kind
    if kind == "path":
        kind = parameter.path.split()[-1]
    if kind == "choice":
        return None
    return "PATH" if kind == "any" else kind.upper()


def _build_type(parameter: Parameter) -> click.ParamType[Any]:
    if parameter.choices:
        return click.Choice(parameter.choices)
    if parameter.kind == "integer":
        minimum = None if parameter.minimum is None else int(parameter.minimum)
        maximum = None if parameter.maximum is None else int(parameter.maximum)
        return click.IntRange(minimum, maximum)
    if parameter.kind == "number":
        return click.FloatRange(parameter.minimum, parameter.maximum)
    if parameter.kind == "path":
        return click.Path(
            exists=parameter.path.startswith("existing"),
            file_okay=not parameter.path.endswith("folder"),
            dir_okay=not parameter.path.endswith("file"),
            path_type=Path,
        )
    return click.STRING


def _as_json(value: object) -> object:
    if isinstance(value, UserError):
        return {part: vars(value)[part] for part in ("what", "where", "expected", "remedy")}
    if isinstance(value, Step):
        return asdict(value)
    return str(value)


class CommandGroup(click.Group):
    """Commands of operations, which are imported when they are used.

    Args:
        sections: Names of operations, and groups, by section of the help and by name.
    """

    def __init__(
        self,
        *args: Any,
        sections: Mapping[str, Mapping[str, str | CommandGroup]],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._sections = sections
        self._entries: dict[str, str | CommandGroup] = {}
        for section in sections.values():
            self._entries.update(section)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the words before a command. Raises UserError for an unknown option."""
        words = [*args]
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if error.option_name == "-h":
                click.echo(ctx.get_help())
                ctx.exit()
            program = ctx.command_path
            options: list[str] = []
            for param in self.get_params(ctx):
                options += param.opts
            remedy = suggest_command(error.option_name, options) or f"see {program} --help"
            if any(word in self._entries for word in words):
                remedy = "write the options after the command"
            raise UserError(
                f"no such option: {error.option_name}",
                where="command line",
                expected=f"{program} COMMAND, with the options after the command",
                remedy=remedy,
            ) from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command of the first word. Raises UserError with a proposal for another one."""
        name = args[0]
        if name in self._entries or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        prefix = ctx.command_path.partition(" ")[2]
        commands = set(chain.from_iterable(OPERATIONS.values()))
        remedy = ""
        if prefix:
            # Such as `data import`, which is `import`.
            full_names = [one for one in (f"{prefix} {name}", name) if one in commands]
            near = difflib.get_close_matches(f"{prefix} {name}", commands, n=1)
            found = [*full_names, *near]
            if found:
                remedy = f"did you mean finesight {found[0]}?"
        remedy = remedy or suggest_command(name, commands)
        raise UserError(
            f"no such command: {name}",
            where="command line",
            expected=f"one of {', '.join(self._entries)}",
            remedy=remedy or f"see {ctx.command_path} --help",
        )

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of the commands, in the order of the help."""
        return [*self._entries]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return the command with a name, which imports its operation; None for an unknown one."""
        entry = self._entries.get(cmd_name)
        if isinstance(entry, str):
            return build_command(cmd_name, find_operation(entry))
        return entry

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the sections with the summaries of their commands."""
        for title, section in self._sections.items():
            rows: list[tuple[str, str]] = []
            for name, entry in section.items():
                command: click.Command
                if isinstance(entry, str):
                    # Without parameters, whose choices may import components.
                    command = click.Command(name, help=_read_help(find_operation(entry)))
                else:
                    command = entry
                rows.append((name, command.get_short_help_str(100)))
            with formatter.section(title):
                formatter.write_dl(rows)


_SECTIONS: dict[str, dict[str, str | CommandGroup]] = {
    title: {name: name for name in group if " " not in name} for title, group in OPERATIONS.items()
}
_DATA = {name[5:]: name for name in OPERATIONS["Data"] if name.startswith("data ")}
if _DATA:
    _SECTIONS["Data"]["data"] = CommandGroup(
        "data",
        sections={"Commands": _DATA},
        help="Export samples.\n\nExample: finesight data export mine/train.jsonl out --to llava",
    )


@click.command(
    cls=CommandGroup,
    sections=_SECTIONS,
    help="""Fine-tune Qwen vision-language models on your own images.

    Start with quickstart. With your own images: init, train, predict.

    Example: finesight init photos/captions.csv""",
)
@click.version_option(
    __version__, message="%(prog)s %(version)s", help="Print the version and exit."
)
def app() -> None:
    """Do nothing before a command."""


def run_command(arguments: Sequence[str], command: click.Command = app) -> int:
    """Run one command line and return its exit code.

    Internal errors propagate, so that Python prints their traceback and exits with code 1.

    Args:
        arguments: Words of the command line after `finesight`.
        command: Commands to run; tests replace them.
    """
    configure_openmp_spin()
    # Processes that the command starts have no outcome of their own.
    file = os.environ.pop(OUTCOME_VARIABLE, "")
    if not file:
        return _run_words(arguments, command, None)
    report: dict[str, object] = {"exit_code": 1}
    try:
        code = report["exit_code"] = _run_words(arguments, command, report)
    finally:
        text = json.dumps(report, default=_as_json, ensure_ascii=False)
        # For this user only: the error may contain data.
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        # Non-UTF-8 bytes of names become question marks; as escaped surrogates, they are no text.
        with open(descriptor, "w", encoding="utf-8", errors="replace") as stream:
            stream.write(text)
    return code


def _run_words(
    arguments: Sequence[str], command: click.Command, report: dict[str, object] | None
) -> int:
    """Run a command line, and return its exit code.

    Args:
        report: Receives the next steps or the error, which the terminal shows otherwise.
    """
    try:
        code = command.main(list(arguments), "finesight", standalone_mode=False, obj=report)
    except click.ClickException as error:
        if report is None:
            error.show()
        else:
            report["error"] = UserError(error.format_message(), where="command line")
        return error.exit_code
    except click.Abort:
        return EXIT_INTERRUPTED
    except SystemExit:
        return 0  # click exits so on a closed pipe (`| head`) only
    except UserError as error:
        if report is not None:
            report["error"] = error
            return EXIT_USER_ERROR
        if isinstance(error.remedy, Step):
            error.remedy = error.remedy.format(format_command)
        click.echo(f"error: {error}", err=True)
        return EXIT_USER_ERROR
    except TrainingInterrupted as interrupt:
        # torchrun takes any other code for a failure, and may start the processes again.
        is_success = isinstance(interrupt, TrainingStopped) and TORCHRUN_VARIABLE in os.environ
        message = str(interrupt)
        if is_success:
            message += "; exit code 0, because torchrun reports others as failures"
        if os.environ.get("RANK", "0") == "0":
            click.echo(message, err=True)
        if is_success:
            return 0
        return EXIT_CHECKPOINTED
    return code if isinstance(code, int) else 0


def _record_exit_code(code: str) -> None:
    """Write the exit code of this rank for the launcher, if it reads exit codes."""
    folder = os.environ.get(EXIT_CODES_VARIABLE)
    if folder:
        with contextlib.suppress(OSError):  # The launcher may have ended.
            Path(folder, os.environ.get("RANK", "0")).write_text(code)


def main() -> None:
    """Run the command line of this process; the entry point of the `finesight` script."""
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="surrogateescape")  # file names that are not UTF-8
    gc.set_threshold(GARBAGE_THRESHOLD)
    # torchrun starts processes again: the code of the one before must not count.
    _record_exit_code("")
    code = run_command(sys.argv[1:])
    _record_exit_code(str(code))
    gc.freeze()  # The exit of Python would search all objects of torch for garbage.
    if _has_cuda_context() and _has_only_daemon_threads():
        # The system releases the memory of a GPU half a second faster than its driver does.
        atexit._run_exitfuncs()
        with contextlib.suppress(OSError, ValueError):  # of streams that are closed
            for stream in (sys.stdout, sys.stderr):
                if stream is not None:
                    stream.flush()
            os._exit(code)
    sys.exit(code)


def _has_only_daemon_threads() -> bool:
    """Return whether the exit of Python would wait for no thread."""
    main_thread = threading.main_thread()
    return all(one.daemon or one is main_thread for one in threading.enumerate())


def _has_cuda_context() -> bool:
    """Return whether this process has used a GPU."""
    torch = sys.modules.get("torch")
    return torch is not None and torch.cuda.is_initialized()


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
        running, _, _ = LOADAVG_PATH.read_text().split()[3].partition("/")
        num_running = int(running) - 1
        is_single_process = os.environ.get("WORLD_SIZE", "1") == "1"
        is_idle = is_single_process and 2 * num_running < num_allowed_cpus()
    spin_count = LONG_SPIN_COUNT if is_idle else SHORT_SPIN_COUNT
    os.environ.setdefault("GOMP_SPINCOUNT", str(spin_count))
