"""What one request, one client and all of them together may ask of a server."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from finesight.data.headers import MAX_PIXELS

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Every limit with its default; `MEANINGS` says what each is. `rows`, `waiting` and `seconds`
    are options of the command."""

    rows: int = 64
    waiting: int = 256
    seconds: float = 300.0
    answer_tokens: int = 16_384
    connections: int = 512
    body_bytes: int = 64 * MIB
    bodies_bytes: int = 1024 * MIB
    header_seconds: float = 15.0
    body_seconds: float = 120.0
    idle_seconds: float = 15.0
    stalled_seconds: float = 30.0
    closing_seconds: float = 60.0
    messages: int = 1000
    text_characters: int = 1_000_000
    pictures: int = 32
    picture_bytes: int = 32 * MIB
    picture_pixels: int = MAX_PIXELS
    choices: int = 8
    top_logprobs: int = 20
    stops: int = 16
    schema_characters: int = 100_000
    fetch_seconds: float = 20.0
    files: int = 1000
    files_bytes: int = 2048 * MIB
    readers: int = 4
    image_seconds: float = 2.0
    prepare_seconds: float = 20.0
    worker_bytes: int = 1024 * MIB
    schema_seconds: float = 2.0
    answer_schema_seconds: float = 30.0
    schema_bytes: int = 256 * MIB

    @property
    def requests(self) -> int:
        """Questions that are answered, read or waiting."""
        return self.rows + self.waiting


MEANINGS = {
    "rows": ("answers that grow together", "`--rows`"),
    "waiting": ("questions that wait behind them; the next one is answered 429", "`--waiting`"),
    "seconds": ("of one request from its first byte; then its answer is given up", "`--seconds`"),
    "answer_tokens": ("that a request may ask for; 4,096 where it does not say", ""),
    "connections": ("at once; the next one is closed unread", ""),
    "body_bytes": ("of one request; more are answered 413", ""),
    "bodies_bytes": (
        "of all requests and decoded images that are held at once; more are answered 503",
        "",
    ),
    "header_seconds": ("until the head of a request is there; then the connection is closed", ""),
    "body_seconds": ("until its body is there; then it is answered 408", ""),
    "idle_seconds": ("that a connection is kept between requests", ""),
    "stalled_seconds": (
        "in which a client takes nothing of its answer, which is then given up",
        "",
    ),
    "closing_seconds": ("for running answers to finish, once the server is told to stop", ""),
    "messages": ("of one conversation", ""),
    "text_characters": (
        "of all texts of a request; fewer where the context of the model is short: 16 for each of"
        " its tokens",
        "",
    ),
    "pictures": ("of one request", ""),
    "picture_bytes": ("of one picture, uploaded, fetched or in a data URL", ""),
    "picture_pixels": ("of one picture, read from its header before it is decoded", ""),
    "choices": ("`n` of one request", ""),
    "top_logprobs": ("of one token", ""),
    "stops": ("stop texts of one request", ""),
    "schema_characters": ("of a JSON schema, or of all tools, as JSON", ""),
    "fetch_seconds": ("for one picture of an allowed host, all redirects included", ""),
    "files": ("uploaded files that are kept", ""),
    "files_bytes": ("of all of them", ""),
    "readers": ("worker processes that parse, decode and tokenize; other requests wait", ""),
    "image_seconds": (
        "processor time to parse a body, to read the header of an image, to decode it, to tokenize",
        "",
    ),
    "prepare_seconds": ("processor time to read one request, all of its images included", ""),
    "worker_bytes": ("memory of a worker process; past it, the request is answered 400", ""),
    "schema_seconds": (
        "processor time to compile a schema, and for each token of an answer held to it",
        "",
    ),
    "answer_schema_seconds": ("processor time to hold one answer to its schema", ""),
    "schema_bytes": ("memory of the process that holds an answer to its schema", ""),
}
"""Of each limit: what it bounds, and the option that sets it."""


def table(limits: Limits, said: Callable[[str], str] = str) -> str:
    """The limits as a table in Markdown; `said` gives its words in the page's language."""
    titles = " | ".join(map(said, ("limit", "default", "what it bounds", "option")))
    shown = [
        f"| `{name}` | {_shown(name, value)} | {said(MEANINGS[name][0])} | {MEANINGS[name][1]} |"
        for name, value in asdict(limits).items()
    ]
    return "\n".join([f"| {titles} |", "|---|---|---|---|", *shown])


def _shown(name: str, value: float) -> str:
    return f"{value // MIB} MiB" if name.endswith("_bytes") else f"{value:,.0f}"
