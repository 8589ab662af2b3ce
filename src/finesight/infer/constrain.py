"""Answers that a grammar holds to: JSON of a schema, boxes as the family writes them, calls.

The grammars are followed by llguidance, which says after every token which may come next.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finesight.data.json_boxes import BOX_KEY
from finesight.encode.qwen_vl import TOKENS
from finesight.encode.rank_tokenizer import RankTokenizer
from finesight.encode.render import Renderer
from finesight.encode.tokenizer import Tokenizer
from finesight.errors import UserError
from finesight.infer.request import Constraint

if TYPE_CHECKING:
    from types import ModuleType

    from llguidance import LLMatcher, LLTokenizer

Schema = Mapping[str, Any]

WIDTH = 32
"""Bits of one number of a mask."""

LEXER_STATES = 50_000
"""Of one answer's grammar, each of one or two kilobytes: schemas come from strangers."""

LONGEST_LABEL = 200
WIDEST = 99_999
"""The largest pixel that a box of Qwen2.5-VL may name."""

# A model that may write spaces for ever will, where it does not know how to go on.
_SPACED = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{1,24}"}}
# As chat templates write calls.
_AS_DUMPED = {
    "x-guidance": {
        "whitespace_flexible": False,
        "item_separator": ", ",
        "key_separator": ": ",
    }
}
_ANY_OBJECT: Schema = {"type": "object"}


