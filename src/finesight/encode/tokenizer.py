"""Text to token ids: what users write never becomes a special token."""

from __future__ import annotations

import base64
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from finesight.bounded_files import read_json_object
from finesight.errors import UserError

CACHE_BYTES = 16 << 20
"""Memory limit of the token cache of a tokenizer: prompts recur in sample after sample."""

LARGEST_SHARE = 16
"""A text that takes more than one such part of the cache is not cached."""

_ID_BYTES = 28
"""Of a Python number."""


class TokenCache:
    """LRU cache of token ids by text, limited in bytes.

    Args:
        tokenize: Function that computes the ids of a text.
        max_bytes: Memory that texts and ids may take.
    """

    def __init__(
        self, tokenize: Callable[[str], tuple[int, ...]], max_bytes: int = CACHE_BYTES
    ) -> None:
        self._tokenize, self._max_bytes = tokenize, max_bytes
        self._lock = threading.Lock()
        self._ids: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self.bytes = 0

    def __call__(self, text: str) -> tuple[int, ...]:
        """Look up the ids of a text, or compute them."""
        with self._lock:
            found = self._ids.get(text)
            if found is not None:
                self._ids.move_to_end(text)
                return found
        ids = self._tokenize(text)
        cost = _cost(text, ids)
        if cost <= self._max_bytes // LARGEST_SHARE:
            with self._lock:
                self.bytes += 0 if text in self._ids else cost
                self._ids[text] = ids
                while self.bytes > self._max_bytes:
                    self.bytes -= _cost(*self._ids.popitem(last=False))
        return ids

    def clear(self) -> None:
        """Remove all texts."""
        with self._lock:
            self._ids.clear()
            self.bytes = 0


def _cost(text: str, ids: tuple[int, ...]) -> int:
    return sys.getsizeof(text) + sys.getsizeof(ids) + _ID_BYTES * len(ids)


