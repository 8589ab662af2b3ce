"""Samples that Python code creates, with images in memory, and the files that they become.

Training and evaluation read files. Images in memory are written to files that are named by their
content, and samples to a JSONL file next to them.
"""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from finesight.data.image_file import find_image_suffix
from finesight.data.prompt_format import DEFAULT_PROMPT_FORMAT, build_media_part
from finesight.data.sample import (
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
    validate_sample,
)
from finesight.data.sample import Sample as FileSample
from finesight.errors import UserError, format_count
from finesight.storage import make_folder, write_file

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
        if isinstance(image, str | os.PathLike):
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


def _convert_image(image: object, where: str) -> Image.Image:
    """Return a PIL image of a mode that PNG files represent."""
    # Importing finesight must not import these packages.
    import numpy as np
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray):
        image = _array_to_image(image, where)
    if not isinstance(image, Image.Image):
        raise UserError(
            f"a {type(image).__name__} instead of an image",
            where=where,
            expected="a path, bytes of an image file, a PIL image, or a NumPy array",
            remedy="convert it, for example with numpy.asarray(image)",
        )
    # An opened file then equals its path, which is read with its EXIF orientation.
    image = ImageOps.exif_transpose(image)
    if image.mode in ("P", "PA"):
        has_alpha = image.mode == "PA" or "transparency" in image.info
        image = image.convert("RGBA" if has_alpha else "RGB")
    if image.mode not in PNG_MODES:
        raise UserError(
            f"an image of the mode {image.mode}",
            where=where,
            expected=f"one of {', '.join(PNG_MODES)}, which are written without loss",
            remedy='pass image.convert("RGB")',
        )
    return image


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
    remedy = 'pass image.astype("uint8")'
    if array.ndim == 3 and not is_color and array.shape[0] in (3, 4):
        remedy = "pass image.transpose(1, 2, 0)"
    elif array.dtype.kind == "f":
        remedy = 'for values from 0 to 1, pass (image * 255).round().astype("uint8")'
    raise UserError(
        f"an array of {array.dtype} of shape {array.shape}",
        where=where,
        expected="uint8 of shape (height, width), (height, width, 3) or (height, width, 4)",
        remedy=remedy,
    )


@cache
def _create_session_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="finesight-images-")


def open_session_store() -> ImageStore:
    """Return the store of images whose folder is removed at the end of the session."""
    return ImageStore(Path(_create_session_folder().name))


AnySample = Sample | LocatedSample


def convert_samples(
    samples: Sequence[AnySample], store: ImageStore, where: str, *, require_answer: bool = True
) -> list[FileSample]:
    """Write the images of samples, and return the samples with their paths.

    A sample without ID gets a digest of its content, and a number if the digest is not unique.

    Args:
        where: Name of the argument, for errors.

    Raises:
        UserError: There are no samples, or one is invalid.
    """
    if isinstance(samples, str | os.PathLike) or not isinstance(samples, Sequence) or not samples:
        raise UserError(
            f"{samples!r:.80} instead of samples",
            where=where,
            expected="a list of finesight.Sample",
            remedy=f'{where}=[finesight.Sample(image="a.png", question="...", answer="...")], or '
            f"for files {where}=finesight.api.read_samples(FILE)",
        )
    converted: list[FileSample] = []
    counts: dict[str, int] = {}
    for index, sample in enumerate(samples):
        location = f"{where}[{index}]"
        if isinstance(sample, LocatedSample):
            file_sample = sample.sample.map_paths(partial(_make_absolute, sample.folder))
        else:
            file_sample = _convert_sample(sample, store, location)
        validate_sample(file_sample, location, require_answer=require_answer)
        if not file_sample.id:
            digest = _hash_sample(file_sample)
            counts[digest] = counts.get(digest, 0) + 1
            name = digest if counts[digest] == 1 else f"{digest}-{counts[digest]}"
            file_sample = file_sample.model_copy(update={"id": name})
        converted.append(file_sample)
    return converted


def _make_absolute(folder: Path, name: str) -> str:
    return str(folder.absolute() / name)


def _hash_sample(sample: FileSample) -> str:
    content = encode_json_line(sample_fields(sample, str))
    return hashlib.sha256(content.encode(errors="surrogatepass")).hexdigest()[:16]


def _convert_sample(sample: object, store: ImageStore, where: str) -> FileSample:
    if not isinstance(sample, Sample):
        raise UserError(
            f"a {type(sample).__name__} instead of a sample",
            where=where,
            expected="a finesight.Sample",
            remedy='finesight.Sample(image=image, question="...", answer="...")',
        )
    if sample.messages and (sample.question or sample.answer or sample.image is not None):
        raise UserError(
            "messages beside image, question or answer",
            where=where,
            expected="a conversation, or one question",
            remedy='messages=[finesight.Message("user", [image, "..."]), ...] alone',
        )
    turns: list[dict[str, Any]] = []
    if sample.messages:
        for message in sample.messages:
            parts = _convert_content(message.content, store, where)
            turns.append({"role": message.role, "content": parts, "loss": message.loss})
    else:
        images = [store.save(image, where) for image in list_images(sample.image)]
        media = [build_media_part(path) for path in images]
        content = DEFAULT_PROMPT_FORMAT.build_content(sample.question, media)
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
        return sample_from_dict(record, where)
    except UserError as error:
        error.remedy = "correct the arguments of finesight.Sample or finesight.Message"
        raise


def _convert_content(content: Content, store: ImageStore, where: str) -> list[ContentPart]:
    if isinstance(content, str):
        return [TextPart(text=content)]
    if not isinstance(content, list | tuple):
        raise UserError(
            f"a {type(content).__name__} as the content of a turn",
            where=where,
            expected="a text, or a list of texts, images and boxes",
            remedy='finesight.Message("user", [image, "..."]), or answer="..."',
        )
    parts: list[ContentPart] = []
    for part in content:
        if isinstance(part, str):
            parts.append(TextPart(text=part))
        elif isinstance(part, BoxPart | ToolCallPart):
            parts.append(part)
        else:
            parts.append(build_media_part(store.save(part, where)))
    return parts


def write_sample_file(samples: Sequence[FileSample], file: Path) -> None:
    """Write samples to a JSONL file, whose folder may be missing."""
    make_folder(file.parent)
    write_file(file, b"".join(encode_samples(samples)))


def locate_samples(samples: Sequence[AnySample]) -> list[LocatedSample]:
    """Write the images of samples to files that last until the end of the session.

    Raises:
        UserError: A sample is invalid.
    """
    located: list[LocatedSample] = []
    store = open_session_store()
    for sample in samples:
        if isinstance(sample, LocatedSample):
            located.append(sample)
            continue
        (converted,) = convert_samples([sample], store, "samples", require_answer=False)
        located.append(LocatedSample(converted, store.folder))
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
