"""What is tokenised together and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversations import make_folder

from finesight.encode.tape import Tape
from finesight.encode.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = make_folder(tmp_path_factory.mktemp("model"), "qwen2_vl")
    return Tokenizer(folder / "tokenizer.json")


def test_adjacent_text_is_tokenised_as_one(tokenizer: Tokenizer) -> None:
    tape = Tape(tokenizer)
    for piece in ("us", "er\n", "\n", "tab"):
        tape.text(piece, learned=False)
    ids, learned = tape.arrays()
    assert ids.tolist() == list(tokenizer.encode("user\n\ntab"))
    apart = [token for piece in ("us", "er\n", "\n", "tab") for token in tokenizer.encode(piece)]
    assert ids.tolist() != apart
    assert not learned.any()


def test_learned_text_is_tokenised_apart(tokenizer: Tokenizer) -> None:
    tape = Tape(tokenizer)
    tape.text("user\n", learned=False)
    tape.text("\ntab", learned=True)
    before, after = tokenizer.encode("user\n"), tokenizer.encode("\ntab")
    ids, learned = tape.arrays()
    assert ids.tolist() == [*before, *after]
    assert learned.tolist() == [False] * len(before) + [True] * len(after)


def test_special_tokens_and_length(tokenizer: Tokenizer) -> None:
    tape = Tape(tokenizer)
    assert tape.length == 0
    tape.text("x", learned=False)
    assert tape.length == 1
    tape.special("<|image_pad|>", learned=False, times=3)
    tape.special("<|im_end|>", learned=True)
    tape.text("x", learned=True)
    pad, end = tokenizer.id_of("<|image_pad|>"), tokenizer.id_of("<|im_end|>")
    x = tokenizer.encode("x")[0]
    ids, learned = tape.arrays()
    assert ids.tolist() == [x, pad, pad, pad, end, x]
    assert learned.tolist() == [False] * 4 + [True] * 2
    assert tape.length == 6