def _byte_letters() -> dict[str, int]:
    """The letters in which byte-level vocabularies spell bytes (Radford et al. 2019, GPT-2): a
    byte that prints stands for itself, the others follow from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_letters()


class TextTokenizer(Protocol):
    """Text to ids and back: what a family's tokenizer can do, whatever file it reads."""

    @property
    def path(self) -> Path:
        """That file."""

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text that holds no special token, whatever it spells."""

    def clear_cache(self) -> None:
        """Clear the token cache."""

    def id_of(self, token: str) -> int:
        """The id of a special token by its name. Raises UserError when there is none."""

    def specials(self) -> tuple[str, ...]:
        """The names of all special tokens, in the order of their ids."""

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of ids; a character that is cut in the middle becomes U+FFFD."""

    def name_of(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id, or an empty text for an id beyond it."""

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for: a special one for its name, one beyond for nothing."""


class Tokenizer:
    """A `tokenizer.json` that reads the special tokens in a text as the characters they are.

    `<|im_end|>` or `<|image_pad|>` typed in a caption would otherwise end a turn or claim a
    picture that is not there. Special ids come from `id_of` alone. Words that the tokenizer adds
    to its vocabulary without calling them special, such as `<tool_call>`, stay words.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _explained(path, Exception):  # the library raises plain Exception
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # A file may ask for both; either would change every text without a word.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._ids = TokenCache(self._tokenize)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        # Pickled, the library's object forgets how to treat special tokens; worker processes
        # that are started afresh read the file again.
        return Tokenizer, (self.path,)

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text that holds no special token, whatever it spells."""
        return self._ids(text) if text else ()

    def clear_cache(self) -> None:
        """Clear the token cache."""
        self._ids.clear()

    def id_of(self, token: str) -> int:
        """The id of a token by its name. Raises UserError when the tokenizer has none."""
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UserError(
                f"no token {token}",
                where=str(self.path),
                expected="the tokenizer of a Qwen2-VL or a later family",
                remedy="download the model's tokenizer.json again",
            )
        return int(found)

    def specials(self) -> tuple[str, ...]:
        """The names of all special tokens, in the order of their ids."""
        added = self._tokenizer.get_added_tokens_decoder()
        return tuple(str(added[i].content) for i in sorted(added) if added[i].special)

    def decode(self, ids: Sequence[int], *, skip_special: bool) -> str:
        """The text of ids; a character that is cut in the middle becomes U+FFFD."""
        with _explained(self.path):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def name_of(self, token_id: int) -> str:
        """The vocabulary's own spelling of one id, or an empty text for an id beyond it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def bytes_of(self, token_id: int) -> bytes:
        """What a token stands for: a special one for its name, one beyond for nothing."""
        name = self.name_of(token_id)
        if token_id in self._added or not set(name) <= set(_BYTES):
            return name.encode()
        return bytes(_BYTES[letter] for letter in name)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        with _explained(self.path):
            return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


LARGEST_ID = 2**31
"""Ids are 32-bit numbers."""

NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
"""Normalizers of native families: Unicode forms, which neither cut a text nor make it grow."""

_EXPECTED = "the tokenizer.json of the tokenizers library"
_REMEDY = "download the model's tokenizer.json again"


def check_file(path: Path, *, native: bool, vocabulary: int) -> None:
    """Refuse a `tokenizer.json` that would crash the process, change texts or leave the embedding.

    Args:
        path: The file.
        native: The family has a byte-level vocabulary, so that only NORMALIZERS are allowed.
        vocabulary: Rows of the model's embedding; ids of tokens are below.

    Raises:
        UserError: The file is not JSON, its normalizer is damaged or not allowed, or an id is too
            large.
    """
    content = read_json_object(path, expected=_EXPECTED, remedy=_REMEDY)
    for token, number in _tokens(content):
        if not 0 <= number < vocabulary:
            raise UserError(
                f"the token {token!r:.80} has the id {number}",
                where=str(path),
                expected=f"ids below {vocabulary}, the vocab_size of config.json",
                remedy="take both files from the same model",
            )
    for normalizer in _normalizers(content.get("normalizer")):
        kind = normalizer.get("type")
        if native and kind not in NORMALIZERS:
            raise UserError(
                f"the normalizer is {kind!r:.80}",
                where=str(path),
                expected=f"none, or one of {', '.join(NORMALIZERS)}",
                remedy=_REMEDY,
            )
        if kind == "Precompiled" and not _is_sound(normalizer.get("precompiled_charsmap")):
            raise UserError(
                "precompiled_charsmap of the normalizer is damaged",
                where=str(path),
                expected="base64 of a trie and its texts",
                remedy=_REMEDY,
            )


def _tokens(content: dict[str, Any]) -> Iterator[tuple[object, int]]:
    """Yield the token of the largest id in the vocabulary and the added tokens, with their ids."""
    model, added = content.get("model"), content.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, dict) and words:
        ids = {word: number for word, number in words.items() if isinstance(number, int)}
        yield max(ids.items(), key=itemgetter(1), default=("", 0))
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield token.get("content"), token["id"]


def _normalizers(tree: object) -> Iterator[dict[str, object]]:
    """Yield the normalizers of a file, those of sequences one by one."""
    if not isinstance(tree, dict):
        return
    parts = tree.get("normalizers")
    if tree.get("type") != "Sequence" or not isinstance(parts, list):
        yield tree
        return
    for part in parts:
        yield from _normalizers(part)


def _is_sound(charsmap: object) -> bool:
    """Return True if the trie is as long as it says: the library allocates that length."""
    try:
        content = base64.b64decode(str(charsmap), validate=True)
    except ValueError:
        return False
    size = int.from_bytes(content[:4], "little")
    return len(content) >= 4 and size % 4 == 0 and size <= len(content) - 4


@contextmanager
def _explained(path: Path, kind: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Turn errors of a `kind`, and panics of the library, into a UserError about its file."""
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, kind) or is_panic(error)):
            raise
        raise UserError(
            f"not a tokenizer ({error})", where=str(path), expected=_EXPECTED, remedy=_REMEDY
        ) from error


def is_panic(error: BaseException) -> bool:
    """Return True for a panic of a Rust library, whose exception cannot be imported."""
    return type(error).__name__ == "PanicException"
