"""The one way from a sample to tokens: for training, measuring and answering alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from finesight.config import PictureRule
from finesight.data.boxes import ROUNDING
from finesight.data.headers import picture_size
from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart, VideoPart
from finesight.encode.dialect import Box, PlacedBox, Special
from finesight.encode.encoded import Encoded, Grid, Outline, Size, Span
from finesight.encode.family import Family, family_of_folder
from finesight.encode.positions import rope_positions
from finesight.encode.tape import Tape
from finesight.encode.tokenizer import Tokenizer
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.vision.patches import end_to_end, geometry_of, to_patches
from finesight.vision.picture import open_picture
from finesight.vision.resize import native_rule, resized_size
from finesight.vision.video import frame_size, video_patches

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
TEXT_END = "<|endoftext|>"
PLACEHOLDERS = {"image": "<|image_pad|>", "video": "<|video_pad|>"}


@dataclass(frozen=True, slots=True)
class _Visual:
    """A picture or video of a sample before it has a place among the tokens."""

    kind: Literal["image", "video"]
    files: tuple[Path, ...]
    original: Size
    resized: Size
    grid: Grid
    seconds: float


class Renderer:
    """Turns samples of one model, picture rule and system prompt into tokens and patches.

    A conversation is `<|im_start|>role`, a newline, the content, `<|im_end|>` and a newline for
    each turn, as in the published chat template. The system turn is the sample's own, or
    `system`, or the family's. A picture is `<|vision_start|>`, one `<|image_pad|>` for each
    merged patch, `<|vision_end|>`; a run of adjacent boxes is written in the family's dialect.

    Learned is the content of every assistant turn and its `<|im_end|>`; the newline after it is
    not. An answer is tokenised apart from the `assistant` and newline before it, because in
    generation the prompt ends there: the tokens of `prompt` are always the first tokens of
    `outline`. Tokenising the template's whole text gives the same, except for an answer that
    starts with white space and a newline, whose newlines would merge with the prompt's.
    """

    def __init__(
        self, folder: ModelFolder, picture: PictureRule | None = None, system: str | None = None
    ) -> None:
        """`picture` is the recipe's size rule (None: the model's own), `system` its prompt."""
        self.family: Family = family_of_folder(folder)
        self.geometry = geometry_of(folder)
        self.rule: PictureRule = picture or native_rule(folder.preprocessor)
        self.system = self.family.system_prompt if system is None else system
        self.tokenizer = Tokenizer(folder.tokenizer_file)
        self.end_ids = (self.tokenizer.id_of(TURN_END), self.tokenizer.id_of(TEXT_END))
        for kind, token in PLACEHOLDERS.items():
            self._check_id(folder, f"{kind}_token_id", token)

    def outline(self, located: Located) -> Outline:
        """The whole sample as tokens, from its text and the headers of its pictures.

        Raises DamagedPicture for a picture that cannot be used (also one of more than 200 times
        one side in the other), and UserError for a box outside of its picture.
        """
        return self._outline(located, located.sample.messages, answering=False)

    def encode(self, located: Located) -> Encoded:
        """The whole sample with its patches."""
        return self.with_patches(self.outline(located))

    def prompt(self, located: Located) -> Encoded:
        """All turns before the last one of the assistant, ready for the answer to follow.

        A sample that ends with the user's turn is taken whole. Nothing is learned.
        """
        return self.with_patches(self.prompt_outline(located))

    def prompt_outline(self, located: Located) -> Outline:
        """`prompt` without its patches, from the headers of its pictures."""
        messages = located.sample.messages
        asked = messages[:-1] if messages[-1].role == "assistant" else messages
        return self._outline(located, asked, answering=True)

    def question(self, pictures: Sequence[Path], prompt: str) -> Encoded:
        """One user turn, pictures before text, ready for the answer; paths as they are given."""
        parts = [ImagePart(image=str(path)) for path in pictures]
        message = Message(role="user", content=(*parts, TextPart(text=prompt)))
        return self.prompt(Located(Sample(id=prompt, messages=(message,)), Path()))

    def with_patches(self, outline: Outline) -> Encoded:
        """The outline with the patches of its pictures, decoded now."""
        none = np.empty((0, self.geometry.numbers), dtype=np.uint8)
        return Encoded(outline, end_to_end([self._patches(s) for s in outline.spans] or [none]))

    def text(self, ids: Sequence[int]) -> tuple[str, str]:
        """What generated ids say: up to the end token without special tokens, and all of it."""
        stops = (at for at, token in enumerate(ids) if token in self.end_ids)
        answer = self.tokenizer.decode(ids[: next(stops, len(ids))], skip_special=True)
        return answer, self.tokenizer.decode(ids, skip_special=False)

    def boxes(self, raw: str, spans: Sequence[Span], image: int = 0) -> list[Box]:
        """The boxes of an answer with its special tokens, in original pixels of picture `image`.

        An answer does not say which picture it means; without pictures there are no boxes.
        """
        images = [span for span in spans if span.kind == "image"]
        if not images:
            return []
        return self.family.read_boxes(raw, images[image].original, images[image].resized)

    def _outline(self, located: Located, messages: Sequence[Message], answering: bool) -> Outline:
        visuals = [self._visual(part, located) for part in _visual_parts(located.sample)]
        tape = Tape(self.tokenizer)
        spans: list[Span] = []
        if messages[0].role != "system":
            messages = (Message(role="system", content=(TextPart(text=self.system),)), *messages)
        for message in messages:
            tape.special(TURN_START, learned=False)
            tape.text(f"{message.role}\n", learned=False)
            self._lay_content(tape, message, visuals, spans, located.sample.id)
            tape.special(TURN_END, learned=message.role == "assistant")
            tape.text("\n", learned=False)
        if answering:
            tape.special(TURN_START, learned=False)
            tape.text("assistant\n", learned=False)
        ids_T, learned_T = tape.arrays()
        if answering:
            learned_T = np.zeros_like(learned_T)
        times = [
            self.family.time_steps(visual.grid[0], visual.seconds)
            for visual in visuals[: len(spans)]
        ]
        positions_3T = rope_positions(len(ids_T), spans, times, self.geometry.merge)
        return Outline(located.sample.id, ids_T, learned_T, positions_3T, tuple(spans))

    def _lay_content(
        self,
        tape: Tape,
        message: Message,
        visuals: Sequence[_Visual],
        spans: list[Span],
        sample: str,
    ) -> None:
        """Lay down one turn's parts; `spans` grows by its pictures, which are the next ones of
        `visuals`. Boxes may speak of any picture of the sample, also of a later turn's."""
        learned = message.role == "assistant"
        images = [visual for visual in visuals if visual.kind == "image"]
        run: list[PlacedBox] = []
        for part in (*message.content, None):
            if isinstance(part, BoxPart):
                run.append(_placed(part, images, sample))
                continue
            if run:
                self._lay_boxes(tape, run, learned)
                run = []
            if isinstance(part, TextPart):
                tape.text(part.text, learned=learned)
            elif part is not None:
                spans.append(self._lay_visual(tape, visuals[len(spans)]))

    def _lay_boxes(self, tape: Tape, boxes: Sequence[PlacedBox], learned: bool) -> None:
        for piece in self.family.write_boxes(boxes):
            if isinstance(piece, Special):
                tape.special(piece.token, learned=learned)
            else:
                tape.text(piece, learned=learned)

    def _lay_visual(self, tape: Tape, visual: _Visual) -> Span:
        tape.special("<|vision_start|>", learned=False)
        start = tape.length
        times = self.geometry.tokens(visual.grid)
        tape.special(PLACEHOLDERS[visual.kind], learned=False, times=times)
        tape.special("<|vision_end|>", learned=False)
        return Span(
            kind=visual.kind,
            start=start,
            stop=start + times,
            grid=visual.grid,
            files=visual.files,
            original=visual.original,
            resized=visual.resized,
        )

    def _visual(self, part: ImagePart | VideoPart, located: Located) -> _Visual:
        names = (part.image,) if isinstance(part, ImagePart) else part.frames
        files = tuple(located.path(name) for name in names)
        original = picture_size(files[0]) if len(files) == 1 else frame_size(files)
        resized = resized_size(original, self.rule, self.geometry.factor, where=str(files[0]))
        return _Visual(
            kind=part.type,
            files=files,
            original=original,
            resized=resized,
            grid=self.geometry.grid(resized, len(files)),
            seconds=0.0 if isinstance(part, ImagePart) else self.geometry.temporal / part.fps,
        )

    def _patches(self, span: Span) -> NDArray[np.uint8]:
        if span.kind == "video":
            return video_patches(span.files, span.resized, self.geometry)
        return to_patches([open_picture(span.files[0])], span.resized, self.geometry)

    def _check_id(self, folder: ModelFolder, key: str, token: str) -> None:
        found, expected = self.tokenizer.id_of(token), folder.config.get(key)
        if expected not in (None, found):
            raise UserError(
                f"{token} is {found} in tokenizer.json, but {key} is {expected} in config.json",
                where=str(folder.path),
                expected="the same id in both files",
                remedy="take both files from the same model",
            )


