"""Encoding of the first Qwen-VL: published ids of whole chats, images, boxes, errors."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from chat_samples import ChatImage, ChatText, ChatTurn, SampleChat, make_chats
from numpy.typing import NDArray
from PIL import Image

from finesight.config import ExactSize, LongestSide
from finesight.data.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
)
from finesight.encode.family import ImageBox, PredictedBox, SpecialToken
from finesight.encode.qwen_vl import QwenVL, from_folder
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.model_folder import ModelFolder

pytest.importorskip("tiktoken")
ASSETS = Path(__file__).resolve().parents[3] / "shared" / "qwen_assets" / "Qwen-VL-Chat"
STORED = json.loads((Path(__file__).parent / "qwen_vl_ids.json").read_text(encoding="utf-8"))
CHATS = make_chats(100, 11)


@pytest.fixture(scope="module")
def renderer() -> NativeRenderer:
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files beside the repository")
    return NativeRenderer(ModelFolder(ASSETS))


@pytest.fixture(scope="module")
def image_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(12):
        Image.new("RGB", (1000, 1000), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def _message(turn: ChatTurn) -> Message:
    role, parts = turn
    content: list[TextPart | ImagePart | BoxPart] = []
    for part in parts:
        if isinstance(part, ChatImage):
            content.append(ImagePart(image=part.name))
        elif isinstance(part, ChatText):
            content.append(TextPart(text=part.text))
        else:
            x1, y1, x2, y2 = part.xyxy
            content.append(BoxPart(image=0, label=part.label, xyxy=(x1, y1, x2, y2)))
    return Message(role="user" if role == "user" else "assistant", content=tuple(content))


def _located(chat: SampleChat, folder: Path) -> LocatedSample:
    system = Message(role="system", content=(TextPart(text=chat.system),))
    messages = (system, *map(_message, chat.turns))
    return LocatedSample(Sample(id="chat", messages=messages), folder)


def _sum(values: NDArray[np.generic]) -> list[int]:
    return [len(values), zlib.crc32(values.astype("<i4").tobytes())]


@pytest.mark.parametrize("number", range(0, len(CHATS), 20))
def test_chat_ids_match_published_code(
    renderer: NativeRenderer, image_set: Path, number: int
) -> None:
    for chat, (prompt, full, supervised) in list(zip(CHATS, STORED["chats"], strict=True))[
        number : number + 20
    ]:
        located_sample = _located(chat, image_set)
        assert _sum(renderer.tokenize_prompt(located_sample).ids_T) == prompt
        outline = renderer.tokenize(located_sample)
        assert _sum(outline.ids_T) == full
        # The published script also supervises the special tokens of all turns and the newline
        # after each. Here only an answer and its end are supervised.
        ids_T = outline.ids_T
        start, end = (
            renderer.tokenizer.token_to_id(name) for name in ("<|im_start|>", "<|im_end|>")
        )
        marks_T = (ids_T == start) | (ids_T == end)
        after_T = np.append(False, (ids_T == end)[:-1])
        assert _sum(outline.loss_mask_T | marks_T | after_T) == supervised


def test_image_has_448_pixels_and_256_tokens(renderer: NativeRenderer, tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "a.png")
    encoded = renderer.encode_question([tmp_path / "a.png"], "What is it?")
    (span,) = encoded.tokenized.spans
    assert (span.grid_thw, span.resized_size, span.original_size) == (
        (1, 32, 32),
        (448, 448),
        (200, 300),
    )
    assert span.stop - span.start == 256
    assert encoded.patches_ND.shape == (1024, 588)
    ids = [int(i) for i in encoded.tokenized.ids_T]
    assert ids[span.start - 1] == 151857
    assert set(ids[span.start : span.stop]) == {151859}
    assert ids[span.stop] == 151858
    text = renderer.tokenizer.decode(ids, skip_special_tokens=False).replace("<imgpad>", "")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <img></img>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (encoded.tokenized.position_ids_3T == np.arange(len(ids))).all()


def test_image_resize_matches_published_code(renderer: NativeRenderer, tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "a.png")
    patches_ND = renderer.encode_question([tmp_path / "a.png"], "?").patches_ND
    squares = patches_ND.reshape(16, 16, 2, 2, 3, 14, 14).transpose(0, 2, 5, 1, 3, 6, 4)
    with Image.open(tmp_path / "a.png") as image:
        expected = image.resize((448, 448), Image.Resampling.BICUBIC)
    assert (squares.reshape(448, 448, 3) == np.asarray(expected)).all()


def test_boxes_are_thousandths_below_1000() -> None:
    size = (200, 400)
    boxes = [
        ImageBox("dog", (40.0, 20.0, 400.0, 200.0), size, (448, 448)),
        ImageBox(None, (0.1, 0.0, 1.0, 100.0), size, (448, 448)),
    ]
    written = QwenVL().write_boxes(boxes)
    assert written == [
        *(SpecialToken("<ref>"), "dog", SpecialToken("</ref>")),
        *(SpecialToken("<box>"), "(100,100),(999,999)", SpecialToken("</box>")),
        *(SpecialToken("<box>"), "(0,0),(3,500)", SpecialToken("</box>")),
    ]
    text = "".join(p.token if isinstance(p, SpecialToken) else p for p in written)
    assert QwenVL().read_boxes(f"Here: {text}.", size, (448, 448)) == [
        PredictedBox("dog", (40.0, 20.0, pytest.approx(399.6), pytest.approx(199.8))),
        PredictedBox("dog", (0.0, 0.0, pytest.approx(1.2), 100.0)),
    ]


def test_image_size_is_fixed_by_the_model(renderer: NativeRenderer) -> None:
    folder = ModelFolder(ASSETS)
    assert renderer.image_rule == ExactSize(height=448, width=448)
    assert (
        NativeRenderer(folder, ExactSize(height=448, width=448)).image_rule == renderer.image_rule
    )
    with pytest.raises(UserError, match="longest_side=500") as caught:
        NativeRenderer(folder, LongestSide(longest_side=500))
    assert "448 x 448" in caught.value.expected


def test_videos_are_rejected(renderer: NativeRenderer, image_set: Path) -> None:
    video = VideoPart(frames=("0.png", "1.png"), fps=1.0)
    message = Message(role="user", content=(video, TextPart(text="?")))
    with pytest.raises(UserError, match="a video of 2 frames"):
        renderer.encode_prompt(LocatedSample(Sample(id="a", messages=(message,)), image_set))


def test_text_only_model_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen"}', encoding="utf-8")
    with pytest.raises(UserError, match="a text-only Qwen model"):
        from_folder(ModelFolder(tmp_path))


def test_inconsistent_token_ids_are_rejected(tmp_path: Path) -> None:
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files beside the repository")
    config = json.loads((ASSETS / "config.json").read_text(encoding="utf-8"))
    config["visual"]["image_start_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "qwen.tiktoken").symlink_to(ASSETS / "qwen.tiktoken")
    with pytest.raises(UserError, match=r"151857 in qwen.tiktoken, but visual.image_start_id is 7"):
        NativeRenderer(ModelFolder(tmp_path))
