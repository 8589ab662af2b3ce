"""Pictures and questions made on the spot, answers token by token, and the slow way to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

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
from finesight.encode.encoded import Encoded
from finesight.encode.pack import pack
from finesight.errors import UserError
from finesight.infer.engine import SMALL_PAGE, Engine
from finesight.infer.pages import picture_digests
from finesight.infer.request import Constraint, Event, Finish, Request, Token
from finesight.infer.rows import Prompt, Rows
from finesight.model.attention import PackedAttention, Segments
from finesight.model.bank import Bank
from finesight.model.linear import GroupedLinear
from finesight.model.lora import LoraGroup, LowRank
from finesight.model.network import VisionLanguageModel


def noise(path: Path, width: int, height: int, seed: int = 0) -> Path:
    """A PNG of coloured noise: every patch differs from every other."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def ask(
    name: str,
    folder: Path,
    *content: str | tuple[str, ...],
    answer: str | BoxPart | None = None,
) -> Located:
    """A sample from file names (ending in .png), frames of videos and texts, and its answer."""
    parts = tuple(map(_part, content))
    messages = [Message(role="user", content=parts)]
    if answer is not None:
        part = TextPart(text=answer) if isinstance(answer, str) else answer
        messages.append(Message(role="assistant", content=(part,)))
    return Located(Sample(id=name, messages=tuple(messages)), folder)


def _part(piece: str | tuple[str, ...]) -> Part:
    if isinstance(piece, tuple):
        return VideoPart(frames=piece, fps=2.0)
    return ImagePart(image=piece) if piece.endswith(".png") else TextPart(text=piece)


def mixed_questions(folder: Path) -> list[Located]:
    """Questions of different lengths about no, one and two pictures of several sizes."""
    sizes = {"a.png": (84, 56), "b.png": (56, 140), "c.png": (112, 112)}
    for seed, (name, (width, height)) in enumerate(sizes.items()):
        noise(folder / name, width, height, seed)
    return [
        ask("one", folder, "a.png", "What is in the picture?"),
        ask("text", folder, "Why?"),
        ask("two", folder, "b.png", "and then", "c.png", "which is larger?"),
        ask("tall", folder, "b.png", "Read it."),
        ask("again", folder, "c.png", "Where is the text? Answer with a box, please, and say why."),
        ask("words", folder, "Tell me about the weather in three lines of plain text."),
    ]


