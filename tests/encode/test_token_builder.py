"""What is tokenised together and what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
from conversation_fixtures import make_folder

from finesight.encode.renderer import TokenBuilder
from finesight.encode.tokenization import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = make_folder(tmp_path_factory.mktemp("model"), "qwen2_vl")
    return Tokenizer(folder / "tokenizer.json")


def test_adjacent_text_is_tokenized_together(tokenizer: Tokenizer) -> None:
    tape = TokenBuilder(tokenizer)
    for piece in ("us", "er\n", "\n", "tab"):
        tape.add_text(piece, is_supervised=False)
    ids, supervised = tape.to_arrays()
    assert ids.tolist() == list(tokenizer.encode("user\n\ntab"))
    apart = [token for piece in ("us", "er\n", "\n", "tab") for token in tokenizer.encode(piece)]
    assert ids.tolist() != apart
    assert not supervised.any()


def test_supervised_text_is_tokenized_separately(tokenizer: Tokenizer) -> None:
    tape = TokenBuilder(tokenizer)
    tape.add_text("user\n", is_supervised=False)
    tape.add_text("\ntab", is_supervised=True)
    before, after = tokenizer.encode("user\n"), tokenizer.encode("\ntab")
    ids, supervised = tape.to_arrays()
    assert ids.tolist() == [*before, *after]
    assert supervised.tolist() == [False] * len(before) + [True] * len(after)


def test_special_tokens_and_length(tokenizer: Tokenizer) -> None:
    tape = TokenBuilder(tokenizer)
    assert tape.length == 0
    tape.add_text("x", is_supervised=False)
    assert tape.length == 1
    tape.add_special_token("<|image_pad|>", is_supervised=False, count=3)
    tape.add_special_token("<|im_end|>", is_supervised=True)
    tape.add_text("x", is_supervised=True)
    pad, end = tokenizer.token_to_id("<|image_pad|>"), tokenizer.token_to_id("<|im_end|>")
    x = tokenizer.encode("x")[0]
    ids, supervised = tape.to_arrays()
    assert ids.tolist() == [x, pad, pad, pad, end, x]
    assert supervised.tolist() == [False] * 4 + [True] * 2
    assert tape.length == 6
