"""The first Qwen's tokenizer: a file of byte strings and their ranks, read by tiktoken."""

from __future__ import annotations

import base64
import binascii
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.bounded_files import read_bytes
from finesight.encode.tokenizer import LARGEST_ID, TextTokenizer, TokenCache, Tokenizer, check_file
from finesight.errors import UserError
from finesight.hub import ModelFolder

if TYPE_CHECKING:
    import tiktoken

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where text is cut before byte pairs merge: the rule of all Qwen tokenizers so far."""

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|extra_{number}|>" for number in range(205)),
    *("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>", "<img>", "</img>", "<imgpad>"),
)
"""In the order of their ids, which follow those of the file. No file names them."""


class RankTokenizer:
    """A `qwen.tiktoken` that reads the special tokens in a text as the characters they are: the
    interface of `encode.tokenizer.Tokenizer`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        ranks = _ranks(path)
        self._special_ids = {t: len(ranks) + n for n, t in enumerate(SPECIAL_TOKENS)}
        self._special_names = {number: token for token, number in self._special_ids.items()}
        self._words = {number: word for word, number in ranks.items()}
        self.encoding = _encoding(ranks, self._special_ids, path)
        self._ids = TokenCache(self._tokenize)

    def __reduce__(self) -> tuple[type[RankTokenizer], tuple[Path]]:
        # Worker processes that are started afresh read the file again.
        return RankTokenizer, (self.path,)

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text that holds no special token, whatever it spells."""
        return self._ids(text) if text else ()

    def clear_cache(self) -> None:
        """Clear the token cache."""
        self._ids.clear()

    def id_of(self, token: str) -> int:
        """The id of a token by its name. Raises UserError when the tokenizer has none."""
        found = self._special_ids.get(token)
        if found is None:
            raise UserError(
                f"no token {token}",
                where=str(self.path),
                expected="the name of a special token of Qwen-VL, such as <|im_end|> or <img>",
                remedy="choose a model of the family that has this token",
            )
        return found

    def specials(self) -> tuple[str, ...]:
        """The names of all special tokens, in the order of their ids."""
        return SPECIAL_TOKENS

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of ids; a character that is cut in the middle becomes U+FFFD, an id beyond the
        vocabulary nothing."""
        names = {} if skip_special else self._special_names
        pieces = (self._words.get(number) or names.get(number, "").encode() for number in ids)
        return b"".join(pieces).decode(errors="replace")

    def name_of(self, token_id: int) -> str:
        """The name of a special id, the bytes of any other, or an empty text for one beyond."""
        word = self._words.get(token_id)
        return self._special_names.get(token_id, "") if word is None else repr(word)[2:-1]

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for: a special one for its name, one beyond for nothing."""
        word = self._words.get(token_id)
        return self._special_names.get(token_id, "").encode() if word is None else word

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.encoding.encode_ordinary(unicodedata.normalize("NFC", text)))


def tokenizer_of(folder: ModelFolder) -> TextTokenizer:
    """The tokenizer of a model folder, by the file that its family has."""
    path = folder.tokenizer_file
    if path.suffix == ".tiktoken":
        return RankTokenizer(path)
    text = folder.config.get("text_config", folder.config)
    size = text.get("vocab_size") if isinstance(text, dict) else None
    check_file(path, native=True, vocabulary=size if isinstance(size, int) else LARGEST_ID)
    return Tokenizer(path)


def _ranks(path: Path) -> dict[bytes, int]:
    """Byte strings and their ranks: a line for each, base 64 and a number from 0 upwards."""
    try:
        content = read_bytes(path, expected="the qwen.tiktoken of a Qwen-VL model")
        lines = (line.split() for line in content.splitlines() if line)
        ranks = {base64.b64decode(word, validate=True): int(rank) for word, rank in lines}
    except (ValueError, binascii.Error) as error:
        raise _unreadable(path, str(error)) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _unreadable(path, f"{len(ranks)} byte strings whose ranks do not count up from 0")
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _unreadable(path, f"the byte {missing[0]} is no token")
    return ranks


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(
        f"not a tokenizer ({why})",
        where=str(path),
        expected="the qwen.tiktoken of a Qwen-VL model",
        remedy="download the model's qwen.tiktoken again (a pointer of Git LFS is not the file)",
    )


def _encoding(
    ranks: Mapping[bytes, int], specials: Mapping[str, int], path: Path
) -> tiktoken.Encoding:
    try:
        # Imported here: only this family needs it.
        from tiktoken import Encoding
    except ImportError as error:
        raise UserError(
            "this model's tokenizer is read by tiktoken, which is not installed",
            where=str(path),
            expected="the extra qwen-vl of finesight",
            remedy="pip install 'finesight[qwen-vl]'",
        ) from error
    return Encoding(
        path.name, pat_str=SPLIT, mergeable_ranks=dict(ranks), special_tokens=dict(specials)
    )
