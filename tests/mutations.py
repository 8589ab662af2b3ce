"""Mutations of JSON, JSON Lines and YAML files, drawn from a seed."""

import json
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

NUMERIC_VALUES = (0, -1, 1, 2, 3, 0.5, 1e-300, 1e308, 10**9, 2**31, 2**63, 10**30, 10**400)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
SIMPLE_VALUES = (
    *(None, True, False, "", [], {}, [[]], [None], {"": None}, [0] * 10_000, "x" * 100_000),
)
TEXTS = ("NaN", "\0", "a\0b", "\u202e", "1", "..", ".", "/", "~", "a/b", "\ud800", "(", "[a-", "%s")
PATHS = ("/dev/zero", "/etc/passwd", "/proc/self/mem", "file:///x", "../../x", "s3://x/y", "a b")
TOKENS = ("<|im_end|>", "<|image_pad|>", "<|vision_start|>", "{{ x }}", "{% raw %}")
VALUES = (*NUMERIC_VALUES, *NUMERIC_VALUES, *NOT_FINITE, *SIMPLE_VALUES, *TEXTS, *PATHS, *TOKENS)

DEEP = '{"a": ' * 300 + "[" * 100_000
ODD_FILES = (
    *(b"", b"\0", b"{", b"[]", b"{}", b"null", b"3", b'"x"', b"\xff\xfe{\0}\0", b"\xef\xbb\xbf{}"),
    *(b"[" * 100_000, b'{"a":' * 100_000, b"[" * 150 + b"]" * 150, b"9" * 100_000, b"NaN"),
    *(b"{" + b'"a": 1, ' * 50_000 + b'"b": 2}', b"\n" * 10_000, b"[" + b"{}," * 100_000 + b"{}]"),
)


def iter_entries(node: object, few: int, depth: int = 0) -> Iterator[tuple[Any, Any]]:
    """Yield holder and key of the first values of each list and object."""
    items = enumerate(node) if isinstance(node, list) else ()
    for key, value in list(node.items() if isinstance(node, dict) else items)[:few]:
        yield node, key
        if depth < 20:
            yield from iter_entries(value, few, depth + 1)


def mutated_value(
    rng: random.Random, content: Any, few: int = 200, values: Sequence[Any] = VALUES
) -> Any:
    """Return a copy with one to four values exchanged, lost, added, wrapped or repeated."""
    content = deepcopy(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        entries = list(iter_entries(content, few))
        if not entries:
            return deepcopy(rng.choice(values))
        holder, key = rng.choice(entries)
        match rng.randrange(8):
            case 0 | 1 | 2 | 3:
                holder[key] = deepcopy(rng.choice(values))
            case 4:
                del holder[key]
            case 5:
                holder[key] = rng.choice(([holder[key]], {"type": holder[key]}))
            case 6:
                other, other_key = rng.choice(entries)
                holder[key] = deepcopy(other[other_key])
            case _ if isinstance(holder, dict):
                holder[rng.choice(TEXTS)] = deepcopy(holder[key])
            case _:
                holder += [deepcopy(holder[key]) for _ in range(rng.choice((1, 100)))]
    return content


def mutated_bytes(rng: random.Random, content: bytes) -> bytes:
    """Bytes changed, lost, repeated or cut off."""
    found = bytearray(content or b"x")
    for _ in range(rng.choice((1, 2, 5, 20))):
        location = rng.randrange(len(found))
        match rng.randrange(6):
            case 0:
                found[location] = rng.randrange(256)
            case 1:
                found[location] = rng.choice(b":-{}[]&*!|<>'\"%@`#,?/ \n\t\x000123456789eE.")
            case 2:
                del found[location : location + rng.randrange(1, 20)]
            case 3:
                found[location:location] = found[rng.randrange(len(found)) :][:20]
            case 4:
                found[location : location + 8] = rng.choice((b"\xff" * 8, b"\0" * 8, b"\x7f" * 8))
            case _ if rng.random() < 0.3:
                del found[location:]
        found = found or bytearray(b"x")
    return bytes(found)


def as_json(content: object) -> bytes:
    """The text of a value, lone surrogates as escapes."""
    return json.dumps(content).encode()


def mutated_json(rng: random.Random, content: bytes) -> bytes:
    """A JSON file that something is wrong with, mostly."""
    match rng.randrange(10):
        case 0:
            return rng.choice(ODD_FILES)
        case 1 | 2:
            return mutated_bytes(rng, content)
        case 3:
            text = as_json(mutated_value(rng, json.loads(content)))
            return text.replace(b"null", DEEP.encode(), 1)
        case _:
            return as_json(mutated_value(rng, json.loads(content)))


def mutated_lines(rng: random.Random, content: bytes) -> bytes:
    """A JSON Lines file that something is wrong with, mostly."""
    lines = content.splitlines()
    if not lines or rng.randrange(12) == 0:
        return rng.choice(ODD_FILES)
    for _ in range(rng.choice((1, 1, 2, 5))):
        location = rng.randrange(len(lines))
        match rng.randrange(8):
            case 0:
                lines[location] = mutated_bytes(rng, lines[location])
            case 1:
                lines[location] = rng.choice(ODD_FILES).replace(b"\n", b" ")
            case 2:
                lines.insert(location, rng.choice(lines))
            case 3:
                del lines[location]
                lines = lines or [b"{}"]
            case _:
                try:
                    lines[location] = as_json(mutated_value(rng, json.loads(lines[location])))
                except (ValueError, RecursionError):
                    lines[location] = b"{}"
    return b"\n".join(lines) + rng.choice((b"\n", b""))


def read_peak_memory() -> int:
    """Return the peak resident memory in bytes; `ru_maxrss` would include that of the parent."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    return next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line) * 1024
