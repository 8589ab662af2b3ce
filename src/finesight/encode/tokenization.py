"""Tokenization of texts and samples.

Tokenizers never parse special tokens in user text: `Tokenizer` reads `tokenizer.json`,
`TiktokenTokenizer` the rank file of Qwen-VL. A `TokenBuilder` builds a `TokenizedSample`, which
with its image patches is an `EncodedSample`.

Shapes: T tokens of a sequence, N patches, D values per patch.
"""

from __future__ import annotations

import base64
import binascii
import math
import sys
import threading
import unicodedata
from abc import ABC, abstractmethod
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar

import numpy as np
import tokenizers
from numpy.typing import NDArray

from finesight.errors import UserError
from finesight.files.bounded_files import read_bytes, read_json_object
from finesight.files.worker_pool import JobOutput
from finesight.model_folder import ModelFolder
from finesight.samples.augmentation import ImageVariant
from finesight.samples.frames import ImageSize
from finesight.vision.image_processing import GridTHW

if TYPE_CHECKING:
    import tiktoken
    from torch import Tensor


Key = TypeVar("Key")
Value = TypeVar("Value")

CACHE_BYTES = 16 << 20
"""Memory limit of the token cache of a tokenizer. Datasets repeat prompts in many samples."""

MAX_TEXT_SHARE = 16
"""Texts that need more than 1 / MAX_TEXT_SHARE of the cache memory are not cached."""

_ID_BYTES = 28


class LruCache(Generic[Key, Value]):
    """Thread-safe cache that evicts the least recently used values above a memory limit."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, tuple[Value, int]] = OrderedDict()
        self.bytes = 0

    def get(self, key: Key) -> Value | None:
        """Return a value, or None if it is not cached."""
        with self._lock:
            if key not in self._entries:
                return None
            self._entries.move_to_end(key)
            return self._entries[key][0]

    def put(self, key: Key, value: Value, num_bytes: int) -> None:
        """Add or replace a value that takes `num_bytes`."""
        with self._lock:
            _, replaced_bytes = self._entries.get(key, (value, 0))
            self._entries[key] = value, num_bytes
            self.bytes += num_bytes - replaced_bytes
            while self.bytes > self.max_bytes:
                self.bytes -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Remove all entries from the cache."""
        with self._lock:
            self._entries.clear()
            self.bytes = 0


