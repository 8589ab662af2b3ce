import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import create_tiny_model
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models, pre_tokenizers

from finesight.encode.renderer import NativeRenderer, parse_reasoning
from finesight.encode.tokenization import TextTokenizer, Tokenizer
from finesight.infer.inference_service import IncrementalDetokenizer
from finesight.model_folder import ModelFolder

END = 256
PIECES = [b"</think>", b"\n\n", "中文".encode(), "😀".encode()[1:], b" stop"]
"""Tokens of several bytes, which follow on the end token's number."""


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tokens for all bytes, an end token, and some of several bytes or parts of characters."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    letters = [chr(byte if byte in seen else next(others)) for byte in range(256)]
    assert set(letters) == set(pre_tokenizers.ByteLevel.alphabet())
    words = [
        *letters,
        "<|im_end|>",
        *("".join(letters[byte] for byte in piece) for piece in PIECES),
    ]
    library = Library(models.BPE({word: number for number, word in enumerate(words)}, []))
    library.add_special_tokens(["<|im_end|>"])
    library.decoder = decoders.ByteLevel()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    library.save(str(path))
    return Tokenizer(path)


def stream_text(
    tokenizer: TextTokenizer, ids: list[int], end_ids: tuple[int, ...] = ()
) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, end_ids, (), False)
    deltas = [detokenizer.add_token(token) for token in ids]
    deltas.append(detokenizer.flush())
    assert detokenizer.text == "".join(deltas)
    return deltas


def test_character_is_emitted_when_complete(byte_tokenizer):
    text = "plain 中文 and 😀 e\u0301 a\u00a0é 𝔘𝔫𝔦 👩‍👩‍👧 \n\n ok"
    ids = list(text.encode())
    deltas = stream_text(byte_tokenizer, [*ids, END, 65], end_ids=(END, 65))
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


def test_answer_ends_before_first_stop_string(byte_tokenizer):
    """Whether it comes in a token or over several; nothing that begins one is said before."""
    for text, stop, wanted in (
        ("one stop two", (" stop",), "one"),
        ("one sto two", (" stop",), "one sto two"),
        ("one sto", (" stop",), "one sto"),
        ("aaab", ("aab",), "a"),
        ("ababac", ("abac",), "ab"),
        ("x\n\ny", ("\n\n", "y"), "x"),
        ("later first", ("first", "later"), ""),
        ("a 中 b", ("中",), "a "),
        ("abcd", ("cd", "bcd"), "a"),
    ):
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


def test_reasoning_is_emitted_separately(byte_tokenizer):
    """A stop string in the reasoning does not end the answer."""
    for text in (
        "why\n</think>\n\nbecause",
        "why stop</think>because",
        "no end of it",
        "</think>\n\n",
        "a </thin> b </think>\n\n\n answer\n",
        "\n\n</think>\n中",
        "why\n</think>\n\nas </think> says",
    ):
        rng = random.Random(1)
        for _ in range(10):
            detokenizer = IncrementalDetokenizer(byte_tokenizer, (), (" stop",), True)
            reasoning = ""
            for token in _in_pieces(text.encode(), rng):
                detokenizer.add_token(token)
                reasoning += detokenizer.take_reasoning()
            detokenizer.flush()
            reasoning += detokenizer.take_reasoning()
            assert (reasoning, detokenizer.text) == parse_reasoning(text)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen"])
def test_random_ids_match_the_renderer(tmp_path, family):
    """Includes special tokens, end tokens and ids beyond the vocabulary."""
    if family == "qwen":
        pytest.importorskip("tiktoken")
    renderer = NativeRenderer(ModelFolder(create_tiny_model(tmp_path / "tiny", family)))
    end_ids, rng = renderer.end_ids, random.Random(2)
    for _ in range(300):
        ids = [rng.randrange(max(end_ids) + 20) for _ in range(rng.randrange(40))]
        # The engine gives nothing after an end token.
        ends = [at for at, token in enumerate(ids) if token in end_ids]
        ids = ids[: ends[0] + 1] if ends else ids
        streamed = "".join(stream_text(renderer.tokenizer, ids, end_ids))
        assert streamed == renderer.decode_completion(ids).text
