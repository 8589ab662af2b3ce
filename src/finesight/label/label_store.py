"""Decisions of a labelling session: a journal with the history, and a file of training samples.

`journal.jsonl` is append-only, with one entry per suggestion and decision, and flushed to disk
after each decision. An incomplete last line, left by a crash, is removed. `labels.jsonl` is written
atomically from the journal and contains the labeled samples for training. With a
training fraction, some of them are in `labels_eval.jsonl` instead.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, ValidationError

from finesight.errors import LABEL_TRAIN_FRACTION, UserError
from finesight.files.bounded_files import MAX_FILE_BYTES, read_json
from finesight.files.storage import (
    FileLock,
    append_line,
    check_writable_folder,
    find_free_path,
    flush_file,
    make_folder,
    translate_os_errors,
    truncate_file,
    write_file,
    write_files,
)
from finesight.samples.image_file import CorruptImageError, get_file
from finesight.samples.image_split import group_rows
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    PointPart,
    Sample,
    TextPart,
    encode_samples,
    read_samples,
    relocate_sample,
    validate_sample,
)
from finesight.settings.config import Recipe
from finesight.settings.setting_types import is_url
from finesight.vision.image_reader import NUM_IMAGE_WORKERS, ImageReader, create_image_pool

JOURNAL_FILE, LABELS_FILE, EVAL_FILE = "journal.jsonl", "labels.jsonl", "labels_eval.jsonl"
FRACTION_FILE, SOURCES_FILE, REVIEWED_FILE = "train_fraction.txt", "sources.json", "reviewed.json"

ENTRY_START = b'{"time":'
"""Start of each line of the journal."""

ORIGINAL_PROMPT_KEY = "original_prompt"
"""Key in the metadata of a label for the question that the user has corrected."""

LABELS_PER_WRITE = 500
"""`labels.jsonl` is written after one decision for each so many labels that it contains."""

ANSWER_EVENTS = ("written", "accepted", "corrected")
"""Decisions with an answer: without a suggestion, equal to it, or different from it."""

AnswerKind = Literal["text", "fields", "classes", "boxes", "points"]

AnswerContent = tuple[TextPart | BoxPart, ...]
"""Content of an answer: a text, or boxes and points."""

LabelEvent = Literal["suggested", "written", "accepted", "corrected", "skipped", "reopened"]


@dataclass(frozen=True, slots=True)
class SuggestedPart:
    """Confidence of one part of a suggested answer.

    Attributes:
        path: Keys and list indices of a JSON field; the index of a box; empty for a text.
    """

    path: tuple[str | int, ...]
    confidence: float


@dataclass(frozen=True, slots=True)
class Suggestion:
    """Suggested answer to a sample with confidences in [0, 1].

    Attributes:
        loss: Negative log likelihood of the answer, in nats.
        score: Probability that the label of the sample is wrong; None for an unlabeled sample.
    """

    id: str
    content: AnswerContent
    confidence: float
    parts: tuple[SuggestedPart, ...]
    loss: float = 0.0
    score: float | None = None


class JournalEntry(BaseModel):
    """Line of the journal: a suggestion, or a decision about a sample.

    Attributes:
        model: Run or model of the suggestion; empty without one.
        confidence: Confidence of the suggestion; None without one.
        content: Suggested answer, or the label of the sample; empty if a skipped or reopened sample
            has none.
        parts: Confidence of each part of the suggestion.
        score: Score of a review; None for a suggestion of a new label.
        sample: Digest of the images or else the questions, to notice another sample with this ID.
        version: Digest of question and existing answer. A changed sample is open again.
        question: Corrected texts of the question; empty for an unchanged one.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    time: datetime
    event: LabelEvent
    id: str
    model: str = ""
    confidence: float | None = None
    content: tuple[Annotated[TextPart | BoxPart | PointPart, Discriminator("type")], ...] = ()
    parts: tuple[SuggestedPart, ...] = ()
    score: float | None = None
    sample: str = ""
    version: str = ""
    question: tuple[str, ...] = ()


