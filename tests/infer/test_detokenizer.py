from __future__ import annotations

import random
from pathlib import Path

import pytest
from case_files import load_cases
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import TinyFamily, create_tiny_model
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from finesight.encode.renderer import NativeRenderer, parse_reasoning
from finesight.encode.tokenization import TextTokenizer, Tokenizer
from finesight.infer.inference_service import IncrementalDetokenizer
from finesight.model_folder import ModelFolder

CASES = load_cases("detokenizer")

END = 256
PIECES = [b"</think>", b"\n\n", "中文".encode(), "😀".encode()[1:], b" stop"]
"""Tokens of several bytes, which follow on the end token's number."""

TEXTS = ["plain", "中文 and 😀 e\u0301", "a\u00a0é\ufffd\ufffdz", "𝔘𝔫𝔦", "", "👩‍👩‍👧 \n\n ok"]


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A token for each byte, an end token, and a few tokens of several bytes, which may begin and
    end within a character."""
    of_byte = _letters()
    assert set(of_byte) == set(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {of_byte[byte]: byte for byte in range(256)}
    vocabulary["<|im_end|>"] = END
    for piece in PIECES:
        vocabulary["".join(of_byte[byte] for byte in piece)] = len(vocabulary)
    library = Library(models.BPE(vocabulary, []))
    library.add_special_tokens(["<|im_end|>"])
    library.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return Tokenizer(path)


def _letters() -> list[str]:
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in seen else next(others)) for byte in range(256)]


def stream_text(
    tokenizer: TextTokenizer,
    ids: list[int],
    stop: tuple[str, ...] = (),
    thinks: bool = False,
    end_ids: tuple[int, ...] = (),
) -> list[str]:
    """What is said with each token, and at the end."""
    detokenizer = IncrementalDetokenizer(tokenizer, end_ids, stop, thinks)
    deltas = [detokenizer.add_token(token) for token in ids]
    deltas.append(detokenizer.flush())
    assert detokenizer.text == "".join(deltas)
    return deltas


@pytest.mark.parametrize("text", TEXTS)
def test_character_is_emitted_when_complete(byte_tokenizer, text):
    """Check byte by byte; a replacement character may be the start of another one."""
    deltas = stream_text(byte_tokenizer, list(text.encode()))
    assert "".join(deltas) == text
    if "\ufffd" not in text:
        assert [delta for delta in deltas if delta] == list(text)


# Few sequences of these bytes are a character, many are a part of one.
BYTES = [0x41, 0x80, 0x98, 0xBF, 0xC3, 0xE4, 0xB8, 0xAD, 0xF0, 0x9F, *range(END + 1, END + 6)]


@given(
    st.sampled_from([1, 5, 40, 300]).flatmap(
        lambda length: st.lists(st.sampled_from(BYTES), min_size=length, max_size=length)
    )
)
def test_stream_matches_full_decoding(byte_tokenizer, ids):
    assert "".join(stream_text(byte_tokenizer, ids)) == byte_tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_invalid_bytes_are_emitted_incrementally(byte_tokenizer):
    """And what is decoded for each token stays short."""
    detokenizer = IncrementalDetokenizer(byte_tokenizer, (), (), False)
    lengths = [len(detokenizer.add_token(token)) for token in [0x80] * 500]
    # Each waits for the next one.
    assert lengths == [0] + [1] * 499
    assert len(detokenizer._token_ids) - detokenizer._prefix_offset < 100
    assert "".join(map(detokenizer.add_token, "😀中".encode())) == "\ufffd😀中"


def test_no_text_after_end_token(byte_tokenizer):
    assert byte_tokenizer.token_to_id("<|im_end|>") == END
    assert "".join(stream_text(byte_tokenizer, [*b"done", END], end_ids=(END,))) == "done"


@pytest.mark.parametrize(
    ("text", "stop", "wanted"),
    [
        ("one stop two", (" stop",), "one"),
        ("one sto two", (" stop",), "one sto two"),
        ("one sto", (" stop",), "one sto"),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("x\n\ny", ("\n\n", "y"), "x"),
        ("later first", ("first", "later"), ""),
        ("a 中 b", ("中",), "a "),
        ("abcd", ("cd", "bcd"), "a"),
    ],
)
def test_answer_ends_before_first_stop_string(byte_tokenizer, text, stop, wanted):
    """Whether it comes in a token or over several; nothing that begins one is said before."""
    rng = random.Random(0)
    for _ in range(20):
        ids = _in_pieces(text.encode(), rng)
        detokenizer = IncrementalDetokenizer(byte_tokenizer, (), stop, False)
        so_far = ""
        for token in ids:
            so_far += detokenizer.add_token(token)
            assert wanted.startswith(so_far)
        assert so_far + detokenizer.flush() == detokenizer.text == wanted
        assert detokenizer.has_stopped == (wanted != text)
        if detokenizer.has_stopped:
            assert detokenizer.add_token(0x41) == detokenizer.flush() == ""


def _in_pieces(text: bytes, rng: random.Random) -> list[int]:
    """Ids that spell the bytes, with longer tokens wherever they fit, sometimes."""
    number = {piece: END + 1 + n for n, piece in enumerate(PIECES)}
    ids, at = [], 0
    while at < len(text):
        fitting = [piece for piece in number if text.startswith(piece, at)]
        if fitting and rng.random() < 0.5:
            ids.append(number[fitting[0]])
            at += len(fitting[0])
        else:
            ids.append(text[at])
            at += 1
    return ids


@pytest.mark.parametrize("text", CASES["test_reasoning_is_emitted_separately"])
def test_reasoning_is_emitted_separately(byte_tokenizer, text):
    rng = random.Random(1)
    for _ in range(10):
        ids = _in_pieces(text.encode(), rng)
        assert "".join(stream_text(byte_tokenizer, ids, thinks=True)) == parse_reasoning(text)[1]
        detokenizer = IncrementalDetokenizer(byte_tokenizer, (), (), True)
        reasoning = ""
        for token in ids:
            detokenizer.add_token(token)
            reasoning += detokenizer.take_reasoning()
        detokenizer.flush()
        assert reasoning + detokenizer.take_reasoning() == parse_reasoning(text)[0]


def test_stop_string_in_reasoning_is_ignored(byte_tokenizer):
    deltas = stream_text(
        byte_tokenizer, list(b"a stop b\n</think>\n\nc stop d"), (" stop",), thinks=True
    )
    assert "".join(deltas) == "c"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen"])
def test_random_ids_match_the_renderer(tmp_path: Path, family: TinyFamily):
    """Special tokens, end tokens and numbers beyond the vocabulary among them."""
    if family == "qwen":
        pytest.importorskip("tiktoken")
    renderer = NativeRenderer(ModelFolder(create_tiny_model(tmp_path / "tiny", family)))
    tokenizer, end_ids = renderer.tokenizer, renderer.end_ids
    most = max(end_ids) + 20
    rng = random.Random(2)
    for _ in range(300):
        ids = [rng.randrange(most) for _ in range(rng.randrange(40))]
        # The engine gives nothing after an end token.
        ends = [at for at, token in enumerate(ids) if token in end_ids]
        ids = ids[: ends[0] + 1] if ends else ids
        assert (
            "".join(stream_text(tokenizer, ids, end_ids=end_ids))
            == renderer.decode_completion(ids).text
        )
