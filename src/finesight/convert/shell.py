"""The command that starts a training, found in a shell script without running anything."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from finesight.errors import UserError

_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")
_COMPUTED = re.compile(r"\$\(\([^()]*\)\)|\$\([^()]*\)|`[^`\n]*`")
_EXPORTING = ("export", "declare")
_BEFORE = {*_EXPORTING, "-x", "env", "nohup", "exec", "time", "sudo"}
_OPERATOR = re.compile(r"[();<>|&{}]+")

NAMELESS = "words without an option"
"""The key of what a command was told without a name."""

UNKNOWN = "${what_a_command_prints}"
"""In place of what only running the script could tell."""


@dataclass(frozen=True)
class Command:
    """The words of a command, and the variables of the environment that were set for it."""

    words: tuple[str, ...]
    environment: Mapping[str, str]


def commands(text: str, where: str) -> Iterator[Command]:
    """Each simple command of a script, in order, with the variables that the script has set by
    then filled in. Loops and conditions are not followed, and what other commands would print is
    left open. Raises UserError for quotes without an end."""
    known: dict[str, str] = {}
    exported: dict[str, str] = {}
    for words in _simple(text, where):
        own: dict[str, str] = {}
        first = words[0]
        while words and (words[0] in _BEFORE or _ASSIGNED.fullmatch(words[0])):
            if found := _ASSIGNED.fullmatch(words[0]):
                own[found[1]] = _filled(found[2], known | own)
            words = words[1:]
        if first in _EXPORTING:
            own |= {name: known[name] for name in words if name in known}
            exported |= own
        if not words or first in _EXPORTING:
            known |= own
            # A variable of the environment stays one.
            exported |= {name: value for name, value in own.items() if name in exported}
            continue
        yield Command(_expanded(words, known), exported | own)


def _simple(text: str, where: str) -> Iterator[list[str]]:
    """The words between line ends and operators, still with their variables."""
    joined = re.sub(r"\\\r?\n", " ", text)
    while (left := _COMPUTED.sub(UNKNOWN, joined)) != joined:
        joined = left
    joined = re.sub(r"(?<=\s)[012](?=>)", "", joined)
    for line in _lines(joined, where):
        words: list[str] = []
        line_words = iter(line)
        for word in line_words:
            if not _OPERATOR.fullmatch(word):
                words.append(word)
            elif word.startswith(("<", ">")) or word in ("&>", "&>>"):
                next(line_words, "")  # the file that is read or written
            else:
                if words:
                    yield words
                words = []
        if words:
            yield words


def _lines(text: str, where: str) -> Iterator[list[str]]:
    """The words of each line; quotes may go over several."""
    held, first = "", 0
    for number, line in enumerate(text.splitlines(), 1):
        held, first = (f"{held}\n{line}", first) if held else (line, number)
        try:
            words = _split(held)
        except ValueError:
            continue
        held = ""
        yield words
    if held:
        raise UserError(
            "a quotation mark without its end",
            where=f"{where}:{first}",
            expected="a shell script",
            remedy="close the quotation",
        )


def _split(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
    lexer.commenters = "#"
    # As in a shell: whatever is neither a blank nor an operator belongs to the word.
    lexer.whitespace_split = True
    return list(lexer)


def _expanded(words: list[str], known: Mapping[str, str]) -> tuple[str, ...]:
    """A variable that stands alone may hold several words, as in a shell without quotes."""
    result: list[str] = []
    for word in words:
        filled = _filled(word, known)
        if filled != word and _VARIABLE.fullmatch(word) and " " in filled:
            result += filled.split()
        else:
            result.append(filled)
    return tuple(result)


def _filled(word: str, known: Mapping[str, str]) -> str:
    def value(found: re.Match[str]) -> str:
        name = found[1] or found[2]
        return known.get(name, found[3] if found[3] is not None else found[0])

    return _VARIABLE.sub(value, word)


def is_open(value: object) -> bool:
    """Whether a value holds a variable that the script does not set."""
    return _VARIABLE.search(str(value)) is not None


def options(words: tuple[str, ...]) -> dict[str, object]:
    """`--name value ...` and `--name=value` as settings; an option without a value is true, one
    with several is a list, and of two the last holds. What stands before the first one is under
    `NAMELESS`."""
    settings: dict[str, object] = {}
    name, values = NAMELESS, list[str]()
    for word in (*words, "--"):
        if not re.match(r"--?[A-Za-z]|--$", word):
            values.append(word)
            continue
        if name != NAMELESS or values:
            settings[name] = values[0] if len(values) == 1 else values or "true"
        name, equals, value = word.lstrip("-").partition("=")
        name, values = name.replace("-", "_"), [value] if equals else []
    return settings