class LabelItem:
    """Sample with its newest suggestion and decision.

    Attributes:
        is_listed: Whether the sample is to be labeled or reviewed.
        decision: Newest decision; None if the sample is undecided.
        draft: Newest saved answer, also after the sample was reopened.
        question: Texts of the last question, as corrected by the newest saved answer.
        digest, version: See `JournalEntry`.
        has_path_id: Whether the ID is the path of the image, as the user named it.
        images: Paths of the images.
    """

    def __init__(self, located: LocatedSample, *, review: bool) -> None:
        self.sample = located
        self._reset()
        self.is_listed = review or self.existing_answer is None
        sample, parts = located.sample, [*located.sample.iter_parts()]
        images = (part.image for part in parts if isinstance(part, ImagePart))
        self.images = [*map(located.resolve_path, images)]
        self.has_path_id = {str(get_file(path)) for path in self.images} == {sample.id}
        turns = [turn for turn in sample.messages if turn.role != "assistant"]
        questions = [turn.model_dump_json(exclude={"loss"}) for turn in turns]
        self.digest = _compute_digest([*map(os.path.realpath, self.images)] or questions)
        texts = [one.model_dump_json() for one in parts if isinstance(one, TextPart | BoxPart)]
        self.version = _compute_digest([sample.messages[-1].role, *texts])

    def _reset(self) -> None:
        self.history = list[JournalEntry]()
        self.suggestion: JournalEntry | None = None
        self.decision: JournalEntry | None = None
        self.draft: AnswerContent = ()
        self.question = list_question_texts(self.sample.sample)

    @property
    def existing_answer(self) -> AnswerContent | None:
        """Answer that the sample had before; None for an unlabeled sample."""
        last = self.sample.sample.messages[-1]
        if last.role != "assistant":
            return None
        return tuple(part for part in last.content if isinstance(part, TextPart | BoxPart))

    @property
    def label(self) -> AnswerContent | None:
        """Saved answer, or else the existing answer."""
        if self.decision is not None and self.decision.event != "skipped":
            return self.decision.content
        return self.existing_answer

    @property
    def proposal(self) -> AnswerContent:
        """Answer that the page shows first: the draft, or else the label or the suggestion."""
        if self.draft or self.label is not None:
            return self.draft or self.label or ()
        return () if self.suggestion is None else self.suggestion.content

    def apply(self, entry: JournalEntry) -> None:
        """Update the item by an entry of the journal."""
        self.history.append(entry)
        if entry.version not in ("", self.version):
            return
        if entry.event == "suggested":
            self.suggestion = entry
        else:
            self.decision = None if entry.event == "reopened" else entry
            if entry.event in ANSWER_EVENTS:
                self.draft = entry.content
                self.question = entry.question or list_question_texts(self.sample.sample)

    def undo(self) -> None:
        """Withdraw the last entry, which the journal does not have."""
        *entries, _ = self.history
        self._reset()
        for entry in entries:
            self.apply(entry)


