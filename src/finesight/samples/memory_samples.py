"""Samples that Python code creates, with images in memory, and the files that they become.

Training and evaluation read files. Images in memory are written to files that are named by their
content, and samples to a JSONL file next to them.
"""

from __future__ import annotations

import atexit
import hashlib
import io
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finesight.errors import UserError, format_count
from finesight.files.storage import make_folder, write_file
from finesight.samples.image_file import find_image_suffix, list_pages
from finesight.samples.prompt_format import DEFAULT_PROMPT_FORMAT, build_media_part
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    LocatedSample,
    Role,
    TextPart,
    ToolCallPart,
    encode_json_line,
    encode_samples,
    sample_fields,
    sample_from_dict,
    sample_to_dict,
    validate_sample,
)
from finesight.samples.sample import Sample as FileSample

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    ImageData: TypeAlias = bytes | Image.Image | NDArray[np.uint8]
else:
    ImageData = Any

ImageInput: TypeAlias = str | Path | ImageData
"""An image: path, content of an image file, PIL image, or array of shape (height, width, 3)."""

Content: TypeAlias = str | Sequence[str | Path | ImageData | BoxPart | ToolCallPart]
"""A text, or texts, images and boxes in their order: a `str` is a text, a `Path` is a file."""

IMAGES_FOLDER = "images"

PNG_MODES = ("1", "L", "LA", "I;16", "RGB", "RGBA")
"""Modes of PIL images that PNG files represent without loss."""


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """A turn of a conversation.

    Attributes:
        content: A text, or texts, images and boxes in their order. A `str` is a text, and a `Path`
            is an image or video file.
        loss: Whether training uses the answer, if the turn is one.
    """

    role: Role
    content: Content = field(repr=False)
    loss: bool = True


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Sample:
    """A question about images with its answer, or a conversation.

    Attributes:
        image: One image, several, or None: path, content of a file, PIL image, or array of uint8.
        question: The question. `<image>` sets the position of an image; by default, images precede
            the text.
        answer: The answer; empty in a sample that is only a prompt.
        messages: The turns of a conversation, instead of image, question and answer.
        rejected: Worse answer, in a preference pair.
        label: Whether the answer is desirable; None without a verdict.
        references: Further correct answers, used only for scoring.
        id: Name of the sample; by default, a digest of its content.
    """

    # Arrays take many lines as text.
    image: ImageInput | Sequence[ImageInput] | None = field(default=None, repr=False)
    question: str = ""
    answer: Content = ""
    messages: Sequence[Message] = ()
    rejected: Content = ""
    label: bool | None = None
    references: Sequence[str] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    id: str = ""


def list_images(images: ImageInput | Sequence[ImageInput] | None) -> Sequence[ImageInput]:
    """Return images as a list: none, one or several."""
    if images is None:
        return []
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return images
    return [images]


class ImageStore:
    """Folder of images, which are named by their content.

    Args:
        folder: Folder of the samples. The images are in its subfolder `images`.
        is_read_only: Whether images are only named, to compare samples with those of a run.
    """

    def __init__(self, folder: Path, *, is_read_only: bool = False) -> None:
        self.folder = folder
        self.is_read_only = is_read_only

    def save(self, image: object, where: str) -> Path:
        """Write an image, and return its path relative to the folder; absolute for a file.

        Raises:
            UserError: The object is no image, or cannot be written without loss.
        """
        _check_image_type(image, where)
        if isinstance(image, str | os.PathLike):
            _check_path(str(image), where)
            return Path(os.path.abspath(os.path.expanduser(image)))
        if isinstance(image, bytes):
            suffix = _find_suffix(image, where)
            name = Path(IMAGES_FOLDER) / f"{hashlib.sha256(image).hexdigest()[:32]}{suffix}"
            self._write(name, lambda: image)
            return name
        pixels = _convert_image(image, where)
        # The bytes of a PNG file would depend on the version of the library that writes it.
        key = f"{pixels.mode} {pixels.size} ".encode() + pixels.tobytes()
        name = Path(IMAGES_FOLDER) / f"{hashlib.sha256(key).hexdigest()[:32]}.png"
        self._write(name, partial(_encode_png, pixels))
        return name

    def _write(self, name: Path, encode: Callable[[], bytes]) -> None:
        file = self.folder / name
        if self.is_read_only or file.exists():
            return
        make_folder(file.parent)
        write_file(file, encode())


