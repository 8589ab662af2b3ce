"""`finesight chat`: chat with a model in the terminal."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Unpack

import click

from finesight.errors import UserError, escape_unprintable
from finesight.operations.model import load_adapters
from finesight.operations.operation import Parameter
from finesight.operations.options import LoadingOptions, MaxNewTokensOption, RunOrModelArgument

if TYPE_CHECKING:
    from finesight.infer.chat_session import ChatReply, ChatSession, ChatTurn
    from finesight.infer.request import GenerationOptions

COMMAND_HELP = {
    "/image": ("PATH...", "attach images, PDF files or videos to the next question"),
    "/box": ("[FILE]", "save the image with the boxes of the last answer, as PNG"),
    "/undo": ("", "remove the last question and its answer"),
    "/again": ("", "regenerate the last answer (differs at a temperature above 0)"),
    "/save": ("[FILE]", "save the conversation as a sample (JSONL for train and predict --data)"),
    "/new": ("", "start a new conversation"),
    "/help": ("", "print this list"),
    "/quit": ("", "quit (also Ctrl-D); Ctrl-C stops an answer"),
}


def chat(
    run_or_model: RunOrModelArgument,
    max_new_tokens: MaxNewTokensOption = 512,
    temperature: Annotated[float, Parameter(minimum=0.0)] = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    **loading: Unpack[LoadingOptions],
) -> None:
    """Chat with a model about images in the terminal. /help lists the commands of the chat.

    If standard input is a file or a pipe, its lines are the input, and the first error ends the
    chat.

    Example: finesight chat runs/latex

    Args:
        temperature: Sampling temperature, 0 to 100; 0 is greedy decoding.
        top_p: Nucleus sampling: sample from the most probable tokens whose probabilities add up to
            this value, above 0 and at most 1 (all tokens). Needs --temperature above 0.
        seed: Random seed of sampling, for --temperature above 0. Default: different each time.
    """
    from finesight.infer.chat_session import ChatSession
    from finesight.infer.inference_service import InferenceService
    from finesight.infer.request import GenerationOptions, SamplingParams
    from finesight.samples.run_examples import has_single_questions

    sampling = SamplingParams(temperature=temperature, top_p=top_p, seed=seed)
    generation_options = GenerationOptions(max_new_tokens=max_new_tokens, sampling_params=sampling)
    if sys.stdin.isatty() and has_single_questions(run_or_model):
        click.echo("Trained on single questions: start each one with /new and its /image.")
    service = InferenceService(load_adapters(run_or_model, (), **loading), max_num_seqs=1)
    try:
        ChatTerminal(ChatSession(service), generation_options, sys.stdin.isatty()).run()
    finally:
        service.close(wait_for_running=False)


class ChatTerminal:
    """Line-based chat with a model on standard input and output.

    An error ends the chat if standard input is not a terminal. In an interactive chat, the message
    is printed and the chat continues.
    """

    def __init__(
        self, session: ChatSession, generation_options: GenerationOptions, is_interactive: bool
    ) -> None:
        self._session = session
        self._is_interactive = is_interactive
        self._generation_options = generation_options
        self._pending_images: list[Path] = []
        self._num_regenerations = 0

    def run(self) -> None:
        """Read and process input lines until `/quit` or the end of standard input."""
        if self._is_interactive:
            _enable_line_editing()
            manifest = self._session.service.manifest
            hint = ""
            if manifest is not None and manifest.has_images:
                hint = "Attach an image with /image PATH. "
            model_name = self._session.service.model_names[0]
            click.echo(f"{model_name}. {hint}Enter a question or /help.")
            if manifest is not None:
                for prompt in manifest.prompts[:1]:
                    click.echo(escape_unprintable(f"Training prompt: {prompt}"))
            for note in self._session.service.get_prompt_format().describe_forms():
                click.echo(escape_unprintable(str(note)))
        while (line := self._read_line()) is not None:
            try:
                if not self._handle_line(line.strip()):
                    return
            except UserError as error:
                if not self._is_interactive:
                    raise
                click.echo(f"error: {error}", err=True)

    def _read_line(self) -> str | None:
        while True:
            try:
                return input("> " if self._is_interactive else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self._is_interactive:
                    raise
                click.echo("\n(use /quit or Ctrl-D to quit)")

    def _handle_line(self, line: str) -> bool:
        """Process one input line: a command or a question. Returns False for `/quit`."""
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        handlers: dict[str, Callable[[], None]] = {
            "/image": lambda: self._add_images(argument),
            "/box": lambda: self._save_annotated_image(argument),
            "/undo": self._undo,
            "/again": self._regenerate,
            "/save": lambda: self._save_session(argument),
            "/new": self._start_session,
            "/help": _print_help,
        }
        if name == "/quit":
            return False
        if name in handlers:
            handlers[name]()
        elif name.startswith("/") and name[1:].isalpha():
            raise UserError(
                f"unknown command {name}",
                where="chat",
                expected=f"one of {', '.join(COMMAND_HELP)}",
                remedy="enter /help; start a question with another character",
            )
        elif line:
            options = [self._generation_options]
            self._print_reply(self._session.send(line, self._pending_images, options))
            self._pending_images = []
        return True

    def _add_images(self, argument: str) -> None:
        from finesight.samples.image_file import list_pages
        from finesight.samples.video_file import read_visual_size

        for path in chain.from_iterable(map(list_pages, _parse_paths(argument))):
            height, width = read_visual_size(path)
            self._pending_images.append(path)
            text = f"{path}: {width} x {height}, attached to the next question"
            click.echo(escape_unprintable(text))

    def _print_reply(self, turn: ChatTurn) -> None:
        reply = turn.replies[0]
        with _cancel_on_sigint(reply):
            num_chars = 0
            for delta in reply:
                reasoning = reply.reasoning[num_chars:]
                num_chars = len(reply.reasoning)
                if reasoning:
                    click.secho(escape_unprintable(reasoning), nl=False, dim=True)
                if delta and delta == reply.text and reply.reasoning:
                    click.echo("\n")
                click.echo(escape_unprintable(delta), nl=False)
        assert reply.prediction is not None, "the reply has not ended"
        finish_notes = {
            "length": f" [truncated after {reply.prediction.num_tokens} tokens]",
            "cancelled": " [stopped]",
        }
        click.echo(finish_notes.get(reply.finish_reason or "", ""))
        for box in reply.boxes:
            corners = ", ".join(f"{coordinate:.1f}" for coordinate in box.xyxy)
            label = f"  {box.label}" if box.label else ""
            click.echo(escape_unprintable(f"  box {corners}{label}"))

    def _regenerate(self) -> None:
        from dataclasses import replace

        self._num_regenerations += 1
        sampling = self._generation_options.sampling_params
        # The same seed would generate the same answer.
        seed = None if sampling.seed is None else sampling.seed + self._num_regenerations
        sampling = replace(sampling, seed=seed)
        options = replace(self._generation_options, sampling_params=sampling)
        self._print_reply(self._session.regenerate([options]))

    def _undo(self) -> None:
        turn = self._session.undo()
        text = "nothing to undo" if turn is None else f"removed: {turn.text}"
        click.echo(escape_unprintable(text))

    def _start_session(self) -> None:
        from finesight.infer.chat_session import ChatSession

        self._session = ChatSession(self._session.service)
        self._pending_images = []

    def _save_annotated_image(self, argument: str) -> None:
        file = Path(argument).expanduser() if argument else None
        saved_path = self._session.save_annotated_image(file)
        note = ""
        if not self._session.turns[-1].replies[0].boxes:
            note = " (the answer has no boxes)"
        click.echo(escape_unprintable(f"saved: {saved_path}{note}"))

    def _save_session(self, argument: str) -> None:
        file = Path(argument or "chat.jsonl").expanduser()
        self._session.save(file)
        click.echo(escape_unprintable(f"saved: {file}"))


def _print_help() -> None:
    for name, (argument, description) in COMMAND_HELP.items():
        click.echo(f"{name} {argument}".ljust(16) + description)


def _parse_paths(argument: str) -> list[Path]:
    """Parse the file names of `/image`.

    The argument is one name, spaces included, if such a file exists. Otherwise it is split into
    words like a shell command.
    """
    with contextlib.suppress(OSError, ValueError):
        if Path(argument).expanduser().is_file():
            return [Path(argument).expanduser()]
    try:
        words = shlex.split(argument)
        problem = "a path is missing"
    except ValueError as error:
        words = []
        problem = f"cannot be parsed: {error}"
    if not words:
        raise UserError(
            f"{argument!r}: {problem}",
            where="/image",
            expected="/image PATH..., paths with spaces in quotes",
            remedy="for example /image cat.jpg",
        )
    return [Path(word).expanduser() for word in words]


def _enable_line_editing() -> None:
    """Enable line editing, history and file name completion, if readline is installed."""
    with contextlib.suppress(ImportError):
        import readline

        readline.set_completer_delims(" \t\n")
        readline.parse_and_bind("tab: complete")


@contextmanager
def _cancel_on_sigint(reply: ChatReply) -> Iterator[None]:
    """Let Ctrl-C cancel the current answer instead of the process, within the `with` block."""
    previous_handler = signal.signal(signal.SIGINT, lambda *_: reply.cancel())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous_handler)
