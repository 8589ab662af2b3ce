"""Records of samples for tests of the check."""

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finesight.files.storage import write_folder
from finesight.ingest.check.check_issues import CheckIssue
from finesight.ingest.check.check_result import CheckResult
from finesight.ingest.check.data_checker import DataChecker, ModelRequirements, inputs_from_files
from finesight.ingest.check.dataset_fixer import FixResult
from finesight.ingest.import_source import ImportOptions

SampleRecord = dict[str, Any]


def make_record(
    image: str | Path | None, question: str = "What?", answer: str | None = "A square.", *boxes: Any
) -> SampleRecord:
    """Make a question about an image with its answer; each box is four numbers, each point two."""
    images = [] if image is None else [{"type": "image", "image": str(image)}]
    answers: list[Any] = [] if answer is None else [{"type": "text", "text": answer}]
    kinds = {4: ("box", "xyxy"), 2: ("point", "xy")}
    for kind, key, box in ((*kinds[len(box)], [*box]) for box in boxes):
        answers.append({"type": kind, "image": 0, key: box})
    user = {"role": "user", "content": [*images, {"type": "text", "text": question}]}
    return {"messages": [user, {"role": "assistant", "content": answers}]}


def write_records(path: Path, records: Iterable[SampleRecord]) -> Path:
    """A file of samples named by their lines."""
    text = "".join(json.dumps({"id": f"s{n}", **r}) + "\n" for n, r in enumerate(records, 1))
    path.write_text(text, encoding="utf-8")
    return path


def run_check(
    train: Path, validation: Path | None = None, model: ModelRequirements | None = None, **read: Any
) -> CheckResult:
    """What a check of one source, or of two sides, finds."""
    saved = Path(tempfile.mkdtemp(prefix="saved", dir=train.parent))
    request = ImportOptions(**{"format": "samples", **read})
    subjects = inputs_from_files([train], [validation] if validation else [], request)
    return DataChecker(subjects, saved, model).run()[0]


def run_fix(
    train: Path, out: Path, validation: Path | None = None, request: ImportOptions | None = None
) -> FixResult:
    """Run a check with `--fix` into `out`."""
    request = request or ImportOptions(format="samples")
    subjects = inputs_from_files([train], [validation] if validation else [], request)
    with write_folder(out) as staging:
        check = DataChecker(subjects, staging)
        _, album = check.run()
        return check.fixer.write(staging, out, album, check.sources)


def issues_by_line(found: CheckResult, code: str) -> dict[int, CheckIssue]:
    """The findings of one fault by the lines that they are about."""
    return {int(f.where.rsplit(":", 1)[1]): f for f in found.issues if f.code == code}


def count_codes(found: CheckResult) -> dict[str, int]:
    """How often each fault was found."""
    return dict(found.issue_counts)
