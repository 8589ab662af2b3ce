"""Chat completion responses in the format of the OpenAI API, complete or streamed."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finesight.encode.tokenization import TextTokenizer
from finesight.infer.prediction import Prediction, box_to_dict
from finesight.infer.request import CompletionDelta, FinishReason, GeneratedToken, TokenUsage
from finesight.serve.preprocessing_jobs import TOOL_CALL_END, TOOL_CALL_START


@dataclass(frozen=True, slots=True)
class ParsedToolCall:
    """Tool call that the model has generated, with its arguments as JSON text."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """Return the tool call object of the OpenAI API."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(slots=True)
class ToolCallParser:
    """Splits a streamed completion into text and tool calls.

    Text that may start a tool call is held back until it is complete.
    """

    pending: str = ""
    after_call: bool = False

    def add_text(self, delta: str) -> tuple[str, list[ParsedToolCall]]:
        """Add generated text. Returns text that can be sent, and complete tool calls."""
        self._set_pending(self.pending + delta)
        text, calls = "", list[ParsedToolCall]()
        while TOOL_CALL_START in self.pending:
            before, _, rest = self.pending.partition(TOOL_CALL_START)
            call_text, end_tag, after = rest.partition(TOOL_CALL_END)
            if not end_tag:
                text, self.pending = text + before.rstrip("\n"), self.pending[len(before) :]
                return text, calls
            call = parse_tool_call(call_text)
            if call is None:  # the text remains in the answer
                text += f"{before}{TOOL_CALL_START}{call_text}{TOOL_CALL_END}"
            else:
                text += before.rstrip("\n")
                calls.append(call)
            self.after_call = call is not None
            self._set_pending(after)
        end = len(self.pending) - _count_partial_tag(self.pending)
        text, self.pending = text + self.pending[:end], self.pending[end:]
        return text, calls

    def flush(self) -> tuple[str, list[ParsedToolCall]]:
        """Return the text or tool call that is left at the end of the completion.

        The last tool call may lack its end tag.
        """
        rest, self.pending = self.pending, ""
        if rest.startswith(TOOL_CALL_START):
            call = parse_tool_call(rest.removeprefix(TOOL_CALL_START))
            if call is not None:
                return "", [call]
        return rest, []

    def _set_pending(self, text: str) -> None:
        """Set the text that is held back, without newlines after a tool call."""
        self.pending = text.lstrip("\n") if self.after_call else text
        self.after_call = self.after_call and not self.pending