def _build_byte_decoder() -> dict[str, int]:
    """Return the byte of each character in the byte-level BPE alphabet of GPT-2.

    The alphabet represents bytes as printable characters (Radford et al. 2019).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    unprintable = [byte for byte in range(256) if byte not in printable]
    byte_by_char = {chr(byte): byte for byte in printable}
    return byte_by_char | {chr(0x100 + offset): byte for offset, byte in enumerate(unprintable)}


_BYTE_DECODER = _build_byte_decoder()


class TextTokenizer(ABC):
    """Tokenizer of a file, independent of its format: token cache, and pickling by path."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.token_cache = LruCache[str, tuple[int, ...]](CACHE_BYTES)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        # Spawned worker processes load the file again; pickling would lose encode_special_tokens.
        return type(self), (self.path,)

    def encode(self, text: str) -> tuple[int, ...]:
        """Tokenize text; special tokens in it are tokenized as ordinary text."""
        ids = self.token_cache.get(text) if text else ()
        if ids is None:
            ids = self._tokenize(text)
            num_bytes = sys.getsizeof(text) + sys.getsizeof(ids) + _ID_BYTES * len(ids)
            if num_bytes <= self.token_cache.max_bytes // MAX_TEXT_SHARE:
                self.token_cache.put(text, ids, num_bytes)
        return ids

    @abstractmethod
    def _tokenize(self, text: str) -> tuple[int, ...]:
        """Tokenize text without the cache."""

    @abstractmethod
    def token_to_id(self, token: str) -> int:
        """Return the id of a special token."""

    @abstractmethod
    def list_special_tokens(self) -> tuple[str, ...]:
        """Return all special tokens in the order of their ids."""

    @abstractmethod
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Decode token ids to text; an incomplete UTF-8 character becomes U+FFFD."""

    @abstractmethod
    def id_to_token(self, token_id: int) -> str:
        """Return the vocabulary entry of a token id; empty for an unknown id."""

    @abstractmethod
    def id_to_bytes(self, token_id: int) -> bytes:
        """Return the UTF-8 bytes of a token id; empty for an unknown id."""


class Tokenizer(TextTokenizer):
    """Tokenizer loaded from `tokenizer.json` that never parses special tokens in text.

    Otherwise, `<|im_end|>` in a caption would end the turn, and `<|image_pad|>` would refer to a
    missing image. Ids of special tokens are available only through `token_to_id`. Added tokens that
    are not special, such as `<tool_call>`, remain single tokens.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with _translate_library_errors(path, Exception):  # the library raises Exception
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        # tokenizer.json may enable truncation and padding, which would silently change texts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._added_token_ids = frozenset(self._tokenizer.get_added_tokens_decoder())

    def token_to_id(self, token: str) -> int:
        token_id = self._tokenizer.token_to_id(token)
        if token_id is None:
            raise UserError(
                f"no token {token}",
                where=str(self.path),
                expected="the tokenizer of Qwen2-VL or a later family",
                remedy="download the model's tokenizer.json again",
            )
        return int(token_id)

    def list_special_tokens(self) -> tuple[str, ...]:
        added_tokens = self._tokenizer.get_added_tokens_decoder()
        return tuple(
            str(added_tokens[i].content) for i in sorted(added_tokens) if added_tokens[i].special
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        with _translate_library_errors(self.path):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def id_to_token(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or ""

    def id_to_bytes(self, token_id: int) -> bytes:
        name = self.id_to_token(token_id)
        if token_id in self._added_token_ids or not set(name) <= set(_BYTE_DECODER):
            return name.encode()
        return bytes(_BYTE_DECODER[char] for char in name)

    def _tokenize(self, text: str) -> tuple[int, ...]:
        with _translate_library_errors(self.path):
            return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)


LARGEST_ID = 2**31
"""Exclusive upper bound of token ids, which are stored as int32."""

ALLOWED_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD")
"""Normalizers that a `tokenizer.json` of a native family may use.

They change the Unicode form only; other normalizers could truncate or extend texts.
"""

_EXPECTED = "the tokenizer.json of the tokenizers library"
_REMEDY = "download the model's tokenizer.json again"


def check_tokenizer_file(path: Path, *, is_native_family: bool, vocabulary: int) -> None:
    """Validate a `tokenizer.json` before it is loaded.

    A damaged file can crash the process, a normalizer can change texts, and a token id can exceed
    the embedding.

    Args:
        is_native_family: Whether the family has a byte-level vocabulary, so that only
            ALLOWED_NORMALIZERS are accepted.
        vocabulary: Number of rows of the token embedding; all token ids must be smaller.
    """
    content = read_json_object(path, expected=_EXPECTED, remedy=_REMEDY)
    for token, number in _iter_largest_ids(content):
        if not 0 <= number < vocabulary:
            raise UserError(
                f"the token {token!r:.80} has the id {number}",
                where=str(path),
                expected=f"ids below {vocabulary}, the vocab_size of config.json",
                remedy="use both files of the same model",
            )
    for normalizer in _iter_normalizers(content.get("normalizer")):
        normalizer_type = normalizer.get("type")
        if is_native_family and normalizer_type not in ALLOWED_NORMALIZERS:
            raise UserError(
                f"the normalizer is {normalizer_type!r:.80}",
                where=str(path),
                expected=f"none, or one of {', '.join(ALLOWED_NORMALIZERS)}",
                remedy=_REMEDY,
            )
        if normalizer_type == "Precompiled" and not _is_valid_charsmap(
            normalizer.get("precompiled_charsmap")
        ):
            raise UserError(
                "precompiled_charsmap of the normalizer is damaged",
                where=str(path),
                expected="base64 of a trie and its texts",
                remedy=_REMEDY,
            )


def _iter_largest_ids(content: dict[str, Any]) -> Iterator[tuple[object, int]]:
    """Yield (token, id) of the last vocabulary token and of all added tokens.

    The last vocabulary token is that with the largest id.
    """
    model = content.get("model")
    added = content.get("added_tokens")
    words = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(words, dict) and words:
        ids = {word: number for word, number in words.items() if isinstance(number, int)}
        yield max(ids.items(), key=itemgetter(1), default=("", 0))
    if not isinstance(added, list):
        return
    for token in added:
        if isinstance(token, dict) and isinstance(token.get("id"), int):
            yield token.get("content"), token["id"]


def _iter_normalizers(tree: object) -> Iterator[dict[str, object]]:
    """Yield the normalizers of a `tokenizer.json`, including those nested in sequences."""
    if not isinstance(tree, dict):
        return
    parts = tree.get("normalizers")
    if tree.get("type") != "Sequence" or not isinstance(parts, list):
        yield tree
        return
    for part in parts:
        yield from _iter_normalizers(part)


def _is_valid_charsmap(charsmap: object) -> bool:
    """Return True if a base64-encoded charsmap contains a trie of the declared length.

    The tokenizers library allocates memory of the declared length.
    """
    try:
        content = base64.b64decode(str(charsmap), validate=True)
    except ValueError:
        return False
    size = int.from_bytes(content[:4], "little")
    return len(content) >= 4 and size % 4 == 0 and size <= len(content) - 4


@contextmanager
def _translate_library_errors(
    path: Path, error_types: type[Exception] | tuple[()] = ()
) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if not (isinstance(error, error_types) or is_rust_panic(error)):
            raise
        raise UserError(
            f"not a tokenizer ({error})", where=str(path), expected=_EXPECTED, remedy=_REMEDY
        ) from error


def is_rust_panic(error: BaseException) -> bool:
    """Return True if an exception is a panic of a Rust library.

    The check compares the class name, because the exception class cannot be imported.
    """
    return type(error).__name__ == "PanicException"


PRETOKENIZE_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    *(f"<|extra_{number}|>" for number in range(205)),
    "<ref>",
    "</ref>",
    "<box>",
    "</box>",
    "<quad>",
    "</quad>",
    "<img>",
    "</img>",
    "<imgpad>",
)
"""Special tokens of Qwen-VL in the order of their ids.

The ids follow those of the rank file. No file of the model lists the special tokens.
"""


