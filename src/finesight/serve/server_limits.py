"""Limits of the inference server on requests, connections and resources."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

from finesight.data.image_header import MAX_IMAGE_PIXELS

MIB = 2**20


def _limit(default: Any, description: str, option: str = "") -> Any:
    """Declare a limit with its description and its command-line option."""
    return field(default=default, metadata={"description": description, "option": option})


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of the inference server. The metadata of each field describes it."""

    max_num_seqs: int = _limit(64, "concurrently generated answers", "`--max-num-seqs`")
    max_waiting: int = _limit(
        256, "requests in the queue; the next one gets status 429", "`--max-waiting`"
    )
    request_timeout_s: float = _limit(
        300.0,
        "seconds for a request from its first byte; then it is canceled",
        "`--request-timeout-s`",
    )
    max_completion_tokens: int = _limit(
        16_384, "tokens that a request may ask for; 4,096 by default"
    )
    max_connections: int = _limit(512, "concurrent connections; the next one is closed")
    max_body_bytes: int = _limit(64 * MIB, "size of a request body; a larger one gets status 413")
    max_total_body_bytes: int = _limit(
        1024 * MIB,
        "size of all request bodies and decoded images in memory; beyond it, requests get status"
        " 503",
    )
    header_timeout_s: float = _limit(
        15.0, "seconds to receive a request header; then the connection is closed"
    )
    body_timeout_s: float = _limit(
        120.0, "seconds to receive a request body; then the request gets status 408"
    )
    keep_alive_timeout_s: float = _limit(15.0, "seconds that an idle connection stays open")
    send_timeout_s: float = _limit(
        30.0, "seconds without progress in sending a response; then the connection is closed"
    )
    shutdown_timeout_s: float = _limit(60.0, "seconds for running answers to complete at shutdown")
    max_messages: int = _limit(1000, "messages of a conversation")
    max_text_chars: int = _limit(
        1_000_000,
        "characters of all texts of a request, and at most 16 per token of the context length",
    )
    max_images: int = _limit(32, "images of a request")
    max_image_bytes: int = _limit(
        32 * MIB, "size of an image file: uploaded, fetched or in a data URL"
    )
    max_image_pixels: int = _limit(
        MAX_IMAGE_PIXELS, "pixels of an image, read from its header before decoding"
    )
    max_choices: int = _limit(8, "`n` of a request")
    max_top_logprobs: int = _limit(20, "`top_logprobs` of a request")
    max_stop_strings: int = _limit(16, "stop strings of a request")
    max_schema_chars: int = _limit(100_000, "characters of a JSON schema, or of all tools, as JSON")
    fetch_timeout_s: float = _limit(
        20.0, "seconds to fetch an image from an allowed host, with redirects"
    )
    max_files: int = _limit(1000, "stored uploaded files")
    max_total_file_bytes: int = _limit(2048 * MIB, "size of all stored files")
    num_reader_threads: int = _limit(
        4, "worker processes that parse, decode and tokenize; other requests wait"
    )
    max_image_cpu_s: float = _limit(
        2.0, "CPU seconds to parse a body, read an image header, decode an image, or tokenize"
    )
    max_request_cpu_s: float = _limit(
        20.0, "CPU seconds to preprocess a request with all of its images"
    )
    max_worker_memory_bytes: int = _limit(
        1024 * MIB, "memory of a worker process; a request that exceeds it gets status 400"
    )
    max_schema_cpu_s: float = _limit(
        2.0, "CPU seconds to compile a schema, and for each token of a constrained answer"
    )
    max_constraint_cpu_s: float = _limit(30.0, "CPU seconds for the schema constraint of an answer")
    max_schema_memory_bytes: int = _limit(256 * MIB, "memory of the process of a schema constraint")

    @property
    def max_requests(self) -> int:
        """Maximum number of admitted requests: generating, in preprocessing or queued."""
        return self.max_num_seqs + self.max_waiting

    def to_markdown(self, translate: Callable[[str], str] = str) -> str:
        """Format the limits as a Markdown table for the documentation."""
        titles = " | ".join(map(translate, ("limit", "default", "description", "option")))
        lines = [f"| {titles} |", "|---|---|---|---|"]
        for name, value in asdict(self).items():
            metadata = self.__dataclass_fields__[name].metadata
            default = f"{value // MIB} MiB" if name.endswith("_bytes") else f"{value:,.0f}"
            description, option = translate(metadata["description"]), metadata["option"]
            lines.append(f"| `{name}` | {default} | {description} | {option} |")
        return "\n".join(lines)