def save_images(
    images: ImageInput | Sequence[ImageInput] | None, store: ImageStore, where: str
) -> list[Path]:
    """Write images and return the paths of their pages.

    Paths are those of `ImageStore.save`.

    Raises:
        UserError: An object is no image, or a document cannot be opened.
    """
    paths: list[Path] = []
    for image in list_images(images):
        path = store.save(image, where)
        # Pages are next to their document. In a read-only store, a new document is missing.
        is_missing = store.is_read_only and not (store.folder / path).exists()
        pages = [path] if is_missing else list_pages(store.folder / path)
        paths += [path.with_name(page.name) for page in pages]
    return paths


def _check_path(path: str, where: str) -> None:
    """Verify that a text is no URL, and not empty."""
    if path and "://" not in path and not path.startswith("data:"):
        return
    raise UserError(
        f"{path:.80} is a URL" if path else "an empty path",
        where=where,
        expected="the path of an image file",
        remedy="download the image, and pass its path" if path else "for no image, pass None",
    )


def _find_suffix(content: bytes, where: str) -> str:
    suffix = find_image_suffix(content)
    if suffix:
        return suffix
    raise UserError(
        f"{len(content):,} bytes of no image format",
        where=where,
        expected="the content of an image file, such as JPEG or PNG",
        remedy='for pixels, pass an array of shape (height, width, 3) of dtype "uint8"',
    )


def _check_image_type(image: object, where: str) -> None:
    import numpy as np
    from PIL import Image

    if not isinstance(image, str | os.PathLike | bytes | Image.Image | np.ndarray):
        raise UserError(
            f"a {type(image).__name__} instead of an image",
            where=where,
            expected="a path, bytes of an image file, a PIL image, or a NumPy array",
            remedy="convert it, for example with numpy.asarray(image)",
        )


def _convert_image(image: object, where: str) -> Image.Image:
    """Return a PIL image of a mode that PNG files represent, without metadata."""
    # Importing finesight must not import these packages.
    import numpy as np
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray):
        image = _array_to_image(image, where)
    assert isinstance(image, Image.Image), "an image of a type that is not checked"
    try:
        image.load()
        # An opened file then equals its path, which is read with its EXIF orientation.
        image = _convert_mode(ImageOps.exif_transpose(image))
    except (OSError, ValueError) as error:
        raise UserError(
            f"an image that cannot be read ({error})",
            where=where,
            expected="a complete and open image",
            remedy="open the file again, or pass its path",
        ) from error
    if image.mode not in PNG_MODES or "transparency" in image.info:
        raise _build_mode_error(image, where)
    if 0 in image.size:
        raise UserError(
            f"an image of {image.width} x {image.height} pixels",
            where=where,
            expected="an image with pixels",
            remedy="correct the size of the image",
        )
    image = image.copy()
    image.info = {}
    return image


def _convert_mode(image: Image.Image) -> Image.Image:
    """Convert the palette and the transparent color of an image to channels."""
    has_color = "transparency" in image.info
    if image.mode in ("P", "PA"):
        return image.convert("RGBA" if has_color or image.mode == "PA" else "RGB")
    if has_color and image.mode in ("1", "L"):
        return image.convert("LA")
    if has_color and image.mode == "RGB":
        return image.convert("RGBA")
    return image


def _build_mode_error(image: Image.Image, where: str) -> UserError:
    remedy = 'pass image.convert("RGB")'
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        remedy = "scale the values to 0 to 255, such as for 16 bits with"
        remedy += ' (numpy.asarray(image) // 256).astype("uint8")'
    text = " with a transparent color" if "transparency" in image.info else ""
    return UserError(
        f"an image of the mode {image.mode}{text}",
        where=where,
        expected=f"one of {', '.join(PNG_MODES)}, which are written without loss",
        remedy=remedy,
    )