class TiktokenTokenizer(TextTokenizer):
    """Tokenizer loaded from `qwen.tiktoken` that never parses special tokens in text."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        ranks = _read_ranks(path)
        self._special_tokens_by_id = dict(enumerate(SPECIAL_TOKENS, start=len(ranks)))
        self._special_ids = {
            token: token_id for token_id, token in self._special_tokens_by_id.items()
        }
        self._bytes_by_id = {number: token_bytes for token_bytes, number in ranks.items()}
        self.encoding = _build_encoding(ranks, self._special_ids, path)

    def token_to_id(self, token: str) -> int:
        token_id = self._special_ids.get(token)
        if token_id is None:
            raise UserError(
                f"no token {token}",
                where=str(self.path),
                expected="a special token of Qwen-VL, such as <|im_end|> or <img>",
                remedy="choose a model of a family with this token",
            )
        return token_id

    def list_special_tokens(self) -> tuple[str, ...]:
        return SPECIAL_TOKENS

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        pieces: list[bytes] = []
        for token_id in ids:
            if token_id in self._bytes_by_id:
                pieces.append(self._bytes_by_id[token_id])
            elif not skip_special_tokens:
                pieces.append(self._special_tokens_by_id.get(token_id, "").encode())
        return b"".join(pieces).decode(errors="replace")

    def id_to_token(self, token_id: int) -> str:
        token_bytes = self._bytes_by_id.get(token_id)
        if token_bytes is None:
            return self._special_tokens_by_id.get(token_id, "")
        return repr(token_bytes)[2:-1]

    def id_to_bytes(self, token_id: int) -> bytes:
        token_bytes = self._bytes_by_id.get(token_id)
        if token_bytes is None:
            return self._special_tokens_by_id.get(token_id, "").encode()
        return token_bytes

    def _tokenize(self, text: str) -> tuple[int, ...]:
        return tuple(self.encoding.encode_ordinary(unicodedata.normalize("NFC", text)))


def load_tokenizer(folder: ModelFolder) -> TextTokenizer:
    """Load the tokenizer of a native model from `qwen.tiktoken` or `tokenizer.json`."""
    path = folder.tokenizer_file
    if path.suffix == ".tiktoken":
        return TiktokenTokenizer(path)
    text_config = folder.config.get("text_config", folder.config)
    vocabulary = text_config.get("vocab_size") if isinstance(text_config, dict) else None
    if not isinstance(vocabulary, int):
        vocabulary = LARGEST_ID
    check_tokenizer_file(path, is_native_family=True, vocabulary=vocabulary)
    return Tokenizer(path)


def _read_ranks(path: Path) -> dict[bytes, int]:
    """Read a tiktoken rank file: a base64 byte string and its rank per line."""
    ranks: dict[bytes, int] = {}
    try:
        content = read_bytes(path, expected="the qwen.tiktoken of a Qwen-VL model")
        for line in content.splitlines():
            if line:
                token_bytes, rank = line.split()
                key = base64.b64decode(token_bytes, validate=True)
                ranks[key] = int(rank)
    except (ValueError, binascii.Error) as error:
        raise _build_invalid_file_error(path, str(error)) from error
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise _build_invalid_file_error(
            path, f"ranks of {len(ranks)} byte strings are not consecutive from 0"
        )
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _build_invalid_file_error(path, f"the byte {missing[0]} is not a token")
    return ranks


def _build_invalid_file_error(path: Path, reason: str) -> UserError:
    return UserError(
        f"not a tokenizer ({reason})",
        where=str(path),
        expected="the qwen.tiktoken of a Qwen-VL model",
        remedy="download qwen.tiktoken again (a Git LFS pointer is not sufficient)",
    )


def _build_encoding(
    ranks: Mapping[bytes, int], special_tokens: Mapping[str, int], path: Path
) -> tiktoken.Encoding:
    try:
        # Lazy import: an optional dependency of this family only.
        from tiktoken import Encoding
    except ImportError as error:
        raise UserError(
            "the tokenizer requires tiktoken, which is not installed",
            where=str(path),
            expected="finesight with the extra qwen-vl",
            remedy="pip install 'finesight[qwen-vl]'",
        ) from error
    return Encoding(
        path.name,
        pat_str=PRETOKENIZE_PATTERN,
        mergeable_ranks=dict(ranks),
        special_tokens=dict(special_tokens),
    )


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """An image or video of a tokenized sample, and the range of its placeholder tokens.

    Attributes:
        files: The image, the frames of the video, or the video file.
        frame_indices: Indices of the frames in a video file; empty for images.
        variant: Random changes of the image in training, if any.
    """

    kind: Literal["image", "video"]
    start: int
    stop: int
    grid_thw: GridTHW
    files: tuple[Path, ...]
    original_size: ImageSize
    resized_size: ImageSize
    frame_indices: tuple[int, ...] = ()
    variant: ImageVariant | None = None

    @property
    def num_frames(self) -> int:
        """Number of frames before the last one is repeated; 1 for an image."""
        return len(self.frame_indices or self.files)


def iter_video_runs(spans: Iterable[VisualSpan]) -> Iterator[list[VisualSpan]]:
    """Group consecutive spans of one video file whose frames can be decoded in one pass.

    Every other span is its own group.
    """
    run: list[VisualSpan] = []
    for span in spans:
        is_next = (
            run
            and span.frame_indices
            and span.files == run[-1].files
            and span.frame_indices[0] > run[-1].frame_indices[-1]
        )
        if run and not is_next:
            yield run
            run = []
        run.append(span)
    if run:
        yield run


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """Token ids, loss mask and position ids of a sample.

    Built from the text and the image headers; pixels are not decoded.

    Attributes:
        position_ids_3T: M-RoPE positions: time, height and width (Wang et al. 2024, Qwen2-VL,
            section 2.1).
        is_thinking: Whether the sample is rendered in thinking mode. A prompt then ends within the
            reasoning section.
        response_starts: Start of each response of a preference pair. The tokens before the first
            one are the prompt of all responses, which a pack contains once.
    """

    id: str
    ids_T: NDArray[np.int32]
    loss_mask_T: NDArray[np.bool_]
    position_ids_3T: NDArray[np.int32]
    spans: tuple[VisualSpan, ...]
    is_thinking: bool = field(default=False, kw_only=True)
    response_starts: tuple[int, ...] = field(default=(), kw_only=True)

    @property
    def num_tokens(self) -> int:
        return len(self.ids_T)

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that contribute to the loss.

        The first token is not counted, because no earlier token predicts it.
        """
        return int(self.loss_mask_T[1:].sum())

    @property
    def num_answer_tokens(self) -> int:
        """Number of supervised tokens of the last answer, which an evaluation generates."""
        return self.num_supervised_tokens - int(self.loss_mask_T[1 : self._last_answer_start].sum())

    @property
    def _last_answer_start(self) -> int:
        """Index of the first supervised token of the last answer."""
        starts = np.flatnonzero(self.loss_mask_T[1:] & ~self.loss_mask_T[:-1])
        if not len(starts):
            return self.num_tokens
        return int(starts[-1]) + 1

    @property
    def num_packed_tokens(self) -> int:
        """Number of tokens of this sample that a packed batch contains.

        Tokens after the last image and after the token that predicts the last supervised token do
        not affect the loss and are not packed. Without supervised tokens, all tokens are packed.
        """
        predicting = np.flatnonzero(self.loss_mask_T[1:])
        if not len(predicting):
            return self.num_tokens
        end = int(predicting[-1]) + 1
        if self.spans:
            end = max(end, self.spans[-1].stop)
        return end

    @property
    def num_patches(self) -> int:
        return sum(math.prod(span.grid_thw) for span in self.spans)

    def join_responses(self, others: Sequence[TokenizedSample], end: int | None = None) -> Self:
        """Return the last answers of this sample and of the same sample with others, up to `end`.

        Only the last answer of each is supervised. A response begins with the last token of the
        prompt, which predicts its first token, and ends with its last supervised token.
        """
        responses: tuple[TokenizedSample, ...] = (self, *others)
        answer_starts = [one._last_answer_start for one in responses]
        stops = [int(np.flatnonzero(one.loss_mask_T)[-1]) + 1 for one in responses]
        prompt_length = min(answer_starts) - 1
        for other in others:
            # Prompts differ if only one answer contains reasoning.
            is_different = self.ids_T[:prompt_length] != other.ids_T[:prompt_length]
            mismatches = np.flatnonzero(is_different)
            if len(mismatches):
                prompt_length = int(mismatches[0])
        assert not self.spans or self.spans[-1].stop <= prompt_length, f"images of {self.id} differ"

        ids = []
        loss_masks = []
        position_ids = []
        response_starts: list[int] = []
        next_start = prompt_length
        start = 0
        for response, answer_start, stop in zip(responses, answer_starts, stops, strict=True):
            tokens = slice(start, stop)
            ids.append(response.ids_T[tokens])
            loss_masks.append(np.arange(stop)[tokens] >= answer_start)
            position_ids.append(response.position_ids_3T[:, tokens])
            response_starts.append(next_start)
            next_start += stop - prompt_length
            # Only the first response follows its prompt.
            start = prompt_length
        return replace(
            self,
            ids_T=np.concatenate(ids)[:end],
            loss_mask_T=np.concatenate(loss_masks)[:end],
            position_ids_3T=np.hstack(position_ids)[:, :end],
            response_starts=tuple(response_starts),
        )


