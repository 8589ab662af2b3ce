"""A folder of pictures, each with a text file of its name beside it: the text is the answer.

folder/a.jpg, folder/a.txt. What is asked is said by --prompt. Line breaks at the end of a text are
dropped. Pictures without a text are left out and counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from finesight.data.case import Case
from finesight.data.formats.by_picture import TRIMMED, inside, text_beside, texts_by_picture
from finesight.data.formats.format import Format, Reading, Scene, Writing, never, plain
from finesight.data.formats.inventory import inventory
from finesight.data.jsonl import Located, read_bytes
from finesight.data.limits import LARGEST_LABELS
from finesight.data.rows import Row, Rows, rows_of
from finesight.data.sample import Message
from finesight.errors import UserError

WORDLESS = "pictures without a text file of their name"


def open_folder(source: Path) -> tuple[Rows, str] | None:
    """A row for each picture of a folder where at least one has its text beside it."""
    if not source.is_dir():
        return None
    found = inventory(source)
    pictures = found.pictures()
    texts = {text.with_suffix(""): text for text in found.ending(".txt")}
    told = sum(picture.with_suffix("") in texts for picture in pictures)
    if not told:
        return None

    def row(number: int, picture: Path) -> Row:
        text = texts.get(picture.with_suffix(""))
        record = {"id": picture.stem, "image": str(picture), "text": str(text) if text else None}
        return Row(number, str(picture), record, source.stem)

    return rows_of(pictures, row), f"{told} pictures with a text file of their name"


def read(row: Row, reading: Reading) -> list[Case]:
    """See the head of this file for what is read."""
    if row.record["text"] is None:
        reading.left_out[WORDLESS] += 1
        return []
    file = Path(row.record["text"])
    try:
        text = read_bytes(file, LARGEST_LABELS).decode().replace("\r\n", "\n").rstrip("\n")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file.name}: byte {error.start} is not UTF-8 text",
            expected="a text in UTF-8",
            remedy="save the file as UTF-8",
        ) from error
    image = Scene(reading).picture(row.record["image"])
    user = Message(role="user", content=reading.asked([image]))
    return [Case(row.id, (user,), ((plain(text),),))]


def write(samples: Sequence[Located], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """A text file beside each picture, which must lie in the output folder, with one answer."""
    taken: set[str] = set()
    for one in texts_by_picture(samples, writing, set()):
        name = inside(one.path, writing, "a folder of texts")
        text = text_beside(name, taken)
        if len(one.texts) != 1:
            raise UserError(
                f"{len(one.texts)} texts for {text}",
                where=str(one.path),
                expected="one answer for each picture",
                remedy="export as coco, which holds several captions of a picture",
            )
        writing.lost[TRIMMED] += one.texts[0] != one.texts[0].rstrip("\n")
        yield text, f"{one.texts[0]}\n".encode()


FORMAT = Format(
    name="folder",
    looks="a folder of pictures, each with a .txt file of its name beside it",
    keys=frozenset(),
    detect=never,
    read=read,
    takes=frozenset({"prompt"}),
    open=open_folder,
    write=write,
)
