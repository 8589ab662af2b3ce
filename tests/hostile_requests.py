"""Generators of requests that try to stall a server or to exhaust its memory."""

import base64
import json
import random
import socket
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from case_files import load_cases
from image_fixtures import encode_image
from mutations import VALUES, mutated_bytes, mutated_value
from PIL import Image

SIDE = 7_900
"""Side of an image just below the pixel limit."""


@dataclass(frozen=True)
class HostileRequest:
    """Named request. The client disconnects after the fraction `cut` of the body."""

    name: str
    path: str
    body: bytes
    content_type: str = "application/json"
    cut: float = 1.0
    headers: str = ""

    def send(self, port: int, seconds: float = 120.0) -> int:
        """Send the request and return the status, or 0 if the connection was closed."""
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
            f"Content-Type: {self.content_type}\r\nContent-Length: {len(self.body)}\r\n"
            f"{self.headers}\r\n"
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


def make_chat_body(model: str, content: Any, **more: Any) -> bytes:
    body = {"model": model, "messages": [{"role": "user", "content": content}], **more}
    return json.dumps({"max_tokens": 64, **body}).encode()


def make_image_content(data: bytes, kind: str = "png") -> dict[str, Any]:
    """Make an image part of a message."""
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


EBML = b"\x1a\x45\xdf\xa3"


def make_video_content(data: bytes) -> dict[str, Any]:
    """Make a part of a message with a video file."""
    url = f"data:video/mp4;base64,{base64.b64encode(data).decode()}"
    return {"type": "video_url", "video_url": {"url": url}}


def make_frames(data: bytes, times: int) -> dict[str, Any]:
    """Make a part of a message with a list of equal frames."""
    return {"type": "video", "video": [make_image_content(data)["image_url"]["url"]] * times}


def make_schema_format(schema: dict[str, Any]) -> dict[str, Any]:
    """Make a `response_format` with a JSON schema."""
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


SLOW_TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMAS["intersection"]}}


@cache
def make_jpeg2000() -> bytes:
    """Make an image of a few hundred bytes that takes seconds to decode."""
    flat = Image.new("L", (SIDE, SIDE), 128)
    return encode_image(flat, "JPEG2000", quality_mode="rates", quality_layers=[1000])


@cache
def make_progressive_jpeg(scans: int = 3_000) -> bytes:
    """Make a JPEG with many repeated scans, each of which processes all pixels."""
    flat = Image.new("RGB", (SIDE, SIDE), (120, 30, 200))
    data = encode_image(flat, "JPEG", progressive=True, quality=50)
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
def make_large_png() -> bytes:
    """Make an image of some 100 kB whose decoding takes tenths of a second."""
    return encode_image(Image.new("RGB", (SIDE, SIDE), (120, 30, 200)))


@cache
def make_small_image(kind: str) -> bytes:
    """Make an image of 64 x 64 pixels."""
    return encode_image(Image.new("P" if kind == "GIF" else "RGB", (64, 64)), kind)


