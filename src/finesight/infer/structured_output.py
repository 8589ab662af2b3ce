"""Structured output: decoding constraints from JSON schemas, box formats and tool calls.

llguidance computes the bitmask of valid next tokens.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from finesight.encode.family import ThinkingOptions
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import TiktokenTokenizer, Tokenizer
from finesight.errors import UserError
from finesight.infer.request import DecodingConstraint
from finesight.samples.boxes import BOX_KEY

if TYPE_CHECKING:
    from types import ModuleType

    from llguidance import LLMatcher, LLTokenizer

JsonSchema = Mapping[str, Any]

BITMASK_WORD_BITS = 32

MAX_LEXER_STATES = 50_000
"""Maximum number of lexer states per grammar; a state takes 1 to 2 kB.

The limit is necessary because schemas are untrusted input.
"""

MAX_LABEL_LENGTH = 200

# Bounded whitespace: with unlimited whitespace a model may generate only spaces.
_WHITESPACE_OPTIONS = {"x-guidance": {"whitespace_pattern": r"[ \n\t]{1,24}"}}
# JSON separators of tool calls in chat templates.
_JSON_DUMPS_OPTIONS = {
    "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
}
_ANY_OBJECT_SCHEMA: JsonSchema = {"type": "object"}


class GrammarCompiler:
    """Compiles grammars to decoding constraints for one model."""

    def __init__(self, renderer: NativeRenderer, vocab_size: int) -> None:
        self._renderer = renderer
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._ll_tokenizer: LLTokenizer | None = None

    def with_thinking(self, options: ThinkingOptions) -> GrammarCompiler:
        """Return a compiler that applies grammars to the answers in a thinking mode."""
        compiler = copy(self)
        compiler._renderer = self._renderer.with_thinking(options)
        return compiler

    def compile_json_object(self) -> GrammarConstraint:
        """Compile a constraint for any JSON object."""
        return self.compile_json_schema(_ANY_OBJECT_SCHEMA)

    def compile_json_schema(self, schema: JsonSchema) -> GrammarConstraint:
        """Compile a constraint for a JSON schema."""
        return self._compile(f"answer: %json {json.dumps({**schema, **_WHITESPACE_OPTIONS})}\n")

    def compile_boxes(self, key: str = BOX_KEY) -> GrammarConstraint:
        """Compile a constraint for boxes, or points, in the format of the family."""
        family = self._renderer.family
        limit = family.max_box_coordinate
        if family.box_tokens is not None:
            return self._compile(self._build_token_grammar(family.box_tokens, limit, key))
        return self.compile_json_schema(_build_box_schema(limit, key))

    def compile_tool_calls(
        self, functions: Sequence[tuple[str, JsonSchema | None]]
    ) -> GrammarConstraint:
        """Compile a constraint for one tool call of one of the given functions.

        Args:
            functions: Name and JSON schema of the arguments of each function; None for any object.
        """
        open_tag = self._token_symbol("<tool_call>")
        close_tag = self._token_symbol("</tool_call>")
        alternatives = " | ".join(f"call_{number}" for number in range(len(functions)))
        rules = [f'answer: {open_tag} "\\n" ({alternatives}) "\\n" {close_tag}']
        rules.append('value[suffix="\\n</parameter>\\n"]: /(?s:.*)/')
        for call_index, (name, parameters) in enumerate(functions):
            if self._renderer.family.calls_are_xml:
                keys = " | ".join(map(json.dumps, (parameters or {}).get("properties", {})))
                rules += [
                    f'call_{call_index}: "<function={name}>\\n" key_{call_index}* "</function>"',
                    f'key_{call_index}: "<parameter=" ({keys or "/[^>]+/"}) ">\\n" value',
                ]
            else:
                schema_json = json.dumps(_build_call_schema(name, parameters) | _JSON_DUMPS_OPTIONS)
                rules.append(f"call_{call_index}: %json {schema_json}")
        return self._compile("\n".join(rules) + "\n")

    def _build_token_grammar(self, box_tokens: Sequence[str], limit: int, key: str) -> str:
        """Build the grammar of boxes in special tokens, with coordinates in thousandths."""
        ref, ref_end, box, box_end = (self._token_symbol(token) for token in box_tokens)
        max_value = ' | "1000"' if limit >= 1000 else ""
        corner = '"(" N "," N ")"'
        corners = f'{corner} "," {corner}' if key == BOX_KEY else corner
        return (
            "answer: box*\n"
            f"box: ({ref} LABEL {ref_end})? {box} {corners} {box_end}\n"
            f"N: /0|[1-9][0-9]{{0,2}}/{max_value}\n"
            f"LABEL: /[^<>\\n]{{1,{MAX_LABEL_LENGTH}}}/\n"
        )

    def _compile(self, rules: str) -> GrammarConstraint:
        start_rules = "start: answer\n"
        if self._renderer.has_reasoning:
            start_rules = self._build_reasoning_rules()
        package = import_llguidance()
        grammar = package.LLMatcher.grammar_from_lark(start_rules + rules)
        limits = package.LLParserLimits(max_lexer_states=MAX_LEXER_STATES)
        matcher = package.LLMatcher(self.load_tokenizer(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise UserError(
                f"the grammar cannot be compiled: {matcher.get_error():.300}",
                where="response_format",
                expected="a JSON schema of limited size with keywords that llguidance supports",
                remedy="simplify the schema",
            )
        return GrammarConstraint(matcher, self._vocab_size, self._renderer.end_ids)

    def _build_reasoning_rules(self) -> str:
        """Build the rules of an answer after reasoning that ends at the first `</think>`."""
        end_symbol = self._token_symbol("</think>")
        if end_symbol.startswith('"'):
            # Without a token of its own, the tag is text, whose first occurrence ends the rule.
            start = "start: thought /\\n{0,2}/ answer\n"
            return f"{start}thought[suffix={end_symbol}]: /(?s:.*)/\n"
        return f"start: thought {end_symbol} /\\n{{0,2}}/ answer\nthought: /(?s:.*)/\n"

    def _token_symbol(self, text: str) -> str:
        """Return the grammar symbol of a special token; for other text, a string literal."""
        tokenizer = self.load_tokenizer()
        ids = tokenizer.tokenize_str(text, parse_special=True)
        is_single_token = len(ids) == 1 and tokenizer.is_special_token(ids[0])
        return f"<[{ids[0]}]>" if is_single_token else json.dumps(text)

    def load_tokenizer(self) -> LLTokenizer:
        """Return the llguidance tokenizer, which is built on first use within a second."""
        with self._lock:
            if self._ll_tokenizer is None:
                self._ll_tokenizer = _build_ll_tokenizer(self._renderer, self._vocab_size)
            return self._ll_tokenizer


class GrammarConstraint(DecodingConstraint):
    """Decoding constraint that follows a compiled grammar.

    Compilation and `compute_bitmask` have no time limit. Untrusted grammars must run in a worker
    process (see `serve`).
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, end_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._num_words = -(-vocab_size // BITMASK_WORD_BITS)

    def compute_bitmask(self) -> NDArray[np.int32]:
        """Return the bitmask of valid next tokens.

        If the grammar exceeds its limits, only end tokens are valid.
        """
        mask = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.int32)[
            : self._num_words
        ].copy()
        if self._matcher.is_error() or not mask.any():
            return build_bitmask(self._end_ids, self._num_words)
        return mask

    def accept_token(self, token: int) -> None:
        """Advance the grammar by a sampled token."""
        self._matcher.consume_token(token)

    @property
    def has_failed(self) -> bool:
        """True if the grammar exceeded its limits and the completion was truncated."""
        return bool(self._matcher.is_error())


