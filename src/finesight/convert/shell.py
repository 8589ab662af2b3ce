"""The command that starts a training, found in a shell script without running anything."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from finesight.convert import sums
from finesight.errors import UserError

_ASSIGNED = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
_LIST = re.compile(r"([A-Za-z_]\w*)(\+?)=\(")
_VARIABLE = re.compile(r"\$(?:(\w+)|\{([^{}]*)\}|[@*#?])")
_INSIDE = re.compile(r"(\w+)(?:\[([@*]|\d+)\])?(?::?([-=?])(.*))?", re.DOTALL)
_COMPUTED = re.compile(r"\$\(\([^()]*\)\)|\$\([^()]*\)|`[^`\n]*`")
_EXPORTING = ("export", "declare")
_BEFORE = {*_EXPORTING, "-x", "env", "nohup", "exec", "time", "sudo", "then", "else", "do"}
_HERE = re.compile(r"(?<!<)<<-?[ \t]*(['\"]?)([A-Za-z_]\w*)\1")
_OPERATOR = re.compile(r"[();<>|&{}]+")

BRANCHING = ("if", "case", "for", "while", "until")
"""What begins a part of a script that is done sometimes, or several times."""

_WITHIN = "\ue000"
"""For `#` within a word; Unicode keeps this character for private use."""

_LONGEST = 100_000
"""Characters of a value: one that doubles itself line by line is not followed for ever."""

NAMELESS = "words without an option"
"""The key of what a command was told without a name."""

UNKNOWN = "${what_a_command_prints}"
"""In place of what only running the script could tell."""

ARGUMENTS = ("$@", "$*", "${@}", "${*}")
"""All that a script was called with."""


@dataclass(frozen=True)
class Command:
    """The words of a command, and the variables of the environment that were set for it."""

    words: tuple[str, ...]
    environment: Mapping[str, str]


def commands(text: str, where: str) -> Iterator[Command]:
    """Each simple command of a script, in order, with the variables that the script has set by
    then filled in. Loops and conditions are not followed, and what other commands would print is
    left open, but for sums of whole numbers. Raises UserError for quotes without an end."""
    known, exported = _Variables(), dict[str, str]()
    for words in _simple(text, where):
        if found := _LIST.fullmatch(words[0]):
            before = known.lists.get(found[1], ()) if found[2] else ()
            known.lists[found[1]] = before + known.expanded(words[1:])
            continue
        own: dict[str, str] = {}
        first = words[0]
        while words and (words[0] in _BEFORE or _ASSIGNED.fullmatch(words[0])):
            if found := _ASSIGNED.fullmatch(words[0]):
                own[found[1]] = _Variables(known.texts | own, known.lists).filled(found[2])
            words = words[1:]
        if first in _EXPORTING:
            own |= {name: known.texts[name] for name in words if name in known.texts}
            exported |= own
        if not words or first in _EXPORTING:
            known.texts |= own
            # A variable of the environment stays one.
            exported |= {name: value for name, value in own.items() if name in exported}
            continue
        yield Command(known.expanded(words), exported | own)


@dataclass
class _Variables:
    """What a script has set: texts, and lists of words."""

    texts: dict[str, str] = field(default_factory=dict)
    lists: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def expanded(self, words: list[str]) -> tuple[str, ...]:
        """Words with their variables filled in. One that is a list, or that stands alone and holds
        blanks, is several words, as in a shell (there without quotes)."""
        result: list[str] = []
        for word in words:
            filled, alone = self.filled(word), _VARIABLE.fullmatch(word)
            name = (alone[1] or alone[2] or "") if alone else ""
            if name[-3:] in ("[@]", "[*]") and name[:-3] in self.lists:
                result += self.lists[name[:-3]]
            elif alone and filled != word and " " in filled:
                result += filled.split()
            else:
                result.append(filled)
        return tuple(result)

    def filled(self, word: str) -> str:
        """A word with the variables that are known; the others stay."""
        filled = _VARIABLE.sub(self._value, word)
        return filled if len(filled) <= _LONGEST else word

    def _value(self, found: re.Match[str]) -> str:
        if found[1] is None and (found[2] or "").startswith("="):
            return self._sum(found[2][1:])
        inside = _INSIDE.fullmatch(found[1] or found[2] or "")
        if inside is None:
            return found[0]
        name, place, how, otherwise = inside.groups()
        value = self._one(name, place)
        if value is None and how in ("-", "="):
            value = self.filled(otherwise)
            if how == "=":
                self.texts[name] = value
        return found[0] if value is None else value

    def _one(self, name: str, place: str | None) -> str | None:
        items = self.lists.get(name, ())
        if place in ("@", "*"):
            return " ".join(items) if items else None
        number = int(place or 0)
        return items[number] if number < len(items) else None if place else self.texts.get(name)

    def _sum(self, text: str) -> str:
        filled = re.sub(r"[A-Za-z_]\w*", lambda name: self._one(name[0], None) or name[0], text)
        value = sums.value(filled)
        return UNKNOWN if value is None else str(value)


def _simple(text: str, where: str) -> Iterator[list[str]]:
    """The words between line ends and operators, still with their variables; of a list (`NAME=(`
    to `)`, over several lines) `NAME=(` and its words."""
    # In a comment, the end of the line is one whatever stands before it.
    joined = re.sub(r"(?m)^([ \t]*#.*?)\\+[ \t\r]*$", r"\1", _without_texts(text))
    joined = sums.kept(re.sub(r"\\\r?\n", " ", joined))
    while (left := _COMPUTED.sub(UNKNOWN, joined)) != joined:
        joined = left
    joined = re.sub(r"(?<=\s)[012](?=>)", "", joined)
    words: list[str] = []
    in_list = False
    for line in _lines(joined, where):
        line_words = iter(line)
        for word in line_words:
            if not _OPERATOR.fullmatch(word):
                words.append(word)
            elif not in_list and word[0] == "(" and words and _LIST.fullmatch(f"{words[-1]}("):
                words, in_list = [f"{words[-1]}("], ")" not in word
            elif word.startswith(("<", ">")) or word in ("&>", "&>>"):
                next(line_words, "")  # the file that is read or written
            elif not in_list or ")" in word:
                if words:
                    yield words
                words, in_list = [], False
        if words and not in_list:
            yield words
            words = []


def _without_texts(script: str) -> str:
    """The script without texts that are written in it for a command to read (`<<EOF` to `EOF`):
    none of their lines is a command."""
    lines = script.split("\n")
    last = {line.strip(): number for number, line in enumerate(lines)}
    kept: list[str] = []
    until = None
    for number, line in enumerate(lines):
        if until is None:
            kept.append(line)
            found = _HERE.search(line)
            if found and last.get(found[2], 0) > number:
                until = found[2]
        elif line.strip() == until:
            until = None
    return "\n".join(kept)


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
    # As in a shell: whatever is neither a blank nor an operator belongs to the word, and `#` within
    # one begins no comment.
    held = re.sub(r"(?<=[^\s();<>|&])#", _WITHIN, line)
    lexer = shlex.shlex(held, posix=True, punctuation_chars="();<>|&")
    lexer.whitespace_split = True
    return [word.replace(_WITHIN, "#") for word in lexer]


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
