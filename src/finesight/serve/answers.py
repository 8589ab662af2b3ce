"""Answers as OpenAI's clients read them: whole, or in chunks as they grow."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from finesight.encode.tokenizer import TextTokenizer
from finesight.infer.predict import Prediction, as_box
from finesight.infer.request import Delta, Finish, Token, Usage
from finesight.serve.tools import Call, Splitter


@dataclass(slots=True)
class Choice:
    """One answer of a request: what of it was said, and with what log probabilities."""

    index: int
    tokenizer: TextTokenizer
    with_logprobs: bool
    splitter: Splitter | None
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    finish: Finish | None = None
    prediction: Prediction | None = None

    def take(self, delta: Delta) -> dict[str, Any] | None:
        """A chunk with what has come; None where nothing is certain yet."""
        shown, calls = self.splitter.take(delta.text) if self.splitter else (delta.text, [])
        return self._grown(shown, calls, delta.tokens)

    def end(self, finish: Finish, prediction: Prediction) -> list[dict[str, Any]]:
        """The last chunks: what was held back, then why it ended."""
        shown, calls = self.splitter.end() if self.splitter else ("", [])
        rest = self._grown(shown, calls, ())
        self.finish, self.prediction = finish, prediction
        last = self._chunk(self._extras())
        last["finish_reason"] = self.reason
        return [last] if rest is None else [rest, last]

    @property
    def reason(self) -> str:
        """Why the answer ended, in OpenAI's words: a client that has gone reads none."""
        if self.calls and self.finish == "stop":
            return "tool_calls"
        return "length" if self.finish == "length" else "stop"

    def whole(self) -> dict[str, Any]:
        """The choice with its message."""
        calls = {"tool_calls": [call.as_json() for call in self.calls]} if self.calls else {}
        content = self.text if self.text or not self.calls else None
        return {
            "index": self.index,
            "message": {
                "role": "assistant",
                "content": content,
                "refusal": None,
                **calls,
                **self._extras(),
            },
            "finish_reason": self.reason,
            "logprobs": {"content": self.logprobs, "refusal": None} if self.with_logprobs else None,
        }

    def opening(self) -> dict[str, Any]:
        """The first chunk."""
        return self._chunk({"role": "assistant", "content": ""})

    def _extras(self) -> dict[str, Any]:
        """What is not OpenAI's: boxes in pixels of the original pictures, the answer with its
        special tokens, and the thought of a model that thinks."""
        found = self.prediction
        if found is None:
            return {}
        thought = {} if found.thought is None else {"reasoning_content": found.thought}
        return {"boxes": [as_box(box) for box in found.boxes], "raw": found.raw, **thought}

    def _grown(
        self, shown: str, calls: Sequence[Call], tokens: Sequence[Token]
    ) -> dict[str, Any] | None:
        rows = [self._logprob(token) for token in tokens] if self.with_logprobs else []
        if not shown and not calls and not rows:
            return None
        delta: dict[str, Any] = {"content": shown} if shown else {}
        if calls:
            first = len(self.calls)
            delta["tool_calls"] = [
                {"index": place, **call.as_json()} for place, call in enumerate(calls, first)
            ]
        self.text += shown
        self.calls += calls
        self.logprobs += rows
        chunk = self._chunk(delta)
        if self.with_logprobs:
            chunk["logprobs"] = {"content": rows, "refusal": None}
        return chunk

    def _chunk(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "finish_reason": None, "logprobs": None}

    def _logprob(self, token: Token) -> dict[str, Any]:
        top = [self._row(id, logprob) for id, logprob in token.top]
        assert token.logprob is not None, f"token {token.id} came without its log probability"
        return {**self._row(token.id, token.logprob), "top_logprobs": top}

    def _row(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = self.tokenizer.bytes_of(token)
        # What JSON has no number for: the model rules this token out.
        number = max(logprob, -9999.0)
        shown = spelled.decode(errors="replace")
        return {"token": shown, "logprob": number, "bytes": list(spelled)}


@dataclass(frozen=True, slots=True)
class Frame:
    """What all chunks of an answer, or the whole, say alike."""

    id: str
    model: str
    made: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        body = {"choices": [choice.whole() for choice in choices], "usage": usage}
        return {**self._head("chat.completion"), **body}

    def chunk(
        self, choices: Sequence[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One event of a stream."""
        said = {} if usage is None else {"usage": usage}
        return {**self._head("chat.completion.chunk"), "choices": list(choices), **said}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.made, "model": self.model}


def used(usages: Sequence[Usage]) -> dict[str, Any]:
    """The tokens of a request: its prompt is counted once, however many answers it has."""
    prompt, answer = usages[0].prompt, sum(usage.answer for usage in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": usages[0].known},
    }
