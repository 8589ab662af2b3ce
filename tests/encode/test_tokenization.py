"""Text stays text, whatever it spells; token tables and filters of tokenized samples."""

import json
import pickle
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from conversation_fixtures import (
    WORDS,
    make_conversation,
    make_folder,
    make_images,
    make_text_sample,
)
from tiny_model import SPECIAL_TOKENS

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import (
    TokenizedSample,
    Tokenizer,
    find_sample_error,
    format_token_table,
    iter_token_rows,
)
from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.operations.model import token_table_to_dict


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"), "qwen2_vl") / "tokenizer.json"


def test_special_token_names_in_text_stay_text(path):
    tokenizer = Tokenizer(path)
    sent = pickle.loads(pickle.dumps(tokenizer))
    for special in SPECIAL_TOKENS:
        text = f"before {special} after"
        ids = tokenizer.encode(text)
        assert tokenizer.token_to_id(special) not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
        assert sent.encode(text) == ids


def test_tokens_decode_to_their_text(path):
    tokenizer = Tokenizer(path)
    every = "".join(map(chr, range(0x20, 0x250))) + "\t\n\r\x00 你好 😀\xad"
    for text in (*WORDS, every):
        ids, composed = tokenizer.encode(text), unicodedata.normalize("NFC", text)
        assert tokenizer.decode(ids, skip_special_tokens=False) == composed
        assert b"".join(map(tokenizer.id_to_bytes, ids)).decode() == composed
    assert tokenizer.encode("") == ()
    end = tokenizer.token_to_id("<|im_end|>")
    ids = [*tokenizer.encode("x"), end]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "x"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "x<|im_end|>"
    for token_id, token in ((end, "<|im_end|>"), (10**6, "")):
        assert tokenizer.id_to_token(token_id) == token
        assert tokenizer.id_to_bytes(token_id) == token.encode()


def test_unknown_token_and_broken_file(path, tmp_path):
    with pytest.raises(UserError, match=r"no token <\|none\|>"):
        Tokenizer(path).token_to_id("<|none|>")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer") as raised:
        Tokenizer(tmp_path / "tokenizer.json")
    assert raised.value.where == str(tmp_path / "tokenizer.json")


def test_non_special_added_tokens_are_encoded(shared):
    newer = Tokenizer(shared / "qwen_assets" / "Qwen2.5-VL-7B-Instruct" / "tokenizer.json")
    assert newer.encode("<tool_call>") == (151657,)
    assert 151655 not in newer.encode("<|image_pad|>")


def test_token_cache_is_bounded_in_bytes(path, monkeypatch):
    requested: list[str] = []

    def tokenize(_: Tokenizer, text: str) -> tuple[int, ...]:
        requested.append(text)
        return tuple(range(len(text)))

    monkeypatch.setattr(Tokenizer, "_tokenize", tokenize)
    tokenizer = Tokenizer(path)
    encode, cache = tokenizer.encode, tokenizer.token_cache
    cache.max_bytes = 100_000
    texts = [f"{number:03d}" + "x" * 50 for number in range(500)]
    for text in texts:
        assert encode(text) == tuple(range(len(text)))
        assert 0 < cache.bytes <= 100_000
    requested.clear()
    for text in (texts[-1], texts[0]):
        encode(text)
    assert requested == texts[:1]
    # A text that would take a large share is not cached.
    before, long = cache.bytes, "y" * 1000
    assert encode(long) == encode(long)
    assert requested[1:] == [long, long]
    assert cache.bytes == before
    cache.clear()
    assert cache.bytes == 0
    encode(texts[0])
    assert requested[-1] == texts[0]


def test_token_table_covers_every_token_once(path, tmp_path):
    renderer, images = NativeRenderer(ModelFolder(path.parent)), make_images(tmp_path)
    for number in range(20):
        outline = renderer.tokenize(make_conversation(number, images, videos=True))
        found = list(iter_token_rows(outline, renderer.tokenizer))
        assert [row.start for row in found[1:]] == [row.stop for row in found[:-1]]
        assert (found[0].start, found[-1].stop) == (0, outline.num_tokens)
        assert tuple(row.span for row in found if row.span) == outline.spans
        for row in found:
            assert set(outline.ids_T[row.start : row.stop].tolist()) == {row.id}
            assert set(outline.loss_mask_T[row.start : row.stop].tolist()) == {row.is_supervised}
            assert row.first_position == tuple(outline.position_ids_3T[:, row.start])
            assert row.last_position == tuple(outline.position_ids_3T[:, row.stop - 1])
        record = json.loads(json.dumps(token_table_to_dict(outline, renderer.tokenizer)))
        assert record["num_tokens"] == outline.num_tokens
        assert record["num_supervised_tokens"] == outline.num_supervised_tokens
        assert len(record["rows"]) == len(found)
        assert len(list(format_token_table(outline, renderer.tokenizer))) == len(found) + 3
    outline = renderer.tokenize(make_text_sample("x\n", "😀"))
    lines = list(format_token_table(outline, renderer.tokenizer))
    assert lines[0] == "sample chat"
    assert lines[1].startswith(
        f"tokens: {outline.num_tokens}, supervised: {outline.num_supervised_tokens}, images"
    )
    supervised = [line for line in lines[3:] if "*" in line]
    assert len(supervised) == int(np.sum(outline.loss_mask_T))
    assert supervised[-1].endswith("'<|im_end|>'")
    assert not any("\ufffd" in line for line in lines)


def make_tokenized(name: str, tokens: int, supervised: int = 1) -> TokenizedSample:
    marks = np.arange(tokens) >= tokens - supervised
    zeros = np.zeros(tokens, dtype=np.int32)
    return TokenizedSample(name, zeros, marks, np.zeros((3, tokens), dtype=np.int32), ())


def test_samples_need_an_answer_and_at_most_the_maximum_length():
    rows = (("a", 10), ("b", 11), ("c", 5, 0), ("d", 1), ("e", 9))
    errors = [find_sample_error(make_tokenized(*row), 10) for row in rows]
    # No token before the only token of "d" could predict it.
    expected = [None, "11 tokens", *["no assistant turn, so no supervised tokens"] * 2, None]
    assert [error and error.what for error in errors] == expected
    assert errors[1].where == "sample b"
