"""Samples of any other family: its own processor and chat template make tokens and pixels.

What stands in a text stays text here as well, but by refusing: a processor reads a special token
wherever one is spelled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from finesight.config import PictureRule, PixelRange
from finesight.data.headers import MAX_PIXELS
from finesight.data.jsonl import Located
from finesight.data.sample import ImagePart, Message, Part, TextPart
from finesight.encode.borrowed import LOCAL, configuration, transformers
from finesight.encode.dialect import Box
from finesight.encode.encoded import Encoded, Outline, Span
from finesight.encode.render import Answer
from finesight.encode.tokenizer import LARGEST_ID, Tokenizer, check_file, is_panic
from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.vision.picture import open_picture
from finesight.vision.resize import resized_size

AS_IT_IS = PixelRange(min_pixels=1, max_pixels=MAX_PIXELS)
"""The rule that leaves every picture to the model's processor."""


@dataclass(frozen=True, slots=True)
class Read(Outline):
    """An outline, and the turns that it was made from: pictures are read again from them."""

    turns: tuple[Message, ...]
    folder: Path
    answering: bool


@dataclass(frozen=True, slots=True)
class _Made:
    """What a processor makes of turns: ids [T], and whatever else the model reads, by name."""

    ids_T: NDArray[np.int32]
    inputs: dict[str, Tensor]


