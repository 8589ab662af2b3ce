"""Split a shell script into commands, with the values of its variables; nothing is executed."""

from __future__ import annotations

import ast
import re
import shlex
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from finesight.convert.python_values import evaluate_constant

LITERAL_DOLLAR = "\0"
"""Replaces a dollar sign that starts no variable, in single quotes or after a backslash."""

_PUNCTUATION = "\n;|&()<>"
_LIST_ENDS = "\n;&"
_CONTROL_KEYWORDS = ("if", "for", "while", "until", "case", "function")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_APPENDED = re.compile(r"([A-Za-z_]\w*)\+=(.+)", re.DOTALL)
_ARRAY_START = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_ARRAY_ITEMS = re.compile(r"[$\x01](?:\{(\w+)\[[@*]\]\}|\{?([@*])\}?)")
_ARITHMETIC = re.compile(r"\$\(\(((?:[^()]|\([^()]*\))*)\)\)")
_SUBSTITUTION = re.compile(r"\$\((?:[^()]|\([^()]*\))*\)")
_MARKERS = dict.fromkeys(map(ord, "\0\1\2\3\4"))
"""Control characters with a meaning here, which are removed from a script."""

_PROTECTED = str.maketrans("() \t\n", "\2\3\4\4\4")
_UNPROTECTED = str.maketrans("\2\3\4", "() ")
"""Characters of an arithmetic expression that must not end its word."""

_VARIABLE = re.compile(
    r"[$\x01](?:([A-Za-z_]\w*|\d)|\{(\w+)(?:(:?[-=])([^}$]*))?\}|\x02\x02(.*?)\x03\x03(?!\x03))"
)
"""`$NAME`, `${NAME:-default}` or arithmetic; a dollar sign in double quotes is \1."""

_QUOTED_OR_SKIPPED = re.compile(
    r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.)|(?<!\S)#[^\n]*|(?<!\S)[\d&]*[<>]+&?[ \t]*[^\s;|&]+""",
    re.DOTALL,
)
"""Quoted text and escaped characters, which remain, or comments and redirections."""


_HERE_DOCUMENT = re.compile(r"""(?<!<)<<-?[ \t]*(["']?)(\w+)\1""")
"""Start of input of a command, with the word on the last line of the input."""

_MAX_EXPANDED_CHARS = 1_000_000
"""Limit of the values of all variables in use: `A=$A$A`, 40 times, would be terabytes."""


class UnresolvedCommandError(Exception):
    """A command that depends on a text that only a shell can determine."""


def build_array_reference(name: str) -> str:
    """Return a reference to the elements of an array, which only a shell can replace."""
    return f"${{{name}[@]}}"


@dataclass
class ShellState:
    """Values of the variables and arrays of a script, and its arguments, None if unknown.

    `exported` are the names of variables that commands receive once they have a value.
    """

    variables: dict[str, str] = field(default_factory=dict)
    arguments: list[str] | None = None
    arrays: dict[str, list[str]] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)
    _num_expanded: int = 0

    def get_environment(self) -> dict[str, str]:
        """Return the variables that commands receive."""
        environment: dict[str, str] = {}
        for name, value in self.variables.items():
            if name in self.exported:
                environment[name] = value
        return environment

    def export(self, assigned: Mapping[str, str]) -> None:
        """Assign variables and export them."""
        self.variables |= assigned
        self.exported |= assigned.keys()

    def declare(self, words: list[str]) -> None:
        """Assign or export variables, as the builtins `export`, `declare` and `readonly` do."""
        options = "".join(word for word in words[1:] if word.startswith("-"))
        removed = "".join(word for word in words[1:] if word.startswith("+"))
        is_removed = "x" in removed or (words[0] == "export" and "n" in options)
        is_exported = words[0] == "export" or "x" in options
        for word in words[1:]:
            name = word
            assignment = parse_assignment(word)
            if assignment is not None:
                name, value = assignment
                self.variables[name] = value
            if is_removed:
                self.exported.discard(name)
            elif is_exported:
                self.exported.add(name)

    def start_shell(self, assigned: Mapping[str, str]) -> ShellState:
        """Return the state of a shell that a command with assignments starts."""
        shell = ShellState()
        shell.export(self.get_environment())
        shell.export(assigned)
        return shell

    def forget(self, command: list[str]) -> None:
        """Make the variables unknown that a command assigns, declares or removes.

        Their values become references to them, which only a shell can replace.
        """
        is_exported = command[0] == "export" or "-x" in command
        for word in command:
            name, separator, _ = word.partition("=")
            if not name.isidentifier() or (word == command[0] and not separator):
                continue
            self.variables[name] = f"${name}"
            if name in self.arrays:
                self.arrays[name] = [build_array_reference(name)]
            if is_exported:
                self.exported.add(name)

    def unset(self, names: list[str]) -> None:
        """Remove variables and arrays, as the builtin `unset` does."""
        for name in names:
            self.variables.pop(name, None)
            self.arrays.pop(name, None)
            self.exported.discard(name)

    def set_arguments(self, arguments: list[str] | None) -> None:
        """Set the arguments `$1`, `$2`, ... and `$@`, None if they are unknown."""
        for number in range(1, len(self.arguments or ()) + 1):
            self.variables.pop(str(number), None)
        self.arguments = arguments
        if arguments is None:
            self.arrays.pop("@", None)
            self.arrays.pop("*", None)
            return
        self.count_expanded(len(arguments))
        for number, word in enumerate(arguments, start=1):
            self.variables[str(number)] = word
        self.arrays["@"] = arguments
        self.arrays["*"] = arguments

    def shift(self, words: list[str]) -> None:
        """Drop the first arguments, as the builtin `shift` does."""
        if self.arguments is not None:
            count = 1
            if words and words[0].isdecimal():
                count = int(words[0])
            self.set_arguments(self.arguments[count:])

    def count_expanded(self, num_chars: int) -> None:
        """Count the characters of a value in use. Raises UnresolvedCommandError over the limit."""
        self._num_expanded += num_chars
        if self._num_expanded > _MAX_EXPANDED_CHARS:
            raise UnresolvedCommandError("very long variables")


