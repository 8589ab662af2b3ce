"""The tokenizer of the first Qwen: the ids of the published code, and invalid files."""

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
from case_files import load_cases
from each_value import each
from tokenizer_strings import TextPiece, make_strings

from finesight.encode.tokenization import SPECIAL_TOKENS, TiktokenTokenizer
from finesight.errors import UserError

CASES = load_cases("tiktoken_tokenizer")

pytest.importorskip("tiktoken")
ASSETS = Path(__file__).resolve().parents[3] / "shared" / "qwen_assets" / "Qwen-VL-Chat"
STORED = json.loads((Path(__file__).parent / "qwen_vl_ids.json").read_text(encoding="utf-8"))
NUM_IMAGE_IDS = 256


@pytest.fixture(scope="module")
def published() -> TiktokenTokenizer:
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files beside the repository")
    return TiktokenTokenizer(ASSETS / "qwen.tiktoken")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    words = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc", " 图".encode()]
    lines = [f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words)]
    path = tmp_path / "qwen.tiktoken"
    path.write_text("".join(lines), encoding="ascii")
    return path


def encode_pieces(tokenizer: TiktokenTokenizer, pieces: list[TextPiece]) -> Iterator[int]:
    for kind, group in groupby(pieces, key=itemgetter(0)):
        texts = [text for _, text in group]
        if kind == "text":
            yield from tokenizer.encode("".join(texts))
        elif kind == "special":
            yield from map(tokenizer.token_to_id, texts)
        for text in texts if kind == "image" else ():
            # The published code writes the image path into the placeholders, one byte per id.
            name = text.encode()
            yield tokenizer.token_to_id("<img>")
            yield from [*name, *[tokenizer.token_to_id("<imgpad>")] * (NUM_IMAGE_IDS - len(name))]
            yield tokenizer.token_to_id("</img>")


def test_ids_match_published_code(published):
    for number, pieces in enumerate(make_strings(500, 7)):
        ids = np.array(list(encode_pieces(published, pieces)), "<i4")
        assert [len(ids), zlib.crc32(ids.tobytes())] == STORED["strings"][number], pieces
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<ref>", "<box>", "<img>", "<imgpad>")
    found = [published.token_to_id(name) for name in names]
    assert found == [151643, 151644, 151645, 151851, 151853, 151857, 151859]
    assert published.list_special_tokens() == SPECIAL_TOKENS


def test_user_text_never_becomes_a_special_token(published):
    for token in SPECIAL_TOKENS:
        ids = published.encode(f"a {token} b")
        assert max(ids) < published.token_to_id("<|endoftext|>"), token


def test_tokens_of_a_small_vocabulary(small):
    tokenizer = pickle.loads(pickle.dumps(TiktokenTokenizer(small)))
    assert tokenizer.encode("abcab 图") == (257, 256, 258)
    assert tokenizer.encode("") == ()
    assert tokenizer.token_to_id("<|endoftext|>") == 259
    assert tokenizer.decode([257, 0xE5, 10**6], skip_special_tokens=True) == "abc\ufffd"
    names = [tokenizer.id_to_token(number) for number in (257, 0xE5, 261, 10**6)]
    assert names == ["abc", r"\xe5", "<|im_end|>", ""]
    with pytest.raises(UserError, match="no token <"):
        tokenizer.token_to_id("<|vision_start|>")
    text = "Zürich 图 😀\n\n\xad x_1 <|im_end|>"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.id_to_bytes, ids)).decode() == text
    box = tokenizer.token_to_id("<box>")
    assert tokenizer.decode([*ids, box], skip_special_tokens=True) == text
    assert tokenizer.decode([*ids, box], skip_special_tokens=False) == f"{text}<box>"
    assert tokenizer.id_to_bytes(box) == b"<box>"
    assert tokenizer.id_to_bytes(10**6) == b""


@each(("content", "output"), CASES["test_invalid_file_is_rejected"])
def test_invalid_file_is_rejected(tmp_path, content, output):
    path = tmp_path / "qwen.tiktoken"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=output):
        TiktokenTokenizer(path)


def test_missing_tiktoken_names_the_extra(small, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(UserError, match="which is not installed") as caught:
        TiktokenTokenizer(small)
    assert caught.value.remedy == "pip install 'finesight[qwen-vl]'"
