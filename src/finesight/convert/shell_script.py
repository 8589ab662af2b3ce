"""Split a shell script into commands, with the values of its variables; nothing is executed."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field

from finesight.convert.python_values import evaluate_constant

LITERAL_DOLLAR = "\0"
"""Replaces a dollar sign that starts no variable, in single quotes or after a backslash."""

_PUNCTUATION = "\n;|&()<>"
_CONTROL_KEYWORDS = ("if", "for", "while", "until", "case", "function")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_ARRAY_START = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_ARRAY_ITEMS = re.compile(r"[$\x01](?:\{(\w+)\[[@*]\]\}|\{?([@*])\}?)")
_ARITHMETIC = re.compile(r"\$\(\(((?:[^()]|\([^()]*\))*)\)\)")
_SUBSTITUTION = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)")
_PROTECTED = str.maketrans("() \t\n", "\2\3\4\4\4")
_UNPROTECTED = str.maketrans("\2\3\4", "() ")
"""Characters of an arithmetic expression that must not end its word."""

_VARIABLE = re.compile(
    r"[$\x01](?:([A-Za-z_]\w*|\d)|\{(\w+)(?::?[-=]([^}$]*))?\}|\x02\x02(.*?)\x03\x03(?!\x03))"
)
"""`$NAME`, `${NAME:-default}` or arithmetic; a dollar sign in double quotes is \1."""

_QUOTED_OR_SKIPPED = re.compile(
    r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?<!\S)#[^\n]*|(?<!\S)[\d&]*[<>]+&?[ \t]*[^\s;|&]+""",
    re.DOTALL,
)
"""Quoted text and escaped characters, which remain, or comments and redirections."""


_HERE_DOCUMENT = re.compile(
    r"""(?<!<)<<-?[ \t]*(["']?)(\w+)\1([^\n]*\n).*?^[ \t]*\2[ \t]*$""", re.DOTALL | re.MULTILINE
)
"""Lines of input of a command, which are no commands; the rest of its first line remains."""


class UnresolvedCommandError(Exception):
    """A command that depends on a text that only a shell can determine."""


@dataclass
class ShellState:
    """Values of the variables and arrays of a script, and its arguments, None if unknown."""

    variables: dict[str, str] = field(default_factory=dict)
    arguments: list[str] | None = None
    arrays: dict[str, list[str]] = field(default_factory=dict)

    def set_arguments(self, arguments: list[str]) -> None:
        """Set the arguments `$1`, `$2`, ... and `$@`."""
        for name in [name for name in self.variables if name.isdecimal()]:
            del self.variables[name]
        self.variables |= {str(number): word for number, word in enumerate(arguments, start=1)}
        self.arrays |= {"@": arguments, "*": arguments}
        self.arguments = arguments

    def shift(self, words: list[str]) -> None:
        """Drop the first arguments, as the builtin `shift` does."""
        if self.arguments is not None:
            count = int(words[0]) if words and words[0].isdecimal() else 1
            self.set_arguments(self.arguments[count:])


def split_commands(text: str, state: ShellState) -> Iterator[list[str]]:
    """Yield the words of each simple command of a shell script.

    The caller may complete the variables of `state` after each command.

    Raises:
        UnresolvedCommandError: The script has a condition or loop.
        ValueError: A quotation mark is not closed.
    """
    command: list[str] = []
    array: list[str] | None = None
    for word in _split_words(text):
        is_separator = word != "" and set(word) <= set(_PUNCTUATION)
        start = None
        if command and word.startswith("("):
            start = _ARRAY_START.fullmatch(command[-1])
        if start is not None:
            command.pop()
            previous = state.arrays.get(start[1], []) if start[2] else []
            array = [*previous]
            state.arrays[start[1]] = array
        items = _ARRAY_ITEMS.fullmatch(word)
        name = (items[1] or items[2]) if items else ""
        if name in state.arrays:
            target = command if array is None else array
            target.extend(state.arrays[name])
        elif array is not None:
            if not is_separator:
                array += _expand_variables(word, state.variables)
            elif ")" in word:
                array = None
        elif not is_separator and word not in ("{", "}"):
            command += _expand_variables(word, state.variables)
        elif command:
            if command[0] in _CONTROL_KEYWORDS:
                raise UnresolvedCommandError(f"{command[0]} ...")
            yield command
            command = []


def _split_words(text: str) -> list[str]:
    """Return the words and separators of a script, with a line break at its end."""
    text = _HERE_DOCUMENT.sub(r"\3", text)
    text = _ARITHMETIC.sub(lambda match: match[0].translate(_PROTECTED), text)
    text = _SUBSTITUTION.sub("$...", text.replace("\\$", LITERAL_DOLLAR))
    text = _QUOTED_OR_SKIPPED.sub(_mark_dollars, text).replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=_PUNCTUATION)
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    lexer.commenters = ""
    return [*lexer, "\n"]


def _mark_dollars(match: re.Match[str]) -> str:
    """Return quoted text with its dollar signs marked; comments and redirections are dropped."""
    quoted = match[1] or ""
    if quoted.startswith('"'):
        return quoted.replace("$", "\1").replace("\\\n", "")
    return quoted.replace("$", LITERAL_DOLLAR)


def parse_assignment(word: str) -> tuple[str, str] | None:
    """Return name and value of a word `NAME=value`, None for another word."""
    match = _ASSIGNMENT.fullmatch(word)
    return (match[1], match[2]) if match else None


def _expand_variables(word: str, variables: dict[str, str]) -> list[str]:
    """Replace known variables and arithmetic in a word; an unquoted value may be several words."""
    numbers = {name: int(value) for name, value in variables.items() if value.isdecimal()}

    def replace(match: re.Match[str]) -> str:
        plain, braced, default, arithmetic = match.groups()
        if arithmetic is not None:
            return _evaluate_arithmetic(arithmetic, numbers) or match[0]
        name = plain or braced
        if default is None:
            return variables.get(name, match[0])
        if match[0][: -len(default) - 1].endswith("="):
            variables.setdefault(name, default)
        return variables.get(name, default)

    expanded = _VARIABLE.sub(replace, word).replace("\1", "$")
    is_split = "$" in word and parse_assignment(word) is None
    words = expanded.split() if is_split else [expanded]
    return [word.translate(_UNPROTECTED) for word in words]


def _evaluate_arithmetic(text: str, numbers: dict[str, int]) -> str | None:
    """Return the result of an arithmetic expansion, None if a variable is unknown."""
    expression = re.sub(r"[${}]", "", text.translate(_UNPROTECTED)).replace("/", "//")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        return str(evaluate_constant(tree.body, numbers))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
