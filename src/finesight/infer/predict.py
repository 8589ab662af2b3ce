"""Questions to answers: encoding, generation in batches, and reading boxes back."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch

from finesight.data.headers import DamagedPicture, picture_size
from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart
from finesight.encode.encoded import Encoded, Outline
from finesight.encode.rendering import Rendering
from finesight.infer import fallback
from finesight.infer.engine import Engine, room_together
from finesight.infer.request import Request
from finesight.model.any_family import AnyModel
from finesight.model.fallback import FallbackModel
from finesight.model.network import VisionLanguageModel

T = TypeVar("T")

READERS = 4
"""Threads that open and resize pictures while the model generates."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer: `answer` as a person reads it, `raw` with its special tokens (the end token too,
    where the model stopped by itself), `boxes` in pixels of the original `images`, which are the
    sample's pictures without its videos: a box's number counts these. `thought` is what a model
    that thinks said before it answered, None of others."""

    id: str
    images: tuple[Path, ...]
    prompt: str
    answer: str
    raw: str
    boxes: tuple[BoxPart, ...]
    tokens: int
    stopped: bool
    thought: str | None = None

    @property
    def text(self) -> str:
        """The answer as a person reads it, under the name that a reply has elsewhere, too."""
        return self.answer

    def as_json(self) -> dict[str, Any]:
        """What `finesight predict --json` prints: `image` is a path, a list of several, or null."""
        paths = [str(path) for path in self.images]
        thought = {} if self.thought is None else {"thought": self.thought}
        return {
            "id": self.id,
            "image": None if not paths else paths[0] if len(paths) == 1 else paths,
            "prompt": self.prompt,
            **thought,
            "answer": self.answer,
            "raw": self.raw,
            "boxes": [as_box(box) for box in self.boxes],
        }

    def as_text(self) -> str:
        """What `finesight predict` prints: pictures, the answer, then its boxes, one a line, and a
        thought."""
        head = "".join(f"{path}: " for path in self.images)
        cut = "" if self.stopped else f" [cut off after {self.tokens} tokens]"
        boxes = [
            f"\n  box {', '.join(f'{number:.1f}' for number in box.xyxy)}"
            + (f"  {box.label}" if box.label else "")
            for box in self.boxes
        ]
        thought = f"\n  thought  {self.thought}" if self.thought else ""
        return head + self.answer + cut + "".join(boxes) + thought


def as_box(box: BoxPart) -> dict[str, Any]:
    """A box as JSON data, to a hundredth of a pixel."""
    corners = [round(number, 2) for number in box.xyxy]
    return {"image": box.image, "label": box.label, "xyxy": corners}


def question(pictures: Sequence[Path], prompt: str, name: str) -> Located:
    """One user turn, pictures before text, by a name for its answer.

    Raises DamagedPicture for what is missing or no picture, before any model is loaded.
    """
    for path in pictures:
        picture_size(path)
    shown = [ImagePart(image=str(path)) for path in pictures]
    message = Message(role="user", content=(*shown, TextPart(text=prompt)))
    return Located(Sample(id=name, messages=(message,)), Path())


def questions(pictures: Sequence[Path], prompt: str) -> list[Located]:
    """The same question about each picture in turn; the question alone without any. Raises
    DamagedPicture as `question` does."""
    if not pictures:
        return [question((), prompt, prompt)]
    return [question([path], prompt, str(path)) for path in pictures]


def predict(
    model: AnyModel,
    renderer: Rendering,
    samples: Sequence[Located],
    *,
    max_new_tokens: int,
    batch: int,
    advance: Callable[[int], None] | None = None,
    damaged: Callable[[int, DamagedPicture], None] | None = None,
    fewer: Callable[[int], None] | None = None,
) -> list[Prediction]:
    """Answers to the last turns of the samples, in their order.

    The model is left in the mode (train or eval) it was in. `advance` is told after each token
    how many answers ended with it, and may raise to stop. A picture that cannot be read raises
    DamagedPicture, unless `damaged` is given: then it is told the sample's index, and the sample
    has no prediction. Where a GPU's memory is full, half as many are answered at once; `fewer` is
    told how many.
    """
    was_training = model.training
    model.eval()
    reader = _Reader(renderer, samples, damaged)
    predictions: dict[int, Prediction] = {}
    try:
        with reader:
            if isinstance(model, VisionLanguageModel):
                found = _as_many_as_fit(
                    model, renderer, reader, max_new_tokens, batch, advance, fewer
                )
            else:
                found = _one_by_one(model, renderer, reader, max_new_tokens, advance)
            for i, prompt, ids in found:
                predictions[i] = read_prediction(renderer, samples[i], prompt, ids)
    finally:
        model.train(was_training)
    return [predictions[i] for i in sorted(predictions)]


Answered = Iterator[tuple[int, Outline, list[int]]]
"""Indices of samples, their prompts without patches, and the ids of the answers."""


def _as_many_as_fit(
    model: VisionLanguageModel,
    renderer: Rendering,
    reader: _Reader,
    max_new_tokens: int,
    batch: int,
    advance: Callable[[int], None] | None,
    fewer: Callable[[int], None] | None,
) -> Answered:
    """By the engine, at first `batch` at once."""
    while True:
        try:
            for i, prompt, ids in _by_engine(
                model, renderer, reader, max_new_tokens, batch, advance
            ):
                reader.done.add(i)
                yield i, prompt, ids
            return
        except torch.OutOfMemoryError:
            batch = min(batch, len(reader.left)) // 2
            if not batch:
                raise
        # The error is gone, and with it what its frames held.
        gc.collect()
        if fewer is not None:
            fewer(batch)


def _by_engine(
    model: VisionLanguageModel,
    renderer: Rendering,
    reader: _Reader,
    max_new_tokens: int,
    batch: int,
    advance: Callable[[int], None] | None,
) -> Answered:
    """As many at once as `batch` and the cache allow: where one ends, the next one begins."""
    lengths = [outline.tokens for outline in reader.left.values()]
    if not lengths:
        return
    rows = min(batch, len(lengths))
    tokens = room_together(model, lengths, max_new_tokens, rows)
    engine = Engine(model, renderer.end_ids, rows=rows, tokens=tokens)
    prompts = reader.prompts(batch)
    asked: dict[int, tuple[int, Outline, list[int]]] = {}
    more = True
    while more or engine.busy:
        while more and engine.waiting + engine.running < batch:
            following = next(prompts, None)
            more = following is not None
            if following is not None:
                i, prompt = following
                longest = min(max_new_tokens, engine.room_for(prompt))
                request = Request(prompt=prompt, max_new_tokens=longest)
                asked[engine.add(request)] = (i, prompt.outline, [])
        done = 0
        for event in engine.step():
            if event.error is not None:
                raise event.error
            if event.token is not None:
                asked[event.ticket][2].append(event.token.id)
            if event.finish is not None:
                done += 1
                yield asked.pop(event.ticket)
        if advance is not None:
            advance(done)


def _one_by_one(
    model: FallbackModel,
    renderer: Rendering,
    reader: _Reader,
    max_new_tokens: int,
    advance: Callable[[int], None] | None,
) -> Answered:
    for i, prompt in reader.prompts(READERS):
        (ids,) = fallback.generate(
            model, [prompt], max_new_tokens=max_new_tokens, end_ids=renderer.end_ids, ended=advance
        )
        yield i, prompt.outline, ids


class _Reader:
    """Prompts, the longest first, some of them being read while others are answered; damaged ones
    are left out."""

    def __init__(
        self,
        renderer: Rendering,
        samples: Sequence[Located],
        damaged: Callable[[int, DamagedPicture], None] | None,
    ) -> None:
        self._renderer, self._damaged = renderer, damaged
        self.done: set[int] = set()
        outlines = self._collected(
            (i, partial(renderer.prompt_outline, sample)) for i, sample in enumerate(samples)
        )
        # A machine that is too small fails at once and not at the end.
        order = sorted(outlines, key=lambda i: (-outlines[i].tokens, i))
        self._outlines = {i: outlines[i] for i in order}
        self._pool = ThreadPoolExecutor(READERS)

    @property
    def left(self) -> dict[int, Outline]:
        """Prompts without patches that are still to be answered, by the index of their sample."""
        return {i: one for i, one in self._outlines.items() if i not in self.done}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def prompts(self, ahead: int) -> Iterator[tuple[int, Encoded]]:
        """Each by the index of its sample, with `ahead` more being read."""
        left = iter(self.left.items())
        reading: deque[tuple[int, Future[Encoded]]] = deque()
        while True:
            for i, outline in islice(left, ahead + 1 - len(reading)):
                reading.append((i, self._pool.submit(self._renderer.with_patches, outline)))
            if not reading:
                return
            i, future = reading.popleft()
            yield from self._collected([(i, future.result)]).items()

    def _collected(self, made: Iterable[tuple[int, Callable[[], T]]]) -> dict[int, T]:
        """What each call gives, by index, those with a damaged picture told and left out."""
        results: dict[int, T] = {}
        for i, make in made:
            try:
                results[i] = make()
            except DamagedPicture as error:
                if self._damaged is None:
                    raise
                self._damaged(i, error)
                self.done.add(i)
        return results


def read_prediction(
    renderer: Rendering, located: Located, prompt: Outline, ids: Sequence[int]
) -> Prediction:
    """What the ids of an answer say, to the sample whose prompt was answered."""
    answer = renderer.answer(ids)
    sample = located.sample
    picture = _picture_meant(sample)
    return Prediction(
        id=sample.id,
        images=tuple(located.path(p.image) for p in sample.parts() if isinstance(p, ImagePart)),
        prompt=_last_question(sample),
        answer=answer.text,
        raw=answer.raw,
        boxes=tuple(
            BoxPart(image=picture, label=box.label, xyxy=box.xyxy)
            for box in renderer.boxes(answer.raw, prompt.spans, picture)
        ),
        tokens=len(ids),
        stopped=bool(ids) and ids[-1] in renderer.end_ids,
        thought=answer.thought,
    )


def _picture_meant(sample: Sample) -> int:
    """Which picture the boxes of an answer are read for: no dialect says it, so the first one, or
    in a sample with an answer the one that its boxes are all in."""
    boxes = [part for part in sample.messages[-1].content if isinstance(part, BoxPart)]
    meant = {box.image for box in boxes} if sample.messages[-1].role == "assistant" else set()
    return meant.pop() if len(meant) == 1 else 0


def _last_question(sample: Sample) -> str:
    for message in reversed(sample.messages):
        if message.role == "user":
            return "".join(p.text for p in message.content if isinstance(p, TextPart))
    return ""