class LabelStore(AbstractContextManager["LabelStore"]):
    """Labels of a folder, which one process at a time may open.

    Items are ordered by the confidence of their suggestions, least certain first, or by the score
    of a review, highest first. Samples without a suggestion follow in their own order.
    """

    def __init__(
        self,
        folder: Path,
        samples: Sequence[LocatedSample],
        *,
        review: bool,
        train_fraction: float | None = None,
    ) -> None:
        """Open or create a folder and read its journal.

        Args:
            samples: Samples to label; those with an answer are listed in a review only.
            train_fraction: Fraction of the labels for training; the others are for validation.
                None: that of the last session with a fraction, or else all.

        Raises:
            UserError: Another process uses the folder, the journal is damaged, or samples share an
                ID.
        """
        self.folder = folder
        _check_label_folder(folder)
        make_folder(folder)
        self._journal = folder / JOURNAL_FILE
        with translate_os_errors(self._journal):
            self._lock = FileLock(self._journal, os.O_RDWR | os.O_CREAT)
        self.images = ImageReader(create_image_pool())
        # Each file is decoded once, because this takes long: key of the pixels, and the reason
        # if it is unreadable.
        self._decoded: dict[str, tuple[str, str]] = {}
        # Items of the decisions that are being saved together. An error withdraws one decision per
        # element, so an item may occur several times.
        self._changed: list[LabelItem] | None = None
        try:
            self._lock.acquire(wait=False)
            self._journal_stat = os.stat(self._journal)
            lines = read_complete_lines(self._journal, ENTRY_START)
            entries = read_journal(self._journal, lines)
            remove_incomplete_line(self._journal, lines)
            self._items = _build_items(samples, entries, review)
            # The labels of images that are not loaded now are kept. A review replaces all labels.
            known_ids = self._apply_entries(entries).union(self._items)
            others = [] if review else [one.sample for one in read_labels(folder)]
            self._others = [sample for sample in others if sample.id not in known_ids]
            self._train_fraction = _store_fraction(folder / FRACTION_FILE, train_fraction)
            # A crash may have ended the last session before it wrote its labels.
            decided = (one.id in self._items for one in entries if one.event != "suggested")
            self._num_unwritten = int(any(decided))
            # The first decision does not wait for the images of earlier labels.
            self._select_eval_ids(self._list_labeled())
        except BlockingIOError as error:
            self._lock.close()
            raise UserError(
                "another process labels in this folder",
                where=str(self.folder),
                expected="one process per folder",
                remedy="use the page of that process, or another --out",
            ) from error
        except BaseException:
            self._lock.close()
            raise
        self._order: list[str] = []
        self.sort()

    def _apply_entries(self, entries: Sequence[JournalEntry]) -> set[str]:
        """Update the items, and return the IDs of other samples that lost their label."""
        withdrawn_ids: set[str] = set()
        for entry in entries:
            item = self._items.get(entry.id)
            if item is None:
                # Decisions about samples that are not loaded remain in the journal.
                if entry.event != "suggested" and entry.content:
                    withdrawn_ids.discard(entry.id)
                elif entry.event != "suggested":
                    withdrawn_ids.add(entry.id)
            elif entry.sample in ("", item.digest):
                item.apply(entry)
            else:
                from finesight.train.run_dir import RunDir

                raise UserError(
                    f"the folder has labels of another sample with the ID {entry.id!r:.200}",
                    where=str(self._journal),
                    expected="the samples for which the folder was created",
                    remedy=f"choose a free folder: --out {RunDir(self.folder).next_path}",
                )
        return withdrawn_ids

    def _check_folder(self) -> None:
        """Raise UserError if the folder was moved or replaced during the session."""
        with suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(os.stat(self._journal), self._journal_stat):
                return
        raise UserError(
            "the folder was moved or deleted during this session",
            where=str(self.folder),
            expected="the folder with the earlier decisions of the session",
            remedy="move it back, from .finesight/trash if the studio moved it, and save again",
        )

    @property
    def items(self) -> Sequence[LabelItem]:
        """Listed items in the order of the page."""
        return [self._items[sample_id] for sample_id in self._order]

    def sort(self) -> None:
        """Order the listed items by their suggestions."""

        def key(item: LabelItem) -> float:
            entry = item.suggestion
            if entry is None:
                return 2.0
            if entry.score is not None:
                return -entry.score
            return 1.0 if entry.confidence is None else entry.confidence

        listed = [item for item in self._items.values() if item.is_listed]
        self._order = [item.sample.sample.id for item in sorted(listed, key=key)]

    def find(self, sample_id: str) -> LabelItem:
        """Return the listed item with an ID. Raises UserError if there is none."""
        item = self._items.get(sample_id)
        if item is None or not item.is_listed:
            raise UserError(
                f"{sample_id!r:.200} is not a sample of this session",
                where="label",
                expected="the ID of a listed sample",
                remedy="reload the page",
            )
        return item

    def exclude(self, sample_ids: Iterable[str]) -> None:
        """Remove samples with unreadable images from the list."""
        for sample_id in sample_ids:
            self.find(sample_id).is_listed = False
        self.sort()

    def count_events(self) -> dict[str, int]:
        """Count the listed items by decision; `open` are undecided."""
        events = Counter(item.decision.event if item.decision else "open" for item in self.items)
        return {name: events[name] for name in ("open", *ANSWER_EVENTS, "skipped")}

    def list_answers(self) -> list[Sequence[ContentPart]]:
        """Return the answers of all labeled samples, also of those that are not loaded now."""
        others = [sample.messages[-1].content for sample in self._others]
        return [*others, *(item.label for item in self._items.values() if item.label)]

    def list_unsuggested(self, model: str) -> list[LocatedSample]:
        """Return the undecided samples whose newest suggestion is not from this model."""
        return [
            item.sample
            for item in self.items
            if item.decision is None and (item.suggestion is None or item.suggestion.model != model)
        ]

    def add_suggestions(self, suggestions: Iterable[Suggestion], model: str) -> None:
        """Append suggestions to the journal, and sort the items."""
        self._check_folder()
        for suggestion in suggestions:
            score = suggestion.score
            self._append(
                self._items[suggestion.id],
                event="suggested",
                model=model,
                confidence=round(suggestion.confidence, 6),
                content=suggestion.content,
                parts=suggestion.parts,
                score=None if score is None else round(score, 6),
            )
        flush_file(self._journal)
        self.sort()

    def save_label(
        self,
        sample_id: str,
        content: AnswerContent,
        suggested: AnswerContent | None = None,
        question: Sequence[str] | None = None,
    ) -> None:
        """Save the answer of a sample, as accepted if it equals the old answer or the suggestion.

        Args:
            suggested: Parts of the suggestion that the page proposed. None: all of them.
            question: Texts of the question, which may be corrected. None: those of the sample.

        Raises:
            UserError: The content is not a valid answer.
        """
        item = self.find(sample_id)
        corrected = self._find_correction(item, question)
        labeled = self._build_labeled(item, content, corrected).sample
        validate_sample(labeled, f"sample {sample_id}")
        unchanged = item.existing_answer
        if unchanged is None and suggested is None and item.suggestion is not None:
            suggested = item.suggestion.content
        unchanged = unchanged or suggested
        event: LabelEvent = "corrected" if unchanged else "written"
        is_accepted = content == unchanged and not corrected
        self._decide(item, "accepted" if is_accepted else event, content, corrected)

    def _find_correction(self, item: LabelItem, question: Sequence[str] | None) -> tuple[str, ...]:
        """Return the texts of a corrected question; empty for an unchanged one."""
        texts = list_question_texts(item.sample.sample)
        if question is None or (corrected := tuple(question)) == texts:
            return ()
        if len(corrected) != len(texts) or not any(text.strip() for text in corrected):
            remedy, where = "enter a prompt, or reset it", item.sample.sample.id
            raise UserError(
                "the prompt is empty", where=where, expected="a question", remedy=remedy
            )
        return corrected

    def skip(self, sample_id: str) -> None:
        """Skip a sample: an unlabeled one gets no label, and another keeps its answer."""
        item = self.find(sample_id)
        self._decide(item, "skipped", item.existing_answer or ())

    def reopen(self, sample_id: str) -> None:
        """Withdraw the decision about a sample."""
        item = self.find(sample_id)
        if item.decision is not None:
            self._decide(item, "reopened", item.existing_answer or ())

    def _append(self, item: LabelItem, **values: Any) -> None:
        """Append an entry to the journal, and update its item."""
        values |= {"id": item.sample.sample.id, "sample": item.digest, "version": item.version}
        entry = JournalEntry(time=datetime.now(UTC), **values)
        append_line(self._journal, entry.model_dump_json(exclude_none=True, by_alias=True))
        item.apply(entry)

    def _decide(
        self,
        item: LabelItem,
        event: LabelEvent,
        content: AnswerContent,
        question: tuple[str, ...] = (),
    ) -> None:
        self._check_folder()
        last = item.decision
        values: dict[str, Any] = {"event": event, "content": content, "question": question}
        if last is not None and (last.event, last.content, last.question) == (*values.values(),):
            return
        if item.suggestion is not None:
            values |= item.suggestion.model_dump(include={"model", "confidence"})
        if self._changed is not None:
            self._add_decision(item, values, self._changed)
            return
        with self._keep_all_or_none() as changed:
            self._add_decision(item, values, changed)
            flush_file(self._journal)
            if self._num_unwritten > len(self._items) // LABELS_PER_WRITE:
                self.write_labels()

    def _add_decision(
        self, item: LabelItem, values: Mapping[str, Any], changed: list[LabelItem]
    ) -> None:
        self._append(item, **values)
        changed.append(item)
        self._num_unwritten += 1

    @contextmanager
    def write_once(self) -> Iterator[None]:
        """Flush the journal and write the labels once, after all decisions within the context.

        After an error, none of these decisions is kept.
        """
        with self._keep_all_or_none():
            yield
            flush_file(self._journal)
            if self._num_unwritten:
                self.write_labels()

    @contextmanager
    def _keep_all_or_none(self) -> Iterator[list[LabelItem]]:
        """Yield the list of changed items, whose decisions are withdrawn after an error."""
        self._check_folder()
        size = self._journal.stat().st_size
        num_unwritten = self._num_unwritten
        changed = self._changed = list[LabelItem]()
        try:
            yield changed
        except BaseException:
            self._num_unwritten = num_unwritten
            for item in changed:
                item.undo()
            if self._journal.stat().st_size > size:
                truncate_file(self._journal, size)
            raise
        finally:
            self._changed = None

    def decode_images(self, samples: Iterable[LocatedSample]) -> dict[str, str]:
        """Decode images and videos in workers; return the reasons of unreadable samples by ID."""
        files = {sample.sample.id: _list_image_files(sample) for sample in samples}
        new = [*{*chain.from_iterable(files.values())} - self._decoded.keys()]
        with ThreadPoolExecutor(NUM_IMAGE_WORKERS) as threads:
            self._decoded.update(zip(new, threads.map(self._decode, new), strict=True))
        reasons = ((name, self._decoded[file][1]) for name, own in files.items() for file in own)
        return {name: reason for name, reason in reasons if reason}

    def _decode(self, file: str) -> tuple[str, str]:
        try:
            return self.images.check(Path(file)), ""
        except CorruptImageError as error:
            return file, str(error).splitlines()[0]

    def _list_labeled(self) -> dict[str, LocatedSample]:
        """Return all labeled samples by ID, also those that are not loaded now."""
        labeled = {sample.id: LocatedSample(sample, self.folder) for sample in self._others}
        for sample_id, item in self._items.items():
            if item.label is not None:
                question = item.decision.question if item.decision else ()
                labeled[sample_id] = self._build_labeled(item, item.label, question)
        return labeled

    def _select_eval_ids(self, labeled: Mapping[str, LocatedSample]) -> set[str]:
        """Return the IDs of validation samples, which share no pixels with training samples."""
        eval_ids = set[str]()
        if self._train_fraction == 1:
            return eval_ids
        num_eval = min(max(1, round((1 - self._train_fraction) * len(labeled))), len(labeled) - 1)
        # The order is that of digests, so that further labels hardly change the split.
        order = sorted(labeled, key=lambda name: _compute_digest([name]))
        self.decode_images(labeled.values())
        paths = [_list_image_files(labeled[name]) for name in order]
        keys = [frozenset(self._decoded[path][0] for path in own) for own in paths]
        for group in group_rows(keys):
            if len(eval_ids) + len(group) <= num_eval:
                eval_ids.update(order[index] for index in group)
        return eval_ids

    def write_labels(self) -> None:
        """Write all labeled samples. Labels of samples that are not loaded now are kept."""
        self._check_folder()
        train_file, eval_file = self.folder / LABELS_FILE, self.folder / EVAL_FILE
        labeled = self._list_labeled()
        eval_ids = self._select_eval_ids(labeled)
        train_samples = list[Sample]()
        eval_samples = list[Sample]()
        for name, located in labeled.items():
            part = eval_samples if name in eval_ids else train_samples
            part.append(located.sample)
        files = {train_file: encode_samples(train_samples)}
        if eval_ids:
            files[eval_file] = encode_samples(eval_samples)
        write_files(files)
        if not eval_ids:
            eval_file.unlink(missing_ok=True)
        self._num_unwritten = 0

    def _build_labeled(
        self, item: LabelItem, content: AnswerContent, question: Sequence[str] = ()
    ) -> LocatedSample:
        """Return the sample with an answer and with paths relative to the folder of the labels.

        The metadata of a sample with a corrected question contain the original one.
        """
        sample = relocate_sample(item.sample, self.folder)
        messages = sample.messages[: -1 if sample.messages[-1].role == "assistant" else None]
        answer, meta = Message(role="assistant", content=content), _match_meta(item, content)
        if question:
            messages = (*messages[:-1], replace_texts(messages[-1], question))
            meta.setdefault(ORIGINAL_PROMPT_KEY, get_question(sample))
        worse = sample.rejected if sample.rejected != answer.content else ()
        update: dict[str, Any] = {"messages": (*messages, answer), "rejected": worse, "meta": meta}
        update["references"] = _match_references(item, content)
        if sample.label is False and content != sample.messages[-1].content:
            update["label"] = True  # The corrected answer is a desirable one.
        return LocatedSample(sample.model_copy(update=update), self.folder)

    def add_sources(self, sources: Iterable[Path], *, review: bool) -> None:
        """Add the sources of a session, as the user named them, or store the reviewed files."""
        known = (*read_sources(self.folder), *map(str, sources))
        names = {os.path.realpath(name): name for name in known}
        file = self.folder / (REVIEWED_FILE if review else SOURCES_FILE)
        write_file(file, f"{json.dumps([*(names if review else names.values())])}\n".encode())

    def close(self) -> None:
        """Write the labels and release the folder."""
        try:
            if self._num_unwritten:
                self.write_labels()
        except UserError as error:
            error.what += f"; the decisions are kept in {JOURNAL_FILE}"
            error.remedy = "correct the cause; the next session in this folder writes the file"
            raise
        finally:
            self.images.pool.close()
            self._lock.close()

    def __exit__(self, *raised: object) -> None:
        self.close()


