"""Many answers at once: requests join and leave while others grow.

Each step reads some of the waiting prompts, in chunks, and lets every answer grow by a token. On a
card the next step is launched before the host knows the tokens of the last one, so that the card
never waits; an answer that has ended grows by one token that nobody reads.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from finesight.encode.encoded import Encoded
from finesight.errors import UserError
from finesight.infer.cache import token_bytes
from finesight.infer.pages import Key, Pages, grown, keys_of, picture_digests
from finesight.infer.request import Event, Finish, Request, Token
from finesight.infer.rows import Prompt, Rows
from finesight.infer.sampler import Chooser, Chosen, choose
from finesight.infer.told import Told
from finesight.model.network import VisionLanguageModel

PREFILL_TOKENS = 8192
"""Prompt tokens run at once: bounds the memory of activations, pictures included."""

BESIDE_TOKENS = 2048
"""The same while answers grow: they wait for no more."""

CACHE_BYTES = 7 << 30
"""Of the cache: 2^18 tokens of Qwen2-VL-2B in bf16, of others fewer or more."""

PAGE = 64
"""Tokens of a page on a card."""

SMALL_PAGE = 16
"""The same elsewhere, where the pages of a row are gathered at each step."""

PATIENCE_SECONDS = 0.05
"""Longest wait of a step for the masks of constrained answers. Those that are late are paused."""

TOKEN_PATIENCE_SECONDS = 0.002
"""Wait for one answer's mask in the long run: what is waited beyond it is missing later."""


@dataclass(slots=True, eq=False)
class _Answer:
    """A request on its way: its prompt's pages are taken; `row` is its place among those that
    grow, None before and after; `launched` tokens are made, of which the host knows `made`.
    `logits_V` are those of the next token while the answer is paused."""

    ticket: int
    request: Request
    prompt: Prompt
    reader: str
    keys: list[Key]
    known: int
    chooser: Chooser
    row: int | None = None
    launched: int = 0
    made: list[int] = field(default_factory=list)
    ended: bool = False
    logits_V: Tensor | None = None
    patience: float = PATIENCE_SECONDS


@dataclass(frozen=True, slots=True)
class _Launched:
    """Tokens that were made: whose, and what the host will know of them. A paused answer has none
    in its row."""

    answers: list[_Answer | None]
    told: Told


