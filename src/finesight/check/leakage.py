"""Detect validation images in training data, including re-encoded copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from finesight.check.check_issues import CheckIssue, IssueImage, SampleLocation
from finesight.check.image_catalog import ImageCatalog
from finesight.check.near_duplicates import has_contrast
from finesight.check.sample_issues import iter_media_paths
from finesight.data.sample import Sample

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
                message = f"{self._catalog.example_paths[image_index]} is in the validation data,"
                yield self._create_issue(
                    "leaked-image", location, image_index, image_index, message
                )
            else:
                self._train_locations[image_index].append(location)

    def find_near_duplicates(self) -> Iterator[tuple[SampleLocation, CheckIssue]]:
        """Yield issues of training images that are re-encoded copies of validation images."""
        for validation_image, train_image in self._catalog.find_near_duplicates(
            self._validation_locations, self._train_locations
        ):
            message = (
                f"{self._catalog.example_paths[train_image]} is a re-encoded copy of a validation"
                " image,"
            )
            for location in self._train_locations[train_image]:
                yield (
                    location,
                    self._create_issue(
                        "leaked-image-reencoded", location, train_image, validation_image, message
                    ),
                )

    def _image_indices(self, sample: Sample) -> list[int]:
        """Return the catalog indices of the images in a sample.

        Invalid images and images without contrast, such as blank pages, are omitted.
        """
        image_indices = dict.fromkeys(
            self._catalog.image_index(path) for path in iter_media_paths(sample)
        )
        image_infos = self._catalog.image_infos
        return [
            n
            for n in image_indices
            if not image_infos[n].issue_code and has_contrast(image_infos[n].thumbnail)
        ]

    def _create_issue(
        self,
        code: str,
        location: SampleLocation,
        train_image: int,
        validation_image: int,
        message: str,
    ) -> CheckIssue:
        validation_location = self._validation_locations[validation_image]
        issue_images = [
            IssueImage(Path(self._catalog.example_paths[image_index]))
            for image_index in (train_image, validation_image)
        ]
        return location.create_issue(
            code, f"{message} {validation_location.where}", _REMEDY, tuple(issue_images), "skipped"
        )