def _check_label_folder(folder: Path) -> None:
    """Raise UserError if a folder has labels, but no journal of them."""
    check_writable_folder(folder)
    names = (LABELS_FILE, EVAL_FILE, FRACTION_FILE, SOURCES_FILE, REVIEWED_FILE)
    found = [name for name in names if os.path.lexists(folder / name)]
    if found and not os.path.lexists(folder / JOURNAL_FILE):
        raise UserError(
            f"has {found[0]}, but no {JOURNAL_FILE} of a labelling session",
            where=str(folder),
            expected="a new folder, or that of an earlier session",
            remedy=f"choose a free folder: --out {find_free_path(folder)}",
        )


def read_complete_lines(file: Path, start: bytes) -> list[bytes]:
    """Return the lines of a file without an incomplete last one, left by a crash.

    Args:
        start: Start of each line as this program writes it. Another last line raises UserError.
    """
    content = file.read_bytes() if file.exists() else b""
    size = content.rfind(b"\n") + 1
    rest = content[size:]
    if not rest.startswith(start[: len(rest)]):
        raise UserError(
            f"ends with {rest[:80]!r}, which no labelling session has written",
            where=str(file),
            expected="the file of a label folder",
            remedy="move the file away, or choose another folder with --out",
        )
    return content[:size].split(b"\n")[:-1]


