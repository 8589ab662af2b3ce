"""Requests that try to stall a server or to fill its memory, made on the spot."""

from __future__ import annotations

import base64
import io
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image

SIDE = 7_900
"""Pixels of a side of an image that is just within the limit of pixels."""


@dataclass(frozen=True)
class Hostile:
    """A request by its name; `cut` is the share of the body after which the client disconnects."""

    name: str
    path: str
    body: bytes
    content_type: str = "application/json"
    cut: float = 1.0

    def send(self, port: int, seconds: float = 120.0) -> int:
        """Send it and return the status; 0 where the client or the server closed first."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            f"Content-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", port), timeout=seconds) as there:
            try:
                there.sendall(head.encode() + self.body[: int(len(self.body) * self.cut)])
                if self.cut < 1:
                    return 0
                answer = b""
                while piece := there.recv(1 << 16):
                    answer += piece
            except (ConnectionError, TimeoutError):
                return 0
        words = answer[:40].split()
        return int(words[1]) if len(words) > 1 else 0


def chat(model: str, content: Any, **more: Any) -> bytes:
    """The body of a chat completion."""
    body = {"model": model, "messages": [{"role": "user", "content": content}], **more}
    return json.dumps({"max_tokens": 64, **body}).encode()


def image_part(data: bytes, kind: str = "png") -> dict[str, Any]:
    """An image as a part of a message."""
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    """A `response_format` of a JSON schema."""
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}


def _pattern(pattern: str) -> dict[str, Any]:
    return {"type": "string", "pattern": pattern}


SCHEMAS: dict[str, dict[str, Any]] = {
    # Each of the first two stalled a reader thread; memory grew until the process was killed.
    "intersection": {"allOf": [_pattern(f"(a|b)*a(a|b){{{n}}}") for n in range(20)]},
    "multiple of": {"type": "integer", "multipleOf": 12_345_678},
    # Compiles in a tenth of a second; the first mask takes a minute.
    "stars": _pattern(".*" * 45_000),
    "options": _pattern(".?" * 45_000),
    "letters": _pattern("\\p{L}?" * 15_000),
    "negations": _pattern("[^a]?" * 18_000),
    # The mask of the first token is quick, those after the key are not.
    "later": {
        "type": "object",
        "properties": {"key": {"const": "x"}, "value": _pattern(".*" * 20_000)},
        "required": ["key", "value"],
    },
    "properties": {
        "type": "object",
        "properties": {f"k{n}": {"type": "string"} for n in range(3_000)},
    },
    "states": _pattern("^.*a.{2000}$"),
}


@cache
def jpeg2000() -> bytes:
    """A few hundred bytes that take seconds to decode."""
    file = io.BytesIO()
    flat = Image.new("L", (SIDE, SIDE), 128)
    flat.save(file, "JPEG2000", quality_mode="rates", quality_layers=[1000])
    return file.getvalue()


@cache
def progressive_jpeg(scans: int = 3_000) -> bytes:
    """A JPEG whose smallest scan is repeated: each pass goes over all of the image."""
    file = io.BytesIO()
    flat = Image.new("RGB", (SIDE, SIDE), (120, 30, 200))
    flat.save(file, "JPEG", progressive=True, quality=50)
    data = file.getvalue()
    pieces, at = list[bytes](), 2
    while data[at + 1] != 0xD9:
        end = at + 2 + struct.unpack(">H", data[at + 2 : at + 4])[0]
        if data[at + 1] == 0xDA:
            while data[end] != 0xFF or data[end + 1] == 0 or 0xD0 <= data[end + 1] <= 0xD7:
                end += 1
        pieces.append(data[at:end])
        at = end
    smallest = min((piece for piece in pieces if piece[1] == 0xDA), key=len)
    return data[:2] + b"".join(pieces) + smallest * scans + data[at:]


@cache
def small_image(kind: str) -> bytes:
    """An image of 64 x 64 pixels."""
    file = io.BytesIO()
    Image.new("P" if kind == "GIF" else "RGB", (64, 64)).save(file, kind)
    return file.getvalue()


def header_flood(kind: str, size: int) -> bytes:
    """An image whose header has as many segments, comments or chunks as `size` bytes hold."""
    data = small_image(kind)
    if kind == "JPEG":
        at, piece = 2, b"\xff\xe1\x00\x08Exif\0\0"
    elif kind == "GIF":
        at, piece = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0), b"\x21\xfe\x01a\0"
    else:
        name = b"abCd"
        at, piece = 33, struct.pack(">I", 0) + name + struct.pack(">I", zlib.crc32(name))
    return data[:at] + piece * (size // len(piece)) + data[at:]


def long_text(kind: str, length: int, seed: int) -> str:
    """A text that takes long to tokenize, different for each seed."""
    units = {"digits": "0123456789", "jamo": "\u1100\u1161\u11a8", "marks": "\u0301\u0316"}
    text = units[kind] * (length // len(units[kind]))
    return f"{seed} {text}"


def form(data: bytes) -> tuple[bytes, str]:
    """The body of an upload, and its content type."""
    mark = b"----------------8f0c"
    head = b'\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n--' + mark
    file = b'\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    body = b"--" + mark + head + file + data + b"\r\n--" + mark + b"--\r\n"
    return body, f"multipart/form-data; boundary={mark.decode()}"


CHAT, FILES = "/v1/chat/completions", "/v1/files"


def kinds(model: str, flood: int, length: int) -> dict[str, Callable[[int], Hostile]]:
    """Makers of hostile requests by name; `flood` are bytes of a header, `length` characters."""

    def asked(name: str, content: Any, **more: Any) -> Hostile:
        return Hostile(name, CHAT, chat(model, content, **more))

    def shown(name: str, data: bytes, times: int = 1, **more: Any) -> Hostile:
        return asked(name, [*[image_part(data)] * times, {"type": "text", "text": "What?"}], **more)

    def uploaded(name: str, data: bytes) -> Hostile:
        return Hostile(name, FILES, *form(data))

    makers: dict[str, Callable[[int], Hostile]] = {
        f"schema: {name}": lambda _, name=name, schema=schema: asked(  # type: ignore[misc]
            name, "Answer.", response_format=schema_format(schema), max_tokens=400
        )
        for name, schema in SCHEMAS.items()
    }
    for text in ("digits", "jamo", "marks"):
        # Beyond the limit of characters, or just within it.
        makers[f"text: {text}"] = lambda seed, text=text: asked(  # type: ignore[misc]
            text, long_text(text, length if seed % 2 else 400_000, seed)
        )
    for kind in ("JPEG", "GIF", "PNG"):
        makers[f"header: {kind}"] = lambda _, kind=kind: shown(  # type: ignore[misc]
            kind, header_flood(kind, flood)
        )
        makers[f"upload: {kind}"] = lambda _, kind=kind: uploaded(  # type: ignore[misc]
            kind, header_flood(kind, flood)
        )
    makers |= {
        "image: JPEG 2000": lambda _: shown("JPEG 2000", jpeg2000(), 8),
        "image: progressive": lambda _: shown("progressive", progressive_jpeg(), 4, n=4),
        "image: cut off": lambda _: shown("cut off", small_image("PNG")[:60]),
        "tools": lambda _: asked(
            "tools",
            "Call it.",
            tools=[
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": SCHEMAS["intersection"]},
                }
            ],
            tool_choice="required",
        ),
        "body: escapes": lambda seed: asked("escapes", f"{seed}" + "\u4e00" * (flood // 6)),
        "body: brackets": lambda _: Hostile("brackets", CHAT, b"[" * flood),
        "body: values": lambda _: Hostile(
            "values", CHAT, b'{"model":"a","messages":[' + b"1," * 100_000 + b"1]}"
        ),
        "body: not UTF-8": lambda seed: Hostile(
            "not UTF-8", CHAT, random.Random(seed).randbytes(50_000)
        ),
        "disconnect": lambda seed: Hostile(
            "disconnect",
            CHAT,
            chat(model, long_text("digits", flood, seed)),
            cut=random.Random(seed).random(),
        ),
    }
    return makers


def hostile_requests(
    model: str, number: int, flood: int = 4 << 20, length: int = 990_000
) -> Iterator[Hostile]:
    """So many requests, every kind in turn, in an order that is always the same."""
    makers = kinds(model, flood, length)
    names = [name for _ in range(-(-number // len(makers))) for name in makers][:number]
    random.Random(0).shuffle(names)
    for seed, name in enumerate(names):
        yield makers[name](seed)