def build_bitmask(token_ids: Sequence[int], num_words: int) -> NDArray[np.int32]:
    """Build a bitmask of `num_words` 32-bit words that allows only the given tokens."""
    bits = np.zeros(num_words, dtype=np.uint32)
    for token in token_ids:
        bits[token // BITMASK_WORD_BITS] |= np.uint32(1 << token % BITMASK_WORD_BITS)
    return bits.view(np.int32)


def import_llguidance() -> ModuleType:
    """Import llguidance."""
    try:
        import llguidance as package
    except ImportError as error:
        raise UserError(
            f"cannot import llguidance: {error}",
            where="response_format",
            expected="an installed llguidance, which is required for structured output",
            remedy="pip install 'finesight[serve]'",
        ) from error
    return package


def _build_ll_tokenizer(renderer: NativeRenderer, vocab_size: int) -> LLTokenizer:
    package = import_llguidance()
    from llguidance.tiktoken import lltokenizer_from_encoding

    tokenizer = renderer.tokenizer
    eos_ids = list(renderer.end_ids)
    if isinstance(tokenizer, TiktokenTokenizer):
        return lltokenizer_from_encoding(tokenizer.encoding, n_vocab=vocab_size, eos_token=eos_ids)
    assert isinstance(tokenizer, Tokenizer), f"unsupported tokenizer {type(tokenizer)}"
    # Pass the content of the file: a path would be resolved as a hub name.
    content = tokenizer.path.read_text(encoding="utf-8")
    ll_tokenizer: LLTokenizer = package.LLTokenizer(content, n_vocab=vocab_size, eos_token=eos_ids)
    return ll_tokenizer


def _build_call_schema(name: str, parameters: JsonSchema | None) -> dict[str, Any]:
    """Build the schema of a tool call in JSON; any object is allowed without parameters."""
    properties = {"name": {"const": name}, "arguments": parameters or _ANY_OBJECT_SCHEMA}
    return {
        "type": "object",
        "properties": properties,
        "required": ["name", "arguments"],
        "additionalProperties": False,
    }


def _build_box_schema(max_coordinate: int, key: str) -> JsonSchema:
    count = 4 if key == BOX_KEY else 2
    coordinate = {"type": "integer", "minimum": 0, "maximum": max_coordinate}
    box = {
        "type": "object",
        "properties": {
            key: {"type": "array", "items": coordinate, "minItems": count, "maxItems": count},
            "label": {"type": "string", "maxLength": MAX_LABEL_LENGTH},
        },
        "required": [key],
        "additionalProperties": False,
    }
    return {"anyOf": [box, {"type": "array", "items": box}]}
