"""Limits of the inference server on requests, connections and resources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

from finesight.data.image_header import MAX_IMAGE_PIXELS

MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of the inference server. `LIMIT_DESCRIPTIONS` describes each field."""

    max_num_seqs: int = 64
    max_waiting: int = 256
    request_timeout_s: float = 300.0
    max_completion_tokens: int = 16_384
    max_connections: int = 512
    max_body_bytes: int = 64 * MIB
    max_total_body_bytes: int = 1024 * MIB
    header_timeout_s: float = 15.0
    body_timeout_s: float = 120.0
    keep_alive_timeout_s: float = 15.0
    send_timeout_s: float = 30.0
    shutdown_timeout_s: float = 60.0
    max_messages: int = 1000
    max_text_chars: int = 1_000_000
    max_images: int = 32
    max_image_bytes: int = 32 * MIB
    max_image_pixels: int = MAX_IMAGE_PIXELS
    max_choices: int = 8
    max_top_logprobs: int = 20
    max_stop_strings: int = 16
    max_schema_chars: int = 100_000
    fetch_timeout_s: float = 20.0
    max_files: int = 1000
    max_total_file_bytes: int = 2048 * MIB
    num_reader_threads: int = 4
    max_image_cpu_s: float = 2.0
    max_request_cpu_s: float = 20.0
    max_worker_memory_bytes: int = 1024 * MIB
    max_schema_cpu_s: float = 2.0
    max_constraint_cpu_s: float = 30.0
    max_schema_memory_bytes: int = 256 * MIB

    @property
    def max_requests(self) -> int:
        """Maximum number of admitted requests: generating, in preprocessing or queued."""
        return self.max_num_seqs + self.max_waiting


LIMIT_DESCRIPTIONS = {
    "max_num_seqs": ("concurrently generated answers", "`--max-num-seqs`"),
    "max_waiting": ("requests in the queue; the next one gets status 429", "`--max-waiting`"),
    "request_timeout_s": (
        "seconds for a request from its first byte; then it is canceled",
        "`--request-timeout-s`",
    ),
    "max_completion_tokens": ("tokens that a request may ask for; 4,096 by default", ""),
    "max_connections": ("concurrent connections; the next one is closed", ""),
    "max_body_bytes": ("size of a request body; a larger one gets status 413", ""),
    "max_total_body_bytes": (
        "size of all request bodies and decoded images in memory; beyond it, requests get status"
        " 503",
        "",
    ),
    "header_timeout_s": ("seconds to receive a request header; then the connection is closed", ""),
    "body_timeout_s": ("seconds to receive a request body; then the request gets status 408", ""),
    "keep_alive_timeout_s": ("seconds that an idle connection stays open", ""),
    "send_timeout_s": (
        "seconds without progress in sending a response; then the connection is closed",
        "",
    ),
    "shutdown_timeout_s": ("seconds for running answers to complete at shutdown", ""),
    "max_messages": ("messages of a conversation", ""),
    "max_text_chars": (
        "characters of all texts of a request, and at most 16 per token of the context length",
        "",
    ),
    "max_images": ("images of a request", ""),
    "max_image_bytes": ("size of an image file: uploaded, fetched or in a data URL", ""),
    "max_image_pixels": ("pixels of an image, read from its header before decoding", ""),
    "max_choices": ("`n` of a request", ""),
    "max_top_logprobs": ("`top_logprobs` of a request", ""),
    "max_stop_strings": ("stop strings of a request", ""),
    "max_schema_chars": ("characters of a JSON schema, or of all tools, as JSON", ""),
    "fetch_timeout_s": ("seconds to fetch an image from an allowed host, with redirects", ""),
    "max_files": ("stored uploaded files", ""),
    "max_total_file_bytes": ("size of all stored files", ""),
    "num_reader_threads": (
        "worker processes that parse, decode and tokenize; other requests wait",
        "",
    ),
    "max_image_cpu_s": (
        "CPU seconds to parse a body, read an image header, decode an image, or tokenize",
        "",
    ),
    "max_request_cpu_s": ("CPU seconds to preprocess a request with all of its images", ""),
    "max_worker_memory_bytes": (
        "memory of a worker process; a request that exceeds it gets status 400",
        "",
    ),
    "max_schema_cpu_s": (
        "CPU seconds to compile a schema, and for each token of a constrained answer",
        "",
    ),
    "max_constraint_cpu_s": ("CPU seconds for the schema constraint of an answer", ""),
    "max_schema_memory_bytes": ("memory of the process of a schema constraint", ""),
}
"""Description and command-line option by field of `ServerLimits`."""


def format_limits_table(limits: ServerLimits, translate: Callable[[str], str] = str) -> str:
    """Format the limits as a Markdown table for the documentation.

    Args:
        limits: Limits with their values.
        translate: Translates the texts of the table.
    """
    titles = " | ".join(map(translate, ("limit", "default", "description", "option")))
    lines = [f"| {titles} |", "|---|---|---|---|"]
    for name, value in asdict(limits).items():
        description, option = LIMIT_DESCRIPTIONS[name]
        cells = f"`{name}`", _format_limit(name, value), translate(description), option
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _format_limit(name: str, value: float) -> str:
    return f"{value // MIB} MiB" if name.endswith("_bytes") else f"{value:,.0f}"
