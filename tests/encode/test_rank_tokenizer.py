"""The first Qwen's tokenizer: the ids of the published code, and what is read of a file."""

from __future__ import annotations

import base64
import json
import pickle
import sys
import zlib
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
from mixed_strings import Piece, strings

from finesight.encode.rank_tokenizer import SPECIAL_TOKENS, RankTokenizer
from finesight.errors import UserError

pytest.importorskip("tiktoken")
ASSETS = Path(__file__).resolve().parents[3] / "shared" / "qwen_assets" / "Qwen-VL-Chat"
STORED = json.loads((Path(__file__).parent / "qwen_vl_ids.json").read_text(encoding="utf-8"))
PICTURE_IDS = 256


@pytest.fixture(scope="module")
def published() -> RankTokenizer:
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files beside the repository")
    return RankTokenizer(ASSETS / "qwen.tiktoken")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    words = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc", " 图".encode()]
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)]
    path = tmp_path / "qwen.tiktoken"
    path.write_text("".join(lines), encoding="ascii")
    return path


def _ids(tokenizer: RankTokenizer, pieces: list[Piece]) -> Iterator[int]:
    for kind, group in groupby(pieces, key=itemgetter(0)):
        texts = [text for _, text in group]
        if kind == "text":
            yield from tokenizer.encode("".join(texts))
        elif kind == "special":
            yield from map(tokenizer.id_of, texts)
        for text in texts if kind == "picture" else ():
            # The published code writes a picture's path, a byte an id, where its features will be.
            name = text.encode()
            yield tokenizer.id_of("<img>")
            yield from [*name, *[tokenizer.id_of("<imgpad>")] * (PICTURE_IDS - len(name))]
            yield tokenizer.id_of("</img>")


def test_ids_of_500_strings_are_those_of_the_published_code(published: RankTokenizer) -> None:
    for number, pieces in enumerate(strings(500, 7)):
        ids = np.array(list(_ids(published, pieces)), "<i4")
        assert [len(ids), zlib.crc32(ids.tobytes())] == STORED["strings"][number], pieces


def test_special_ids_follow_the_words_of_the_file(published: RankTokenizer) -> None:
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<ref>", "<box>", "<img>", "<imgpad>")
    found = [published.id_of(name) for name in names]
    assert found == [151643, 151644, 151645, 151851, 151853, 151857, 151859]
    assert published.specials() == SPECIAL_TOKENS


def test_text_comes_back_from_its_ids(published: RankTokenizer) -> None:
    text = "Zürich 你好 😀\n\n  x_1 <|im_end|>"
    ids = [*published.encode(text), published.id_of("<|im_end|>")]
    assert published.decode(ids, skip_special=True) == text
    assert published.decode(ids, skip_special=False) == f"{text}<|im_end|>"


def test_what_a_user_types_never_becomes_a_special_token(published: RankTokenizer) -> None:
    for token in SPECIAL_TOKENS:
        ids = published.encode(f"a {token} b")
        assert max(ids) < published.id_of("<|endoftext|>"), token


def test_small_file(small: Path) -> None:
    tokenizer = pickle.loads(pickle.dumps(RankTokenizer(small)))
    assert tokenizer.encode("abcab 图") == (257, 256, 258)
    assert tokenizer.encode("") == ()
    assert tokenizer.id_of("<|endoftext|>") == 259
    assert tokenizer.decode([257, 0xE5, 10**6], skip_special=True) == "abc\ufffd"
    names = [tokenizer.name_of(number) for number in (257, 0xE5, 261, 10**6)]
    assert names == ["abc", r"\xe5", "<|im_end|>", ""]
    with pytest.raises(UserError, match="no token <"):
        tokenizer.id_of("<|vision_start|>")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "the byte 0 is no token"),
        ("IQ== 0\nIg== 2\n", "do not count up"),
        ("IQ== zero\n", "invalid literal"),
        ("I%== 0\n", "not a tokenizer"),
        ("version https://git-lfs.github.com/spec/v1\n", "not a tokenizer"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "qwen.tiktoken"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=said):
        RankTokenizer(path)


def test_without_tiktoken_the_extra_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="which is not installed") as caught:
        RankTokenizer(small)
    assert caught.value.remedy == "pip install 'finesight[qwen-vl]'"


def test_the_bytes_of_tokens_are_those_of_the_text(small: Path) -> None:
    tokenizer = RankTokenizer(small)
    text = "abc 图 😀\n\xad"
    assert b"".join(map(tokenizer.bytes_of, tokenizer.encode(text))).decode() == text
    assert tokenizer.bytes_of(tokenizer.id_of("<box>")) == b"<box>"
    assert tokenizer.bytes_of(10**6) == b""
