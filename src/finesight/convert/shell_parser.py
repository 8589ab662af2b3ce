"""Parse the commands of a shell script without running it, to find the training command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from finesight.convert import shell_arithmetic
from finesight.errors import UserError

_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_ARRAY = re.compile(r"([A-Za-z_]\w*)(\+?)=\(")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^{}]*)\}|[@*#?])")
_EXPANSION = re.compile(r"(\w+)(?:\[([@*]|\d+)\])?(?::?([-=?])(.*))?", re.DOTALL)
_SUBSTITUTION = re.compile(r"\$\(\([^()]*\)\)|\$\([^()]*\)|`[^`\n]*`")
_EXPORT_COMMANDS = ("export", "declare")
_COMMAND_PREFIXES = {
    *_EXPORT_COMMANDS,
    "-x",
    "env",
    "nohup",
    "exec",
    "time",
    "sudo",
    "then",
    "else",
    "do",
}
_HEREDOC = re.compile(r"(?<!<)<<-?[ \t]*(['\"]?)([A-Za-z_]\w*)\1")
_OPERATOR = re.compile(r"[();<>|&{}]+")

CONTROL_KEYWORDS = ("if", "case", "for", "while", "until")
"""Shell keywords that start conditional or repeated commands."""

_HASH_ESCAPE = "\ue000"
"""Private-use character that replaces `#` within a word, where it starts no comment."""

_MAX_VALUE_LENGTH = 100_000
"""Maximum number of characters of an expanded value.