class FallbackRenderer:
    """Turns samples of one model into what transformers computes with, a sample at a time.

    The chat template lays out the turns, with `enable_thinking` off where it knows that: answers
    are asked for and learned without a thought. Learned is, of every assistant turn, what the
    template puts after the prompt for it, up to and with the first end token. Found by rendering:
    the tokens of the prompt for a turn have to be the first tokens of the whole, as an answer is
    generated after exactly them; a template that rewrites earlier turns is refused.

    A picture is scaled by the recipe's rule, and after it by the processor's own. Boxes and videos
    are not written: each family has its own way, and these are not known here.
    """

    thinks = False

    def __init__(
        self, folder: ModelFolder, picture: PictureRule | None = None, system: str | None = None
    ) -> None:
        """`picture` is the recipe's size rule (None: the processor's alone), `system` its prompt
        (None: what the template does without one)."""
        self._given = (folder, picture, system)
        self._lock = Lock()
        self.family = folder.family
        self.rule: PictureRule = picture or AS_IT_IS
        self.system = system
        configuration(folder)
        check_file(folder.tokenizer_file, native=False, vocabulary=LARGEST_ID)
        self.tokenizer = Tokenizer(folder.tokenizer_file)
        self._processor = _processor(folder)
        # A template that does not know the variable has the processor complain of it.
        knows = "enable_thinking" in str(self._processor.chat_template)
        self._variables = {"enable_thinking": False} if knows else {}
        self._specials = self.tokenizer.specials()
        self._special_ids = [self.tokenizer.id_of(token) for token in self._specials]
        self.end_ids = _end_ids(folder, self._processor.tokenizer)

    def __reduce__(self) -> tuple[type[FallbackRenderer], tuple[Any, ...]]:
        # Processes that are started afresh read the processor's files again.
        return FallbackRenderer, self._given

    def outline(self, located: Located) -> Outline:
        """The whole sample as tokens, its pictures processed and forgotten: how many tokens they
        become only their processor knows.

        Raises DamagedPicture for a picture that cannot be used, UserError for boxes and videos, for
        a special token in a text, and where the template hides what an answer is.
        """
        return self.encode(located).outline

    def encode(self, located: Located) -> Encoded:
        """The whole sample with what the model reads of its pictures."""
        return self._encoded(located.sample.id, self._turns(located), located.folder, False)

    def unseen(self, located: Located) -> Encoded:
        """Not to be had: transformers computes the features of pictures in every step."""
        raise AssertionError(f"the pictures of {located.sample.id} cannot be left out")

    def prompt_outline(self, located: Located) -> Outline:
        """All turns before the last one of the assistant, ready for the answer to follow."""
        turns = self._turns(located)
        asked = turns[:-1] if turns[-1].role == "assistant" else turns
        return self._encoded(located.sample.id, asked, located.folder, True).outline

    def with_patches(self, outline: Outline) -> Encoded:
        """The outline, which came from here, with what the model reads of its pictures."""
        assert isinstance(outline, Read), f"the outline of {outline.id} is another renderer's"
        made = self._made(outline.turns, outline.folder, outline.answering, outline.id)
        return Encoded(outline, _NO_PATCHES, made.inputs)

    def answer(self, ids: Sequence[int]) -> Answer:
        """What generated ids say up to the end token; `raw` is all of them."""
        stops = (at for at, token in enumerate(ids) if token in self.end_ids)
        said = self.tokenizer.decode(ids[: next(stops, len(ids))], skip_special=True)
        return Answer(said, self.tokenizer.decode(ids, skip_special=False), None)

    def boxes(self, raw: str, spans: Sequence[Span], image: int = 0) -> list[Box]:
        """None: how the family writes them is not known."""
        return []

    def _turns(self, located: Located) -> tuple[Message, ...]:
        turns = located.sample.messages
        for part in located.sample.parts():
            if not isinstance(part, TextPart | ImagePart):
                raise UserError(
                    f"a {part.type} in a conversation with a model of the family {self.family}",
                    where=f"sample {located.sample.id:.80}",
                    expected="text and pictures: how the family writes boxes or reads videos is not"
                    " known to the fallback through transformers",
                    remedy="take a model of a native family, or take these parts out",
                )
        if turns[0].role != "system" and self.system is not None:
            turns = (Message(role="system", content=(TextPart(text=self.system),)), *turns)
        return turns

    def _encoded(
        self, name: str, turns: tuple[Message, ...], folder: Path, answering: bool
    ) -> Encoded:
        self._check_places(turns, name)
        made = self._made(turns, folder, answering, name)
        learned_T = np.zeros(len(made.ids_T), dtype=np.bool_)
        for at, turn in enumerate(turns):
            if turn.role == "assistant" and not answering:
                start = self._start(made.ids_T, turns, at, folder, name)
                learned_T[self._answered(made.ids_T, start, name)] = True
        # Where tokens stand among rows and columns the model works out itself.
        positions_3T = np.tile(np.arange(len(made.ids_T), dtype=np.int32), (3, 1))
        outline = Read(name, made.ids_T, learned_T, positions_3T, (), turns, folder, answering)
        return Encoded(outline, _NO_PATCHES, made.inputs)

    def _start(
        self,
        ids_T: NDArray[np.int32],
        turns: tuple[Message, ...],
        at: int,
        folder: Path,
        name: str,
    ) -> int:
        """Where the answer `turns[at]` begins among the tokens of all turns: how many its prompt
        has. Where no picture follows, it is counted from the end, in text alone."""
        later = any(isinstance(part, ImagePart) for turn in turns[at:] for part in turn.content)
        if not later:
            whole = self._words(turns, False, name)
            asked = self._words(turns[:at], True, name)
            rest = whole[len(asked) :]
            if whole[: len(asked)] == asked and ids_T[len(ids_T) - len(rest) :].tolist() == rest:
                return len(ids_T) - len(rest)
        before_T = self._made(turns[:at], folder, True, name).ids_T
        if not np.array_equal(ids_T[: len(before_T)], before_T):
            raise UserError(
                f"the chat template of {self.family} lays out the prompt of an answer in another"
                " way once the answer, or a later turn, follows it",
                where=f"sample {name:.80}",
                expected="turns that stay as they are when others are added",
                remedy="keep the last answer of each conversation alone, without a thought and"
                " without white space at its start",
            )
        return len(before_T)

    def _check_places(self, turns: Sequence[Message], name: str) -> None:
        """Refuse turns of which the template leaves out the last picture: some lay out one only."""
        fewer = _without_last_picture(turns)
        if fewer is not None and self._text(turns, False, name) == self._text(fewer, False, name):
            raise UserError(
                f"the chat template of {self.family} leaves a picture out",
                where=f"sample {name:.80}",
                expected="a place for every picture of the sample",
                remedy="give samples with fewer pictures; many families take one only",
            )

    def _words(self, turns: Sequence[Message], answering: bool, name: str) -> list[int]:
        """The tokens of turns in which a picture is a mark, not yet as long as it will be."""
        text = self._text(turns, answering, name)
        ids: list[int] = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def _text(self, turns: Sequence[Message], answering: bool, name: str) -> str:
        """Turns as the template lays them out, a picture as its mark."""
        said = [
            {
                "role": turn.role,
                "content": [
                    {"type": "text", "text": part.text}
                    if isinstance(part, TextPart)
                    else {"type": "image"}
                    for part in turn.content
                ],
            }
            for turn in turns
        ]
        return str(self._laid_out(said, answering, name, tokenize=False)[0])

    def _laid_out(
        self, said: Sequence[Mapping[str, Any]], answering: bool, name: str, **how: object
    ) -> Any:
        """What the processor makes of turns, `how` it is asked to."""
        try:
            # Tokenizers are not made for threads, and answering reads ahead in several.
            with self._lock:
                return self._processor.apply_chat_template(
                    [said], add_generation_prompt=answering, **how, **self._variables
                )
        except Exception as error:  # templates and processors raise anything
            raise UserError(
                f"the processor of {self.family} refuses it: {type(error).__name__}: {error}",
                where=f"sample {name:.80}",
                expected="a conversation that the model's chat template and processor take",
                remedy="correct the sample, or leave it out; many families take one picture only",
            ) from error

    def _answered(self, ids_T: NDArray[np.int32], start: int, name: str) -> slice:
        """Where an answer stands, its end token included; no other special token is in it."""
        special = np.isin(ids_T[start:], [*self._special_ids, *self.end_ids])
        ends = start + np.flatnonzero(special)
        if not len(ends) or int(ids_T[ends[0]]) not in self.end_ids:
            raise UserError(
                f"no end token ({', '.join(map(self.tokenizer.name_of, self.end_ids))}) follows an"
                f" answer in the chat template of {self.family}",
                where=f"sample {name:.80}",
                expected="a template that ends an assistant's turn: a model learns to stop from it",
                remedy="add the end token to the chat template of the model's folder",
            )
        return slice(start, int(ends[0]) + 1)

    def _made(self, turns: Sequence[Message], folder: Path, answering: bool, name: str) -> _Made:
        said = [
            {
                "role": turn.role,
                "content": [self._part(part, folder, name) for part in turn.content],
            }
            for turn in turns
        ]
        how = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
        made = self._laid_out(said, answering, name, **how)
        strange = [key for key, value in made.items() if not isinstance(value, Tensor)]
        if strange:
            raise UserError(
                f"the processor of {self.family} gives {', '.join(strange)} as no single tensor",
                where=f"sample {name:.80}",
                expected="tensors, as those that read pictures of one size or in patches give",
                remedy="give samples with one picture each, or all of one size",
            )
        inputs: dict[str, Tensor] = dict(made.items())
        ids_T = inputs.pop("input_ids")[0].to(torch.int32).numpy()
        return _Made(ids_T, inputs)

    def _part(self, part: Part, folder: Path, name: str) -> dict[str, Any]:
        """A part of a turn as chat templates and processors take it."""
        if isinstance(part, ImagePart):
            return {"type": "image", "image": self._picture(folder / part.image)}
        assert isinstance(part, TextPart), f"a {part.type} in sample {name}"
        spelled = [token for token in self._specials if token in part.text]
        if spelled:
            raise UserError(
                f"the text holds {spelled[0]}, which the tokenizer of {self.family} reads as a"
                " special token",
                where=f"sample {name:.80}",
                expected="texts without special tokens",
                remedy="take it out of the text",
            )
        return {"type": "text", "text": part.text}

    def _picture(self, path: Path) -> Image.Image:
        picture = open_picture(path)
        if self.rule == AS_IT_IS:
            return picture
        size = (picture.height, picture.width)
        height, width = resized_size(size, self.rule, 1, where=str(path))
        return picture.resize((width, height), Image.Resampling.BICUBIC)


