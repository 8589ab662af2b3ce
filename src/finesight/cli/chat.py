"""`finesight chat`: a talk about pictures in the terminal."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from finesight.cli.options import Device, Precision, RunOrModel, Weights
from finesight.errors import UserError, printable

if TYPE_CHECKING:
    from finesight.infer.request import Options
    from finesight.infer.talk import Reply, Talk, Turn

COMMANDS = {
    "/image": "PATH...  show pictures with the next question",
    "/box": "[FILE]   save a PNG of the picture, the last answer's boxes drawn",
    "/undo": "        take the last question and its answer back",
    "/again": "       answer the last question anew (differs at a temperature above 0)",
    "/save": "FILE    write the talk as a sample, JSONL that train and predict --data read",
    "/new": "         begin another talk",
    "/help": "        say this",
    "/quit": "        leave (also Ctrl-D); Ctrl-C stops an answer",
}

Temperature = Annotated[
    float, typer.Option(min=0.0, help="0 takes the most probable token, more draws.")
]


def chat(
    run_or_model: RunOrModel,
    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Longest answer in tokens; longer ones are cut there.")
    ] = 512,
    temperature: Temperature = 0.0,
    top_p: Annotated[
        float, typer.Option(help="Draw from the likeliest tokens of this probability in all.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Draw the same answers to the same talk again.")
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    weights: Weights = "auto",
) -> None:
    """Talk with a model about pictures. /help lists the commands; lines may come from a pipe.

    Example: finesight chat runs/latex
    """
    from finesight.infer.load import load_choice
    from finesight.infer.request import Options, Sampling
    from finesight.infer.service import Service
    from finesight.infer.talk import Talk

    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    options = Options(max_new_tokens=max_new_tokens, sampling=sampling)
    service = Service(load_choice(run_or_model, (), device, precision, weights))
    try:
        _Terminal(Talk(service), options, typing=sys.stdin.isatty()).listen()
    finally:
        service.close(finish=False)


class _Terminal:
    """A talk by lines. What is wrong is told and the talk goes on, but not that of a script."""

    def __init__(self, talk: Talk, options: Options, typing: bool) -> None:
        self._talk, self._options, self._typing = talk, options, typing
        self._shown: list[Path] = []
        self._tries = 0

    def listen(self) -> None:
        """Until /quit or the end of the lines."""
        if self._typing:
            _edit_lines()
            typer.echo(f"{self._talk.service.names[0]}. Ask, or /help.")
        while (line := self._line()) is not None:
            try:
                if not self._follow(line.strip()):
                    return
            except UserError as error:
                if not self._typing:
                    raise
                typer.echo(f"error: {error}", err=True)

    def _line(self) -> str | None:
        while True:
            try:
                return input("> " if self._typing else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._typing:
                    raise
                typer.echo("\n(/quit or Ctrl-D leaves)")

    def _follow(self, line: str) -> bool:
        """Do what a line says; False to leave."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        does: dict[str, Callable[[], None]] = {
            "/image": lambda: self._show(rest),
            "/box": lambda: self._draw(rest),
            "/undo": self._undo,
            "/again": self._again,
            "/save": lambda: self._save(rest),
            "/new": self._begin_anew,
            "/help": _help,
        }
        if name == "/quit":
            return False
        if name in does:
            does[name]()
        elif name.startswith("/") and name[1:].isalpha():
            raise UserError(
                f"unknown command {name}",
                where="chat",
                expected=f"one of {', '.join(COMMANDS)}",
                remedy="say /help; begin a question with another character",
            )
        elif line:
            self._say(self._talk.ask(line, self._shown, [self._options]))
            self._shown = []
        return True

    def _show(self, rest: str) -> None:
        from finesight.data.headers import picture_size

        for path in _paths(rest):
            height, width = picture_size(path)
            self._shown.append(path)
            typer.echo(printable(f"{path}: {width} x {height}, shown with the next question"))

    def _say(self, turn: Turn) -> None:
        reply = turn.replies[0]
        with _stopping(reply):
            for piece in reply:
                typer.echo(printable(piece), nl=False)
        cut = {"length": " [cut off: longer than --max-new-tokens]", "cancelled": " [stopped]"}
        typer.echo(cut.get(reply.finish or "", ""))
        for box in reply.boxes:
            corners = ", ".join(f"{number:.1f}" for number in box.xyxy)
            typer.echo(printable(f"  box {corners}" + (f"  {box.label}" if box.label else "")))

    def _again(self) -> None:
        from dataclasses import replace

        self._tries += 1
        sampling = self._options.sampling
        # The same seed would draw the same answer.
        seed = None if sampling.seed is None else sampling.seed + self._tries
        self._say(self._talk.again([replace(self._options, sampling=replace(sampling, seed=seed))]))

    def _undo(self) -> None:
        turn = self._talk.undo()
        typer.echo("nothing to take back" if turn is None else printable(f"gone: {turn.text}"))

    def _begin_anew(self) -> None:
        from finesight.infer.talk import Talk

        self._talk, self._shown = Talk(self._talk.service), []

    def _draw(self, rest: str) -> None:
        drawn = self._talk.draw(Path(rest).expanduser() if rest else None)
        told = "" if self._talk.turns[-1].replies[0].boxes else " (the answer has no boxes)"
        typer.echo(printable(f"drawn: {drawn}{told}"))

    def _save(self, rest: str) -> None:
        if not rest:
            raise UserError(
                f"no file is named: {rest!r}",
                where="/save",
                expected="/save FILE",
                remedy="for example /save talk.jsonl",
            )
        file = Path(rest).expanduser()
        self._talk.save(file)
        typer.echo(printable(f"saved: {file}"))


def _help() -> None:
    for name, what in COMMANDS.items():
        typer.echo(f"{name:7}{what}")


def _paths(rest: str) -> list[Path]:
    """One file name as it is, blanks and all, else words as a shell reads them."""
    with contextlib.suppress(OSError, ValueError):
        if Path(rest).expanduser().is_file():
            return [Path(rest).expanduser()]
    try:
        words = shlex.split(rest)
    except ValueError as error:
        raise UserError(
            f"{rest!r} cannot be read ({error})",
            where="/image",
            expected="paths, quoted where they hold blanks",
            remedy="close the quotes",
        ) from error
    if not words:
        raise UserError(
            f"no picture is named: {rest!r}",
            where="/image",
            expected="/image PATH...",
            remedy="for example /image cat.jpg",
        )
    return [Path(word).expanduser() for word in words]


def _edit_lines() -> None:
    """The arrow keys edit lines and bring earlier ones back, Tab completes file names."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_completer_delims(" \t\n")
        readline.parse_and_bind("tab: complete")


@contextmanager
def _stopping(reply: Reply) -> Iterator[None]:
    """Within the block, Ctrl-C stops the answer and nothing else."""

    def stop(number: int, frame: FrameType | None) -> None:
        reply.cancel()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
