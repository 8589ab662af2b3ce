"""Chat sessions with one or more models, for the terminal and the browser.

A user message is sent to one model, or to several models in parallel. Each model continues from its
own replies. If a model gave no reply to a turn, it continues from the reply of the first model.
"""

from __future__ import annotations

import io
import re
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, filterfalse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finesight.encode.family import THINK_END, THINK_START
from finesight.errors import UserError
from finesight.files.storage import check_new_path, find_free_path, write_new_file
from finesight.infer.prediction import Prediction, draw_boxes
from finesight.infer.request import CompletionDelta, FinishReason, GenerationOptions
from finesight.samples.boxes import (
    TextBox,
    has_json_boxes,
    is_inside_image,
    split_at_boxes,
    split_at_text_boxes,
    strip_code_fences,
)
from finesight.samples.frames import ImageSize
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    is_video_path,
    write_samples,
)
from finesight.samples.video_file import read_visual_size
from finesight.vision.image_processing import load_image

if TYPE_CHECKING:
    from finesight.infer.inference_service import GenerationStream, InferenceService

_SPECIAL_TOKENS = re.compile(r"</?(?:ref|box|quad)>|<\|[a-z_]+\|>")


@dataclass(slots=True, eq=False)
class ChatReply:
    """Reply of one model to a user message.

    Iterate over a streamed reply (synchronously or asynchronously) to receive text deltas.
    `prediction`, `finish_reason` and `content` are set when the stream ends.

    Attributes:
        image_path: Image that predicted boxes refer to; None without an image.
    """

    model: str
    image_path: Path | None
    image_size: ImageSize | None = None
    stream: GenerationStream | None = None
    content: tuple[ContentPart, ...] = ()
    finish_reason: FinishReason | None = None
    prediction: Prediction | None = None
    text: str = ""
    reasoning: str = ""

    def __iter__(self) -> Iterator[str]:
        for delta in self.stream or ():
            yield self._add(delta)
        self._finalize()

    async def __aiter__(self) -> AsyncIterator[str]:
        assert self.stream is not None, f"the reply of {self.model} has ended"
        async for delta in self.stream:
            yield self._add(delta)
        self._finalize()

    def _add(self, delta: CompletionDelta) -> str:
        self.text += delta.text
        self.reasoning += delta.reasoning
        return delta.text

    def cancel(self) -> None:
        """Cancel generation; the iteration ends after the current step."""
        if self.stream is not None:
            self.stream.cancel()

    @property
    def boxes(self) -> tuple[BoxPart, ...]:
        """Boxes of the finished reply in pixels of its image; empty until the stream ends."""
        if self.prediction is None:
            return ()
        return self.prediction.boxes

    def _finalize(self) -> None:
        assert self.stream is not None, f"the reply of {self.model} has ended"
        self.prediction = self.stream.build_prediction()
        self.content = build_answer_parts(self.prediction, self.image_size)
        # Last: other threads read the reply, and with a reason, it is complete.
        self.finish_reason = self.stream.finish_reason


@dataclass(frozen=True, slots=True)
class ChatTurn:
    """A user message and the replies of the requested models, in order."""

    text: str
    image_paths: tuple[Path, ...]
    replies: tuple[ChatReply, ...]

    def reply_from(self, model: str) -> ChatReply:
        """Return the reply of `model`, or the first reply if the model gave none."""
        for reply in self.replies:
            if reply.model == model:
                return reply
        return self.replies[0]


