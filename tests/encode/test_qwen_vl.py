"""Encoding of the first Qwen-VL: published ids of whole conversations, images and errors."""

import base64
import json
import pickle
import random
import sys
import zlib
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pytest
from case_files import load_cases
from numpy.typing import NDArray
from PIL import Image
from tokenizer_strings import TextPiece, make_strings, random_text_without_specials

from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import SPECIAL_TOKENS, TiktokenTokenizer
from finesight.errors import UserError
from finesight.families.qwen.renderer import from_folder
from finesight.infer.prediction import build_question
from finesight.model_folder import ModelFolder
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
)
from finesight.settings.config import ExactSize, LongestSide

pytest.importorskip("tiktoken")
ASSETS = Path(__file__).resolve().parents[3] / "shared" / "qwen_assets" / "Qwen-VL-Chat"
STORED = json.loads((Path(__file__).parent / "qwen_vl_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def renderer() -> NativeRenderer:
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files beside the repository")
    return NativeRenderer(ModelFolder(ASSETS))


def make_conversation(rng: random.Random, number: int) -> Sample:
    turns: list[Message] = []
    num_images = 0
    for question in range(rng.randrange(1, 5)):
        parts: list[ContentPart] = []
        for _ in range(rng.randrange(0 if question or number % 5 == 0 else 1, 4)):
            parts.append(ImagePart(image=f"{num_images}.png"))
            num_images += 1
        parts.append(make_text(rng))
        turns.append(Message(role="user", content=tuple(parts)))
        turns.append(Message(role="assistant", content=make_answer(rng, num_images)))
    system = TextPart(text="You are a helpful assistant.") if number % 3 else make_text(rng)
    return Sample(id="chat", messages=(Message(role="system", content=(system,)), *turns))


def make_text(rng: random.Random) -> TextPart:
    return TextPart(text=random_text_without_specials(rng))


def make_answer(rng: random.Random, num_images: int) -> tuple[ContentPart, ...]:
    parts: list[ContentPart] = [make_text(rng)]
    for _ in range(rng.randrange(3) if num_images else 0):
        x1, x2 = sorted(rng.sample(range(1000), 2))
        y1, y2 = sorted(rng.sample(range(1000), 2))
        label = random_text_without_specials(rng).strip() or "dog"
        parts += [BoxPart(label=label, xyxy=(x1, y1, x2, y2)), make_text(rng)]
    return tuple(parts if rng.random() < 0.9 else parts[1:] or parts)


def compute_checksum(values: NDArray[np.generic]) -> list[int]:
    return [len(values), zlib.crc32(values.astype("<i4").tobytes())]


def test_ids_match_published_code(renderer, tmp_path):
    for number in range(12):
        # Pixels are thousandths.
        Image.new("RGB", (1000, 1000)).save(tmp_path / f"{number}.png")
    rng = random.Random(11)
    start, end = (renderer.tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>"))
    for number, (prompt, full, supervised) in enumerate(STORED["chats"]):
        located_sample = LocatedSample(make_conversation(rng, number), tmp_path)
        assert compute_checksum(renderer.tokenize_prompt(located_sample).ids_T) == prompt
        outline = renderer.tokenize(located_sample)
        assert compute_checksum(outline.ids_T) == full
        # The published script also supervises the special tokens of all turns and the newline
        # after each. Here only an answer and its end are supervised.
        marks_T = (outline.ids_T == start) | (outline.ids_T == end)
        after_T = np.append(False, (outline.ids_T == end)[:-1])
        assert compute_checksum(outline.loss_mask_T | marks_T | after_T) == supervised


def test_image_has_448_pixels_and_256_tokens(renderer, tmp_path):
    image = Image.effect_noise((300, 200), 80).convert("RGB")
    image.save(tmp_path / "a.png")
    encoded = renderer.encode_prompt(build_question([tmp_path / "a.png"], "What is it?", "a"))
    (span,) = encoded.tokenized.spans
    assert (span.grid_thw, span.resized_size) == ((1, 32, 32), (448, 448))
    ids = encoded.tokenized.ids_T.tolist()
    assert ids[span.start - 1 : span.stop + 1] == [151857, *[151859] * 256, 151858]
    text = renderer.tokenizer.decode(ids, skip_special_tokens=False).replace("<imgpad>", "")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <img></img>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (encoded.tokenized.position_ids_3T == np.arange(len(ids))).all()
    patches_ND = encoded.patches_ND
    squares = patches_ND.reshape(16, 16, 2, 2, 3, 14, 14).transpose(0, 2, 5, 1, 3, 6, 4)
    expected = image.resize((448, 448), Image.Resampling.BICUBIC)
    assert (squares.reshape(448, 448, 3) == np.asarray(expected)).all()


def test_image_size_is_fixed_and_user_text_never_becomes_a_special_token(renderer):
    folder, fixed = ModelFolder(ASSETS), ExactSize(height=448, width=448)
    assert renderer.image_rule == NativeRenderer(folder, fixed).image_rule == fixed
    with pytest.raises(UserError, match="longest_side=500") as caught:
        NativeRenderer(folder, LongestSide(longest_side=500))
    assert "448 x 448" in caught.value.expected
    for token in SPECIAL_TOKENS:
        ids = renderer.tokenizer.encode(f"a {token} b")
        assert max(ids) < renderer.tokenizer.token_to_id("<|endoftext|>"), token


def test_text_only_model_and_inconsistent_token_ids_are_rejected(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen"}', encoding="utf-8")
    with pytest.raises(UserError, match="a text-only Qwen model"):
        from_folder(ModelFolder(tmp_path))
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files beside the repository")
    config = json.loads((ASSETS / "config.json").read_text(encoding="utf-8"))
    config["visual"]["image_start_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "qwen.tiktoken").symlink_to(ASSETS / "qwen.tiktoken")
    with pytest.raises(UserError, match=r"151857 in qwen.tiktoken, but visual.image_start_id is 7"):
        NativeRenderer(ModelFolder(tmp_path))


NUM_IMAGE_IDS = 256


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


def test_string_ids_match_published_code(renderer):
    published = renderer.tokenizer
    for number, pieces in enumerate(make_strings(500, 7)):
        ids = np.array(list(encode_pieces(published, pieces)), "<i4")
        assert [len(ids), zlib.crc32(ids.tobytes())] == STORED["strings"][number], pieces
    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<ref>", "<box>", "<img>", "<imgpad>")
    found = [published.token_to_id(name) for name in names]
    assert found == [151643, 151644, 151645, 151851, 151853, 151857, 151859]
    assert published.list_special_tokens() == SPECIAL_TOKENS


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


@pytest.mark.parametrize(
    ("content", "output"), load_cases("tiktoken_tokenizer")["test_invalid_file_is_rejected"]
)
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
