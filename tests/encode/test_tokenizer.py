"""Text stays text, whatever it spells."""

from __future__ import annotations

import pickle
import unicodedata
from pathlib import Path

import pytest
from conversations import SPECIALS, WORDS, make_folder

from finesight.encode.tokenizer import TokenCache, Tokenizer
from finesight.errors import UserError


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"), "qwen2_vl") / "tokenizer.json"


def test_special_names_in_text_are_text(path: Path) -> None:
    tokenizer = Tokenizer(path)
    for special in SPECIALS:
        text = f"before {special} after"
        ids = tokenizer.encode(text)
        assert tokenizer.id_of(special) not in ids
        assert tokenizer.decode(ids, skip_special=True) == text


def test_text_comes_back(path: Path) -> None:
    tokenizer = Tokenizer(path)
    for text in WORDS:
        composed = text.replace("e\u0301", "é")
        assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == composed
    assert tokenizer.encode("") == ()


def test_decode_with_and_without_special_tokens(path: Path) -> None:
    tokenizer = Tokenizer(path)
    ids = [*tokenizer.encode("x"), tokenizer.id_of("<|im_end|>")]
    assert tokenizer.decode(ids, skip_special=True) == "x"
    assert tokenizer.decode(ids, skip_special=False) == "x<|im_end|>"
    assert tokenizer.name_of(ids[-1]) == "<|im_end|>"
    assert tokenizer.name_of(10**6) == ""


def test_the_bytes_of_tokens_are_those_of_the_text(path: Path) -> None:
    tokenizer = Tokenizer(path)
    every = "".join(map(chr, range(0x20, 0x250))) + "\t\n\r\x00 你好 😀\xad"
    for text in (*WORDS, every):
        ids = tokenizer.encode(text)
        spelled = b"".join(map(tokenizer.bytes_of, ids))
        assert spelled.decode() == unicodedata.normalize("NFC", text)
    assert tokenizer.bytes_of(tokenizer.id_of("<|im_end|>")) == b"<|im_end|>"
    assert tokenizer.bytes_of(10**6) == b""


def test_a_pickled_tokenizer_still_reads_text_as_text(path: Path) -> None:
    tokenizer = Tokenizer(path)
    sent = pickle.loads(pickle.dumps(tokenizer))
    assert sent.encode("<|im_end|>") == tokenizer.encode("<|im_end|>")


def test_unknown_token_and_broken_file(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no token <\|none\|>"):
        Tokenizer(path).id_of("<|none|>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer") as raised:
        Tokenizer(tmp_path / "tokenizer.json")
    assert raised.value.where == str(tmp_path / "tokenizer.json")


def test_published_tokenizers_keep_words_that_are_not_special(shared: Path) -> None:
    newer = Tokenizer(shared / "qwen_assets" / "Qwen2.5-VL-7B-Instruct" / "tokenizer.json")
    assert newer.encode("<tool_call>") == (151657,)
    assert 151655 not in newer.encode("<|image_pad|>")


def test_the_cache_of_texts_is_bounded_in_bytes():
    asked: list[str] = []

    def tokenize(text: str) -> tuple[int, ...]:
        asked.append(text)
        return tuple(range(len(text)))

    cache = TokenCache(tokenize, max_bytes=100_000)
    texts = [f"{number:03d}" + "x" * 50 for number in range(500)]
    for text in texts:
        assert cache(text) == tuple(range(len(text)))
        assert 0 < cache.bytes <= 100_000
    asked.clear()
    cache(texts[-1])
    assert not asked
    cache(texts[0])
    assert asked == texts[:1]
    # A text that would take much of it is not kept.
    before, long = cache.bytes, "y" * 1000
    assert cache(long) == cache(long)
    assert asked[1:] == [long, long]
    assert cache.bytes == before
    cache.clear()
    assert cache.bytes == 0


def test_texts_are_forgotten(path: Path):
    tokenizer = Tokenizer(path)
    before = tokenizer.encode("Hello")
    assert tokenizer._ids.bytes > 0
    tokenizer.clear_cache()
    assert tokenizer._ids.bytes == 0
    assert tokenizer.encode("Hello") == before
