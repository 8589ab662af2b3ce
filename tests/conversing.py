"""Records of samples in few words, for tests of the check."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finesight.check.findings import Checked, Finding
from finesight.check.mending import Mended
from finesight.check.run import Check
from finesight.check.subjects import Model, of_files
from finesight.data.opening import Request
from finesight.storage import write_folder

Record = dict[str, Any]


def sample(
    image: str | Path | None, question: str = "What?", answer: str | None = "A square.", *boxes: Any
) -> Record:
    """A question about a picture and its answer; each box is four numbers."""
    asked: list[Record] = [] if image is None else [{"type": "image", "image": str(image)}]
    asked.append({"type": "text", "text": question})
    said: list[Record] = [] if answer is None else [{"type": "text", "text": answer}]
    said += [{"type": "box", "image": 0, "xyxy": list(box)} for box in boxes]
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    return {"messages": turns}


def lines(path: Path, records: Iterable[Record]) -> Path:
    """A file of samples named by their lines."""
    text = "".join(json.dumps({"id": f"s{n}", **r}) + "\n" for n, r in enumerate(records, 1))
    path.write_text(text, encoding="utf-8")
    return path


def checked(
    train: Path, held_out: Path | None = None, model: Model | None = None, **read: Any
) -> Checked:
    """What a check of one source, or of two sides, finds."""
    saved = train.parent / f"saved {train.name}"
    saved.mkdir()
    request = Request(**{"format": "samples", **read})
    subjects = of_files([train], [held_out] if held_out else [], request)
    return Check(subjects, saved, model).run()[0]


def mended(
    train: Path, out: Path, held_out: Path | None = None, request: Request | None = None
) -> Mended:
    """A check whose findings are mended into `out`."""
    request = request or Request(format="samples")
    subjects = of_files([train], [held_out] if held_out else [], request)
    with write_folder(out) as staging:
        check = Check(subjects, staging)
        _, album = check.run()
        return check.mending.write(staging, out, album, check.drafts)


def by_line(found: Checked, code: str) -> dict[int, Finding]:
    """The findings of one fault by the lines that they are about."""
    return {int(f.where.rsplit(":", 1)[1]): f for f in found.findings if f.code == code}


def codes(found: Checked) -> dict[str, int]:
    """How often each fault was found."""
    return dict(found.counts)
