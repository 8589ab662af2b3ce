"""Text to token ids: what users write never becomes a special token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import tokenizers

from finesight.errors import UserError

REMEMBERED = 8192
"""Texts whose ids are kept: prompts return in sample after sample."""


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
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise UserError(
                f"not a tokenizer ({error})",
                where=str(path),
                expected="the tokenizer.json of the tokenizers library",
                remedy="download the model's tokenizer.json again",
            ) from error
        self._tokenizer.encode_special_tokens = True
        self._added = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._ids: Callable[[str], tuple[int, ...]] = lru_cache(REMEMBERED)(self._tokenize)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[Path]]:
        # Pickled, the library's object forgets how to treat special tokens; worker processes
        # that are started afresh read the file again.
        return Tokenizer, (self.path,)

    def encode(self, text: str) -> tuple[int, ...]:
        """The ids of a text that holds no special token, whatever it spells."""
        return self._ids(text) if text else ()

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
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