def remove_incomplete_line(file: Path, lines: Sequence[bytes]) -> None:
    """Remove the rest of a file after its complete lines."""
    size = sum(len(line) + 1 for line in lines)
    if file.exists() and file.stat().st_size > size:
        truncate_file(file, size)


def read_journal(file: Path, lines: Iterable[bytes]) -> list[JournalEntry]:
    """Parse the lines of a journal. Raises UserError with the line of a damaged one."""
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(JournalEntry.model_validate_json(line))
        except ValidationError as error:
            raise UserError(
                f"line {number} is not an entry: {line[:80]!r}",
                where=str(file),
                expected="entries of the journal of a label folder",
                remedy="restore the file from a copy, or remove this line",
            ) from error
    return entries


def _compute_digest(texts: Iterable[str]) -> str:
    return hashlib.sha256("\0".join(texts).encode(errors="surrogateescape")).hexdigest()[:16]


def _build_items(
    samples: Iterable[LocatedSample], entries: Iterable[JournalEntry], review: bool
) -> dict[str, LabelItem]:
    """Return items by ID. An image and its question have one ID, also under another path."""
    items: dict[str, LabelItem] = {}
    known_ids = {(entry.sample, entry.version): entry.id for entry in entries}
    found = [LabelItem(one, review=review) for one in samples]
    for item in sorted(found, key=lambda item: item.has_path_id):
        sample, key = item.sample.sample, (item.digest, item.version)
        if item.has_path_id and (known_id := known_ids.setdefault(key, sample.id)) != sample.id:
            sample = sample.model_copy(update={"id": known_id})
            item.sample = LocatedSample(sample, item.sample.folder)
        if sample.id not in items:
            items[sample.id] = item
        elif not item.has_path_id:
            raise UserError(
                f"several samples have the ID {sample.id!r:.200}",
                where="label",
                expected="samples with different IDs",
                remedy="correct the IDs, or label the files one by one",
            )
    return items