@dataclass(slots=True)
class ChatSession:
    """A conversation with one or more models of an inference service.

    Turns with an empty reply are not sent to the model and not saved.

    Attributes:
        system_prompt: System prompt of new replies; None for that of the model or run.
        read_size: Returns height and width of an image or video, or raises UserError.
    """

    service: InferenceService
    turns: list[ChatTurn] = field(default_factory=list)
    system_prompt: str | None = None
    read_size: Callable[[Path], ImageSize] = read_visual_size

    def send(
        self, text: str, image_paths: Sequence[Path], options: Sequence[GenerationOptions]
    ) -> ChatTurn:
        """Send a message to one model per entry of `options` and start the replies.

        Images are read in the calling thread. After an error the session is unchanged.
        """
        assert options, f"no models requested: options are {options!r}"
        if not text.strip() and not image_paths:
            raise UserError(
                f"text is {text!r} and no image is attached",
                where="message",
                expected="text, an image, or both",
                remedy="enter a question or attach an image",
            )
        for image_path in image_paths:
            self.read_size(image_path)
        replies: list[ChatReply] = []
        try:
            for reply_options in options:
                replies.append(self._start_reply(text, image_paths, reply_options))
        except BaseException:
            for reply in replies:
                reply.cancel()
            raise
        turn = ChatTurn(text, tuple(image_paths), tuple(replies))
        self.turns.append(turn)
        return turn

    def undo(self) -> ChatTurn | None:
        """Remove and return the last turn, and cancel its replies; None without turns."""
        if not self.turns:
            return None
        turn = self.turns.pop()
        for reply in turn.replies:
            reply.cancel()
        return turn

    def regenerate(self, options: Sequence[GenerationOptions]) -> ChatTurn:
        """Send the last message again and replace its replies.

        After an error the session is unchanged.
        """
        if not self.turns:
            raise _build_empty_error("regenerate", "the conversation has 0 turns", "a turn")
        last = self.turns.pop()
        try:
            turn = self.send(last.text, last.image_paths, options)
        except BaseException:
            self.turns.append(last)
            raise
        for reply in last.replies:
            reply.cancel()
        return turn

    def to_samples(self, name_image: Callable[[Path], str]) -> list[Sample]:
        """Convert the conversation to one sample per model, with images renamed by `name_image`.

        `meta["truncated_turns"]` lists turns whose reply did not end with the end token.
        """
        models = dict.fromkeys(reply.model for turn in self.turns for reply in turn.replies)
        samples = []
        for model_number, model in enumerate(models, start=1):
            turns = _select_answered_turns(self.turns, model)
            if not turns:
                continue
            meta: dict[str, Any] = {"model": model}
            truncated: list[int] = []
            for index, turn in enumerate(turns):
                if turn.reply_from(model).finish_reason != "stop":
                    truncated.append(index)
            if truncated:
                meta["truncated_turns"] = truncated
            messages = self._build_messages(turns, model)
            sample = Sample(id=f"chat-{model_number}", messages=messages, meta=meta)
            samples.append(sample.map_paths(lambda path: name_image(Path(path))))
        return samples

    def save(self, file: Path) -> int:
        """Write the conversation as JSONL, one sample per model, with absolute image paths."""
        check_new_path(file)
        samples = self.to_samples(lambda path: str(path.absolute()))
        if not samples:
            what = f"no conversation to save: {len(self.turns)} turns without a reply"
            raise _build_empty_error(str(file), what, "at least one turn with a reply")
        write_samples(file, samples, replace=False)
        return len(samples)

    def save_annotated_image(self, file: Path | None = None) -> Path:
        """Write the image of the last reply as PNG, with the predicted boxes drawn.

        Args:
            file: Output file; by default `<image>-boxes.png` in the working directory.
        """
        reply = self.turns[-1].replies[0] if self.turns else None
        if reply is None or reply.image_path is None:
            what = f"no image in {len(self.turns)} turns"
            raise _build_empty_error("annotated image", what, "a reply about an image")
        target = file or find_free_path(Path(f"{reply.image_path.stem}-boxes.png"))
        check_new_path(target)
        buffer = io.BytesIO()
        draw_boxes(load_image(reply.image_path), reply.boxes).save(buffer, format="PNG")
        write_new_file(target, buffer.getvalue())
        return target

    def _build_messages(
        self, turns: Sequence[ChatTurn], model: str, question: Message | None = None
    ) -> tuple[Message, ...]:
        """Return answered turns and the next question, in the form of the training of a model."""
        prompt_format = self.service.get_prompt_format(model)
        messages: list[Message] = []
        seen_images: list[Path] = []
        for turn in turns:
            messages.append(prompt_format.build_message(turn.text, turn.image_paths))
            seen_images += filterfalse(is_video_path, turn.image_paths)
            reply = turn.reply_from(model)
            image_index = 0
            if reply.image_path is not None:
                image_index = seen_images.index(reply.image_path)
            content: list[ContentPart] = []
            for part in reply.content:
                if isinstance(part, BoxPart):
                    part = part.model_copy(update={"image": image_index})
                content.append(part)
            messages.append(Message(role="assistant", content=tuple(content)))
        if question is not None:
            messages.append(question)
        if self.system_prompt is None:
            return prompt_format.add_system_message(messages)
        system = Message(role="system", content=(TextPart(text=self.system_prompt),))
        return (system, *messages)

    def _start_reply(
        self, text: str, image_paths: Sequence[Path], options: GenerationOptions
    ) -> ChatReply:
        model = options.model
        if model is None:
            model = self.service.model_names[0]
        turns = _select_answered_turns(self.turns, model)
        images: list[Path] = []
        # Answers do not name the image of their boxes: assume the first one of the newest images.
        target_image: Path | None = None
        for paths in (*(turn.image_paths for turn in turns), image_paths):
            new_images = [*filterfalse(is_video_path, paths)]
            if new_images:
                target_image = new_images[0]
            images += new_images
        question = self.service.get_prompt_format(model).build_message(text, image_paths)
        messages = self._build_messages(turns, model, question)
        sample = Sample(id=f"turn {len(turns) + 1}", messages=messages)
        stream = self.service.submit(
            LocatedSample(sample, Path()),
            replace(options, model=model),
            image_index=None if target_image is None else images.index(target_image),
        )
        image_size = None if target_image is None else self.read_size(target_image)
        return ChatReply(model, target_image, image_size, stream)