def _encode_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", compress_level=1)
    return file.getvalue()


def _array_to_image(array: NDArray[Any], where: str) -> Image.Image:
    from PIL import Image

    is_gray = array.ndim == 2
    is_color = array.ndim == 3 and array.shape[2] in (3, 4)
    if array.dtype == "uint8" and array.size and (is_gray or is_color):
        return Image.fromarray(array)
    remedy = _suggest_shape(array.shape) or _suggest_type(array.dtype)
    raise UserError(
        f"an array of {array.dtype} of shape {array.shape}",
        where=where,
        expected="uint8 of shape (height, width), (height, width, 3) or (height, width, 4)",
        remedy=remedy,
    )


def _suggest_shape(shape: tuple[int, ...]) -> str:
    """Return the remedy for a wrong shape; empty for a correct one."""
    if 0 in shape:
        return "correct the size of the image"
    if len(shape) == 2 or (len(shape) == 3 and shape[2] in (3, 4)):
        return ""
    if len(shape) == 4:
        return "pass several images as a list: list(images)"
    if len(shape) == 3 and shape[2] == 1:
        return "pass image[..., 0]"
    if len(shape) == 3 and shape[0] == 1:
        return "pass image[0]"
    if len(shape) == 3 and shape[0] in (3, 4):
        return "pass image.transpose(1, 2, 0)"
    return "pass an array of one of these shapes"


def _suggest_type(dtype: np.dtype[Any]) -> str:
    """Return the remedy for values of a wrong type. Conversion alone would wrap them."""
    if dtype.kind == "f":
        return 'for values from 0 to 1, pass (image * 255).round().astype("uint8")'
    if dtype.kind == "b":
        return 'pass image.astype("uint8") * 255'
    if dtype == "uint16":
        return 'for values of 16 bits, pass (image // 256).astype("uint8")'
    return 'scale the values to 0 to 255, then pass image.clip(0, 255).astype("uint8")'


_creating_folder = threading.Lock()


@cache
def _create_session_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="finesight-images-")
    atexit.register(_remove_session_folder, folder, os.getpid())
    return Path(folder)


def _remove_session_folder(folder: str, process_id: int) -> None:
    """Remove the folder in the process that created it. A forked one keeps it."""
    if os.getpid() == process_id:
        shutil.rmtree(folder, ignore_errors=True)


def open_session_store() -> ImageStore:
    """Return the store of images whose folder is removed at the end of the session."""
    with _creating_folder:
        return ImageStore(_create_session_folder())


AnySample = Sample | LocatedSample


def convert_samples(
    samples: Sequence[AnySample], store: ImageStore, where: str
) -> list[FileSample]:
    """Write the images of samples, and return the samples with their paths.

    A sample without ID gets a digest of its content, and a number if the digest is not unique.

    Args:
        where: Name of the argument, for errors.

    Raises:
        UserError: There are no samples, or one is invalid.
    """
    check_samples(samples, where)
    converted: list[FileSample] = []
    counts: dict[str, int] = {}
    locations: dict[str, str] = {}
    for index, sample in enumerate(samples):
        location = f"{where}[{index}]"
        if isinstance(sample, LocatedSample):
            file_sample = sample.sample.map_paths(partial(_make_absolute, sample.folder))
            validate_sample(file_sample, location)
        else:
            file_sample = _convert_sample(sample, store, location)
        if not file_sample.id:
            digest = _hash_sample(file_sample)
            counts[digest] = counts.get(digest, 0) + 1
            name = digest if counts[digest] == 1 else f"{digest}-{counts[digest]}"
            file_sample = file_sample.model_copy(update={"id": name})
        other = locations.setdefault(file_sample.id, location)
        if other != location:
            raise UserError(
                f"the id {file_sample.id!r:.80} of {other}",
                where=location,
                expected="a different id for each sample",
                remedy="correct it, or remove id for a digest of the content; to repeat samples,"
                ' set epochs; for files with the same ids, pass data={"train": [FILE, FILE]}',
            )
        converted.append(file_sample)
    return converted


