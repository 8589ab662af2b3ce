"""Text of an answer while it grows: only what will not change any more is said."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from finesight.encode.thought import CLOSED
from finesight.encode.tokenizer import TextTokenizer

_BROKEN = "�"
"""What a decoder writes for bytes that are no whole character yet."""

_END_OF_THOUGHT = CLOSED.strip("\n")


class Spoken:
    """The text of tokens as they come, up to an end token or one of the texts `stop`.

    A token may hold a part of a character, and a part of a stop text: text lags behind until it is
    sure. What is decoded anew for each token is short: the tokens since the last sure text, with
    those before them, on which their spacing may depend. `thinks`: all up to the end of the thought
    is kept back, as it is no part of the answer.
    """

    def __init__(
        self, tokenizer: TextTokenizer, end_ids: Collection[int], stop: Sequence[str], thinks: bool
    ) -> None:
        self._tokenizer, self._end_ids, self._stop = tokenizer, end_ids, tuple(stop)
        self._thinks = thinks
        self._ids: list[int] = []
        self._sure, self._before = 0, 0
        self._pending = ""
        self.text = ""
        """All that was said."""
        self.stopped = False
        """Whether a stop text has come."""

    def take(self, token: int) -> str:
        """What is sure with this token."""
        if token in self._end_ids or self.stopped:
            return ""
        self._ids.append(token)
        known = self._decode(self._ids[self._before : self._sure])
        grown = self._decode(self._ids[self._before :])
        if grown.endswith(_BROKEN) and len(self._ids) - self._sure < 4:
            return ""
        self._before, self._sure = self._sure, len(self._ids)
        return self._say(grown[len(known) :], last=False)

    def finish(self) -> str:
        """What was kept back, when no more tokens come."""
        known = self._decode(self._ids[self._before : self._sure])
        grown = self._decode(self._ids[self._before :])
        self._sure = self._before = len(self._ids)
        return self._say(grown[len(known) :], last=True)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=True) if ids else ""

    def _say(self, new: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        self._pending += new
        if self._thinks:
            _, closed, after = self._pending.partition(_END_OF_THOUGHT)
            if not closed:
                return ""
            if not after.strip("\n") and not last:
                return ""
            self._thinks, self._pending = False, after.lstrip("\n")
        ends = [at for text in self._stop if (at := self._pending.find(text)) >= 0]
        if ends:
            self.stopped = True
            said, self._pending = self._pending[: min(ends)], ""
        else:
            kept = 0 if last else self._kept()
            said = self._pending[: len(self._pending) - kept]
            self._pending = self._pending[len(said) :]
        self.text += said
        return said

    def _kept(self) -> int:
        """How much of the end may be the beginning of a stop text."""
        lengths = (
            length
            for text in self._stop
            for length in range(min(len(text) - 1, len(self._pending)), 0, -1)
            if self._pending.endswith(text[:length])
        )
        return max(lengths, default=0)
