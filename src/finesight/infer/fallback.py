"""Greedy generation by transformers, one answer at a time, for families without native code."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from finesight.encode.borrowed import transformers
from finesight.encode.encoded import Encoded
from finesight.encode.pack import pack
from finesight.errors import UserError
from finesight.infer.request import Event, Request, Token
from finesight.model.fallback import FallbackModel


@torch.no_grad()
def generate(
    model: FallbackModel,
    prompts: Sequence[Encoded],
    *,
    max_new_tokens: int,
    end_ids: Sequence[int],
    ended: Callable[[int], None] | None = None,
) -> list[list[int]]:
    """The most probable next token, again and again, one prompt after the other: the token ids of
    each answer. The arguments mean what they mean in `infer.engine.generate`."""
    tell = ended or _nobody

    def told(ids_1T: Tensor, scores: object, **_: Any) -> Tensor:
        """A criterion that never stops the generation, but may raise."""
        tell(0)
        return torch.zeros(len(ids_1T), dtype=torch.bool, device=ids_1T.device)

    package = transformers()
    greedy = package.GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(end_ids),
        pad_token_id=end_ids[0],
    )
    answers: list[list[int]] = []
    for prompt in prompts:
        batch = pack([prompt]).to(model.inner.device)
        made_1T = model.inner.generate(
            **model.inputs_of(batch),
            generation_config=greedy,
            stopping_criteria=package.StoppingCriteriaList([told]),
        )
        answers.append(made_1T[0, prompt.outline.tokens :].tolist())
        tell(1)
    return answers


def _nobody(count: int) -> None:
    """Nobody is told."""


class OneByOne:
    """As `infer.engine.Engine`, where transformers computes: the answers are greedy, and each is
    made in one step, whole."""

    pages_free = pages_in_all = page = 0

    def __init__(self, model: FallbackModel, end_ids: Sequence[int]) -> None:
        self.model = model
        self._end_ids = end_ids
        self._tickets = itertools.count()
        self._waiting: deque[tuple[int, Request]] = deque()
        self._events: list[Event] = []

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._waiting or self._events)

    @property
    def running(self) -> int:
        """Between two steps none is."""
        return 0

    @property
    def waiting(self) -> int:
        """Requests that are not answered yet."""
        return len(self._waiting)

    def room_for(self, prompt: Encoded) -> int:
        """The longest answer: transformers knows no bound but the model's own."""
        return max(1, self.model.positions - prompt.outline.tokens)

    def add(self, request: Request) -> int:
        """Take a request; its ticket. Raises UserError for what only native code does."""
        wants = {
            "temperature": not request.sampling.greedy,
            "repetition_penalty": request.sampling.repetition_penalty != 1.0,
            "logprobs": request.logprobs is not None,
            "a grammar": request.constraint is not None,
        }
        asked = [name for name, wanted in wants.items() if wanted]
        if asked:
            raise UserError(
                f"{' and '.join(asked)}, of a model that transformers computes",
                where="sampling",
                expected="greedy answers, for a family without native code",
                remedy="leave it out",
            )
        ticket = next(self._tickets)
        self._waiting.append((ticket, request))
        return ticket

    def cancel(self, ticket: int) -> None:
        """End a request that waits."""
        if any(ticket == other for other, _ in self._waiting):
            self._waiting = deque(item for item in self._waiting if item[0] != ticket)
            self._events.append(Event(ticket, finish="cancelled"))

    def step(self) -> list[Event]:
        """Make the next answer."""
        if self._waiting and not self._events:
            ticket, request = self._waiting.popleft()
            (ids,) = generate(
                self.model,
                [request.prompt],
                max_new_tokens=request.max_new_tokens,
                end_ids=self._end_ids,
            )
            self._events += [Event(ticket, Token(id_)) for id_ in ids]
            stopped = bool(ids) and ids[-1] in self._end_ids
            self._events.append(Event(ticket, finish="stop" if stopped else "length"))
        events, self._events = self._events, []
        return events
