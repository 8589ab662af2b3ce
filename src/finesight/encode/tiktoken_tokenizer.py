"""Tokenizer of Qwen-VL, whose vocabulary is a tiktoken rank file."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.bounded_files import read_bytes
from finesight.encode.tokenizer import (
    LARGEST_ID,
    CachedTokenizer,
    TextTokenizer,
    Tokenizer,
    check_tokenizer_file,
)
from finesight.errors import UserError
from finesight.model_folder import ModelFolder

if TYPE_CHECKING:
    import tiktoken

PRETOKENIZE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pre-tokenization pattern of all Qwen tokenizers."""

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
"""Special tokens of Qwen-VL in the order of their ids.

The ids follow those of the rank file. No file of the model lists the special tokens.
"""


class TiktokenTokenizer(CachedTokenizer):
    """Tokenizer loaded from `qwen.tiktoken` that never parses special tokens in text.

    Implements the interface `encode.tokenizer.TextTokenizer`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        ranks = _read_ranks(path)
        self._special_ids = {t: len(ranks) + n for n, t in enumerate(SPECIAL_TOKENS)}
        self._special_tokens_by_id = {
            token_id: token for token, token_id in self._special_ids.items()
        }
        self._bytes_by_id = {number: token_bytes for token_bytes, number in ranks.items()}
        self.encoding = _build_encoding(ranks, self._special_ids, path)

    def token_to_id(self, token: str) -> int:
        """Return the id of a special token.

        Raises:
            UserError: The token does not exist.
        """
        token_id = self._special_ids.get(token)
        if token_id is None:
            raise UserError(
                f"no token {token}",
                where=str(self.path),
                expected="a special token of Qwen-VL, such as <|im_end|> or <img>",
                remedy="choose a model of a family with this token",
            )
        return token_id

    def list_special_tokens(self) -> tuple[str, ...]:
        """Return all special tokens in the order of their ids."""
        return SPECIAL_TOKENS

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Decode token ids to text.

        Incomplete UTF-8 characters become U+FFFD, and unknown ids are ignored.
        """
        special_tokens = {} if skip_special_tokens else self._special_tokens_by_id
        pieces = (
            self._bytes_by_id.get(token_id) or special_tokens.get(token_id, "").encode()
            for token_id in ids
        )
        return b"".join(pieces).decode(errors="replace")

    def id_to_token(self, token_id: int) -> str:
        """Return the text of a special token, or the escaped bytes of another token.

        An unknown id gives an empty string.
        """
        token_bytes = self._bytes_by_id.get(token_id)
        return (
            self._special_tokens_by_id.get(token_id, "")
            if token_bytes is None
            else repr(token_bytes)[2:-1]
        )

    def id_to_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of a token id; empty for an unknown id."""
        token_bytes = self._bytes_by_id.get(token_id)
        return (
            self._special_tokens_by_id.get(token_id, "").encode()
            if token_bytes is None
            else token_bytes
        )

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.encoding.encode_ordinary(unicodedata.normalize("NFC", text)))


def load_tokenizer(folder: ModelFolder) -> TextTokenizer:
    """Load the tokenizer of a native model from `qwen.tiktoken` or `tokenizer.json`."""
    path = folder.tokenizer_file
    if path.suffix == ".tiktoken":
        return TiktokenTokenizer(path)
    text = folder.config.get("text_config", folder.config)
    size = text.get("vocab_size") if isinstance(text, dict) else None
    check_tokenizer_file(
        path, is_native_family=True, vocabulary=size if isinstance(size, int) else LARGEST_ID
    )
    return Tokenizer(path)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Read a tiktoken rank file: a base64 byte string and its rank per line."""
    try:
        content = read_bytes(path, expected="the qwen.tiktoken of a Qwen-VL model")
        lines = (line.split() for line in content.splitlines() if line)
        ranks = {
            base64.b64decode(token_bytes, validate=True): int(rank) for token_bytes, rank in lines
        }
    except (ValueError, binascii.Error) as error:
        raise _build_invalid_file_error(path, str(error)) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _build_invalid_file_error(
            path, f"ranks of {len(ranks)} byte strings are not consecutive from 0"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _build_invalid_file_error(path, f"the byte {missing[0]} is not a token")
    return ranks


def _build_invalid_file_error(path: Path, reason: str) -> UserError:
    return UserError(
        f"not a tokenizer ({reason})",
        where=str(path),
        expected="the qwen.tiktoken of a Qwen-VL model",
        remedy="download qwen.tiktoken again (a Git LFS pointer is not sufficient)",
    )


def _build_encoding(
    ranks: Mapping[bytes, int], special_tokens: Mapping[str, int], path: Path
) -> tiktoken.Encoding:
    try:
        # Lazy import: an optional dependency of this family only.
        from tiktoken import Encoding
    except ImportError as error:
        raise UserError(
            "the tokenizer requires tiktoken, which is not installed",
            where=str(path),
            expected="finesight with the extra qwen-vl",
            remedy="pip install 'finesight[qwen-vl]'",
        ) from error
    return Encoding(
        path.name,
        pat_str=PRETOKENIZE_PATTERN,
        mergeable_ranks=dict(ranks),
        special_tokens=dict(special_tokens),
    )
