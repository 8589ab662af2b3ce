"""Incremental construction of the token ids and the loss mask of a sample."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from finesight.encode.family_base import PromptPiece, SpecialToken
from finesight.encode.tokenizer import TextTokenizer


class TokenBuilder:
    """Builds the token ids and loss mask of a sample from text and special tokens.

    Adjacent texts are tokenized together, so that byte pairs merge across their boundaries as in
    the published chat template (for example, the newline after "user" with a newline at the start
    of a caption). Supervised and unsupervised text is never merged: during generation, the prompt
    ends before the answer, so the answer is tokenized separately.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._loss_mask: list[bool] = []
        self._pending_texts: list[str] = []
        self._is_pending_supervised = False

    @property
    def length(self) -> int:
        """Number of tokens added so far. Reading it tokenizes pending text."""
        self._tokenize_pending()
        return len(self._ids)

    def add_text(self, text: str, *, is_supervised: bool) -> None:
        """Append text; special tokens in it are tokenized as ordinary text."""
        if is_supervised != self._is_pending_supervised:
            self._tokenize_pending()
            self._is_pending_supervised = is_supervised
        self._pending_texts.append(text)

    def add_special_token(self, token: str, *, is_supervised: bool, count: int = 1) -> None:
        """Append a special token `count` times."""
        self._tokenize_pending()
        self._ids += [self._tokenizer.token_to_id(token)] * count
        self._loss_mask += [is_supervised] * count

    def add_pieces(self, pieces: Iterable[PromptPiece], *, is_supervised: bool) -> None:
        """Append prompt pieces, each of which is text or a special token."""
        for piece in pieces:
            if isinstance(piece, SpecialToken):
                self.add_special_token(piece.token, is_supervised=is_supervised)
            else:
                self.add_text(piece, is_supervised=is_supervised)

    def flush(self) -> None:
        """Tokenize pending text now, so that it does not merge with later text."""
        self._tokenize_pending()

    def to_arrays(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return the token ids and the loss mask of all added pieces, both [T]."""
        self._tokenize_pending()
        return np.array(self._ids, dtype=np.int32), np.array(self._loss_mask, dtype=np.bool_)

    def _tokenize_pending(self) -> None:
        if self._pending_texts:
            ids = self._tokenizer.encode("".join(self._pending_texts))
            self._ids += ids
            self._loss_mask += [self._is_pending_supervised] * len(ids)
            self._pending_texts = []
