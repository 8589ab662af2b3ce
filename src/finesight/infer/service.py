"""A model in a thread of its own that answers many at once: for chat, page and server alike."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, replace

import torch

from finesight.data.jsonl import Located
from finesight.encode.encoded import Encoded, Outline
from finesight.encode.rendering import Rendering
from finesight.errors import UserError
from finesight.infer.engine import Engine, cache_tokens
from finesight.infer.fallback import OneByOne
from finesight.infer.load import Answerer
from finesight.infer.pages import picture_digests
from finesight.infer.predict import Prediction, read_prediction
from finesight.infer.request import Delta, Event, Finish, Options, Request, Token, Usage
from finesight.infer.spoken import Spoken
from finesight.model.fallback import FallbackModel
from finesight.model.network import VisionLanguageModel

ROWS = 64
"""Answers that grow together, unless told otherwise."""

WAITING = 256
"""Questions that may wait for their turn."""

CPU_CACHE_BYTES = 1 << 30
CARD_SHARE = 0.6
"""Of the memory that a card has free once the weights are there, for the cache; what is left is for
the activations of prompts and of pictures."""

LONGEST = 4096
"""Tokens of an answer for which no other length is asked, at most: room is kept for all of them."""


class Busy(UserError):
    """Too many questions wait already."""


@dataclass(frozen=True, slots=True)
class Facts:
    """How a service is doing: answers that run and wait, pages of the cache, and all the tokens of
    questions read and of answers made so far."""

    running: int
    waiting: int
    pages_free: int
    pages: int
    page_tokens: int
    prompt_tokens: int
    known_tokens: int
    answer_tokens: int
    answers: int


class Answering:
    """An answer that grows: iterate over it, or asynchronously, once. What goes wrong with it is
    raised by the iteration."""

    def __init__(
        self, service: Service, located: Located, outline: Outline, options: Options
    ) -> None:
        renderer = service.renderer
        self._service, self._located, self._outline = service, located, outline
        self._spoken = Spoken(renderer.tokenizer, renderer.end_ids, options.stop, renderer.thinks)
        self._deltas: deque[Delta] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._error: Exception | None = None
        self._known = 0
        self.ids: list[int] = []
        self.finish: Finish | None = None
        """Why the answer ended, None before."""

    def __iter__(self) -> Iterator[Delta]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._deltas or self._over)
            delta = self._next()
            if delta is None:
                return
            yield delta

    async def __aiter__(self) -> AsyncIterator[Delta]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._wake = lambda: _tell(loop, changed)
        while True:
            changed.clear()
            # Asked first: an end that comes after the last delta is not overlooked.
            is_over = self._over
            while (delta := self._next()) is not None:
                yield delta
            if is_over:
                return
            await changed.wait()

    @property
    def _over(self) -> bool:
        return self.finish is not None or self._error is not None

    def _next(self) -> Delta | None:
        if self._deltas:
            return self._deltas.popleft()
        if self._error is not None:
            raise self._error
        return None

    def cancel(self) -> None:
        """End it now, if it has not ended: its pages are free again."""
        self._service._cancel(self)

    @property
    def text(self) -> str:
        """All that was said so far."""
        return self._spoken.text

    @property
    def usage(self) -> Usage:
        """Tokens so far; those that were known are told with the end."""
        return Usage(self._outline.tokens, self._known, len(self.ids))

    def prediction(self) -> Prediction:
        """The answer as `finesight predict` gives it; up to the stop text that ended it."""
        assert self.finish is not None, "the answer has not ended"
        found = read_prediction(self._service.renderer, self._located, self._outline, self.ids)
        return replace(found, answer=self.text, stopped=True) if self._spoken.stopped else found

    def _take(self, event: Event) -> bool:
        """Note what has come, in the service's thread; whether a stop text has, which the engine
        does not know of."""
        if event.token is not None:
            self.ids.append(event.token.id)
        said = "" if event.token is None else self._spoken.take(event.token.id)
        finish = "stop" if self._spoken.stopped else event.finish
        if finish is not None:
            said += self._spoken.finish()
            self._known = event.known
        tokens: tuple[Token, ...] = () if event.token is None else (event.token,)
        self._change(Delta(said, tokens) if said or tokens else None, finish, event.error)
        return self._spoken.stopped and event.finish is None

    def _change(self, delta: Delta | None, finish: Finish | None, error: Exception | None) -> None:
        with self._changed:
            if delta is not None:
                self._deltas.append(delta)
            self.finish, self._error = finish, error
            self._changed.notify_all()
            wake = self._wake
        if wake is not None:
            wake()


def _tell(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> None:
    # A loop that is closed has nobody who waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(changed.set)


class Service:
    """Answers questions with one model, at most `rows` at a time; `waiting` more may wait.

    `cache_bytes` is the room for keys and values, by default a share of what the card has free.
    Questions are read in the thread that asks; the model runs in one of its own, until `close`.
    """

    def __init__(
        self,
        answerer: Answerer,
        *,
        rows: int = ROWS,
        waiting: int = WAITING,
        cache_bytes: int | None = None,
    ) -> None:
        model = answerer.model
        self.renderer: Rendering = answerer.renderer
        self._model, self._adapters = model, answerer.adapters
        self._most_waiting, self._rows = waiting, rows
        self._tokens = 0
        if isinstance(model, VisionLanguageModel):
            most = _cache_bytes(model) if cache_bytes is None else cache_bytes
            self._tokens = min(cache_tokens(model, most), rows * model.geometry.language.positions)
        self._engine = self._new_engine(rows, self._tokens)
        self._lock = threading.Condition()
        self._new: list[tuple[Answering, Request]] = []
        self._gone: list[Answering] = []
        self._open: dict[int, Answering] = {}
        self._closing, self._dropping = False, False
        self._counts = {"prompt": 0, "known": 0, "answer": 0, "answers": 0}
        self._thread = threading.Thread(target=self._run, name="finesight-answers", daemon=True)
        self._thread.start()

    @property
    def names(self) -> tuple[str, ...]:
        """What a question may choose by `Options.model`; the first one where it does not."""
        return tuple(self._adapters)

    @property
    def longest(self) -> int:
        """Tokens of a prompt and its answer together, at most."""
        if isinstance(self._model, FallbackModel):
            return self._model.positions
        return min(self._tokens, self._model.geometry.language.positions)

    def ask(self, located: Located, options: Options, prompt: Encoded | None = None) -> Answering:
        """Begin an answer to the sample's last turn.

        The question is read here, pictures included, unless `prompt` is what it was encoded to:
        call it in a thread of your own. Raises
        UserError for a sample that cannot be read (DamagedPicture for its pictures), a prompt that
        is too long and a model that is not there, and Busy where too many wait.
        """
        adapter = self._adapter(options.model)
        self._check_waiting()
        if prompt is None:
            prompt = self.renderer.with_patches(self.renderer.prompt_outline(located))
        with self._lock:
            room = self._engine.room_for(prompt)
        longest = min(LONGEST, room) if options.max_new_tokens is None else options.max_new_tokens
        if not 1 <= longest <= room:
            raise UserError(
                f"an answer of up to {longest} tokens, to a prompt of {prompt.outline.tokens}",
                where="max_new_tokens",
                expected=f"1 to {room}: so much room is left",
                remedy="ask for a shorter answer, or with less text or smaller pictures",
            )
        answering = Answering(self, located, prompt.outline, options)
        request = Request(
            prompt=prompt,
            max_new_tokens=longest,
            sampling=options.sampling,
            logprobs=options.logprobs,
            constraint=options.constraint,
            adapter=adapter,
            pictures=picture_digests(prompt),
        )
        with self._lock:
            self._check_waiting()
            self._new.append((answering, request))
            self._lock.notify_all()
        return answering

    @property
    def alive(self) -> bool:
        """Whether it takes questions: it is neither closing nor broken."""
        return not self._closing and self._thread.is_alive()

    def facts(self) -> Facts:
        """How it is doing now."""
        with self._lock:
            engine, counts = self._engine, self._counts
            return Facts(
                running=engine.running,
                waiting=engine.waiting + len(self._new),
                pages_free=engine.pages_free,
                pages=engine.pages_in_all,
                page_tokens=engine.page,
                prompt_tokens=counts["prompt"],
                known_tokens=counts["known"],
                answer_tokens=counts["answer"],
                answers=counts["answers"],
            )

    def close(self, finish: bool = False) -> None:
        """Take no more questions, and return when all running answers have ended: at their own end
        with `finish`, else now."""
        with self._lock:
            self._closing = True
            self._dropping = self._dropping or not finish
            self._lock.notify_all()
        self._thread.join()

    def _adapter(self, name: str | None) -> int | None:
        if name is not None and name not in self._adapters:
            raise UserError(
                f"no model {name!r:.80}",
                where="model",
                expected=" or ".join(self.names),
                remedy="choose one of these, or leave it out",
            )
        return self._adapters[self.names[0] if name is None else name]

    def _check_waiting(self) -> None:
        with self._lock:
            waiting = self._engine.waiting + len(self._new)
        if not self.alive:
            raise Busy(
                "the model takes no more questions",
                where="queue",
                expected="a service that is not closing",
                remedy="ask again when it has started again",
            )
        if waiting >= self._most_waiting:
            raise Busy(
                f"{waiting} questions wait already",
                where="queue",
                expected=f"fewer than {self._most_waiting}",
                remedy="ask again in a moment",
            )

    def _cancel(self, answering: Answering) -> None:
        with self._lock:
            self._gone.append(answering)
            self._lock.notify_all()

    def _new_engine(self, rows: int, tokens: int) -> Engine | OneByOne:
        if isinstance(self._model, FallbackModel):
            return OneByOne(self._model, self.renderer.end_ids)
        return Engine(self._model, self.renderer.end_ids, rows=rows, tokens=tokens)

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._new or self._gone or self._closing or self._engine.busy
                )
                new, self._new = self._new, []
                gone, self._gone = self._gone, []
                if self._closing and not (new or gone or self._engine.busy):
                    return
            try:
                self._take_in(new, gone)
                for event in self._engine.step():
                    self._pass_on(event)
            except Exception as error:
                self._fail(error)

    def _take_in(self, new: list[tuple[Answering, Request]], gone: list[Answering]) -> None:
        for answering, request in new:
            try:
                self._open[self._engine.add(request)] = answering
            except Exception as error:
                answering._change(None, None, _told(error))
        if self._dropping:
            gone = [*self._open.values()]
        for answering in gone:
            for ticket, other in self._open.items():
                if other is answering:
                    self._engine.cancel(ticket)

    def _pass_on(self, event: Event) -> None:
        answering = self._open.get(event.ticket)
        if answering is None:
            return
        self._counts["answer"] += event.token is not None
        if answering._take(event):
            self._engine.cancel(event.ticket)
        if answering._over:
            del self._open[event.ticket]
            self._counts["answers"] += 1
            self._counts["prompt"] += answering.usage.prompt
            self._counts["known"] += answering.usage.known

    def _fail(self, error: Exception) -> None:
        """All that run end with the error; the engine, whose state nobody knows, is made anew."""
        for answering in self._open.values():
            answering._change(None, None, _told(error))
        self._open.clear()
        # The old cache first, which the error's frames hold: there may be no room for both.
        traceback.clear_frames(error.__traceback__)
        with self._lock:
            self._engine = self._new_engine(1, 1)
            try:
                self._engine = self._new_engine(self._rows, self._tokens)
            except Exception as again:
                self._closing = True
                for answering, _ in self._new:
                    answering._change(None, None, _told(again))
                self._new = []


def _told(error: Exception) -> Exception:
    if not isinstance(error, torch.OutOfMemoryError):
        return error
    return UserError(
        "the card has no memory left for these questions",
        where="model",
        expected="room for the pictures and prompts that are read together",
        remedy="ask with smaller pictures, or serve with a smaller cache",
    )


def _cache_bytes(model: VisionLanguageModel) -> int:
    device = model.model.embed_tokens.weight.device
    if device.type != "cuda":
        return CPU_CACHE_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(free * CARD_SHARE)