class Grammars:
    """Makes constraints for the answers of one model, `vocabulary` numbers wide."""

    def __init__(self, renderer: Renderer, vocabulary: int) -> None:
        self._renderer, self._vocabulary = renderer, vocabulary
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None

    def load_tokenizer(self) -> None:
        """Load the tokenizer of llguidance now, not with the first constraint: it takes a second.

        Raises UserError where llguidance is missing.
        """
        self._tokenizer()

    def json_object(self) -> Matched:
        """Any JSON object."""
        return self.json_schema(_ANY_OBJECT)

    def json_schema(self, schema: Schema) -> Matched:
        """JSON that the schema describes. Raises UserError for one that cannot be followed."""
        return self._made(f"answer: %json {json.dumps({**schema, **_SPACED})}\n")

    def boxes(self) -> Matched:
        """Boxes in the dialect of the model's family and nothing else, perhaps none."""
        name = self._renderer.family.name
        if name in ("qwen2_vl", "qwen"):
            return self._made(self._in_tokens(TOKENS if name == "qwen" else {}))
        most = WIDEST if name == "qwen2_5_vl" else 1000
        return self.json_schema(_box_schema(most))

    def calls(self, functions: Sequence[tuple[str, Schema | None]]) -> Matched:
        """One call of one of the functions, with arguments as their schemas say."""
        opened, closed = self._mark("<tool_call>"), self._mark("</tool_call>")
        which = " | ".join(f"call_{number}" for number in range(len(functions)))
        rules = [f'answer: {opened} "\\n" ({which}) "\\n" {closed}']
        for number, (name, parameters) in enumerate(functions):
            properties = {"name": {"const": name}, "arguments": parameters or _ANY_OBJECT}
            schema = {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            rules.append(f"call_{number}: %json {json.dumps({**schema, **_AS_DUMPED})}")
        return self._made("\n".join(rules) + "\n")

    def _in_tokens(self, names: Mapping[str, str]) -> str:
        """Boxes between tokens, in thousandths; `names` are those of the first Qwen-VL, whose
        numbers end below 1000."""
        ref, ref_end, box, box_end = (self._mark(names.get(token, token)) for token in TOKENS)
        most = "" if names else ' | "1000"'
        return (
            "answer: box*\n"
            f'box: ({ref} LABEL {ref_end})? {box} "(" N "," N "),(" N "," N ")" {box_end}\n'
            f"N: /0|[1-9][0-9]{{0,2}}/{most}\n"
            f"LABEL: /[^<>\\n]{{1,{LONGEST_LABEL}}}/\n"
        )

    def _made(self, rules: str) -> Matched:
        start = "start: answer\n"
        if self._renderer.thinks:
            closed = self._mark("</think>")
            ends = closed.startswith('"')
            start = f"start: thought {'' if ends else closed} /\\n{{0,2}}/ answer\n"
            start += f"thought{f'[suffix={closed}]' if ends else ''}: /(?s:.*)/\n"
        package = llguidance()
        grammar = package.LLMatcher.grammar_from_lark(start + rules)
        limits = package.LLParserLimits(max_lexer_states=LEXER_STATES)
        matcher = package.LLMatcher(self._tokenizer(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise UserError(
                f"the grammar of this answer cannot be followed: {matcher.get_error():.300}",
                where="response_format",
                expected="a JSON schema of the keywords that llguidance knows, not too large",
                remedy="make the schema simpler",
            )
        return Matched(matcher, self._vocabulary, self._renderer.end_ids)

    def _mark(self, text: str) -> str:
        """How a grammar names what is one token with some tokenizers, and text with others."""
        tokens = self._tokenizer()
        ids = tokens.tokenize_str(text, parse_special=True)
        alone = len(ids) == 1 and tokens.is_special_token(ids[0])
        return f"<[{ids[0]}]>" if alone else json.dumps(text)

    def _tokenizer(self) -> LLTokenizer:
        """The tokenizer as llguidance reads it, made once: it takes a second."""
        with self._lock:
            if self._tokens is None:
                self._tokens = _read(llguidance(), self._renderer, self._vocabulary)
            return self._tokens


class Matched(Constraint):
    """An answer that has come so far through its grammar.

    Neither compilation nor `allow` has a limit of time: untrusted grammars belong in a worker
    process (`serve.constraints`).
    """

    def __init__(self, matcher: LLMatcher, vocabulary: int, end_ids: Sequence[int]) -> None:
        self._matcher, self._end_ids = matcher, end_ids
        self._numbers = -(-vocabulary // WIDTH)

    def allow(self) -> NDArray[np.int32]:
        """The tokens that may come next, as bits; where the grammar has become too large to follow,
        only the end."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)[
            : self._numbers
        ].copy()
        if self._matcher.is_error() or not mask.any():
            return mask_of(self._end_ids, self._numbers)
        return mask

    def take(self, token: int) -> None:
        """That token has come."""
        self._matcher.consume_token(token)

    @property
    def failed(self) -> bool:
        """Whether the grammar has become too large to follow: the answer was ended in the middle
        of it."""
        return bool(self._matcher.is_error())


def mask_of(tokens: Sequence[int], numbers: int) -> NDArray[np.int32]:
    """Build a mask, of this many 32-bit words, that allows only these tokens."""
    bits = np.zeros(numbers, dtype=np.uint32)
    for token in tokens:
        bits[token // WIDTH] |= np.uint32(1 << token % WIDTH)
    return bits.view(np.int32)


def llguidance() -> ModuleType:
    """The package. Raises UserError where it is missing."""
    try:
        import llguidance as package
    except ImportError as error:
        raise UserError(
            f"the package llguidance cannot be imported: {error}",
            where="response_format",
            expected="llguidance, which holds answers to a grammar",
            remedy="pip install 'finesight[serve]'",
        ) from error
    return package


def _read(package: ModuleType, renderer: Renderer, vocabulary: int) -> LLTokenizer:
    from llguidance.tiktoken import lltokenizer_from_encoding

    tokenizer, ends = renderer.tokenizer, list(renderer.end_ids)
    if isinstance(tokenizer, RankTokenizer):
        return lltokenizer_from_encoding(tokenizer.encoding, n_vocab=vocabulary, eos_token=ends)
    assert isinstance(tokenizer, Tokenizer), f"a tokenizer of the type {type(tokenizer)}"
    # The file's content: a name would be looked for on a hub.
    content = tokenizer.path.read_text(encoding="utf-8")
    made: LLTokenizer = package.LLTokenizer(content, n_vocab=vocabulary, eos_token=ends)
    return made


def _box_schema(most: int) -> Schema:
    number = {"type": "integer", "minimum": 0, "maximum": most}
    box = {
        "type": "object",
        "properties": {
            BOX_KEY: {"type": "array", "items": number, "minItems": 4, "maxItems": 4},
            "label": {"type": "string", "maxLength": LONGEST_LABEL},
        },
        "required": [BOX_KEY],
        "additionalProperties": False,
    }
    return {"anyOf": [box, {"type": "array", "items": box}]}