@dataclass(frozen=True, slots=True)
class EncodedSample:
    """A tokenized sample with the pixel patches of its images and videos.

    Attributes:
        patches_ND: uint8 patches of all images and videos in the order of the transformers image
            processor: grouped by merge block, D = channels x frames x patch_size x patch_size.
            Samples with images only store one frame, which the processor repeats
            (`vision.image_processing.repeat_still_frames`).
        appended_patches: Patches of each image of tool results, after `patches_ND`, which the
            sequences of one prompt share.
        hf_inputs: Processor outputs by name for families without native code, which have no
            patches.
    """

    tokenized: TokenizedSample
    patches_ND: NDArray[np.uint8]
    hf_inputs: Mapping[str, Tensor] = field(default_factory=dict)
    appended_patches: tuple[NDArray[np.uint8], ...] = ()

    def list_patches(self) -> list[NDArray[np.uint8]]:
        """List the arrays of all patches in the order of the spans."""
        # Empty patches have the dimension of videos.
        if self.appended_patches and not len(self.patches_ND):
            return list(self.appended_patches)
        return [self.patches_ND, *self.appended_patches]


def pack_tokenized(tokenized: TokenizedSample) -> JobOutput:
    """Convert a tokenized prompt with images and videos to the output of a job."""
    spans = [asdict(span) | {"files": [*map(str, span.files)]} for span in tokenized.spans]
    return JobOutput(
        {"spans": spans, "is_thinking": tokenized.is_thinking},
        [tokenized.ids_T, tokenized.position_ids_3T],
    )