def check_samples(samples: object, where: str, *, may_be_empty: bool = False) -> None:
    """Verify the types of samples before an image is written.

    Raises:
        UserError: It is no list or a similar sequence, or a sample has an argument of a wrong type.
    """
    is_list = isinstance(samples, Sequence) and not isinstance(samples, str | bytes)
    if not is_list or not (samples or may_be_empty):
        raise _build_list_error(samples, where)
    assert isinstance(samples, Sequence)
    for index, sample in enumerate(samples):
        if not isinstance(sample, LocatedSample):
            _check_types(sample, f"{where}[{index}]")


def _build_list_error(samples: object, where: str) -> UserError:
    return UserError(
        f"{samples!r:.80} instead of samples",
        where=where,
        expected="a list of finesight.Sample",
        remedy=f'{where}=[finesight.Sample(image="a.png", question="...", answer="...")], or '
        f"for files {where}=finesight.api.read_samples(FILE)",
    )


def _make_absolute(folder: Path, name: str) -> str:
    return str(folder.absolute() / name)


def _hash_sample(sample: FileSample) -> str:
    content = encode_json_line(sample_fields(sample, str))
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


_FIELD_TYPES: Mapping[str, tuple[type, ...]] = {
    "question": (str,),
    "answer": (str, list, tuple),
    "messages": (list, tuple),
    "rejected": (str, list, tuple),
    "references": (list, tuple),
    "tools": (list, tuple),
    "meta": (Mapping,),
    "id": (str,),
}
_ITEM_TYPES: Mapping[str, type] = {"messages": Message, "references": str, "tools": Mapping}


def _check_types(sample: object, where: str) -> None:
    """Verify the types of the arguments of a sample, and of the items of lists."""
    if not isinstance(sample, Sample):
        raise UserError(
            f"a {type(sample).__name__} instead of a sample",
            where=where,
            expected="a finesight.Sample",
            remedy='finesight.Sample(image=image, question="...", answer="...")',
        )
    for name, types in _FIELD_TYPES.items():
        value: Any = getattr(sample, name)
        _check_type(value, types, name, where)
        if name in _ITEM_TYPES:
            for index, item in enumerate(value):
                _check_type(item, (_ITEM_TYPES[name],), f"{name}[{index}]", where)
    _check_json(sample, where)
    for image in list_images(sample.image):
        _check_image_type(image, where)
    for content in (sample.answer, sample.rejected, *(one.content for one in sample.messages)):
        _check_content(content, where)
    if sample.messages and (sample.question or sample.answer or sample.image is not None):
        raise UserError(
            "messages beside image, question or answer",
            where=where,
            expected="a conversation, or one question",
            remedy='messages=[finesight.Message("user", [image, "..."]), ...] alone',
        )


def _check_type(value: object, types: tuple[type, ...], name: str, where: str) -> None:
    if isinstance(value, types):
        return
    raise UserError(
        f"{name} is a {type(value).__name__}",
        where=where,
        expected=" or ".join(one.__name__ for one in types),
        remedy='finesight.Sample(image=image, question="...", answer="...", references=["..."]), or'
        ' for a conversation messages=[finesight.Message("user", [image, "..."]), ...]',
    )


def _check_content(content: object, where: str) -> None:
    """Verify the types of a turn and of its parts."""
    if isinstance(content, str):
        return
    if not isinstance(content, list | tuple):
        raise UserError(
            f"a {type(content).__name__} as the content of a turn",
            where=where,
            expected="a text, or a list of texts, images and boxes",
            remedy='finesight.Message("user", [image, "..."]), or answer="..."',
        )
    for part in content:
        if not isinstance(part, str | BoxPart | ToolCallPart):
            _check_image_type(part, where)