def _visual_parts(sample: Sample) -> list[ImagePart | VideoPart]:
    return [part for part in sample.parts() if isinstance(part, ImagePart | VideoPart)]


def _placed(box: BoxPart, images: Sequence[_Visual], sample: str) -> PlacedBox:
    """The box with its picture's sizes. Raises UserError when it is not within the picture."""
    if box.image >= len(images):
        raise UserError(
            f"a box in picture number {box.image}, counted from 0",
            where=f"sample {sample}",
            expected=f"a number below {len(images)}, the sample's pictures",
            remedy="correct the box's `image`, or add the picture",
        )
    picture = images[box.image]
    height, width = picture.original
    x1, y1, x2, y2 = box.xyxy
    if not (-ROUNDING <= x1 < x2 <= width + ROUNDING and -ROUNDING <= y1 < y2 <= height + ROUNDING):
        raise UserError(
            f"the box {list(box.xyxy)} in a picture of {width} x {height} pixels",
            where=f"sample {sample} ({picture.files[0]})",
            expected=f"[x1, y1, x2, y2] with x1 < x2 up to {width} and y1 < y2 up to {height}",
            remedy="boxes are in pixels of the original picture, after its EXIF turn;"
            " `finesight data import --box-format --box-units` makes them so",
        )
    return PlacedBox(box.label, box.xyxy, picture.original, picture.resized)