def _store_fraction(file: Path, fraction: float | None) -> float:
    """Store the fraction of a session, or return that of an earlier session."""
    if fraction is not None:
        write_file(file, f"{fraction}\n".encode())
        return fraction
    try:
        return min(1.0, max(0.0, float(file.read_text()))) if file.is_file() else 1.0
    except ValueError as error:
        raise UserError(
            f"not a number: {error}",
            where=str(file),
            expected="the fraction of the labels for training, such as 0.8",
            remedy=f"give it again: --train-fraction {LABEL_TRAIN_FRACTION}",
        ) from error


def _read_entries(folder: Path) -> list[JournalEntry]:
    """Return the entries of a journal without an incomplete last line."""
    journal = folder / JOURNAL_FILE
    content = journal.read_bytes()
    complete_lines = content[: content.rfind(b"\n") + 1].splitlines()
    return read_journal(journal, complete_lines)


def find_label_sources(recipe: Recipe) -> list[str] | None:
    """Return the existing sources of the images that a run was trained on.

    None if the training data of the run are no labels.
    """
    folder = find_label_folder(recipe)
    if folder is None:
        return None
    return list(filter(os.path.exists, read_sources(folder)))


def read_verdicts(folder: Path) -> dict[str, tuple[list[AnswerContent], list[AnswerContent]]]:
    """Return the accepted or corrected answer and the corrected suggestion of each sample."""
    verdicts: dict[str, tuple[list[AnswerContent], list[AnswerContent]]] = {}
    suggested: dict[str, AnswerContent] = {}
    for entry in _read_entries(folder):
        if entry.event == "suggested":
            suggested[entry.id] = entry.content
        else:
            worse: AnswerContent = ()
            if entry.event == "corrected":
                worse = suggested.get(entry.id, ())
            better_answers = list[AnswerContent]()
            worse_answers = list[AnswerContent]()
            if entry.event in ANSWER_EVENTS and worse != entry.content:
                better_answers.append(entry.content)
                if worse:
                    worse_answers.append(worse)
            verdicts[entry.id] = better_answers, worse_answers
    return verdicts