Without a limit, a script could double a variable on each line.
"""

POSITIONAL_KEY = "arguments without an option"
"""Key in the settings of `parse_options` for words that precede the first option."""

UNRESOLVED = "${what_a_command_prints}"
"""Replacement of values that are known only when the script runs."""

SCRIPT_ARGUMENTS = ("$@", "$*", "${@}", "${*}")
"""Spellings of the arguments of a script."""


@dataclass(frozen=True)
class ShellCommand:
    """A command of a script: its words after expansion, and its environment variables."""

    words: tuple[str, ...]
    environment: Mapping[str, str]


def parse_commands(text: str, where: str) -> Iterator[ShellCommand]:
    """Yield the simple commands of a shell script, with variables replaced by their values.

    Commands in loops and conditions are yielded once. Command substitutions are not run and become
    UNRESOLVED, except for integer arithmetic. `where` is the file, for messages.

    Raises UserError for unclosed quotes.
    """
    variables, exported = _ShellVariables(), dict[str, str]()
    for words in _split_commands(text, where):
        if match := _ARRAY.fullmatch(words[0]):
            existing = variables.arrays.get(match[1], ()) if match[2] else ()
            variables.arrays[match[1]] = existing + variables.expand_words(words[1:])
            continue
        assigned: dict[str, str] = {}
        first_word = words[0]
        while words and (words[0] in _COMMAND_PREFIXES or _ASSIGNMENT.fullmatch(words[0])):
            if match := _ASSIGNMENT.fullmatch(words[0]):
                assigned[match[1]] = _ShellVariables(
                    variables.values | assigned, variables.arrays
                ).expand_word(match[2])
            words = words[1:]
        if first_word in _EXPORT_COMMANDS:
            assigned |= {name: variables.values[name] for name in words if name in variables.values}
            exported |= assigned
        if not words or first_word in _EXPORT_COMMANDS:
            variables.values |= assigned
            # An exported variable remains exported.
            exported |= {name: value for name, value in assigned.items() if name in exported}
            continue
        yield ShellCommand(variables.expand_words(words), exported | assigned)


@dataclass
class _ShellVariables:
    """Shell variables and arrays that a script has set so far."""

    values: dict[str, str] = field(default_factory=dict)
    arrays: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def expand_words(self, words: list[str]) -> tuple[str, ...]:
        """Replace variables in the words of a command by their values.

        A word that is an array or a variable with spaces becomes several words, as an unquoted
        variable does in a shell.
        """
        result: list[str] = []
        for word in words:
            expanded, variable_match = self.expand_word(word), _VARIABLE.fullmatch(word)
            name = (variable_match[1] or variable_match[2] or "") if variable_match else ""
            if name[-3:] in ("[@]", "[*]") and name[:-3] in self.arrays:
                result += self.arrays[name[:-3]]
            elif variable_match and expanded != word and " " in expanded:
                result += expanded.split()
            else:
                result.append(expanded)
        return tuple(result)

    def expand_word(self, word: str) -> str:
        """Replace the variables in a word by their values; unset variables remain."""
        expanded = _VARIABLE.sub(self._expand_match, word)
        return expanded if len(expanded) <= _MAX_VALUE_LENGTH else word

    def _expand_match(self, match: re.Match[str]) -> str:
        if match[1] is None and (match[2] or "").startswith("="):
            return self._evaluate_arithmetic(match[2][1:])
        expansion = _EXPANSION.fullmatch(match[1] or match[2] or "")
        if expansion is None:
            return match[0]
        name, subscript, operator, default = expansion.groups()
        value = self._lookup(name, subscript)
        if value is None and operator in ("-", "="):
            value = self.expand_word(default)
            if operator == "=":
                self.values[name] = value
        return match[0] if value is None else value

    def _lookup(self, name: str, subscript: str | None) -> str | None:
        items = self.arrays.get(name, ())
        if subscript in ("@", "*"):
            return " ".join(items) if items else None
        index = int(subscript or 0)
        return items[index] if index < len(items) else None if subscript else self.values.get(name)

    def _evaluate_arithmetic(self, text: str) -> str:
        expanded = re.sub(
            r"[A-Za-z_]\w*",
            lambda name_match: self._lookup(name_match[0], None) or name_match[0],
            text,
        )
        value = shell_arithmetic.evaluate_arithmetic(expanded)
        return UNRESOLVED if value is None else str(value)


def _split_commands(text: str, where: str) -> Iterator[list[str]]:
    """Yield the words of each command of a script, before variables are expanded.

    An array assignment, possibly on several lines, is yielded as `NAME=(` and its items.
    """
    # A comment ends at the end of its line, even after a backslash.
    joined = re.sub(r"(?m)^([ \t]*#.*?)\\+[ \t\r]*$", r"\1", _strip_heredocs(text))
    joined = shell_arithmetic.mark_arithmetic(re.sub(r"\\\r?\n", " ", joined))
    while (replaced := _SUBSTITUTION.sub(UNRESOLVED, joined)) != joined:
        joined = replaced
    joined = re.sub(r"(?<=\s)[012](?=>)", "", joined)
    words: list[str] = []
    in_array = False
    for line in _split_lines(joined, where):
        line_words = iter(line)
        for word in line_words:
            if not _OPERATOR.fullmatch(word):
                words.append(word)
            elif not in_array and word[0] == "(" and words and _ARRAY.fullmatch(f"{words[-1]}("):
                words, in_array = [f"{words[-1]}("], ")" not in word
            elif word.startswith(("<", ">")) or word in ("&>", "&>>"):
                next(line_words, "")  # redirection target
            elif not in_array or ")" in word:
                if words:
                    yield words
                words, in_array = [], False
        if words and not in_array:
            yield words
            words = []


def _strip_heredocs(script: str) -> str:
    """Return a script without its here-documents (`<<EOF` to `EOF`), which are no commands."""
    lines = script.split("\n")
    last_line_by_text = {line.strip(): line_number for line_number, line in enumerate(lines)}
    stripped: list[str] = []
    terminator = None
    for line_number, line in enumerate(lines):
        if terminator is None:
            stripped.append(line)
            match = _HEREDOC.search(line)
            if match and last_line_by_text.get(match[2], 0) > line_number:
                terminator = match[2]
        elif line.strip() == terminator:
            terminator = None
    return "\n".join(stripped)


def _split_lines(text: str, where: str) -> Iterator[list[str]]:
    """Yield the words of each line of a script; quoted text may span several lines."""
    buffer, start_line = "", 0
    for line_number, line in enumerate(text.splitlines(), 1):
        buffer, start_line = (f"{buffer}\n{line}", start_line) if buffer else (line, line_number)
        try:
            words = _split_words(buffer)
        except ValueError:
            continue
        buffer = ""
        yield words
    if buffer:
        raise UserError(
            "unclosed quotation mark",
            where=f"{where}:{start_line}",
            expected="a shell script",
            remedy="close the quotation mark",
        )


def _split_words(line: str) -> list[str]:
    # As in a shell, all characters except spaces and operators belong to a word, and `#` within a
    # word starts no comment.
    escaped = re.sub(r"(?<=[^\s();<>|&])#", _HASH_ESCAPE, line)
    lexer = shlex.shlex(escaped, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    return [word.replace(_HASH_ESCAPE, "#") for word in lexer]


def has_variable(value: object) -> bool:
    """Return whether a value still contains a shell variable, which the script does not set."""
    return _VARIABLE.search(str(value)) is not None


def parse_options(words: tuple[str, ...]) -> dict[str, object]:
    """Parse the options of a command, `--name value ...` or `--name=value`, into a dict.

    An option without a value becomes "true", one with several values a list. Of repeated options,
    the last one wins. Words before the first option are stored under `POSITIONAL_KEY`.
    """
    settings: dict[str, object] = {}
    name, values = POSITIONAL_KEY, list[str]()
    for word in (*words, "--"):
        if not re.match(r"--?[A-Za-z]|--$", word):
            values.append(word)
            continue
        if name != POSITIONAL_KEY or values:
            settings[name] = values[0] if len(values) == 1 else values or "true"
        name, separator, value = word.lstrip("-").partition("=")
        name, values = name.replace("-", "_"), [value] if separator else []
    return settings
