"""Statistics and random samples of a checked dataset, for a review without issues."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from pathlib import Path

from finesight.check.check_issues import (
    DatasetProfile,
    IssueImage,
    SampleLocation,
    SamplePreview,
    shorten,
)
from finesight.check.image_catalog import ImageCatalog
from finesight.data.formats.dataset_format import join_text
from finesight.data.sample import BoxPart, ImagePart, Sample, VideoPart, list_media_paths
from finesight.manifest import count_half_octaves

MAX_PREVIEWS = 48
"""Number of randomly selected samples of a data check."""

MAX_PREVIEW_CHARS, MAX_VALUE_CHARS = 600, 60
"""Maximum characters of a text in a preview, and of an answer or label that is counted."""

MAX_COUNTED_VALUES = 100_000
"""Maximum number of different answers, and of labels. Further ones are not counted."""

NUM_FREQUENT_VALUES = 10


class SplitProfiler:
    """Accumulates the statistics of one split in bounded memory."""

    def __init__(self) -> None:
        self._histograms: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self._answers: Counter[str] = Counter()
        self._labels: Counter[str] = Counter()
        self._num_samples = self._num_boxes = 0

    def add_sample(self, sample: Sample, catalog: ImageCatalog) -> None:
        """Count the answer, images and boxes of a sample. Invalid images are not counted."""
        answer = join_text(sample.messages[-1].content) if sample.messages else ""
        boxes = [part for part in sample.iter_parts() if isinstance(part, BoxPart)]
        paths = [path for part in sample.iter_parts() for path in list_media_paths(part)]
        self._num_samples += 1
        self._num_boxes += len(boxes)
        self.add_value("answer_chars", len(answer))
        self.add_value("num_boxes", len(boxes))
        for path in paths:
            if catalog[path].issue_code is None:
                self.add_value("image_side", max(catalog[path].size))
        _count_value(self._answers, answer)
        for box in boxes:
            _count_value(self._labels, box.label or "")

    def add_value(self, name: str, value: int) -> None:
        """Add a value to a histogram; values below 1 are not counted."""
        self._histograms[name].update(count_half_octaves([value]))

    def build(self) -> DatasetProfile:
        """Return the statistics of all samples so far."""
        return DatasetProfile(
            num_samples=self._num_samples,
            num_boxes=self._num_boxes,
            histograms={name: dict(counts) for name, counts in self._histograms.items()},
            answers=tuple(self._answers.most_common(NUM_FREQUENT_VALUES)),
            num_answers=len(self._answers),
            labels=tuple(self._labels.most_common(NUM_FREQUENT_VALUES)),
            num_labels=len(self._labels),
        )


def _count_value(counts: Counter[str], text: str) -> None:
    value = shorten(" ".join(text.split()), MAX_VALUE_CHARS)
    if value and (value in counts or len(counts) < MAX_COUNTED_VALUES):
        counts[value] += 1


class PreviewSampler:
    """Selects random samples of a stream with equal probability (reservoir sampling).

    Args:
        seed: Seed of the random selection.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._num_samples = 0
        self.previews: list[SamplePreview] = []

    def add_sample(self, sample: Sample, location: SampleLocation, *, is_validation: bool) -> None:
        """Select a sample with probability `MAX_PREVIEWS / number of samples so far`."""
        self._num_samples += 1
        if len(self.previews) < MAX_PREVIEWS:
            # The order is random as well.
            index = self._random.randint(0, len(self.previews))
            self.previews.insert(index, _build_preview(sample, location, is_validation))
        elif (index := self._random.randrange(self._num_samples)) < MAX_PREVIEWS:
            self.previews[index] = _build_preview(sample, location, is_validation)


def _build_preview(sample: Sample, location: SampleLocation, is_validation: bool) -> SamplePreview:
    *turns, answer = [join_text(message.content) for message in sample.messages] or [""]
    parts = list(sample.iter_parts())
    paths = [part.image for part in parts if isinstance(part, ImagePart)]
    frames = [part.frames[0] for part in parts if isinstance(part, VideoPart) and part.frames]
    boxes = [part for part in parts if isinstance(part, BoxPart)]
    images = [
        IssueImage(
            Path(path),
            index,
            tuple(box.xyxy for box in boxes if box.image == index),
            tuple(box.label or "" for box in boxes if box.image == index),
        )
        for index, path in enumerate(paths)
    ]
    return SamplePreview(
        where=location.where,
        sample_id=location.sample_id,
        is_validation=is_validation,
        question=shorten("\n".join(filter(None, turns)), MAX_PREVIEW_CHARS),
        answer=shorten(answer, MAX_PREVIEW_CHARS),
        images=(*images, *(IssueImage(Path(frame)) for frame in frames)),
    )