def parse_tool_call(text: str) -> ParsedToolCall | None:
    """Parse the text between the tool call tags, or return None if it is invalid."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ParsedToolCall(f"call_{secrets.token_hex(12)}", value["name"], arguments)


def _count_partial_tag(text: str) -> int:
    """Count the last characters of a text that may belong to a tool call.

    These are newlines and a partial start tag.
    """
    for length in range(min(len(TOOL_CALL_START) - 1, len(text)), 0, -1):
        if TOOL_CALL_START.startswith(text[-length:]):
            rest = text[:-length]
            return length + len(rest) - len(rest.rstrip("\n"))
    return len(text) - len(text.rstrip("\n"))


@dataclass(slots=True)
class ChoiceBuilder:
    """Builds one choice of a response from the text deltas of its generation."""

    index: int
    tokenizer: TextTokenizer
    with_logprobs: bool
    tool_call_parser: ToolCallParser | None
    text: str = ""
    tool_calls: list[ParsedToolCall] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    prediction: Prediction | None = None

    def add_delta(self, delta: CompletionDelta) -> dict[str, Any] | None:
        """Append a text delta and return a stream chunk, or None if all text is held back."""
        text, calls = delta.text, list[ParsedToolCall]()
        if self.tool_call_parser is not None:
            text, calls = self.tool_call_parser.add_text(delta.text)
        return self._append(text, calls, delta.tokens, delta.reasoning)

    def finish(self, finish_reason: FinishReason, prediction: Prediction) -> list[dict[str, Any]]:
        """Return the last stream chunks: text that was held back, if any, and finish reason."""
        remaining = self.tool_call_parser.flush() if self.tool_call_parser else ("", [])
        remaining_chunk = self._append(*remaining, ())
        self.finish_reason, self.prediction = finish_reason, prediction
        last_chunk = self._build_chunk(self._get_extra_fields())
        last_chunk["finish_reason"] = self.openai_finish_reason
        return [last_chunk] if remaining_chunk is None else [remaining_chunk, last_chunk]

    @property
    def openai_finish_reason(self) -> str:
        """Finish reason in the OpenAI API: `stop`, `length` or `tool_calls`."""
        if self.tool_calls and self.finish_reason == "stop":
            return "tool_calls"
        return "length" if self.finish_reason == "length" else "stop"

    def to_dict(self) -> dict[str, Any]:
        """Return the complete choice with its message, for a response without streaming."""
        content = self.text if self.text or not self.tool_calls else None
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.tool_calls:
            message["tool_calls"] = [call.as_json() for call in self.tool_calls]
        if self.prediction is not None and self.prediction.reasoning is not None:
            message["reasoning_content"] = self.prediction.reasoning
        return {
            "index": self.index,
            "message": message | self._get_extra_fields(),
            "finish_reason": self.openai_finish_reason,
            "logprobs": {"content": self.logprobs, "refusal": None} if self.with_logprobs else None,
        }

    def build_first_chunk(self) -> dict[str, Any]:
        """Return the first stream chunk of the choice, which contains the role."""
        return self._build_chunk({"role": "assistant", "content": ""})

    def _get_extra_fields(self) -> dict[str, Any]:
        """Return `boxes` and `raw_text`, which extend the OpenAI API."""
        prediction = self.prediction
        if prediction is None:
            return {}
        boxes = [box_to_dict(box) for box in prediction.boxes]
        return {"boxes": boxes, "raw_text": prediction.raw_text}

    def _append(
        self,
        text: str,
        calls: Sequence[ParsedToolCall],
        tokens: Sequence[GeneratedToken],
        reasoning: str = "",
    ) -> dict[str, Any] | None:
        logprobs = [self._format_logprob(token) for token in tokens] if self.with_logprobs else []
        if not text and not calls and not logprobs and not reasoning:
            return None
        delta: dict[str, Any] = {"reasoning_content": reasoning} if reasoning else {}
        if text:
            delta["content"] = text
        if calls:
            delta["tool_calls"] = [
                {"index": call_index, **call.as_json()}
                for call_index, call in enumerate(calls, len(self.tool_calls))
            ]
        self.text += text
        self.tool_calls += calls
        self.logprobs += logprobs
        chunk = self._build_chunk(delta)
        if self.with_logprobs:
            chunk["logprobs"] = {"content": logprobs, "refusal": None}
        return chunk

    def _build_chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "finish_reason": None, "logprobs": None}

    def _format_logprob(self, token: GeneratedToken) -> dict[str, Any]:
        assert token.logprob is not None, f"token {token.id} has no log probability"
        entries = []
        for token_id, logprob in ((token.id, token.logprob), *token.top_logprobs):
            token_bytes = self.tokenizer.id_to_bytes(token_id)
            text = token_bytes.decode(errors="replace")
            # JSON has no infinity, the log probability of an excluded token.
            bounded = max(logprob, -9999.0)
            entries.append({"token": text, "logprob": bounded, "bytes": list(token_bytes)})
        return {**entries[0], "top_logprobs": entries[1:]}


def format_usage(usages: Sequence[TokenUsage]) -> dict[str, Any]:
    """Format the token usage of a request. The prompt counts once for all choices."""
    prompt_tokens = usages[0].prompt_tokens
    completion_tokens = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
    }