def _build_empty_error(where: str, what: str, expected: str) -> UserError:
    return UserError(what, where=where, expected=expected, remedy="send a message first")


def _select_answered_turns(turns: Sequence[ChatTurn], model: str) -> list[ChatTurn]:
    """Return the turns with an answer, unless it is about an image of a turn without one."""
    answered: list[ChatTurn] = []
    for turn in turns:
        images = {None, *chain.from_iterable(one.image_paths for one in (*answered, turn))}
        if (reply := turn.reply_from(model)).content and reply.image_path in images:
            answered.append(turn)
    return answered


def build_answer_parts(
    prediction: Prediction, image_size: ImageSize | None
) -> tuple[ContentPart, ...]:
    """Convert a prediction to the content parts of an assistant message.

    Reasoning precedes text and boxes, and boxes refer to image 0. If the boxes cannot be located in
    the text, or one exceeds the image, the answer is a single text part.

    Returns:
        Content parts; empty for an empty answer.
    """
    if not prediction.answer.strip():
        return ()
    parts: list[ContentPart] = [TextPart(text=prediction.answer)]
    pieces = [*split_answer(prediction.raw_text, prediction.answer)]
    boxes = prediction.boxes
    if (
        image_size is not None
        and pieces.count(None) == len(boxes) > 0
        and all(is_inside_image(box.xyxy, image_size, is_point=box.is_point) for box in boxes)
    ):
        parts = _insert_boxes(pieces, boxes)
    if prediction.reasoning is not None:
        parts = [TextPart(text=f"{THINK_START}{prediction.reasoning}{THINK_END}"), *parts]
    return tuple(parts)


def _insert_boxes(pieces: Iterable[str | None], boxes: Iterable[BoxPart]) -> list[ContentPart]:
    """Return the parts of an answer, with a box for each None."""
    parts: list[ContentPart] = []
    remaining = iter(boxes)
    for text in pieces:
        if text is None:
            parts.append(next(remaining).model_copy(update={"image": 0}))
        elif text:
            parts.append(TextPart(text=text))
    return parts


def split_answer(raw_text: str, answer: str) -> Iterator[str | None]:
    """Yield the texts of an answer and, between them, None for each box."""
    pieces: Iterable[str | TextBox | list[str | TextBox]]
    if has_json_boxes(raw_text):
        pieces = split_at_boxes(strip_code_fences(answer))
    else:
        pieces = split_at_text_boxes(raw_text, None, is_tagged=True)
    for piece in pieces:
        parts = piece if isinstance(piece, list) else [piece]
        for part in parts:
            # Models may write other text than coordinates between the tags of a box.
            text = part if isinstance(part, str) else part.coordinates
            if isinstance(text, str):
                yield _SPECIAL_TOKENS.sub("", text)
            else:
                yield None
