"""Randomly corrupted bodies of chat completions, reproducible by seed."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

from hostile_requests import make_image_content, make_schema_format, make_small_image

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.0, -0.0, 1e-320),
    *(1e308, float("nan"), float("inf"), "", " ", "\0", "\ud800", "a" * 1_000, "\u202e", "0"),
    *([], [[]], {}, [None], {"a": {}}, {"type": None}, {"type": "text"}, {"": ""}, "user"),
    *("<|im_end|>", "<|image_pad|>", "data:", "data:;base64,", "data:image/png;base64,AAAA"),
    *("https://localhost/a.png", "file:///etc/passwd", "http://[", "../../x", "\U0001f600" * 50),
    *([1] * 300, [""] * 300, {"a" * 300: 1}, {str(n): n for n in range(300)}),
)
"""Replacement values."""

TOOL = {
    "type": "function",
    "function": {
        "name": "book",
        "description": "Book a seat.",
        "parameters": {"type": "object", "properties": {"seat": {"type": "string"}}},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "a": {"type": "integer", "minimum": 1, "maximum": 9},
        "b": {"type": "string", "pattern": "^[a-z]{1,9}$"},
        "c": {"anyOf": [{"const": 1}, {"enum": ["x", "y"]}]},
        "d": {"type": "array", "items": {"$ref": "#/$defs/e"}, "maxItems": 3},
    },
    "$defs": {"e": {"type": "number", "multipleOf": 5}},
    "required": ["a"],
    "additionalProperties": False,
}


def _make_valid_body(model: str, rng: random.Random) -> dict[str, Any]:
    """Make a valid body."""
    text = {"type": "text", "text": "What is in the image?"}
    image = make_image_content(make_small_image(rng.choice(["PNG", "JPEG", "GIF", "WEBP"])))
    messages: list[dict[str, Any]] = [{"role": "user", "content": rng.choice(["Hello", [text]])}]
    if rng.random() < 0.3:
        messages = [{"role": "user", "content": [image, text]}]
    if rng.random() < 0.3:
        call = {"id": "1", "type": "function", "function": {"name": "book", "arguments": "{}"}}
        messages += [
            {"role": "assistant", "content": rng.choice(["Yes", "", None]), "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": "done"},
            {"role": "user", "content": "And?"},
        ]
    if rng.random() < 0.3:
        messages.insert(0, {"role": rng.choice(["system", "developer"]), "content": "Be brief."})
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": 2}
    optional = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "repetition_penalty": 1.1,
        "seed": 7,
        "stop": ["x", "yz"],
        "n": 2,
        "logprobs": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "response_format": rng.choice(
            [make_schema_format(SCHEMA), *({"type": t} for t in ("json_object", "boxes", "text"))]
        ),
        "tools": [TOOL],
        "tool_choice": rng.choice(["none", "auto", "required"]),
        "metadata": {"a": "b"},
        "user": "me",
    }
    for key in rng.sample(sorted(optional), rng.randint(0, 5)):
        body[key] = optional[key]
    # Nothing is shared with other bodies, or within this one.
    valid: dict[str, Any] = json.loads(json.dumps(body))
    return valid


def _list_json_paths(value: Any) -> list[tuple[Any, Any]]:
    """Return containers and keys of all nested values."""
    items: list[tuple[Any, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))
    found = []
    for key, inner in items:
        found.append((value, key))
        found += _list_json_paths(inner)
    return found


def _corrupt_value(body: dict[str, Any], rng: random.Random) -> None:
    """Change one value of the body."""
    locations = _list_json_paths(body)
    if not locations:
        return
    container, key = rng.choice(locations)
    other, from_key = rng.choice(locations)
    how = rng.randrange(6)
    if how == 0:
        container[key] = copy.deepcopy(rng.choice(ODD))
    elif how == 1:
        del container[key]
    elif how == 2:
        container[key] = copy.deepcopy(other[from_key])
    elif how == 3:
        container[key] = [copy.deepcopy(container[key]) for _ in range(rng.choice([0, 1, 2, 40]))]
    elif how == 4 and isinstance(container, dict):
        container[rng.choice(["", "x", "type", "role", "$ref", "properties"])] = copy.deepcopy(
            container[key]
        )
    elif isinstance(container[key], str):
        text = container[key]
        at = rng.randint(0, len(text))
        container[key] = text[:at] + rng.choice(["", "\0", "\ud800", "{", "}" * 50]) + text[at:]


def _corrupt_bytes(data: bytes, rng: random.Random) -> bytes:
    """Change bytes of the body, which may invalidate the JSON."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at, how = rng.randrange(len(changed) + 1), rng.randrange(4)
        if how == 0 and changed:
            changed[at % len(changed)] = rng.randrange(256)
        elif how == 1:
            changed[at:at] = rng.choice([b"[", b'"', b"\\u", b"\xff", b"{" * 300, b"1e999", b"\0"])
        elif how == 2:
            del changed[at : at + rng.randint(1, 30)]
        else:
            changed[at:at] = changed[: rng.randint(0, 50)]
    return bytes(changed)


def make_fuzzed_body(model: str, seed: int) -> bytes:
    """Make a body by seed: one in twenty is valid, one in four has corrupted bytes."""
    rng = random.Random(seed)
    body = _make_valid_body(model, rng)
    if seed % 20:
        for _ in range(rng.randint(1, 3)):
            _corrupt_value(body, rng)
        # The parser is tested, not how long the model may speak.
        body.setdefault("max_tokens", 2)
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    return _corrupt_bytes(data, rng) if seed % 4 == 3 else data
