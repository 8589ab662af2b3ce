"""Tokens laid end to end, each known to be learned or not."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from finesight.encode.dialect import Piece, Special
from finesight.encode.tokenizer import TextTokenizer


class Tape:
    """Grows by text and special tokens; adjacent text is tokenised as one.

    Byte pairs merge across the borders of parts ("user" + newline + a caption that starts with a
    newline), and the published template tokenises such text in one go. Text that is learned and
    text that is not are never joined: an answer is always tokenised as generation meets it,
    after a prompt that ends before it.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._learned: list[bool] = []
        self._waiting: list[str] = []
        self._waiting_learned = False

    @property
    def length(self) -> int:
        """Tokens so far; text that waits for more is tokenised now."""
        self._settle()
        return len(self._ids)

    def text(self, text: str, *, learned: bool) -> None:
        """Lay down text that is only text, whatever it spells."""
        if learned != self._waiting_learned:
            self._settle()
            self._waiting_learned = learned
        self._waiting.append(text)

    def special(self, token: str, *, learned: bool, times: int = 1) -> None:
        """Lay down a special token, `times` over."""
        self._settle()
        self._ids += [self._tokenizer.id_of(token)] * times
        self._learned += [learned] * times

    def pieces(self, pieces: Iterable[Piece], *, learned: bool) -> None:
        """Lay down text and special tokens."""
        for piece in pieces:
            if isinstance(piece, Special):
                self.special(piece.token, learned=learned)
            else:
                self.text(piece, learned=learned)

    def cut(self) -> None:
        """Tokenise the text so far apart from what follows."""
        self._settle()

    def arrays(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Ids and learned marks of all tokens, both [T]."""
        self._settle()
        return np.array(self._ids, dtype=np.int32), np.array(self._learned, dtype=np.bool_)

    def _settle(self) -> None:
        if self._waiting:
            ids = self._tokenizer.encode("".join(self._waiting))
            self._ids += ids
            self._learned += [self._waiting_learned] * len(ids)
            self._waiting = []