class Engine:
    """A model that answers up to `rows` requests at once, from a cache of `tokens`.

    Not for several threads: `infer.service` has one for it.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        end_ids: Sequence[int],
        *,
        rows: int,
        tokens: int,
        record: bool = True,
    ) -> None:
        self.model = model
        self._end_ids = frozenset(end_ids)
        on_card = model.model.embed_tokens.weight.is_cuda
        self.page = PAGE if on_card else SMALL_PAGE
        pages = -(-tokens // self.page) + 1
        self.pages = Pages(pages)
        self._rows = Rows(model, rows=rows, pages=pages, page=self.page, record=record)
        self._late = 1 if on_card else 0
        """Launched steps whose tokens the host has not asked for."""
        self._tickets = itertools.count()
        self._waiting: deque[_Answer] = deque()
        self._reading: list[_Answer] = []
        self._growing: list[_Answer] = []
        self._paused: list[_Answer] = []
        """Answers whose next mask is late: they have pages and no row, so no other waits."""
        self._leaving: list[_Answer] = []
        self._launched: deque[_Launched] = deque()
        self._events: list[Event] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        running = self._reading or self._growing or self._paused
        return bool(self._waiting or running or self._launched)

    @property
    def running(self) -> int:
        """Answers that have their pages."""
        return len(self._reading) + len(self._growing) + len(self._paused)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    @property
    def pages_free(self) -> int:
        """Pages of the cache that may be taken."""
        return self.pages.free

    @property
    def pages_in_all(self) -> int:
        """Pages of the cache."""
        return self.pages.number - 1

    def room_for(self, prompt: Encoded) -> int:
        """The longest answer that there is room for. Raises UserError where there is none."""
        last = _last_position(prompt, self.model.geometry.language.positions)
        tokens = prompt.outline.tokens
        most = (self.pages.number - 1) * self.page
        room = most - tokens
        if room < 1:
            raise UserError(
                f"the prompt has {tokens} tokens",
                where=f"sample {prompt.outline.id:.80}",
                expected=f"fewer than {most}, the room of the cache",
                remedy="ask with less text, or with fewer or smaller pictures",
            )
        return max(1, min(room, self.model.geometry.language.positions - 1 - last))

    def add(self, request: Request) -> int:
        """Take a request; its ticket, by which events tell of it. Raises UserError where it can
        never be answered."""
        asked, room = request.max_new_tokens, self.room_for(request.prompt)
        assert asked >= 1, f"max_new_tokens is {asked}, less than 1"
        outline = request.prompt.outline
        needed = outline.tokens + asked
        if needed > (self.pages.number - 1) * self.page:
            raise UserError(
                f"the prompt's {outline.tokens} tokens and an answer of up to {asked}",
                where=f"sample {outline.id:.80}",
                expected=f"an answer of up to {room} tokens: so much room has the cache",
                remedy="ask for a shorter answer, or with less text or smaller pictures",
            )
        pictures = request.pictures
        if pictures is None:
            pictures = picture_digests(request.prompt)
        reader = f"{request.adapter} {self.model.geometry.language.reading(outline.tokens)}"
        answer = _Answer(
            ticket=next(self._tickets),
            request=request,
            prompt=Prompt(request.prompt, [], request.adapter, pictures),
            reader=reader,
            keys=keys_of(outline, pictures, self.page, reader),
            known=0,
            chooser=Chooser(request.sampling, request.logprobs, request.constraint, outline.ids_T),
        )
        self._waiting.append(answer)
        return answer.ticket

    def cancel(self, ticket: int) -> None:
        """End a request now, if it has not ended; its pages are free at once."""
        for answer in [*self._waiting, *self._reading, *self._growing, *self._paused]:
            if answer.ticket == ticket and not answer.ended:
                self._end(answer, "cancelled")
                return

    def step(self) -> list[Event]:
        """Read prompts, let answers grow, and tell of tokens that are known by now."""
        with torch.inference_mode():
            self._leave()
            self._resume()
            chunks = self._share_out(BESIDE_TOKENS if self._growing else PREFILL_TOKENS)
            if chunks:
                self._read(chunks)
            if self._growing:
                self._grow()
            late = self._late if self._growing else 0
            while len(self._launched) > late:
                self._collect()
        events, self._events = self._events, []
        return events

    def _share_out(self, budget: int) -> list[tuple[_Answer, int]]:
        """Which prompts are read on, up to where: those of one adapter, first come first served."""
        while self._waiting and self._admit(self._waiting[0], budget):
            answer = self._waiting.popleft()
            self._reading.append(answer)
            if answer.request.constraint is not None:
                self._try(answer, answer.request.constraint.begin)
        chunks: list[tuple[_Answer, int]] = []
        for answer in self._reading:
            same = not chunks or answer.request.adapter == chunks[0][0].request.adapter
            if budget > 0 and same:
                stop = min(answer.prompt.tokens, answer.prompt.read + budget)
                budget -= stop - answer.prompt.read
                chunks.append((answer, stop))
        return chunks

    def _admit(self, answer: _Answer, budget: int) -> bool:
        """Give a request its pages, if there are any, and rows and time for it."""
        unread = sum(other.prompt.tokens - other.prompt.read for other in self._reading)
        if self.running >= self._rows.rows or unread >= budget:
            return False
        tokens = answer.prompt.tokens + answer.request.max_new_tokens
        needed = -(-tokens // self.page)
        # The last token of a prompt is read in any case: what it predicts is not kept.
        usable = answer.keys[: (answer.prompt.tokens - 1) // self.page]
        pages = self.pages.known(usable)
        if needed - len(pages) > self.pages.free:
            self.pages.give_back(pages)
            return False
        answer.known = answer.prompt.read = len(pages) * self.page
        answer.prompt.pages = pages + self.pages.take(needed - len(pages))
        return True

    def _read(self, chunks: list[tuple[_Answer, int]]) -> None:
        prompts = [answer.prompt for answer, _ in chunks]
        logits_RV = self._rows.read(prompts, [stop for _, stop in chunks])
        done = [answer for answer, stop in chunks if stop == answer.prompt.tokens]
        for answer in done:
            self.pages.know(answer.keys, answer.prompt.pages[: len(answer.keys)])
        if logits_RV is None:
            return
        self._reading = [answer for answer in self._reading if answer not in done]
        self._begin_rows(done, logits_RV)

    def _begin_rows(self, answers: list[_Answer], logits_RV: Tensor) -> None:
        """Choose the next token of answers without a row, and let them grow in new rows."""
        ids_R = logits_RV.argmax(-1)
        told = self._choose(logits_RV, answers, ids_R)
        finite_R = logits_RV.isfinite().all(-1)
        for number, answer in enumerate(answers):
            if answer.logits_V is None and not answer.ended:
                answer.row = len(self._growing)
                self._growing.append(answer)
                id_1 = ids_R[number : number + 1]
                self._rows.start(answer.row, answer.prompt, id_1, answer.launched)
        self._launch(answers, Told.of(ids_R, told, finite_R))

    def _resume(self) -> None:
        """Let paused answers go on whose masks are there now; wait for one if all are paused."""
        idle = not (self._waiting or self._reading or self._growing)
        deadline = time.monotonic() + (PATIENCE_SECONDS if idle else 0.0)
        answers = [
            answer
            for answer in list(self._paused)
            if self._is_ready(answer, deadline - time.monotonic())
        ]
        answers = [answer for answer in answers if not answer.ended]
        if not answers:
            return
        self._paused = [answer for answer in self._paused if answer not in answers]
        logits = [answer.logits_V for answer in answers if answer.logits_V is not None]
        for answer in answers:
            answer.logits_V = None
        self._begin_rows(answers, torch.stack(logits))

    def _is_ready(self, answer: _Answer, seconds: float) -> bool:
        """Wait for the mask of the next token; an error ends the answer."""
        constraint = answer.request.constraint
        if constraint is None or answer.ended:
            return True
        try:
            return constraint.ready(max(0.0, seconds))
        except Exception as error:
            self._end(answer, None, error)
            return True

    def _grow(self) -> None:
        answers = list(self._growing)
        longest = max(answer.prompt.tokens + answer.launched for answer in answers)
        logits_RV = self._rows.step(len(answers), longest)
        if any(answer.chooser.constraint is not None for answer in answers):
            # What may come next depends on what has come. The card is at work meanwhile.
            while self._launched:
                self._collect()
        ids_R = self._rows.ids_R[: len(answers)]
        told = self._choose(logits_RV, answers, ids_R)
        self._launch(answers, Told.of(ids_R, told, self._rows.finite_R[: len(answers)]))

    def _choose(
        self, logits_RV: Tensor, answers: Sequence[_Answer], ids_R: Tensor
    ) -> dict[int, tuple[Chosen, int]]:
        """Put the tokens of the rows that want others than the most probable ones into `ids_R`;
        what was chosen, by row, with its place there."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        for number, answer in enumerate(answers):
            if answer.chooser.constraint is None or answer.ended:
                continue
            began = time.monotonic()
            ready = self._is_ready(answer, min(answer.patience, deadline - began))
            patience = answer.patience + TOKEN_PATIENCE_SECONDS - (time.monotonic() - began)
            answer.patience = min(PATIENCE_SECONDS, patience)
            if ready:
                self._try(answer, answer.chooser.follow)
            else:
                self._pause(answer, logits_RV[number])
        rows = [
            n
            for n, a in enumerate(answers)
            if not (a.chooser.plain or a.ended or a.logits_V is not None)
        ]
        if not rows:
            return {}
        at = torch.tensor(rows, device=logits_RV.device)
        chosen = choose(logits_RV.index_select(0, at), [answers[n].chooser for n in rows])
        ids_R.index_copy_(0, at, chosen.ids_S)
        return {row: (chosen, place) for place, row in enumerate(rows)}

    def _pause(self, answer: _Answer, logits_V: Tensor) -> None:
        """Set an answer aside until its mask is there, with the logits of its next token."""
        answer.logits_V = logits_V.clone()
        self._paused.append(answer)
        self._leaving.append(answer)

    def _launch(self, answers: list[_Answer], told: Told) -> None:
        """Tokens are on their way. An answer that is at its longest grows no more."""
        launched = [None if answer.logits_V is not None else answer for answer in answers]
        self._launched.append(_Launched(launched, told))
        for answer in launched:
            if answer is None:
                continue
            answer.launched += 1
            if answer.launched == answer.request.max_new_tokens:
                self._leaving.append(answer)

    def _collect(self) -> None:
        """Wait for the oldest tokens, and tell of them."""
        launched = self._launched.popleft()
        tokens = launched.told.tokens(
            [None if a is None else a.request.logprobs for a in launched.answers]
        )
        for answer, token in zip(launched.answers, tokens, strict=True):
            if answer is None or answer.ended:
                continue
            if token is None:
                self._end(answer, None, _overflow(self.model))
                continue
            answer.made.append(token.id)
            if answer.request.constraint is not None:
                self._try(answer, partial(answer.request.constraint.take, token.id))
                if answer.ended:
                    continue
            finish: Finish | None = None
            if token.id in self._end_ids:
                finish = "stop"
            elif len(answer.made) == answer.request.max_new_tokens:
                finish = "length"
            self._end(answer, finish, token=token)

    def _try(self, answer: _Answer, step: Callable[[], None]) -> None:
        """Do what belongs to one answer alone: whatever goes wrong ends no other."""
        try:
            step()
        except Exception as error:
            self._end(answer, None, error)

    def _end(
        self,
        answer: _Answer,
        finish: Finish | None,
        error: Exception | None = None,
        token: Token | None = None,
    ) -> None:
        """Tell of a token, an end, or both; with an end, give up all that the answer has."""
        self._events.append(Event(answer.ticket, token, finish, error, answer.known))
        if finish is None and error is None:
            return
        answer.ended = True
        if answer in self._waiting:
            self._waiting.remove(answer)
        if answer in self._reading:
            self._reading.remove(answer)
        if answer in self._paused:
            self._paused.remove(answer)
        self._leaving.append(answer)
        self._know_whole(answer)
        self.pages.give_back(answer.prompt.pages)
        answer.prompt.pages = []

    def _know_whole(self, answer: _Answer) -> None:
        """What was asked and said may be what the next question of the talk begins with. Keys and
        values of the last token are not there."""
        if answer.made:
            outline = grown(answer.request.prompt.outline, answer.made[:-1])
            keys = keys_of(outline, answer.prompt.pictures, self.page, answer.reader)
            self.pages.know(keys, answer.prompt.pages[: len(keys)])

    def _leave(self) -> None:
        """Let rows that are done grow no more; the last rows take their places. Not while tokens
        are chosen: rows are known by their places then."""
        for answer in self._leaving:
            if answer.row is None:
                continue
            last = self._growing.pop()
            self._rows.stop(answer.row, len(self._growing))
            if last is not answer:
                self._growing[answer.row] = last
                last.row = answer.row
            answer.row = None
        self._leaving.clear()


