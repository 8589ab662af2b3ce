"""Incremental detokenization of streamed completions."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from finesight.encode.renderer import THINK_END
from finesight.encode.tokenizer import TextTokenizer

_REPLACEMENT_CHAR = "�"
"""Decoder output for bytes of an incomplete character."""

_MIN_REDECODED, _MAX_REDECODED = 8, 64
"""Bounds of the number of tokens with invalid bytes that are decoded again."""

_REASONING_END = THINK_END.strip("\n")


class IncrementalDetokenizer:
    """Incremental detokenizer of one completion, up to an end token or a stop string.

    A token may end within a character or within a stop string. Text is emitted only when later
    tokens cannot change it. Each call decodes only the tokens since the last emitted text and the
    tokens before them that affect spacing. With `has_reasoning`, all text up to the end of the
    reasoning is discarded.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        end_ids: Collection[int],
        stop_strings: Sequence[str],
        has_reasoning: bool,
    ) -> None:
        self._tokenizer, self._end_ids, self._stop_strings = tokenizer, end_ids, tuple(stop_strings)
        self._in_reasoning = has_reasoning
        self._token_ids: list[int] = []
        self._read_offset, self._prefix_offset, self._num_emitted_chars = 0, 0, 0
        self._pending = ""
        self.text = ""
        """All emitted text."""
        self.has_stopped = False
        """Whether a stop string was found."""

    def add_token(self, token: int) -> str:
        """Add a token and return the new text that later tokens cannot change."""
        if token in self._end_ids or self.has_stopped:
            return ""
        self._token_ids.append(token)
        return self._emit(self._decode_new_text(is_last=False), is_last=False)

    def flush(self) -> str:
        """Return the remaining withheld text at the end of the completion."""
        return self._emit(self._decode_new_text(is_last=True), is_last=True)

    def _decode_new_text(self, *, is_last: bool) -> str:
        """Return the newly decoded text, without an incomplete last character."""
        decoded = self._decode(self._token_ids[self._prefix_offset :])
        complete = decoded if is_last else decoded.removesuffix(_REPLACEMENT_CHAR)
        new_text = complete[self._num_emitted_chars :]
        if complete == decoded:
            self._prefix_offset, self._read_offset = self._read_offset, len(self._token_ids)
            self._num_emitted_chars = len(self._decode(self._token_ids[self._prefix_offset :]))
        else:
            self._num_emitted_chars = len(complete)
            self._drop_invalid_prefix(decoded)
        return new_text

    def _drop_invalid_prefix(self, decoded: str) -> None:
        """Stop decoding old tokens with invalid bytes again if the text is unaffected."""
        split_at = len(self._token_ids) - _MIN_REDECODED
        if split_at - self._prefix_offset < _MAX_REDECODED:
            return
        head, tail = (
            self._decode(self._token_ids[self._prefix_offset : split_at]),
            self._decode(self._token_ids[split_at:]),
        )
        if head + tail == decoded:
            self._num_emitted_chars -= len(head)
            self._prefix_offset = self._read_offset = split_at

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""

    def _emit(self, new_text: str, *, is_last: bool) -> str:
        if self.has_stopped:
            return ""
        self._pending += new_text
        if self._in_reasoning:
            _, end_marker, after = self._pending.partition(_REASONING_END)
            if not end_marker:
                return ""
            if not after.strip("\n") and not is_last:
                return ""
            self._in_reasoning, self._pending = False, after.lstrip("\n")
        stop_positions = [
            position for text in self._stop_strings if (position := self._pending.find(text)) >= 0
        ]
        if stop_positions:
            self.has_stopped = True
            emitted, self._pending = self._pending[: min(stop_positions)], ""
        else:
            num_held = 0 if is_last else self._count_partial_stop()
            emitted = self._pending[: len(self._pending) - num_held]
            self._pending = self._pending[len(emitted) :]
        self.text += emitted
        return emitted

    def _count_partial_stop(self) -> int:
        """Return the length of the longest pending suffix that may start a stop string."""
        lengths = (
            length
            for text in self._stop_strings
            for length in range(min(len(text) - 1, len(self._pending)), 0, -1)
            if self._pending.endswith(text[:length])
        )
        return max(lengths, default=0)