def read_suggesters(folder: Path) -> list[str]:
    """Return the runs, models and servers of the suggestions of a folder, the newest first."""
    names: dict[str, None] = {}
    for entry in reversed(_read_entries(folder)):
        if entry.event == "suggested" and entry.model:
            names[entry.model] = None
    return [*names]


def _match_references(item: LabelItem, content: AnswerContent) -> tuple[str, ...]:
    """Return the references of a sample: none if the answer is corrected to another text.

    They are alternatives to the replaced answer. A correction to one of them keeps the others.
    """
    references, answer = item.sample.sample.references, item.existing_answer
    old, new = map(get_text, (content if answer is None else answer, content))
    if old == new:
        return references
    return tuple(one for one in references if new in references and one not in (old, new))


def find_label_folder(recipe: Recipe) -> Path | None:
    """Return the folder of new labels that a recipe trains, the last one of several, or None.

    A recipe may train reviewed labels instead. Folders of a review have no sources.
    """
    files = [Path(file.path) for file in recipe.data.train if not is_url(file.path)]
    names = [name for file in files for name in read_sources(file.parent, REVIEWED_FILE)]
    files = [*(Path(os.path.relpath(name)) for name in names), *files]
    folders = [file.parent for file in files if file.name == LABELS_FILE]
    return next((one for one in reversed(folders) if (one / SOURCES_FILE).is_file()), None)