def unpack_tokenized(reply: JobOutput, sample_id: str) -> TokenizedSample:
    """Restore a tokenized prompt from the output of a job."""
    ids_T, positions_3T = reply.arrays[:2]
    spans = []
    for packed_span in reply.value["spans"]:
        values = {key: _restore_tuple(value) for key, value in packed_span.items()}
        values["files"] = tuple(map(Path, values["files"]))
        spans.append(VisualSpan(**values))
    return TokenizedSample(
        id=sample_id,
        ids_T=ids_T.view(np.int32),
        loss_mask_T=np.zeros(len(ids_T), dtype=np.bool_),
        position_ids_3T=positions_3T.view(np.int32),
        spans=tuple(spans),
        is_thinking=reply.value["is_thinking"],
    )


def _restore_tuple(value: Any) -> Any:
    """Return a list of JSON as a tuple, and any other value unchanged."""
    if isinstance(value, list):
        return tuple(value)
    return value


class CountedSample(Protocol):
    """Interface of samples with known token counts."""

    @property
    def id(self) -> str: ...

    @property
    def num_tokens(self) -> int: ...

    @property
    def num_supervised_tokens(self) -> int: ...


def find_sample_error(sample: CountedSample, max_length: int) -> UserError | None:
    """Return an error if a sample cannot be used for training, else None."""
    where = f"sample {sample.id}"
    if sample.num_tokens > max_length:
        return UserError(
            f"{sample.num_tokens} tokens",
            where=where,
            expected=f"at most {max_length} tokens (data.max_length)",
            remedy="raise data.max_length, set a smaller image size, or set"
            " data.on_invalid_sample: skip",
        )
    if sample.num_supervised_tokens:
        return None
    return UserError(
        "no assistant turn, so no supervised tokens",
        where=where,
        expected="an assistant turn in every sample",
        remedy="remove the sample, or set data.on_invalid_sample: skip",
    )