def make_header_flood(kind: str, size: int) -> bytes:
    """Make an image whose header has `size` bytes of segments, comments or chunks."""
    data = make_small_image(kind)
    if kind == "JPEG":
        at, piece = 2, b"\xff\xe1\x00\x08Exif\0\0"
    elif kind == "GIF":
        at, piece = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0), b"\x21\xfe\x01a\0"
    else:
        name = b"abCd"
        at, piece = 33, struct.pack(">I", 0) + name + struct.pack(">I", zlib.crc32(name))
    return data[:at] + piece * (size // len(piece)) + data[at:]


def make_long_text(kind: str, length: int, seed: int) -> str:
    """Make a text that is slow to tokenize, unique by seed."""
    units = {"digits": "0123456789", "jamo": "\u1100\u1161\u11a8", "marks": "\u0301\u0316"}
    text = units[kind] * (length // len(units[kind]))
    return f"{seed} {text}"


def make_multipart_form(data: bytes) -> tuple[bytes, str]:
    """Make the body of an upload and its content type."""
    mark = b"----------------8f0c"
    head = b'\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n--' + mark
    file = b'\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    body = b"--" + mark + head + file + data + b"\r\n--" + mark + b"--\r\n"
    return body, f"multipart/form-data; boundary={mark.decode()}"


CHAT, FILES = "/v1/chat/completions", "/v1/files"
MANY_MESSAGES = b'{"model":"a","messages":[' + b"1," * 100_000 + b"1]}"


def request_makers(
    model: str, flood: int, length: int
) -> dict[str, Callable[[int], HostileRequest]]:

    def requested(name: str, content: Any, **more: Any) -> HostileRequest:
        return HostileRequest(name, CHAT, make_chat_body(model, content, **more))

    def shown(name: str, data: bytes, times: int = 1, **more: Any) -> HostileRequest:
        parts = [make_image_content(data)] * times
        return requested(name, [*parts, {"type": "text", "text": "What?"}], **more)

    makers: dict[str, Callable[[int], HostileRequest]] = {
        "image: JPEG 2000": lambda _: shown("JPEG 2000", make_jpeg2000(), 8),
        "image: progressive": lambda _: shown("progressive", make_progressive_jpeg(), 4, n=4),
        "image: cut off": lambda _: shown("cut off", make_small_image("PNG")[:60]),
        "video: noise": lambda seed: requested(
            "noise", [make_video_content(EBML + random.Random(seed).randbytes(flood // 2))]
        ),
        "video: zeros": lambda _: requested("zeros", [make_video_content(bytes(flood // 2))]),
        "video: frames": lambda _: requested("frames", [make_frames(make_small_image("PNG"), 768)]),
        "video: many": lambda _: requested("many", [make_frames(b"", 10_000)]),
        "tools": lambda _: requested("tools", "Call.", tools=[SLOW_TOOL], tool_choice="required"),
        "body: escapes": lambda seed: requested("escapes", f"{seed}" + "\u4e00" * (flood // 6)),
        "body: brackets": lambda _: HostileRequest("brackets", CHAT, b"[" * flood),
        "body: values": lambda _: HostileRequest("values", CHAT, MANY_MESSAGES),
        "body: not UTF-8": lambda seed: HostileRequest(
            "not UTF-8", CHAT, random.Random(seed).randbytes(50_000)
        ),
        "disconnect": lambda seed: replace(
            requested("disconnect", make_long_text("digits", flood, seed)),
            cut=random.Random(seed).random(),
        ),
    }

    def add_schema(name: str, schema: dict[str, Any]) -> None:
        given = {"response_format": make_schema_format(schema), "max_tokens": 400}
        makers[f"schema: {name}"] = lambda _: requested(name, "Answer.", **given)

    def add_text(kind: str) -> None:
        # Beyond the limit of characters, or just within it.
        makers[f"text: {kind}"] = lambda seed: requested(
            kind, make_long_text(kind, length if seed % 2 else 400_000, seed)
        )

    def add_header(kind: str) -> None:
        makers[f"header: {kind}"] = lambda _: shown(kind, make_header_flood(kind, flood))
        makers[f"upload: {kind}"] = lambda _: HostileRequest(
            kind, FILES, *make_multipart_form(make_header_flood(kind, flood))
        )

    for name, schema in SCHEMAS.items():
        add_schema(name, schema)
    for kind in ("digits", "jamo", "marks"):
        add_text(kind)
    for kind in ("JPEG", "GIF", "PNG"):
        add_header(kind)
    return makers


def hostile_requests(
    model: str, number: int, flood: int = 4 << 20, length: int = 990_000
) -> Iterator[HostileRequest]:
    """Yield requests of all kinds in a fixed random order."""
    makers = request_makers(model, flood, length)
    names = [name for _ in range(-(-number // len(makers))) for name in makers][:number]
    random.Random(0).shuffle(names)
    for seed, name in enumerate(names):
        yield makers[name](seed)


BODY_VALUES: tuple[Any, ...] = (
    *({"type": None}, {"type": "text"}, {"a": {}}, "user", "data:", "data:image/png;base64,AAAA"),
    *("https://localhost/a.png", "http://[", "\U0001f600" * 50, {str(n): n for n in range(300)}),
)
"""Replacement values that a request may contain, in addition to those of any JSON."""

_PARTS = load_cases("request_bodies")


def _make_valid_body(model: str, rng: random.Random) -> dict[str, Any]:
    text = {"type": "text", "text": "What is in the image?"}
    image = make_image_content(make_small_image(rng.choice(["PNG", "JPEG", "GIF", "WEBP"])))
    messages: list[dict[str, Any]] = [{"role": "user", "content": rng.choice(["Hello", [text]])}]
    if rng.random() < 0.3:
        messages = [{"role": "user", "content": [image, text]}]
    if rng.random() < 0.2:
        video = rng.choice([make_video_content(EBML), make_frames(make_small_image("PNG"), 2)])
        messages = [{"role": "user", "content": [video | {"fps": 2, "max_frames": 8}, text]}]
    if rng.random() < 0.3:
        answer, *others = _PARTS["dialog"]
        messages += [answer | {"content": rng.choice(["Yes", "", None])}, *others]
    if rng.random() < 0.3:
        messages.insert(0, {"role": rng.choice(["system", "developer"]), "content": "Be brief."})
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": 2}
    formats = [{"type": name} for name in ("json_object", "boxes", "text")]
    response_format = rng.choice([make_schema_format(_PARTS["schema"]), *formats])
    tool_choice = rng.choice(["none", "auto", "required"])
    video_arguments = {"fps": 1, "num_frames": 8}
    optional = _PARTS["optional"] | {"media_io_kwargs": {"video": video_arguments}}
    optional |= {"mm_processor_kwargs": {"fps": 2}, "response_format": response_format}
    optional |= {"tools": [_PARTS["tool"]], "tool_choice": tool_choice}
    body |= {key: optional[key] for key in rng.sample(sorted(optional), rng.randint(0, 5))}
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