def _without_last_picture(turns: Sequence[Message]) -> list[Message] | None:
    """The turns with one picture less, None where there is none."""
    for at in reversed(range(len(turns))):
        parts = turns[at].content
        places = [place for place, part in enumerate(parts) if isinstance(part, ImagePart)]
        if places:
            rest = (*parts[: places[-1]], *parts[places[-1] + 1 :])
            fewer = Message(role=turns[at].role, content=rest)
            return [*turns[:at], fewer, *turns[at + 1 :]]
    return None


_NO_PATCHES: NDArray[np.uint8] = np.empty((0, 0), dtype=np.uint8)


def _processor(folder: ModelFolder) -> Any:
    try:
        processor = transformers().AutoProcessor.from_pretrained(str(folder.path), **LOCAL)
    except BaseException as error:  # what is missing in a folder, or as a package, raises anything
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise UserError(
            f"transformers cannot make the processor of {folder.family}:"
            f" {' '.join(str(error).split())}",
            where=str(folder.path),
            expected="the processor's files of the published model, and the packages it needs",
            remedy="download the model again, or install what is missing",
        ) from error
    if not processor.chat_template:
        raise UserError(
            f"a model of the family {folder.family} without a chat template",
            where=str(folder.path),
            expected="a chat template: it says how a question and its answer are laid out",
            remedy="take the edition of the model that is made for conversations",
        )
    return processor


def _end_ids(folder: ModelFolder, tokenizer: Any) -> tuple[int, ...]:
    """The tokens that end an answer: the tokenizer's, and those of generation_config.json."""
    given = folder.generation.get("eos_token_id")
    ids = [tokenizer.eos_token_id, *(given if isinstance(given, list) else [given])]
    found = tuple(dict.fromkeys(token for token in ids if isinstance(token, int)))
    if not found:
        raise UserError(
            f"eos_token_id is {given!r}, and the tokenizer has none",
            where=str(folder.path),
            expected="a token that ends an answer",
            remedy="take the generation_config.json of the published model",
        )
    return found