PositionTHW = tuple[int, int, int]
"""Position ids of a token: time, height and width."""


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Row of a token table: tokens [start, stop), which all have the same id.

    A row is a single token, or all placeholder tokens of one image or video (`span`).
    """

    start: int
    stop: int
    id: int
    text: str
    is_supervised: bool
    first_position: PositionTHW
    last_position: PositionTHW
    span: VisualSpan | None = None


def iter_token_rows(tokenized: TokenizedSample, tokenizer: TextTokenizer) -> Iterator[TokenRow]:
    """Yield the token table rows of a sample, with one row per image or video."""
    spans = {span.start: span for span in tokenized.spans}
    index = 0
    while index < tokenized.num_tokens:
        span = spans.get(index)
        stop = index + 1
        if span is not None:
            stop = span.stop
        token_id = int(tokenized.ids_T[index])
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        if "\ufffd" in text:
            # A token with a part of a character has no text: show its vocabulary entry.
            text = tokenizer.id_to_token(token_id)
        yield TokenRow(
            start=index,
            stop=stop,
            id=token_id,
            text=text,
            is_supervised=bool(tokenized.loss_mask_T[index]),
            first_position=_get_position(tokenized, index),
            last_position=_get_position(tokenized, stop - 1),
            span=span,
        )
        index = stop


def _get_position(tokenized: TokenizedSample, index: int) -> PositionTHW:
    time, height, width = (int(row[index]) for row in tokenized.position_ids_3T)
    return time, height, width


def format_token_table(tokenized: TokenizedSample, tokenizer: TextTokenizer) -> Iterator[str]:
    """Yield the lines of a table of the tokens of a sample; a star marks supervised ones."""
    counts = Counter(span.kind for span in tokenized.spans)
    video_summary = f", video segments: {counts['video']}" if counts["video"] else ""
    rejected = "".join(f", rejected answer from {start}" for start in tokenized.response_starts[1:])
    yield f"sample {tokenized.id}"
    yield (
        f"tokens: {tokenized.num_tokens}, supervised: {tokenized.num_supervised_tokens},"
        f" images: {counts['image']}{video_summary} (patches: {tokenized.num_patches}){rejected}"
    )
    yield f"{'token':>11} {'id':>7} {'loss':<7} {'time, height, width':<27} text"
    for row in iter_token_rows(tokenized, tokenizer):
        tokens = str(row.start)
        text = repr(row.text)
        positions = ", ".join(map(str, row.first_position))
        if row.span is not None:
            tokens = f"{row.start}-{row.stop - 1}"
            positions += f" to {', '.join(map(str, row.last_position))}"
            text = f"{row.stop - row.start} x {row.text} {_format_span(row.span)}"
        mark = "*" if row.is_supervised else ""
        yield f"{tokens:>11} {row.id:>7} {mark:<7} {positions:<27} {text}"


def _format_span(span: VisualSpan) -> str:
    size = _format_size(span.original_size)
    resized = _format_size(span.resized_size)
    frames = ""
    if span.frame_indices:
        frames = f", frames {', '.join(map(str, span.frame_indices))}"
    elif len(span.files) > 1:
        frames = f" and {len(span.files) - 1} more frames"
    grid = " x ".join(map(str, span.grid_thw))
    return f"({span.files[0]}{frames}, {size} as {resized}, grid {grid})"


def _format_size(size: ImageSize) -> str:
    height, width = size
    return f"{width}x{height}"
