"""A talk with a model about pictures, turn by turn: what `finesight chat` and `finesight web` hold.

A turn is asked of one model or of several side by side. Each of them goes on from its own answers;
where it gave none, from those of the one asked first.
"""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.data.boxes import ROUNDING
from finesight.data.headers import picture_size
from finesight.data.json_boxes import BOX_KEY, around_boxes, box_item, unfenced
from finesight.data.jsonl import Located, write_samples
from finesight.data.sample import BoxPart, ImagePart, Message, Part, Sample, TextPart
from finesight.encode.thought import CLOSED, OPENED
from finesight.errors import UserError
from finesight.infer.draw import draw_boxes, free_name
from finesight.infer.predict import Prediction
from finesight.infer.request import Finish, Options
from finesight.storage import refuse_existing, write_file
from finesight.vision.picture import open_picture

if TYPE_CHECKING:
    from finesight.infer.service import Answering, Service

_MARKED = re.compile(
    r"(?:(?:<ref>|<\|object_ref_start\|>)(?:(?!<ref>|<\|object_ref_start\|>).)*?"
    r"(?:</ref>|<\|object_ref_end\|>)\s*)?"
    r"(?:<box>|<\|box_start\|>)[\s\d.,()]*(?:</box>|<\|box_end\|>)",
    re.DOTALL,
)
"""A box as the first Qwen-VL and Qwen2-VL write it."""

_SPECIAL = re.compile(r"</?(?:ref|box|quad)>|<\|[a-z_]+\|>")


class Reply:
    """One model's answer to a turn: `text` is what has come of it, the rest is there at its end.

    Whoever iterates, plainly or asynchronously, gets it piece by piece. `picture` is the one that
    its boxes are read for.
    """

    def __init__(self, model: str, answering: Answering, picture: Path | None) -> None:
        self.model, self.picture = model, picture
        self.text = ""
        self.prediction: Prediction | None = None
        self.finish: Finish | None = None
        self.content: tuple[Part, ...] = ()
        self._answering = answering

    def __iter__(self) -> Iterator[str]:
        for delta in self._answering:
            self.text += delta.text
            yield delta.text
        self._settle()

    async def __aiter__(self) -> AsyncIterator[str]:
        async for delta in self._answering:
            self.text += delta.text
            yield delta.text
        self._settle()

    def cancel(self) -> None:
        """Nobody waits for the rest; the iteration ends soon."""
        self._answering.cancel()

    @property
    def boxes(self) -> tuple[BoxPart, ...]:
        """The boxes of the finished answer, in pixels of `picture`."""
        return () if self.prediction is None else self.prediction.boxes

    def _settle(self) -> None:
        self.finish = self._answering.finish
        self.prediction = self._answering.prediction()
        self.content = answer_parts(self.prediction, self.picture)


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, and the replies to it in the order of the models that were asked."""

    text: str
    pictures: tuple[Path, ...]
    replies: tuple[Reply, ...]

    def of(self, model: str) -> Reply:
        """The model's reply, or the first where it gave none."""
        return next((reply for reply in self.replies if reply.model == model), self.replies[0])


