"""Find issues across samples: duplicates, contradictory or dominant answers, and leakage.

Leakage is a validation image in the training data, also as a re-encoded copy.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from finesight.errors import shorten
from finesight.files.bounded_files import is_object_text
from finesight.ingest.check.check_issues import CheckIssue, IssueImage, SampleLocation
from finesight.ingest.check.image_catalog import ImageCatalog, has_contrast
from finesight.ingest.check.sample_issues import iter_media_paths
from finesight.samples.boxes import measure_overlap
from finesight.samples.frames import Box, ImageSize
from finesight.samples.image_file import DEFAULT_SIZE
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    Message,
    Sample,
    join_text,
    list_media_paths,
)

MAX_SHORT_ANSWER = 40
"""Maximum number of characters of a short answer, such as a name or number."""

MIN_MULTI_ANSWER_FRACTION, MIN_LONG_ANSWER_FRACTION, MIN_MULTI_ANSWER_SAMPLES = 0.3, 0.1, 10
"""Thresholds for questions that have several correct answers by design, such as captions.

Their contradictions are not reported. The thresholds are the minimum fraction of contradictory
samples among samples with the same question, the minimum fraction of contradictions between long
answers, and the minimum number of such samples.
"""

MIN_MATCH_IOU = 0.5
"""Minimum overlap of two boxes or points that mark the same object; see `measure_overlap`."""

MAX_ANSWER_FRACTION, MIN_SAMPLES = 0.5, 20
"""Maximum fraction of samples with the same answer, and minimum number of samples."""

MIN_FREQUENCY_RATIO, MAX_CLASSES, MAX_RARE_LOCATIONS, MAX_EDITS = 20, 1000, 20, 2
"""Minimum ratio of a frequent answer to a rare one, and maximum of classes, samples and edits.