def _check_json(sample: Sample, where: str) -> None:
    """Verify that a file can represent the values of meta and tools."""
    try:
        json.dumps([dict(sample.meta), *map(dict, sample.tools)], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(
            f"meta or tools: {error}",
            where=where,
            expected="values of JSON: text, finite number, bool, None, list or dict",
            remedy="convert them, for example with str(value) or value.tolist()",
        ) from error


def _convert_sample(
    sample: Sample, store: ImageStore, where: str, *, require_answer: bool = True
) -> FileSample:
    """Write the images of a sample, and return it with their paths."""
    turns: list[dict[str, Any]] = []
    if sample.messages:
        for message in sample.messages:
            parts = _convert_content(message.content, store, where)
            turns.append({"role": message.role, "content": parts, "loss": message.loss})
    else:
        media = [build_media_part(path) for path in save_images(sample.image, store, where)]
        try:
            content = DEFAULT_PROMPT_FORMAT.build_content(sample.question, media)
        except UserError as error:
            error.where = where
            raise
        turns.append({"role": "user", "content": content})
        if sample.answer:
            parts = _convert_content(sample.answer, store, where)
            turns.append({"role": "assistant", "content": parts})
    record = {
        "id": sample.id,
        "tools": tuple(map(dict, sample.tools)),
        "messages": turns,
        "rejected": _convert_content(sample.rejected, store, where) if sample.rejected else (),
        "label": sample.label,
        "references": tuple(sample.references),
        "meta": dict(sample.meta),
    }
    try:
        file_sample = sample_from_dict(record, where)
    except UserError as error:
        error.remedy = "correct the arguments of finesight.Sample or finesight.Message"
        raise
    validate_sample(file_sample, where, require_answer=require_answer)
    check_text(encode_json_line(sample_to_dict(file_sample)), where)
    return file_sample


def check_text(text: object, where: str) -> None:
    """Raise UserError for an object that is no text of a UTF-8 file."""
    if not isinstance(text, str):
        raise UserError(
            f"a {type(text).__name__} instead of a text",
            where=where,
            expected="a str",
            remedy="pass a text, which may be empty",
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a text with {error.object[error.start]!a}, which is half of a character",
            where=where,
            expected="texts that UTF-8 represents",
            remedy='text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")',
        ) from error


def _convert_content(content: Content, store: ImageStore, where: str) -> list[ContentPart]:
    if isinstance(content, str):
        return [TextPart(text=content)]
    parts: list[ContentPart] = []
    for part in content:
        if isinstance(part, str):
            parts.append(TextPart(text=part))
        elif isinstance(part, BoxPart | ToolCallPart):
            parts.append(part)
        else:
            parts += map(build_media_part, save_images([part], store, where))
    return parts


def write_sample_file(samples: Sequence[FileSample], file: Path) -> None:
    """Write samples to a JSONL file, whose folder may be missing."""
    make_folder(file.parent)
    write_file(file, b"".join(encode_samples(samples)))


def locate_samples(
    samples: Sequence[AnySample], store: ImageStore | None = None
) -> list[LocatedSample]:
    """Write the images of samples to files.

    Args:
        store: Folder of the files; by default, they last until the end of the session.

    Raises:
        UserError: A sample is invalid.
    """
    check_samples(samples, "samples", may_be_empty=True)
    located: list[LocatedSample] = []
    store = store or open_session_store()
    for index, sample in enumerate(samples):
        if not isinstance(sample, LocatedSample):
            converted = _convert_sample(sample, store, f"samples[{index}]", require_answer=False)
            if not converted.id:
                converted = converted.model_copy(update={"id": _hash_sample(converted)})
            sample = LocatedSample(converted, store.folder)
        located.append(sample)
    return located


def find_changed_sample(samples: Sequence[FileSample], file: Path) -> str:
    """Describe the first difference between samples and a file; empty if they are equal."""
    recorded = file.read_bytes().splitlines(keepends=True) if file.is_file() else []
    if len(recorded) != len(samples):
        return f"{format_count(len(samples), 'sample')} instead of {len(recorded)}"
    for index, line in enumerate(encode_samples(samples)):
        if line != recorded[index]:
            return f"sample {index} ({samples[index].id!r:.60}) has changed"
    return ""
