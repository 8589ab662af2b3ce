"""Randomly corrupted bodies of chat completions, reproducible by seed."""

from __future__ import annotations

import json
import random
from typing import Any

from hostile_requests import make_image_content, make_schema_format, make_small_image
from mutations import VALUES, mutated_bytes, mutated_value

BODY_VALUES: tuple[Any, ...] = (
    *({"type": None}, {"type": "text"}, {"a": {}}, "user", "data:", "data:image/png;base64,AAAA"),
    *("https://localhost/a.png", "http://[", "\U0001f600" * 50, {str(n): n for n in range(300)}),
)
"""Replacement values that a request may contain, in addition to those of any JSON."""

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


def make_fuzzed_body(model: str, seed: int) -> bytes:
    """Make a body by seed: one in twenty is valid, one in four has corrupted bytes."""
    rng = random.Random(seed)
    body = _make_valid_body(model, rng)
    if seed % 20:
        body = mutated_value(rng, body, values=(*VALUES, *BODY_VALUES))
        # The parser is tested, not how long the model may speak.
        if isinstance(body, dict):
            body.setdefault("max_tokens", 2)
    data = json.dumps(body).encode("utf-8", "surrogatepass")
    return mutated_bytes(rng, data) if seed % 4 == 3 else data