class Forced(Constraint):
    """A constraint that allows one token after another, whatever the model would say."""

    def __init__(self, tokens: Sequence[int], vocabulary: int) -> None:
        self._left, self._numbers = list(tokens), -(-vocabulary // 32)
        self.taken: list[int] = []

    def allow(self) -> NDArray[np.int32]:
        bits = np.zeros(self._numbers, dtype=np.uint32)
        # A card asks once more after the last token, before it knows that it was the last one.
        token = self._left[min(len(self.taken), len(self._left) - 1)]
        bits[token // 32] = 1 << token % 32
        return bits.view(np.int32)

    def take(self, token: int) -> None:
        self.taken.append(token)


@dataclass
class Told:
    """What an engine has told of a request."""

    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None
    error: UserError | None = None
    known: int = 0

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def hear(self, event: Event) -> None:
        """Nothing may come after the end."""
        assert self.finish is None, f"{event} after the end"
        assert self.error is None, f"{event} after an error"
        if event.token is not None:
            self.tokens.append(event.token)
        self.finish, self.error, self.known = event.finish, event.error, event.known


def listen(engine: Engine, told: dict[int, Told]) -> None:
    """Step until the engine has nothing to do, and note what it tells, by ticket."""
    while engine.busy:
        for event in engine.step():
            told.setdefault(event.ticket, Told()).hear(event)


@dataclass
class Grown:
    """An answer's tokens and the logits [V] behind each."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def adapt(model: VisionLanguageModel) -> None:
    """Adapters as one trains them, on every layer of the decoder: the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(False)
    for path, group in list(model.named_modules()):
        if isinstance(group, GroupedLinear) and path.startswith("model.layers"):
            layers = dict.fromkeys(group.outputs, LowRank(4, 4.0))
            group.adapter = LoraGroup(group, layers, 0.0, model.head_weight.dtype)
            for parameter in group.adapter.parameters():
                drawn = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.data = drawn.to(parameter)
    model.eval()


def adapt_by_request(model: VisionLanguageModel) -> None:
    """The same, as one of those that are chosen for each question; it is for the next pass."""
    adapt(model)
    bank = Bank(model)
    bank.take()
    model.readers = bank.install()
    assert model.readers is not None
    model.readers.choose(model.readers.mask(0))


@torch.inference_mode()
def grow(
    model: VisionLanguageModel,
    prompts: Sequence[Encoded],
    steps: int,
    *,
    chunk: int | None = None,
    drop_after: int | None = None,
    spoken: Sequence[Sequence[int]] | None = None,
) -> list[Grown]:
    """Answers by the cache, all at once, with the model's first adapter, if it has some by request:
    prompts are read `chunk` tokens at a time; after `drop_after` steps every second row leaves;
    `spoken` tokens are said in place of the most probable ones."""
    needed = [-(-(prompt.outline.tokens + steps) // SMALL_PAGE) for prompt in prompts]
    rows = Rows(model, rows=len(prompts), pages=sum(needed) + 1, page=SMALL_PAGE)
    # In no order: what belongs together lies anywhere.
    free = (np.random.default_rng(0).permutation(sum(needed)) + 1).tolist()
    adapter = None if model.readers is None else 0
    asked = [
        Prompt(prompt, [free.pop() for _ in range(number)], adapter, picture_digests(prompt))
        for prompt, number in zip(prompts, needed, strict=True)
    ]
    found = [Grown() for _ in prompts]

    def say(who: int, logits_V: Tensor) -> Tensor:
        answer = found[who]
        token = int(logits_V.argmax()) if spoken is None else spoken[who][len(answer.tokens)]
        answer.tokens.append(token)
        answer.logits.append(logits_V.clone())
        return torch.tensor([token], device=logits_V.device)

    owner: list[int] = []
    while unread := [n for n, prompt in enumerate(asked) if prompt.read < prompt.tokens]:
        together = [asked[n] for n in unread]
        stops = [min(p.tokens, p.read + (chunk or p.tokens)) for p in together]
        logits_RV = rows.read(together, stops)
        done = [n for n in unread if asked[n].read == asked[n].tokens]
        for who, logits_V in zip(done, () if logits_RV is None else logits_RV, strict=True):
            rows.start(len(owner), asked[who], say(who, logits_V))
            owner.append(who)
    for step in range(1, steps):
        if step - 1 == drop_after:
            for row in reversed(range(0, len(owner), 2)):
                last = owner.pop()
                rows.stop(row, len(owner))
                if row < len(owner):
                    owner[row] = last
        longest = max(asked[who].tokens for who in owner) + step
        logits_RV = rows.step(len(owner), longest)
        for row, who in enumerate(owner):
            rows.ids_R[row : row + 1] = say(who, logits_RV[row])
    return found


@torch.no_grad()
def generate_uncached(model: VisionLanguageModel, prompt: Encoded, steps: int) -> Grown:
    """The most probable tokens, the whole sequence run anew for each."""
    grown = Grown()
    for _ in range(steps):
        batch = pack([_continued(prompt, grown.tokens)]).to(model.head_weight.device)
        segments = Segments(batch.lengths, batch.bounds_S1, max(batch.lengths))
        h_TD = model.read(batch, PackedAttention(segments))
        grown.logits.append(model.logits(model.normed(h_TD[-1:]))[0])
        grown.tokens.append(int(grown.logits[-1].argmax()))
    return grown


def _continued(prompt: Encoded, tokens: Sequence[int]) -> Encoded:
    """The prompt with answer tokens after it: text, each one position on in all three rows."""
    outline = prompt.outline
    following = outline.positions_3T.max() + 1 + np.arange(len(tokens), dtype=np.int32)
    extended = replace(
        outline,
        ids_T=np.concatenate([outline.ids_T, np.array(tokens, dtype=np.int32)]),
        learned_T=np.concatenate([outline.learned_T, np.zeros(len(tokens), dtype=bool)]),
        positions_3T=np.concatenate([outline.positions_3T, np.tile(following, (3, 1))], axis=1),
    )
    return replace(prompt, outline=extended)


def request_for(prompt: Encoded, tokens: int = 9) -> Request:
    """A greedy request for so many tokens."""
    return Request(prompt=prompt, max_new_tokens=tokens)


def told_of(engine: Engine, *prompts: Encoded, tokens: int = 9) -> list[Told]:
    """What the engine tells of these prompts, asked all at once."""
    tickets = [engine.add(request_for(prompt, tokens)) for prompt in prompts]
    told: dict[int, Told] = {}
    listen(engine, told)
    return [told[ticket] for ticket in tickets]
