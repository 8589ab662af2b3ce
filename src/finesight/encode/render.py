"""The one way from a sample to tokens: for training, measuring and answering alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finesight.config import PictureRule
from finesight.data.boxes import ROUNDING
from finesight.data.headers import picture_size
from finesight.data.jsonl import Located
from finesight.data.sample import (
    BoxPart,
    ImagePart,
    Message,
    Part,
    Sample,
    TextPart,
    VideoPart,
)
from finesight.encode.dialect import Box, PlacedBox, Shot
from finesight.encode.encoded import Encoded, Grid, Outline, Size, Span
from finesight.encode.family import Family, family_of
from finesight.encode.positions import rope_positions
from finesight.encode.rank_tokenizer import tokenizer_of
from finesight.encode.tape import Tape
from finesight.encode.thought import CLOSED, OPENED, apart, generated
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.vision.patches import end_to_end, geometry_of, to_patches
from finesight.vision.picture import open_picture
from finesight.vision.resize import resized_size, rule_in_force
from finesight.vision.video import frame_size, video_patches

TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
TEXT_END = "<|endoftext|>"


@dataclass(frozen=True, slots=True)
class Answer:
    """What generated ids say: `text` as a person reads it, `raw` with its special tokens, and the
    thought before it, None of a model that does not think."""

    text: str
    raw: str
    thought: str | None


@dataclass(frozen=True, slots=True)
class _Visual:
    """A picture, or frames of a video, before they have a place among the tokens; `caption` stands
    in front of them, `seconds` lie between groups of frames."""

    kind: Literal["image", "video"]
    caption: str
    files: tuple[Path, ...]
    original: Size
    resized: Size
    grid: Grid
    seconds: float


@dataclass(frozen=True, slots=True)
class _Laid:
    """Tokens of a sample so far, and the pictures among them with their times; `waiting` gives
    those of the next part that shows any. `images` are all of the sample's, also those of later
    turns: boxes may speak of any."""

    sample: str
    tape: Tape
    waiting: Iterator[Sequence[_Visual]]
    images: Sequence[_Visual]
    spans: list[Span]
    times: list[NDArray[np.int64]]


class Renderer:
    """Turns samples of one model, picture rule and system prompt into tokens and patches.

    A conversation is `<|im_start|>role`, a newline, the content, `<|im_end|>` and a newline for
    each turn, as in the published chat template. The system turn is the sample's own, or
    `system`, or the family's, if it has one. A picture is `<|vision_start|>`, one `<|image_pad|>`
    for each merged patch, `<|vision_end|>`; a run of adjacent boxes is written in the family's
    dialect. A model that thinks reads the thoughts of the last answer only.

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
        self.family: Family = family_of(folder)
        self.geometry = geometry_of(folder)
        self.rule: PictureRule = rule_in_force(folder.preprocessor, picture)
        self.system = self.family.system_prompt if system is None else system
        self.tokenizer = tokenizer_of(folder)
        self.end_ids = (self.tokenizer.id_of(TURN_END), self.tokenizer.id_of(TEXT_END))
        for token, key in self.family.id_keys.items():
            self._check_id(folder, key, token)

    @property
    def thinks(self) -> bool:
        """Whether an answer begins with a thought."""
        return self.family.thinks

    def outline(self, located: Located) -> Outline:
        """The whole sample as tokens, from its text and the headers of its pictures.

        Raises DamagedPicture for a picture that cannot be used (also one of more than 200 times
        one side in the other), and UserError for a box outside of its picture.
        """
        return self._outline(located, located.sample.messages, answering=False)

    def encode(self, located: Located) -> Encoded:
        """The whole sample with its patches."""
        return self.with_patches(self.outline(located))

    def unseen(self, located: Located) -> Encoded:
        """The whole sample without a patch, for a model that knows its pictures' features."""
        nothing = np.empty((0, self.geometry.numbers), dtype=np.uint8)
        return Encoded(self.outline(located), nothing)

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
        return Encoded(outline, end_to_end([self.span_patches(s) for s in outline.spans] or [none]))

    def answer(self, ids: Sequence[int]) -> Answer:
        """What generated ids say up to the end token; `raw` is all of them but the thought."""
        stops = (at for at, token in enumerate(ids) if token in self.end_ids)
        said = self.tokenizer.decode(ids[: next(stops, len(ids))], skip_special=True)
        raw = self.tokenizer.decode(ids, skip_special=False)
        if not self.family.thinks:
            return Answer(said, raw, None)
        thought, answer = generated(said)
        return Answer(answer, generated(raw)[1], thought)

    def boxes(self, raw: str, spans: Sequence[Span], image: int = 0) -> list[Box]:
        """The boxes of an answer with its special tokens, in original pixels of picture `image`.

        An answer does not say which picture it means; without pictures there are no boxes.
        """
        images = [span for span in spans if span.kind == "image"]
        if not images:
            return []
        return self.family.read_boxes(raw, images[image].original, images[image].resized)

    def _outline(self, located: Located, messages: Sequence[Message], answering: bool) -> Outline:
        shown = [self._visuals(part, located) for part in _visual_parts(located.sample)]
        images = [visual for visuals in shown for visual in visuals if visual.kind == "image"]
        tape = Tape(self.tokenizer)
        laid = _Laid(located.sample.id, tape, iter(shown), images, [], [])
        if messages[0].role != "system" and self.system is not None:
            messages = (Message(role="system", content=(TextPart(text=self.system),)), *messages)
        for message in messages:
            tape.special(TURN_START, learned=False)
            self._lay_role(tape, message.role)
            answers = message.role == "assistant"
            content: Sequence[Part] = message.content
            if self.family.thinks and answers:
                content = self._lay_thought(laid, message, is_last=message is messages[-1])
            self._lay_content(laid, content, learned=answers)
            tape.special(TURN_END, learned=answers)
            tape.text("\n", learned=False)
        if answering:
            tape.special(TURN_START, learned=False)
            self._lay_role(tape, "assistant")
            tape.text(OPENED if self.family.thinks else "", learned=False)
        ids_T, learned_T = tape.arrays()
        if answering:
            learned_T = np.zeros_like(learned_T)
        spans, times = ([], []) if self.family.flat else (laid.spans, laid.times)
        positions_3T = rope_positions(len(ids_T), spans, times, self.geometry.merge)
        return Outline(located.sample.id, ids_T, learned_T, positions_3T, tuple(laid.spans))

    def _lay_role(self, tape: Tape, role: str) -> None:
        for piece in (role, "\n") if self.family.apart else (f"{role}\n",):
            tape.text(piece, learned=False)
            if self.family.apart:
                tape.cut()

    def _lay_thought(self, laid: _Laid, message: Message, *, is_last: bool) -> tuple[Part, ...]:
        """The answer of an assistant's turn, whose thought is laid down if it is the last one's; an
        answer without a thought is learned as one that follows an empty one."""
        said = apart(message.content)
        if is_last:
            laid.tape.text(OPENED, learned=False)
            self._lay_content(laid, said.thought or (), learned=True)
            laid.tape.text(CLOSED, learned=True)
        return said.answer

    def _lay_content(self, laid: _Laid, content: Sequence[Part], *, learned: bool) -> None:
        """Lay down a turn's parts."""
        tape = laid.tape
        run: list[PlacedBox] = []
        for part in (*content, None):
            if isinstance(part, BoxPart):
                run.append(_placed(part, laid.images, laid.sample))
                continue
            if run:
                tape.pieces(self.family.write_boxes(run), learned=learned)
                run = []
            if isinstance(part, TextPart):
                tape.text(part.text, learned=learned)
            elif part is not None:
                for visual in next(laid.waiting):
                    self._lay_visual(laid, visual)

    def _lay_visual(self, laid: _Laid, visual: _Visual) -> None:
        tape = laid.tape
        tape.text(visual.caption, learned=False)
        marks = self.family.marks(visual.kind, len(laid.spans) + 1)
        tape.pieces(marks.before, learned=False)
        start = tape.length
        times = self.geometry.tokens(visual.grid)
        tape.special(marks.place, learned=False, times=times)
        tape.pieces(marks.after, learned=False)
        span = Span(
            kind=visual.kind,
            start=start,
            stop=start + times,
            grid=visual.grid,
            files=visual.files,
            original=visual.original,
            resized=visual.resized,
        )
        laid.spans.append(span)
        laid.times.append(self.family.time_steps(visual.grid[0], visual.seconds))

    def _visuals(self, part: ImagePart | VideoPart, located: Located) -> list[_Visual]:
        """A picture, or a video in the pieces that the family lays it down in."""
        if isinstance(part, ImagePart):
            file = located.path(part.image)
            return [self._visual("image", (file,), picture_size(file), Shot("", slice(1), 0.0))]
        files = tuple(located.path(name) for name in part.frames)
        original = frame_size(files)
        try:
            shots = self.family.shots(len(files), part.fps, self.geometry.temporal)
        except UserError as error:
            error.where = f"sample {located.sample.id}"
            raise
        return [self._visual("video", files, original, shot) for shot in shots]

    def _visual(
        self, kind: Literal["image", "video"], files: tuple[Path, ...], original: Size, shot: Shot
    ) -> _Visual:
        resized = resized_size(original, self.rule, self.geometry.factor, where=str(files[0]))
        files = files[shot.frames]
        grid = self.geometry.grid(resized, len(files))
        return _Visual(kind, shot.caption, files, original, resized, grid, shot.seconds)

    def span_patches(self, span: Span) -> NDArray[np.uint8]:
        """Decode one image or video of an outline into its patches."""
        if span.kind == "video":
            return video_patches(span.files, span.resized, self.geometry)
        return to_patches([open_picture(span.files[0])], span.resized, self.geometry)

    def _check_id(self, folder: ModelFolder, key: str, token: str) -> None:
        found, expected = self.tokenizer.id_of(token), _stated(folder.config, key)
        if expected not in (None, found):
            raise UserError(
                f"{token} is {found} in {folder.tokenizer_file.name}, but {key} is {expected} in"
                " config.json",
                where=str(folder.path),
                expected="the same id in both files",
                remedy="take both files from the same model",
            )


def _stated(config: Mapping[str, Any], key: str) -> object:
    """The value under a key, its sections before it; None where there is none."""
    *sections, last = key.split(".")
    for section in sections:
        inner = config.get(section)
        config = inner if isinstance(inner, dict) else {}
    return config.get(last)


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
