"""Incremental construction of token ids and loss mask."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from finesight.encode.family_base import PromptPiece, SpecialToken
from finesight.encode.tokenizer import TextTokenizer


class TokenBuilder:
    """Builds token ids and loss mask; adjacent text is tokenized jointly.

    Byte pairs merge across part boundaries ("user" + newline + a caption that starts with a
    newline), as in the published template. Supervised and unsupervised text is never merged: an
    answer is tokenized as in generation, after a prompt that ends before it.
    """

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._loss_mask: list[bool] = []
        self._pending_texts: list[str] = []
        self._is_pending_supervised = False

    @property
    def length(self) -> int:
        """Number of tokens so far; tokenizes pending text."""
        self._tokenize_pending()
        return len(self._ids)

    def add_text(self, text: str, *, is_supervised: bool) -> None:
        """Append text; special tokens in it are treated as text."""
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
        """Append text and special tokens."""
        for piece in pieces:
            if isinstance(piece, SpecialToken):
                self.add_special_token(piece.token, is_supervised=is_supervised)
            else:
                self.add_text(piece, is_supervised=is_supervised)

    def flush(self) -> None:
        """Tokenize pending text separately from later text."""
        self._tokenize_pending()

    def to_arrays(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Return token ids and loss mask, both [T]."""
        self._tokenize_pending()
        return np.array(self._ids, dtype=np.int32), np.array(self._loss_mask, dtype=np.bool_)

    def _tokenize_pending(self) -> None:
        if self._pending_texts:
            ids = self._tokenizer.encode("".join(self._pending_texts))
            self._ids += ids
            self._loss_mask += [self._is_pending_supervised] * len(ids)
            self._pending_texts = []