class SimpleCommand(NamedTuple):
    """Words of a command, and whether it runs only if others succeed or fail."""

    words: list[str]
    is_conditional: bool


@dataclass
class _CommandList:
    """The command that is read, and whether it runs after `&&` and `||`, in groups of braces."""

    words: list[str] = field(default_factory=list)
    is_conditional: bool = False
    _is_test: bool = False
    _groups: list[bool] = field(default_factory=list)

    def start_array(self, state: ShellState) -> list[str] | None:
        """Return the elements of an array so far, to which others are added.

        Returns None if the last word starts no array. A conditional array is unknown.
        """
        if not self.words:
            return None
        start = _ARRAY_START.fullmatch(self.words[-1])
        if start is None:
            return None
        self.words.pop()
        self._is_test = False
        name = start[1]
        array: list[str] = []
        if start[2]:
            array += state.arrays.get(name, [])
        state.arrays[name] = array
        if self.is_conditional:
            state.arrays[name] = [build_array_reference(name)]
        return array

    def end_command(self) -> list[SimpleCommand]:
        """Return the command that is read, if any.

        Raises:
            UnresolvedCommandError: It starts a condition or loop.
        """
        words = self.words
        if not words:
            return []
        if words[0] in _CONTROL_KEYWORDS:
            raise UnresolvedCommandError(f"{words[0]} ...")
        self.words = []
        # Brackets may contain separators, such as those of a pattern.
        self._is_test = words[-1] in ("]", "]]") or "test" in words[:2]
        return [SimpleCommand(words, self.is_conditional)]

    def add_separator(self, separator: str) -> None:
        """Add the separator after a command.

        After `&&`, the next one runs if a test succeeds. That of a function may never run.
        """
        if "((" in separator:
            raise UnresolvedCommandError("((...))")
        is_function = separator.startswith("()")
        if is_function or "||" in separator or ("&&" in separator and self._is_test):
            self.is_conditional = True
        elif set(separator) & set(_LIST_ENDS) and "&&" not in separator:
            self.is_conditional = bool(self._groups) and self._groups[-1]

    def add_brace(self, brace: str) -> None:
        """Start or end a group of commands, all of which are conditional if the group is."""
        if brace == "{":
            self._groups.append(self.is_conditional)
        elif self._groups:
            self.is_conditional = self._groups.pop()


def split_commands(text: str, state: ShellState) -> Iterator[SimpleCommand]:
    """Yield each simple command of a shell script.

    The caller may complete the variables of `state` after each command.

    Raises:
        UnresolvedCommandError: The script has a condition or loop.
        ValueError: A quotation mark is not closed.
    """
    array: list[str] | None = None
    commands = _CommandList()
    for word in _split_words(text):
        is_separator = word != "" and set(word) <= set(_PUNCTUATION)
        if array is None and word.startswith("("):
            array = commands.start_array(state)
        if array is not None:
            if not is_separator:
                array += _expand_word(word, state)
            if not is_separator or ")" not in word:
                continue
            array = None
        elif word in ("{", "}"):
            if not commands.words:
                commands.add_brace(word)
            continue
        elif not is_separator:
            commands.words += _expand_word(word, state)
            continue
        yield from commands.end_command()
        commands.add_separator(word)