@dataclass(slots=True)
class Talk:
    """Turns so far. A turn whose answer is empty is shown, but neither asked about nor saved."""

    service: Service
    turns: list[Turn] = field(default_factory=list)

    def ask(self, text: str, pictures: Sequence[Path], options: Sequence[Options]) -> Turn:
        """Put a question after the turns so far, once for each of `options`, and begin its answers.

        Pictures are read in the caller's thread. Raises UserError for a question of nothing, a
        picture that cannot be used and whatever the service refuses; the talk is then as before.
        """
        assert options, f"a question to nobody: options are {options!r}"
        if not text.strip() and not pictures:
            raise UserError(
                f"the question is {text!r}",
                where="question",
                expected="some text, a picture, or both",
                remedy="say what you want to know",
            )
        for picture in pictures:
            picture_size(picture)
        replies: list[Reply] = []
        try:
            for one in options:
                replies.append(self._begin(text, pictures, one))
        except BaseException:
            for reply in replies:
                reply.cancel()
            raise
        turn = Turn(text, tuple(pictures), tuple(replies))
        self.turns.append(turn)
        return turn

    def undo(self) -> Turn | None:
        """Take the last turn back, its answers stopped; None where there is none."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        for reply in turn.replies:
            reply.cancel()
        return turn

    def again(self, options: Sequence[Options]) -> Turn:
        """Ask the last question anew in place of its answers.

        Raises UserError as `ask` does, and where nothing has been asked.
        """
        last = self.undo()
        if last is None:
            raise UserError(
                "nothing has been asked yet: 0 turns",
                where="again",
                expected="a question to ask again",
                remedy="ask one first",
            )
        try:
            return self.ask(last.text, last.pictures, options)
        except BaseException:
            self.turns.append(last)
            raise

    def samples(self, named: Callable[[Path], str]) -> list[Sample]:
        """The talk as a sample to train on or to ask again, one for each model that was asked;
        pictures by `named`. Answers that do not end by themselves are numbered under `cut_off`."""
        models = dict.fromkeys(reply.model for turn in self.turns for reply in turn.replies)
        samples = []
        for number, model in enumerate(models, start=1):
            turns = _told(self.turns, model)
            if not turns:
                continue
            cut = [at for at, turn in enumerate(turns) if turn.of(model).finish != "stop"]
            meta = {"model": model} | ({"cut_off": cut} if cut else {})
            messages = tuple(_messages(turns, model))
            sample = Sample(id=f"talk-{number}", messages=messages, meta=meta)
            samples.append(sample.with_files(lambda path: named(Path(path))))
        return samples

    def save(self, file: Path) -> int:
        """Write `samples` as JSONL, pictures by their absolute paths; gives how many there are.

        Raises UserError where nothing has been said or the file exists.
        """
        refuse_existing(file)
        samples = self.samples(lambda path: str(path.absolute()))
        if not samples:
            raise UserError(
                f"nothing to save: {len(self.turns)} turns, none with an answer",
                where=str(file),
                expected="a talk with an answer",
                remedy="ask something first",
            )
        write_samples(file, samples)
        return len(samples)

    def draw(self, file: Path | None = None) -> Path:
        """Write a PNG of the picture that the last answer is about, its boxes drawn: to `file`, or
        beside where one works, under the picture's name. Gives the file.

        Raises UserError where there is no picture or the file exists.
        """
        reply = self.turns[-1].replies[0] if self.turns else None
        if reply is None or reply.picture is None:
            raise UserError(
                f"no picture in the last of {len(self.turns)} turns, nor before it",
                where="drawing",
                expected="an answer about a picture",
                remedy="ask about a picture first",
            )
        target = free_name(Path(), f"{reply.picture.stem}-boxes") if file is None else file
        refuse_existing(target)
        drawn = io.BytesIO()
        draw_boxes(open_picture(reply.picture), reply.boxes).save(drawn, format="PNG")
        write_file(target, drawn.getvalue())
        return target

    def _begin(self, text: str, pictures: Sequence[Path], options: Options) -> Reply:
        model = self.service.names[0] if options.model is None else options.model
        turns = _told(self.turns, model)
        shown = [*(turn.pictures for turn in turns), tuple(pictures)]
        meant = next((some[0] for some in reversed(shown) if some), None)
        messages = [*_messages(turns, model), _question(text, pictures)]
        if meant is not None:
            # Boxes of an answer are read for the picture that those of the sample's answer are in.
            at = [path for some in shown for path in some].index(meant)
            box = BoxPart(image=at, xyxy=(0.0, 0.0, 1.0, 1.0))
            messages.append(Message(role="assistant", content=(box,)))
        sample = Sample(id=f"turn {len(turns) + 1}", messages=tuple(messages))
        answering = self.service.ask(Located(sample, Path()), replace(options, model=model))
        return Reply(model, answering, meant)


def _told(turns: Sequence[Turn], model: str) -> list[Turn]:
    """Those with an answer for the model to go on from."""
    return [turn for turn in turns if turn.of(model).content]


def _question(text: str, pictures: Sequence[Path]) -> Message:
    parts: list[Part] = [ImagePart(image=str(path)) for path in pictures]
    return Message(role="user", content=(*parts, TextPart(text=text)))


def _messages(turns: Sequence[Turn], model: str) -> Iterator[Message]:
    shown: list[Path] = []
    for turn in turns:
        yield _question(turn.text, turn.pictures)
        shown += turn.pictures
        reply = turn.of(model)
        number = 0 if reply.picture is None else shown.index(reply.picture)
        content = tuple(
            part.model_copy(update={"image": number}) if isinstance(part, BoxPart) else part
            for part in reply.content
        )
        yield Message(role="assistant", content=content)


def answer_parts(prediction: Prediction, picture: Path | None) -> tuple[Part, ...]:
    """An answer as a sample holds it: its thought, then text and boxes in turn, the latter of image
    0; boxes that cannot be told from the text, or that lie outside of `picture`, stay text. Nothing
    where it says nothing."""
    if not prediction.answer.strip():
        return ()
    parts = _with_boxes(prediction, picture) or [TextPart(text=prediction.answer)]
    if prediction.thought is not None:
        parts = [TextPart(text=f"{OPENED}{prediction.thought}{CLOSED}"), *parts]
    return tuple(parts)


def _with_boxes(prediction: Prediction, picture: Path | None) -> list[Part]:
    """None at all where there is no box, or one that is not in the places that are looked at."""
    if picture is None or not prediction.boxes:
        return []
    if not all(_inside(box, picture) for box in prediction.boxes):
        return []
    boxes = iter(prediction.boxes)
    parts: list[Part] = []
    for piece in _pieces(prediction):
        if isinstance(piece, str):
            parts += [TextPart(text=piece)] if piece else []
            continue
        for _ in range(piece):
            box = next(boxes, None)
            if box is None:
                return []
            parts.append(box.model_copy(update={"image": 0}))
    return [] if next(boxes, None) is not None else parts


def _pieces(prediction: Prediction) -> Iterator[str | int]:
    """Texts of an answer, and between them how many boxes stand there."""
    raw = prediction.raw
    if BOX_KEY in raw:
        for piece in around_boxes(unfenced(prediction.answer)):
            # What else an object says of a box would be lost.
            yield (
                piece if isinstance(piece, str) else sum(box_item(one) is not None for one in piece)
            )
        return
    end = 0
    for found in _MARKED.finditer(raw):
        yield _SPECIAL.sub("", raw[end : found.start()])
        yield 1
        end = found.end()
    yield _SPECIAL.sub("", raw[end:])


def _inside(box: BoxPart, picture: Path) -> bool:
    height, width = picture_size(picture)
    x1, y1, x2, y2 = box.xyxy
    return -ROUNDING <= x1 < x2 <= width + ROUNDING and -ROUNDING <= y1 < y2 <= height + ROUNDING