def read_sources(
    folder: Path, name: str = SOURCES_FILE, max_bytes: int = MAX_FILE_BYTES
) -> list[str]:
    """Return the sources of all sessions of a folder; [] if the file is unreadable."""
    with suppress(UserError):
        sources = read_json(folder / name, max_bytes=max_bytes)
        return [str(source) for source in sources] if isinstance(sources, list) else []
    return []


def can_review(folder: Path, sources: Iterable[Path]) -> bool:
    """Return whether a folder has no samples, or those of a review of exactly these files."""
    if reviewed := {*read_sources(folder, REVIEWED_FILE)}:
        is_same = reviewed == {*map(os.path.realpath, sources)}
        return is_same and not (folder / SOURCES_FILE).exists()
    return not any(file.stat().st_size for file in folder.glob("*.json*"))


def get_question(sample: Sample) -> str:
    """Return the text of the last question of a sample."""
    return get_text(next(turn for turn in sample.messages[::-1] if turn.role == "user").content)


def get_text(content: Sequence[ContentPart]) -> str:
    """Return the text of an answer without its boxes."""
    return "".join(part.text for part in content if isinstance(part, TextPart))


def list_boxes(content: Sequence[ContentPart]) -> list[BoxPart]:
    """Return the boxes and points of an answer."""
    return [part for part in content if isinstance(part, BoxPart)]


def _list_image_files(sample: LocatedSample) -> list[str]:
    """Return the files of the images and video frames of a sample."""
    # Here, because it imports torch, which the first page of the studio does not need.
    from finesight.train.dataset_stats import list_sample_images

    return [*map(os.path.realpath, list_sample_images(sample))]


def list_question_texts(sample: Sample) -> tuple[str, ...]:
    """Return the text parts of the last question of a sample; one empty text without any."""
    turn = next(turn for turn in sample.messages[::-1] if turn.role == "user")
    return tuple(part.text for part in turn.content if isinstance(part, TextPart)) or ("",)


def replace_texts(turn: Message, texts: Sequence[str]) -> Message:
    """Replace the text parts of a question, between which its images stay."""
    parts = turn.content
    if not any(isinstance(part, TextPart) for part in parts):
        parts = (*parts, TextPart(text=""))
    new = iter(texts)
    parts = tuple(TextPart(text=next(new)) if isinstance(p, TextPart) else p for p in parts)
    return turn.model_copy(update={"content": parts})


def read_labels(folder: Path) -> list[LocatedSample]:
    """Return the labeled samples of a folder."""
    files = (folder / EVAL_FILE, folder / LABELS_FILE)
    found = (read_samples(file) for file in files if file.is_file() and file.stat().st_size)
    return [LocatedSample(sample, folder) for sample in chain.from_iterable(found)]


def _match_meta(item: LabelItem, content: AnswerContent) -> dict[str, Any]:
    """Return the metadata of a sample with attributes of unchanged boxes only."""
    meta, answer = dict(item.sample.sample.meta), item.existing_answer or ()
    old, new = map(list_boxes, (answer, content))
    if old != new and (attributes := meta.pop("boxes", None)):
        is_matching = isinstance(attributes, list) and len(attributes) == len(old)
        known = dict(zip(old, attributes, strict=True)) if is_matching else {}
        if any(kept := [known.get(box, {}) for box in new]):
            meta["boxes"] = kept
    return meta