def _split_words(text: str) -> list[str]:
    """Return the words and separators of a script, with a line break at its end."""
    text = _drop_here_documents(text.translate(_MARKERS))
    text = _ARITHMETIC.sub(lambda match: match[0].translate(_PROTECTED), text)
    text = _SUBSTITUTION.sub("$...", text.replace("\\$", LITERAL_DOLLAR))
    text = _QUOTED_OR_SKIPPED.sub(_mark_dollars, text).replace("\\\n", " ")
    lexer = shlex.shlex(text, posix=True, punctuation_chars=_PUNCTUATION)
    lexer.whitespace = " \t\r"
    lexer.whitespace_split = True
    lexer.commenters = ""
    return [*lexer, "\n"]


def _drop_here_documents(text: str) -> str:
    """Remove the lines of input of commands, which are no commands."""
    lines = text.splitlines(keepends=True)
    positions: dict[str, list[int]] = {}
    for index, line in enumerate(lines):
        positions.setdefault(line.strip(), []).append(index)
    kept: list[str] = []
    index = 0
    while index < len(lines):
        line = lines[index]
        index += 1
        if start := _HERE_DOCUMENT.search(line):
            line = line[: start.start()] + line[start.end() :]
            ends = positions.get(start[2], [])
            following = bisect_left(ends, index)
            if following < len(ends):
                index = ends[following] + 1
        kept.append(line)
    return "".join(kept)


def _mark_dollars(match: re.Match[str]) -> str:
    """Return quoted text with its dollar signs marked; comments and redirections are dropped."""
    quoted = match[1] or ""
    if quoted.startswith('"'):
        return quoted.replace("$", "\1").replace("\\\n", "")
    return quoted.replace("$", LITERAL_DOLLAR)


def parse_assignment(word: str) -> tuple[str, str] | None:
    """Return name and value of a word `NAME=value`, None for another word."""
    match = _ASSIGNMENT.fullmatch(word)
    if match is None:
        return None
    return match[1], match[2]


def _expand_word(word: str, state: ShellState) -> list[str]:
    """Replace an array, or known variables and arithmetic in a word.

    An unquoted value may be several words.
    """
    appended = _APPENDED.fullmatch(word)
    if appended is not None:
        name, text = appended.groups()
        word = f"{name}=${{{name}:-}}{text}"
    items = _ARRAY_ITEMS.fullmatch(word)
    if items is not None:
        array = state.arrays.get(items[1] or items[2])
        if array is not None:
            state.count_expanded(sum(map(len, array)) + len(array))
            return list(array)
    expanded = _VARIABLE.sub(lambda match: _expand_variable(match, state), word)
    expanded = expanded.replace("\1", "$")
    words = [expanded]
    if "$" in word and parse_assignment(word) is None:
        words = expanded.split()
    return [one.translate(_UNPROTECTED) for one in words]


def _expand_variable(match: re.Match[str], state: ShellState) -> str:
    """Return the value of a variable or of arithmetic, or the text itself if it is unknown."""
    plain, braced, operator, default, arithmetic = match.groups()
    variables = state.variables
    if arithmetic is not None:
        return _evaluate_arithmetic(arithmetic, variables) or match[0]
    name = plain or braced
    value = variables.get(name)
    is_unset = value is None
    if value == "" and operator in (":-", ":="):
        is_unset = True
    if is_unset and default is not None:
        value = default
        if operator.endswith("="):
            variables[name] = default
    if value is None:
        return match[0]
    state.count_expanded(len(value))
    return value


def _evaluate_arithmetic(text: str, variables: Mapping[str, str]) -> str | None:
    """Return the result of an arithmetic expansion, None if a variable is unknown."""
    expression = re.sub(r"[${}]", "", text.translate(_UNPROTECTED)).replace("/", "//")
    numbers: dict[str, object] = {}
    try:
        for name in re.findall(r"[A-Za-z_]\w*", expression):
            value = variables.get(name, "")
            if value.isdecimal():
                numbers[name] = int(value)
        tree = ast.parse(expression.strip(), mode="eval")
        return str(evaluate_constant(tree.body, numbers))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
