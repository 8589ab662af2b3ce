"""Questions to answers: encoding, generation in batches, and reading boxes back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from finesight.data.headers import DamagedPicture, picture_size
from finesight.data.jsonl import Located
from finesight.data.sample import BoxPart, ImagePart, Message, Sample, TextPart
from finesight.encode.encoded import Encoded
from finesight.encode.rendering import Rendering
from finesight.infer import fallback
from finesight.infer.engine import cache_tokens, generate, plan_batches
from finesight.model.any_family import AnyModel
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


def questions(pictures: Sequence[Path], prompt: str) -> list[Located]:
    """The same question about each picture in turn; the question alone without any.

    Raises DamagedPicture for what is missing or no picture, before any model is loaded.
    """
    asked = []
    for path in pictures:
        picture_size(path)
        parts = (ImagePart(image=str(path)), TextPart(text=prompt))
        message = Message(role="user", content=parts)
        asked.append(Located(Sample(id=str(path), messages=(message,)), Path()))
    if not pictures:
        message = Message(role="user", content=(TextPart(text=prompt),))
        asked.append(Located(Sample(id=prompt, messages=(message,)), Path()))
    return asked


def predict(
    model: AnyModel,
    renderer: Rendering,
    samples: Sequence[Located],
    *,
    max_new_tokens: int,
    batch: int,
    advance: Callable[[int], None] | None = None,
    damaged: Callable[[int, DamagedPicture], None] | None = None,
) -> list[Prediction]:
    """Answers to the last turns of the samples, in their order.

    The model is left in the mode (train or eval) it was in. `advance` is told after each token
    how many answers ended with it, and may raise to stop. A picture that cannot be read raises
    DamagedPicture, unless `damaged` is given: then it is told the sample's index, and the sample
    has no prediction.
    """
    was_training = model.training
    model.eval()
    predictions: dict[int, Prediction] = {}
    reader = _Reader(renderer, samples, damaged)
    try:
        # Transformers answers one question at a time.
        most = cache_tokens(model) if isinstance(model, VisionLanguageModel) else sys.maxsize
        for prompts in reader.batches(batch, max_new_tokens, most):
            answers = _answers(model, list(prompts.values()), max_new_tokens, renderer, advance)
            for (i, prompt), ids in zip(prompts.items(), answers, strict=True):
                predictions[i] = _read(renderer, samples[i], prompt, ids)
    finally:
        model.train(was_training)
    return [predictions[i] for i in sorted(predictions)]


def _answers(
    model: AnyModel,
    prompts: Sequence[Encoded],
    max_new_tokens: int,
    renderer: Rendering,
    advance: Callable[[int], None] | None,
) -> list[list[int]]:
    ends = renderer.end_ids
    if isinstance(model, VisionLanguageModel):
        return generate(model, prompts, max_new_tokens=max_new_tokens, end_ids=ends, ended=advance)
    return fallback.generate(
        model, prompts, max_new_tokens=max_new_tokens, end_ids=ends, ended=advance
    )


class _Reader:
    """Prompts in batches of similar length, the next one being read while one is answered."""

    def __init__(
        self,
        renderer: Rendering,
        samples: Sequence[Located],
        damaged: Callable[[int, DamagedPicture], None] | None,
    ) -> None:
        self._renderer, self._samples, self._damaged = renderer, samples, damaged

    def batches(self, batch: int, max_new_tokens: int, most: int) -> Iterator[dict[int, Encoded]]:
        """Prompts by the index of their sample, as `plan_batches` shares them out; damaged ones are
        left out."""
        outlines = self._collected(
            (i, partial(self._renderer.prompt_outline, sample))
            for i, sample in enumerate(self._samples)
        )
        which = list(outlines)
        lengths = [outline.tokens for outline in outlines.values()]
        groups = plan_batches(lengths, batch, max_new_tokens, most)
        plan = [[which[i] for i in group] for group in groups]
        pool = ThreadPoolExecutor(READERS)
        try:
            ahead: list[tuple[int, Future[Encoded]]] = []
            for members in [*plan, []]:
                now = ahead
                ahead = [
                    (i, pool.submit(self._renderer.with_patches, outlines[i])) for i in members
                ]
                prompts = self._collected((i, future.result) for i, future in now)
                if prompts:
                    yield prompts
        finally:
            pool.shutdown(cancel_futures=True)

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
        return results


def _read(renderer: Rendering, located: Located, prompt: Encoded, ids: list[int]) -> Prediction:
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
            for box in renderer.boxes(answer.raw, prompt.outline.spans, picture)
        ),
        tokens=len(ids),
        stopped=ids[-1] in renderer.end_ids,
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