def _overflow(model: VisionLanguageModel) -> UserError:
    dtype = str(model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    return UserError(
        f"the model's numbers overflow in {dtype}",
        where="precision",
        expected="finite logits; fp16 ends at 65504, and some models go beyond it",
        remedy="use --precision fp32, or bf16 on a card that computes in it",
    )


def _last_position(prompt: Encoded, limit: int) -> int:
    outline = prompt.outline
    last = int(outline.positions_3T.max())
    if last >= limit:
        raise UserError(
            f"the prompt has {outline.tokens} tokens and ends at position {last}",
            where=f"sample {outline.id:.80}",
            expected=f"positions below {limit}, the model's max_position_embeddings",
            remedy="ask with less text, or with fewer or smaller pictures",
        )
    return last


def cache_tokens(model: VisionLanguageModel, most_bytes: int = CACHE_BYTES) -> int:
    """How many tokens of this model a cache of so many bytes holds."""
    return most_bytes // token_bytes(model.geometry.language, model.model.embed_tokens.weight.dtype)


def room_together(
    model: VisionLanguageModel, prompts: Sequence[int], max_new_tokens: int, rows: int
) -> int:
    """Tokens of a cache for prompts of so many tokens and their answers, `rows` of them at once:
    for the longest ones, as far as `cache_tokens` go, but for one of them in any case."""
    answer = min(max_new_tokens, model.geometry.language.positions)
    # What fills up the last page of each.
    longest = sorted((tokens + answer + PAGE for tokens in prompts), reverse=True)[:rows]
    return max(min(sum(longest), cache_tokens(model)), longest[0])