The ratio alone makes an answer rare: a mistake may be repeated.
"""

_MAX_PREVIEW = 60

_NUM_MASK_BITS = 499
"""Number of bits of a character mask: a prime number, so that few characters share a bit."""

_TOKEN = re.compile(r"(?<![^\w\s])[^\w\s]*+\d+(?:[.,]\d+)*|[^\W\d_]+")
_ROMAN = re.compile(r"[ivx]+")
_START = re.compile(r"hyp(?:o|er)|int(?:er|ra)|m[ai]cro|.")


@dataclass(frozen=True, slots=True)
class _AnswerRecord:
    """Summary of an answer for comparison with the answers of other samples.

    Attributes:
        question_hash: Hash of the question text, without its images.
    """

    location: SampleLocation
    answer_hash: int
    preview: str
    boxes: tuple[tuple[int, Box], ...]
    image_path: str
    image_size: ImageSize
    question_hash: int


class ConsistencyChecker:
    """Compare the answers of all samples in a split that share question and images.

    Memory is bounded to a few hashes and a short preview per sample.
    """

    def __init__(self, catalog: ImageCatalog) -> None:
        self._catalog = catalog
        self._first_answers: dict[int, _AnswerRecord] = {}
        self._conflicts: list[tuple[_AnswerRecord, _AnswerRecord]] = []
        self._answer_counts: Counter[int] = Counter()
        self._previews: dict[int, str] = {}
        self._question_counts: Counter[int] = Counter()
        self._json_counts: Counter[int] = Counter()
        self._texts: list[_AnswerRecord] = []

    def add_sample(self, sample: Sample, location: SampleLocation) -> Iterator[CheckIssue]:
        """Add a sample, and yield an issue if it duplicates an earlier sample."""
        turns = sample.messages[:-1]
        # A prompt may have several pairs, and answers with a label.
        prompt_hash = hash((*map(self._hash_message, turns), sample.rejected, sample.label))
        answer = self._record_answer(sample, location)
        self._question_counts[answer.question_hash] += 1
        if is_object_text(join_text(sample.messages[-1].content)):
            self._json_counts[answer.question_hash] += 1
        elif not answer.boxes:
            self._texts.append(answer)
        self._answer_counts[answer.answer_hash] += 1
        self._previews.setdefault(answer.answer_hash, answer.preview)
        first = self._first_answers.setdefault(prompt_hash, answer)
        # Several answers in the same row are intended.
        origin = first.location
        if origin.source == location.source and origin.row_index == location.row_index:
            return
        if first.answer_hash == answer.answer_hash:
            yield location.create_issue(
                "duplicate-sample",
                f"duplicate of {first.location.where}",
                "remove one of the two, unless the duplicate is intended",
                fix="skipped",
            )
        elif not sample.rejected and sample.label is None and _are_contradictory(first, answer):
            self._conflicts.append((first, answer))

    def find_global_issues(
        self, sources: str
    ) -> Iterator[tuple[SampleLocation | None, CheckIssue]]:
        """Yield the issues that can be found only after all samples were added.

        These are contradictory answers and texts among JSON answers with the location of the
        sample, and a dominant answer with None.
        """
        multi_answer_questions = self._find_multi_answer_questions()
        for one, other in self._conflicts:
            if one.boxes or other.boxes or other.question_hash not in multi_answer_questions:
                yield other.location, _create_contradiction_issue(one, other)
        for text in self._texts:
            total = self._question_counts[text.question_hash]
            if 2 * (count := self._json_counts[text.question_hash]) > total:
                what = f"{text.preview!r}, but {count} of {total} answers are JSON objects"
                remedy = "correct the answer, or ask another question"
                yield text.location, text.location.create_issue("answer-not-json", what, remedy)
        num_samples = self._answer_counts.total()
        (answer, count), *_ = self._answer_counts.most_common(1) or [(0, 0)]
        if num_samples >= MIN_SAMPLES and count > MAX_ANSWER_FRACTION * num_samples:
            message = f"{count} of {num_samples} answers are {self._previews[answer]!r}"
            remedy = "a constant answer reaches this score: evaluate the other answers separately"
            yield None, CheckIssue("dominant-answer", sources, message, remedy, source=sources)

    def _find_multi_answer_questions(self) -> set[int]:
        """Return the hashes of questions that have several correct answers by design."""
        counts = Counter(other.question_hash for _, other in self._conflicts)
        long_counts = Counter(
            other.question_hash
            for one, other in self._conflicts
            if max(len(one.preview), len(other.preview)) > MAX_SHORT_ANSWER
        )

        def exceeds(count: int, fraction: float, question: int) -> bool:
            min_count = fraction * self._question_counts[question]
            return count >= max(MIN_MULTI_ANSWER_SAMPLES, min_count)

        return {
            question
            for question, count in counts.items()
            if exceeds(count, MIN_MULTI_ANSWER_FRACTION, question)
            or exceeds(long_counts[question], MIN_LONG_ANSWER_FRACTION, question)
        }

    def _record_answer(self, sample: Sample, location: SampleLocation) -> _AnswerRecord:
        *turns, answer = sample.messages
        boxes = [part for part in answer.content if isinstance(part, BoxPart)]
        text = " ".join(join_text(answer.content).split())
        images = (part.image for part in sample.iter_parts() if isinstance(part, ImagePart))
        image = next(images, "")
        size = self._catalog[image].size if image and boxes else DEFAULT_SIZE
        return _AnswerRecord(
            location,
            hash((self._hash_message(answer), sample.references)),
            shorten(text, _MAX_PREVIEW),
            tuple((box.image, box.xyxy) for box in boxes),
            image,
            size if all(size) else DEFAULT_SIZE,
            hash(tuple((turn.role, join_text(turn.content)) for turn in turns)),
        )

    def _hash_message(self, message: Message) -> int:
        """Hash a message; images with identical content have equal hashes."""
        segments: list[object] = [message.role]
        for part in message.content:
            images = tuple(map(self._catalog.image_index, list_media_paths(part)))
            segments.append(images or part.model_dump_json())
        return hash(tuple(segments))


class RareAnswerChecker:
    """Find rare answers and labels of boxes that are similar to a frequent one, such as a class."""

    def __init__(self) -> None:
        self._counts: defaultdict[int | None, Counter[str]] = defaultdict(Counter)
        self._locations: defaultdict[tuple[int | None, str], list[SampleLocation]]
        self._locations = defaultdict(list)

    def add_sample(self, sample: Sample, location: SampleLocation) -> None:
        *turns, answer = sample.messages
        labels = [part.label for part in answer.content if isinstance(part, BoxPart) and part.label]
        question = None
        if not any(isinstance(part, BoxPart) for part in answer.content):
            labels = [" ".join(join_text(answer.content).split())]
            question = hash(tuple((turn.role, join_text(turn.content)) for turn in turns))
        labels = [label for label in labels if len(label) <= MAX_SHORT_ANSWER]
        self._counts[question].update(labels)
        for label in dict.fromkeys(labels):
            if len(locations := self._locations[question, label]) < MAX_RARE_LOCATIONS:
                locations.append(location)

    def find_issues(self) -> Iterator[tuple[SampleLocation, CheckIssue]]:
        """Yield an issue for each sample with a rare answer or label that may be misspelled."""
        for question, counts in self._counts.items():
            # Further answers are free text.
            if len(counts) > min(MAX_CLASSES, counts.total() / 3):
                continue
            kind = "labels of boxes" if question is None else "answers"
            for rare, text in find_similar(counts):
                what = f"{rare!r} ({counts[rare]} of {counts.total()} {kind})"
                what += f", but {text!r} in {counts[text]}"
                remedy = f"correct it if it is misspelled, also where the prompt lists the {kind}"
                for location in self._locations[question, rare]:
                    yield location, location.create_issue("rare-similar-answer", what, remedy)


def find_similar(counts: Counter[str]) -> Iterator[tuple[str, str]]:
    """Yield each rare text with the most frequent text that is similar to it.

    Only texts with the same first character and almost the same characters are compared.
    """
    ranked = counts.most_common()
    masks = {text: _mask_characters(text.casefold()) for text in counts}
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for text, _ in ranked:
        groups[text[:1].casefold()].append(text)
    for rare, num_rare in ranked:
        for text in groups[rare[:1].casefold()]:
            if counts[text] < num_rare * MIN_FREQUENCY_RATIO:
                break
            num_different = (masks[rare] ^ masks[text]).bit_count()
            if num_different <= 2 * MAX_EDITS and is_similar(rare, text):
                yield rare, text
                break


def _mask_characters(text: str) -> int:
    """Return a bit mask of the occurrences of each character; an edit changes at most two bits."""
    occurrences: Counter[str] = Counter()
    mask = 0
    for character in text:
        mask |= 1 << (8 * ord(character) + occurrences[character]) % _NUM_MASK_BITS
        occurrences[character] += 1
    return mask


def is_similar(text: str, other: str) -> bool:
    """Return whether two texts differ by a likely misspelling; case is ignored.

    One edit (or swap) from 4 characters, two from 6. Different numbers, Roman numerals, words of 1
    or 2 letters and starts of words, such as hypo- and hyper-, are no misspellings.
    """
    a, b = text.casefold(), other.casefold()
    length = min(len(a), len(b))
    max_edits = 0
    if length >= 6:
        max_edits = MAX_EDITS
    elif length >= 4:
        max_edits = 1
    if not _is_within(a, b, max_edits):
        return False
    tokens, others = (Counter(_TOKEN.findall(one)) for one in (a, b))
    words, other_words = tokens - others, others - tokens
    if any(len(x) < 3 or not x.isalpha() or _ROMAN.fullmatch(x) for x in (words | other_words)):
        return False
    starts, other_starts = ({_START.findall(x)[0] for x in y} for y in (words, other_words))
    return starts == other_starts


def _is_within(a: str, b: str, num_edits: int) -> bool:
    while a[:1] == b[:1] != "":
        a, b = a[1:], b[1:]
    pairs = [(a[1:], b), (a, b[1:]), (a[1:], b[1:])]
    pairs += [(a[2:], b[2:])] if a[:2] == b[1::-1] else []
    return a == b or (num_edits > 0 and any(_is_within(*pair, num_edits - 1) for pair in pairs))


def _are_contradictory(one: _AnswerRecord, other: _AnswerRecord) -> bool:
    """Return whether two answers to the same question differ.

    Boxes are compared by overlap, texts without case and punctuation at the ends.
    """
    if one.boxes or other.boxes:
        boxes_match = len(one.boxes) == len(other.boxes) and all(
            any(
                image == i and measure_overlap(box, b, one.image_size) >= MIN_MATCH_IOU
                for i, b in other.boxes
            )
            for image, box in one.boxes
        )
        return not boxes_match
    texts = {answer.preview.casefold().strip(" .!?\"'") for answer in (one, other)}
    return len(texts) == 2


def _create_contradiction_issue(one: _AnswerRecord, other: _AnswerRecord) -> CheckIssue:
    texts, images = [], []
    for answer in (other, one):
        boxes = ", ".join(f"[{', '.join(f'{n:g}' for n in box)}]" for _, box in answer.boxes[:3])
        preview = repr(answer.preview) if answer.preview else ""
        texts.append(" ".join(filter(None, [preview, boxes])))
        first_boxes = tuple(box for image, box in answer.boxes if image == 0)
        images.append(IssueImage(Path(answer.image_path), 0, first_boxes))
    return other.location.create_issue(
        "contradictory-answers",
        f"{texts[0]}, but {texts[1]} at {one.location.where}",
        "keep the correct one; if both are, merge them into one answer"
        " or make the question more specific",
        tuple(images) if other.image_path else (),
    )


_REMEDY = "remove one of the two: scores on training images do not measure generalization"


class LeakageDetector:
    """Detect training samples that contain images of validation samples.

    All validation samples must be added before the first training sample.
    """

    def __init__(self, catalog: ImageCatalog) -> None:
        self._catalog = catalog
        self._validation_locations: dict[int, SampleLocation] = {}
        self._train_locations: defaultdict[int, list[SampleLocation]] = defaultdict(list)

    def add_validation_sample(self, sample: Sample, location: SampleLocation) -> None:
        """Record the images of a validation sample."""
        for image_index in self._image_indices(sample):
            self._validation_locations.setdefault(image_index, location)

    def add_train_sample(self, sample: Sample, location: SampleLocation) -> Iterator[CheckIssue]:
        """Record a training sample, and yield an issue per validation image in it."""
        if not self._validation_locations:
            return
        for image_index in self._image_indices(sample):
            if image_index in self._validation_locations:
                yield self._create_issue("leaked-image", location, image_index, image_index)
            else:
                self._train_locations[image_index].append(location)

    def find_near_duplicates(self) -> Iterator[tuple[SampleLocation, CheckIssue]]:
        """Yield issues of training images that are re-encoded copies of validation images."""
        for validation_image, train_image in self._catalog.find_near_duplicates(
            self._validation_locations, self._train_locations
        ):
            for location in self._train_locations[train_image]:
                code = "leaked-image-reencoded"
                yield location, self._create_issue(code, location, train_image, validation_image)

    def _image_indices(self, sample: Sample) -> list[int]:
        """Return the catalog indices of the images in a sample.

        Invalid images and images without contrast, such as blank pages, are omitted.
        """
        indices = dict.fromkeys(map(self._catalog.image_index, iter_media_paths(sample)))
        infos = self._catalog.image_infos
        valid = (n for n in indices if not infos[n].issue_code)
        # Video files have no thumbnail.
        return [n for n in valid if not infos[n].thumbnail or has_contrast(infos[n].thumbnail)]

    def _create_issue(
        self, code: str, location: SampleLocation, train_image: int, validation_image: int
    ) -> CheckIssue:
        paths = self._catalog.example_paths
        is_copy = code == "leaked-image-reencoded"
        kind = "a re-encoded copy of a validation image" if is_copy else "in the validation data"
        return location.create_issue(
            code,
            f"{paths[train_image]} is {kind}, {self._validation_locations[validation_image].where}",
            _REMEDY,
            tuple(IssueImage(Path(paths[index])) for index in (train_image, validation_image)),
            "skipped",
        )
