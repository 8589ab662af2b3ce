"""Chat completion responses in the format of the OpenAI API, complete or streamed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finesight.encode.tokenizer import TextTokenizer
from finesight.infer.prediction import Prediction, box_to_dict
from finesight.infer.request import CompletionDelta, FinishReason, GeneratedToken, TokenUsage
from finesight.serve.tool_calls import ParsedToolCall, ToolCallParser


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
        """Append a text delta of the generation.

        Returns a stream chunk, or None if the text is held back because it may start a tool call.
        """
        text, calls = (
            self.tool_call_parser.add_text(delta.text)
            if self.tool_call_parser
            else (delta.text, [])
        )
        return self._append(text, calls, delta.tokens)

    def finish(self, finish_reason: FinishReason, prediction: Prediction) -> list[dict[str, Any]]:
        """Return the last stream chunks of the choice.

        These are text that was held back, if any, and the finish reason.
        """
        text, calls = self.tool_call_parser.flush() if self.tool_call_parser else ("", [])
        remaining_chunk = self._append(text, calls, ())
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
        tool_calls = (
            {"tool_calls": [call.as_json() for call in self.tool_calls]} if self.tool_calls else {}
        )
        content = self.text if self.text or not self.tool_calls else None
        return {
            "index": self.index,
            "message": {
                "role": "assistant",
                "content": content,
                "refusal": None,
                **tool_calls,
                **self._get_extra_fields(),
            },
            "finish_reason": self.openai_finish_reason,
            "logprobs": {"content": self.logprobs, "refusal": None} if self.with_logprobs else None,
        }

    def build_first_chunk(self) -> dict[str, Any]:
        """Return the first stream chunk of the choice, which contains the role."""
        return self._build_chunk({"role": "assistant", "content": ""})

    def _get_extra_fields(self) -> dict[str, Any]:
        """Return the message fields that extend the OpenAI API.

        These are `boxes`, `raw_text` and, for reasoning models, `reasoning_content`.
        """
        prediction = self.prediction
        if prediction is None:
            return {}
        reasoning = (
            {} if prediction.reasoning is None else {"reasoning_content": prediction.reasoning}
        )
        return {
            "boxes": [box_to_dict(box) for box in prediction.boxes],
            "raw_text": prediction.raw_text,
            **reasoning,
        }

    def _append(
        self, text: str, calls: Sequence[ParsedToolCall], tokens: Sequence[GeneratedToken]
    ) -> dict[str, Any] | None:
        logprobs = [self._format_logprob(token) for token in tokens] if self.with_logprobs else []
        if not text and not calls and not logprobs:
            return None
        delta: dict[str, Any] = {"content": text} if text else {}
        if calls:
            num_calls = len(self.tool_calls)
            delta["tool_calls"] = [
                {"index": call_index, **call.as_json()}
                for call_index, call in enumerate(calls, num_calls)
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
        top_logprobs = [self._format_token(id, logprob) for id, logprob in token.top_logprobs]
        assert token.logprob is not None, f"token {token.id} has no log probability"
        return {**self._format_token(token.id, token.logprob), "top_logprobs": top_logprobs}

    def _format_token(self, token_id: int, logprob: float) -> dict[str, Any]:
        token_bytes = self.tokenizer.id_to_bytes(token_id)
        # JSON has no infinity, the log probability of an excluded token.
        bounded_logprob = max(logprob, -9999.0)
        text = token_bytes.decode(errors="replace")
        return {"token": text, "logprob": bounded_logprob, "bytes": list(token_bytes)}


@dataclass(frozen=True, slots=True)
class CompletionEnvelope:
    """Builds response objects with the fields that all chunks of a stream share.

    Attributes:
        id: ID of the completion.
        model: Model name of the request.
        created_at: Unix time of the response.
    """

    id: str
    model: str
    created_at: int = field(default_factory=lambda: int(time.time()))

    def build_response(
        self, choices: Sequence[ChoiceBuilder], usage: dict[str, Any]
    ) -> dict[str, Any]:
        """Build the response body of a request without streaming."""
        body = {"choices": [choice.to_dict() for choice in choices], "usage": usage}
        return {**self._build_header("chat.completion"), **body}

    def build_chunk(
        self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Build one chunk of a streamed response."""
        usage_field = {} if usage is None else {"usage": usage}
        return {
            **self._build_header("chat.completion.chunk"),
            "choices": list(choices),
            **usage_field,
        }

    def _build_header(self, object_type: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_type,
            "created": self.created_at,
            "model": self.model,
        }


def format_usage(usages: Sequence[TokenUsage]) -> dict[str, Any]:
    """Format the token usage of a request. The prompt counts once for all choices."""
    prompt_tokens, completion_tokens = (
        usages[0].prompt_tokens,
        sum(usage.completion_tokens for usage in usages),
    )
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usages[0].cached_tokens},
    }
