"""The first Qwen-VL's encoding: the published ids of whole chats, pictures, boxes, refusals."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from talks import Picture, Talk, Turn, Words, talks

from finesight.config import ExactSize, LongestSide
from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart, VideoPart
from finesight.encode.dialect import Box, PlacedBox, Special
from finesight.encode.qwen_vl import QwenVL, from_folder
from finesight.encode.render import Renderer
from finesight.errors import UserError
from finesight.hub import ModelFolder

pytest.importorskip("tiktoken")
ASSETS = Path(__file__).resolve().parents[3] / "shared" / "qwen_assets" / "Qwen-VL-Chat"
STORED = json.loads((Path(__file__).parent / "qwen_vl_ids.json").read_text(encoding="utf-8"))
TALKS = talks(100, 11)


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files beside the repository")
    return Renderer(ModelFolder(ASSETS))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(12):
        Image.new("RGB", (1000, 1000), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


def _message(turn: Turn) -> Message:
    role, parts = turn
    content: list[TextPart | ImagePart | BoxPart] = []
    for part in parts:
        if isinstance(part, Picture):
            content.append(ImagePart(image=part.name))
        elif isinstance(part, Words):
            content.append(TextPart(text=part.text))
        else:
            x1, y1, x2, y2 = part.xyxy
            content.append(BoxPart(image=0, label=part.label, xyxy=(x1, y1, x2, y2)))
    return Message(role="user" if role == "user" else "assistant", content=tuple(content))


def _located(talk: Talk, folder: Path) -> Located:
    system = Message(role="system", content=(TextPart(text=talk.system),))
    messages = (system, *map(_message, talk.turns))
    return Located(Sample(id="talk", messages=messages), folder)


def _sum(numbers: NDArray[np.generic]) -> list[int]:
    return [len(numbers), zlib.crc32(numbers.astype("<i4").tobytes())]


@pytest.mark.parametrize("number", range(0, len(TALKS), 20))
def test_chats_have_the_published_ids(renderer: Renderer, pictures: Path, number: int) -> None:
    for talk, (prompt, whole, learned) in list(zip(TALKS, STORED["chats"], strict=True))[
        number : number + 20
    ]:
        located = _located(talk, pictures)
        assert _sum(renderer.prompt_outline(located).ids_T) == prompt
        outline = renderer.outline(located)
        assert _sum(outline.ids_T) == whole
        # The published script also learns the marks of all turns, the user's too, and the newline
        # after each. Here an answer and its end are learned, and nothing else.
        ids_T = outline.ids_T
        start, end = (renderer.tokenizer.id_of(name) for name in ("<|im_start|>", "<|im_end|>"))
        marks_T = (ids_T == start) | (ids_T == end)
        after_T = np.append(False, (ids_T == end)[:-1])
        assert _sum(outline.learned_T | marks_T | after_T) == learned


def test_a_picture_has_448_pixels_and_256_places(renderer: Renderer, tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "a.png")
    encoded = renderer.question([tmp_path / "a.png"], "What is it?")
    (span,) = encoded.outline.spans
    assert (span.grid, span.resized, span.original) == ((1, 32, 32), (448, 448), (200, 300))
    assert span.stop - span.start == 256
    assert encoded.patches_ND.shape == (1024, 588)
    ids = [int(i) for i in encoded.outline.ids_T]
    assert ids[span.start - 1] == 151857
    assert set(ids[span.start : span.stop]) == {151859}
    assert ids[span.stop] == 151858
    text = renderer.tokenizer.decode(ids, skip_special=False).replace("<imgpad>", "")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "Picture 1: <img></img>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (encoded.outline.positions_3T == np.arange(len(ids))).all()


def test_a_picture_is_resized_as_published(renderer: Renderer, tmp_path: Path) -> None:
    Image.effect_noise((300, 200), 80).convert("RGB").save(tmp_path / "a.png")
    patches_ND = renderer.question([tmp_path / "a.png"], "?").patches_ND
    squares = patches_ND.reshape(16, 16, 2, 2, 3, 14, 14).transpose(0, 2, 5, 1, 3, 6, 4)
    with Image.open(tmp_path / "a.png") as picture:
        expected = picture.resize((448, 448), Image.Resampling.BICUBIC)
    assert (squares.reshape(448, 448, 3) == np.asarray(expected)).all()


def test_boxes_are_whole_thousandths_below_1000() -> None:
    size = (200, 400)
    boxes = [
        PlacedBox("dog", (40.0, 20.0, 400.0, 200.0), size, (448, 448)),
        PlacedBox(None, (0.1, 0.0, 1.0, 100.0), size, (448, 448)),
    ]
    written = QwenVL().write_boxes(boxes)
    assert written == [
        *(Special("<ref>"), "dog", Special("</ref>")),
        *(Special("<box>"), "(100,100),(999,999)", Special("</box>")),
        *(Special("<box>"), "(0,0),(3,500)", Special("</box>")),
    ]
    text = "".join(p.token if isinstance(p, Special) else p for p in written)
    assert QwenVL().read_boxes(f"Here: {text}.", size, (448, 448)) == [
        Box("dog", (40.0, 20.0, pytest.approx(399.6), pytest.approx(199.8))),
        Box("dog", (0.0, 0.0, pytest.approx(1.2), 100.0)),
    ]


def test_the_size_of_pictures_is_the_models(renderer: Renderer) -> None:
    folder = ModelFolder(ASSETS)
    assert renderer.rule == ExactSize(height=448, width=448)
    assert Renderer(folder, ExactSize(height=448, width=448)).rule == renderer.rule
    with pytest.raises(UserError, match="longest_side=500") as caught:
        Renderer(folder, LongestSide(longest_side=500))
    assert "448 x 448" in caught.value.expected


def test_videos_are_refused(renderer: Renderer, pictures: Path) -> None:
    video = VideoPart(frames=("0.png", "1.png"), fps=1.0)
    message = Message(role="user", content=(video, TextPart(text="?")))
    with pytest.raises(UserError, match="a video of 2 frames"):
        renderer.prompt(Located(Sample(id="a", messages=(message,)), pictures))


def test_a_language_model_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen"}', encoding="utf-8")
    with pytest.raises(UserError, match="a Qwen that reads text alone"):
        from_folder(ModelFolder(tmp_path))


def test_ids_that_contradict_the_configuration_are_refused(tmp_path: Path) -> None:
    if not ASSETS.is_dir():
        pytest.skip("no folder with published files beside the repository")
    config = json.loads((ASSETS / "config.json").read_text(encoding="utf-8"))
    config["visual"]["image_start_id"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (tmp_path / "qwen.tiktoken").symlink_to(ASSETS / "qwen.tiktoken")
    with pytest.raises(UserError, match=r"151857 in qwen.tiktoken, but visual.image_start_id is 7"):
        Renderer(ModelFolder(tmp_path))
