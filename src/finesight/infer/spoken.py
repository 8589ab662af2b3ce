"""Text of an answer while it grows: only what will not change any more is said."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from finesight.encode.thought import CLOSED
from finesight.encode.tokenizer import TextTokenizer

_BROKEN = "�"
"""What a decoder writes for bytes that are no whole character yet."""

_FEW, _MANY = 8, 64
"""Of broken tokens so many are decoded again and again, at least and at most."""

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
        self._sure, self._before, self._known = 0, 0, 0
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
        return self._say(self._new(last=False), last=False)

    def finish(self) -> str:
        """What was kept back, when no more tokens come."""
        return self._say(self._new(last=True), last=True)

    def _new(self, *, last: bool) -> str:
        """What is decoded by now and was not before. Only the last character can be incomplete, and
        then one replacement character stands for it, whatever comes after."""
        grown = self._decode(self._ids[self._before :])
        whole = grown if last else grown.removesuffix(_BROKEN)
        new = whole[self._known :]
        if whole == grown:
            self._before, self._sure = self._sure, len(self._ids)
            self._known = len(self._decode(self._ids[self._before :]))
        else:
            self._known = len(whole)
            self._shorten(grown)
        return new

    def _shorten(self, grown: str) -> None:
        """Let tokens go where too many are broken: all but a few, if nothing lies across."""
        at = len(self._ids) - _FEW
        if at - self._before < _MANY:
            return
        head, tail = self._decode(self._ids[self._before : at]), self._decode(self._ids[at:])
        if head + tail == grown:
            self._known -= len(head)
            self._before = self._sure = at

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
