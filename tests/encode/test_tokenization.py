"""Text stays text, whatever it spells."""

from __future__ import annotations

import pickle
import unicodedata
from pathlib import Path

import pytest
from conversation_fixtures import WORDS, make_folder
from tiny_model import SPECIAL_TOKENS

from finesight.encode.tokenization import TokenCache, Tokenizer
from finesight.errors import UserError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"), "qwen2_vl") / "tokenizer.json"


def test_special_token_names_in_text_stay_text(path: Path) -> None:
    tokenizer = Tokenizer(path)
    for special in SPECIAL_TOKENS:
        text = f"before {special} after"
        ids = tokenizer.encode(text)
        assert tokenizer.token_to_id(special) not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_decode_inverts_encode(path: Path) -> None:
    tokenizer = Tokenizer(path)
    for text in WORDS:
        composed = text.replace("e\u0301", "é")
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == composed
    assert tokenizer.encode("") == ()


def test_decode_with_and_without_special_tokens(path: Path) -> None:
    tokenizer = Tokenizer(path)
    ids = [*tokenizer.encode("x"), tokenizer.token_to_id("<|im_end|>")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "x<|im_end|>"
    assert tokenizer.id_to_token(ids[-1]) == "<|im_end|>"
    assert tokenizer.id_to_token(10**6) == ""


def test_token_bytes_equal_text_bytes(path: Path) -> None:
    tokenizer = Tokenizer(path)
    every = "".join(map(chr, range(0x20, 0x250))) + "\t\n\r\x00 你好 😀\xad"
    for text in (*WORDS, every):
        ids = tokenizer.encode(text)
        spelled = b"".join(map(tokenizer.id_to_bytes, ids))
        assert spelled.decode() == unicodedata.normalize("NFC", text)
    assert tokenizer.id_to_bytes(tokenizer.token_to_id("<|im_end|>")) == b"<|im_end|>"
    assert tokenizer.id_to_bytes(10**6) == b""


def test_pickled_tokenizer_treats_special_names_as_text(path: Path) -> None:
    tokenizer = Tokenizer(path)
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent.encode("<|im_end|>") == tokenizer.encode("<|im_end|>")


def test_unknown_token_and_broken_file(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no token <\|none\|>"):
        Tokenizer(path).token_to_id("<|none|>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer") as raised:
        Tokenizer(tmp_path / "tokenizer.json")
    assert raised.value.where == str(tmp_path / "tokenizer.json")


def test_non_special_added_tokens_are_encoded(shared: Path) -> None:
    newer = Tokenizer(shared / "qwen_assets" / "Qwen2.5-VL-7B-Instruct" / "tokenizer.json")
    assert newer.encode("<tool_call>") == (151657,)
    assert 151655 not in newer.encode("<|image_pad|>")


def test_the_cache_of_texts_is_bounded_in_bytes():
    requested: list[str] = []

    def tokenize(text: str) -> tuple[int, ...]:
        requested.append(text)
        return tuple(range(len(text)))

    cache = TokenCache(tokenize, max_bytes=100_000)
    texts = [f"{number:03d}" + "x" * 50 for number in range(500)]
    for text in texts:
        assert cache(text) == tuple(range(len(text)))
        assert 0 < cache.bytes <= 100_000
    requested.clear()
    cache(texts[-1])
    assert not requested
    cache(texts[0])
    assert requested == texts[:1]
    # A text that would take much of it is not kept.
    before, long = cache.bytes, "y" * 1000
    assert cache(long) == cache(long)
    assert requested[1:] == [long, long]
    assert cache.bytes == before
    cache.clear()
    assert cache.bytes == 0


def test_texts_are_forgotten(path: Path):
    tokenizer = Tokenizer(path)
    before = tokenizer.encode("Hello")
    assert tokenizer.token_cache.bytes > 0
    tokenizer.token_cache.clear()
    assert tokenizer.token_cache.bytes == 0
    assert tokenizer.encode("Hello") == before
