"""Run a data check of files or of a recipe in one pass over the samples.

Worker processes decode and check images ahead of the pass.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import yaml

from finesight.encode.renderer import Renderer
from finesight.encode.tokenization import load_tokenizer
from finesight.errors import Step, UserError, shorten
from finesight.files.archive import is_archive
from finesight.files.bounded_files import load_yaml
from finesight.files.path_patterns import is_glob
from finesight.hub.download import WEB_SCHEMES
from finesight.ingest.check.box_hypothesis import BoxClaim
from finesight.ingest.check.check_issues import (
    ISSUE_TYPES,
    CheckIssue,
    IssueImage,
    SampleLocation,
    format_location,
    issue_from_error,
)
from finesight.ingest.check.check_result import (
    CheckResult,
    DatasetProfile,
    SamplePreview,
    SourceStats,
)
from finesight.ingest.check.convention_detector import find_convention_issues, has_enough_samples
from finesight.ingest.check.dataset_fixer import DatasetFixer
from finesight.ingest.check.dataset_issues import (
    ConsistencyChecker,
    LeakageDetector,
    RareAnswerChecker,
)
from finesight.ingest.check.image_catalog import ImageCatalog, open_executor
from finesight.ingest.check.sample_issues import (
    filter_known_tokens,
    find_sample_issues,
    iter_media_paths,
)
from finesight.ingest.formats import get_native_format
from finesight.ingest.formats.dataset_format import RawBox
from finesight.ingest.import_source import (
    ImportOptions,
    UnvalidatedRow,
    UnvalidatedSource,
    is_sample_source,
    open_unvalidated,
    open_unvalidated_samples,
)
from finesight.ingest.presets import with_preset
from finesight.ingest.row_reader import is_tar_file, is_webdataset
from finesight.model_folder import ModelFolder
from finesight.report.histogram_counts import count_half_octaves
from finesight.samples.boxes import COORDINATE_REMEDIES, TextCoordinates, find_number_lists
from finesight.samples.corpus import PACKED_SUFFIXES
from finesight.samples.frames import PIXELS
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Sample,
    VideoPart,
    join_text,
    list_media_paths,
)
from finesight.settings.config import Recipe

REMOTE_PREFIXES = ("hf:", "modelscope:", "https:/", "http:/")
"""Prefixes of remote sources, as they appear after conversion to a path."""

_OBJECT_STORE_PATH = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/(?P<name>.+\.(?:tar|parquet))")
"""Pattern of an object storage URL converted to a path, with a single slash."""

MAX_PREVIEWS = 48
"""Number of randomly selected samples of a data check."""

MAX_PREVIEW_CHARS, MAX_VALUE_CHARS = 600, 60
"""Maximum characters of a text in a preview, and of an answer or label that is counted."""

MAX_COUNTED_VALUES = 100_000
"""Maximum number of different answers, and of labels. Further ones are not counted."""

NUM_FREQUENT_VALUES = 10


@dataclass(frozen=True, slots=True)
class CheckInput:
    """A data file to check.

    Attributes:
        is_imported: Whether the file must be imported before training. Training reads other files
            directly: tar and Parquet files of samples, glob patterns, and object storage URLs.
    """

    path: Path | str
    options: ImportOptions
    is_validation: bool = False
    is_imported: bool = True


@dataclass(frozen=True, slots=True)
class ModelRequirements:
    """Properties of a model that samples are checked against.

    Attributes:
        special_tokens: Special tokens of the tokenizer, which must not occur in texts.
        renderer: Renderer that computes the number of tokens of a sample; None skips this check.
    """

    special_tokens: tuple[str, ...] = ()
    renderer: Renderer | None = None
    max_length: int | None = None


def inputs_from_files(
    train: Sequence[Path], validation: Sequence[Path], options: ImportOptions
) -> list[CheckInput]:
    """Build the check inputs of files given on the command line.

    Raises:
        UserError: A file is given more than once, or is an archive or a remote source.
    """
    inputs = []
    seen: set[Path | str] = set()
    for path, is_validation in [*((p, False) for p in train), *((p, True) for p in validation)]:
        match = _OBJECT_STORE_PATH.fullmatch(str(path))
        is_sample_format = options.is_detected or (
            options.format == get_native_format().name and not options.columns
        )
        if match is not None and match["scheme"] not in WEB_SCHEMES:
            url = f"{match['scheme']}://{match['name']}"
            check_input = CheckInput(url, options, is_validation, is_imported=False)
        elif is_sample_format and is_sample_source(path):
            check_input = CheckInput(path, options, is_validation, is_imported=False)
        else:
            _reject_remote_source(path)
            check_input = CheckInput(path, options, is_validation)
        key = check_input.path if isinstance(check_input.path, str) else check_input.path.resolve()
        if key in seen:
            raise UserError(
                "source is given more than once",
                where=str(check_input.path),
                expected="each source once: as training data, or with --against",
                remedy="remove one of the two",
            )
        seen.add(key)
        inputs.append(check_input)
    return inputs


def _reject_remote_source(source: Path) -> None:
    is_archive_file = is_archive(source.name) and source.is_file()
    if is_archive_file and is_tar_file(source) and is_webdataset(source):
        return
    # A URL that was converted to a path has one slash.
    if is_archive_file or (not source.exists() and str(source).startswith(REMOTE_PREFIXES)):
        name = str(source) if is_archive_file else str(source).replace(":/", "://", 1)
        raise UserError(
            "archives and remote sources cannot be checked directly",
            where=name,
            expected="local files or folders, unpacked",
            remedy=Step("import", {"source": name, "out": "OUT"}, "import it first"),
        )


def load_model_requirements(
    folder: ModelFolder | None, renderer: Renderer | None, max_length: int | None
) -> ModelRequirements:
    """Load the requirements of a model on samples. Without a model there are none.

    Args:
        renderer: Renderer of the model, which `max_length` requires.

    Raises:
        UserError: `max_length` is given without a model.
    """
    if folder is None:
        if max_length is not None:
            raise UserError(
                f"{max_length} tokens without a model",
                where="--max-length",
                expected="--model as well: sample lengths depend on the tokenizer",
                remedy="add --model FOLDER, or check a recipe",
            )
        return ModelRequirements()
    tokenizer = renderer.tokenizer if renderer else load_tokenizer(folder)
    special_tokens = filter_known_tokens(tokenizer.list_special_tokens())
    return ModelRequirements(special_tokens, renderer, max_length)


def is_recipe(path: Path) -> bool:
    """Return whether a file is a recipe: YAML, but not of a YOLO dataset."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True  # the recipe loader reports the error
    return not isinstance(content, dict) or "names" not in content


def inputs_from_recipe(recipe: Recipe) -> list[CheckInput]:
    """Build the check inputs of the data files of a recipe."""
    inputs = []
    for is_validation, files in ((False, recipe.data.train), (True, recipe.data.eval)):
        for file in files:
            options = ImportOptions(format=get_native_format().name, limit=file.limit)
            is_imported = isinstance(file.path, Path) and not (
                file.path.suffix.lower() in PACKED_SUFFIXES or is_glob(file.path)
            )
            inputs.append(CheckInput(file.path, options, is_validation, is_imported))
    return inputs


ROWS_PER_GROUP = 32
"""Number of rows whose images are submitted to the worker processes in one task."""

MAX_BOX_CLAIMS = 40_000
"""Approximate maximum number of boxes per file for detecting the box convention.

The boxes are sampled evenly over the file.
"""


class DataChecker:
    """Check training and validation files together, including leakage between them.

    Validation files are read first, so that their images are known when training files are read.

    Args:
        output_folder: Existing folder in which images embedded in tables are saved.
        model: Properties of the model that samples are checked against.
        max_issues: Maximum number of issues per code in the result; further issues are only
            counted.
        seed: Seed of the random samples in the result.
    """

    def __init__(
        self,
        inputs: Sequence[CheckInput],
        output_folder: Path,
        model: ModelRequirements | None = None,
        max_issues: int = 1000,
        seed: int = 0,
    ) -> None:
        """Open all data files. Raises UserError like `open_unvalidated`."""
        self._requirements = model or ModelRequirements()
        self._max_issues = max_issues
        ordered_inputs = sorted(inputs, key=lambda check_input: not check_input.is_validation)
        self._inputs = [
            (one, _open_source(one, output_folder / f"source-{n}"))
            for n, one in enumerate(ordered_inputs)
        ]
        self.fixer = DatasetFixer()
        self._counts: Counter[str] = Counter()
        self._affected_samples: Counter[str] = Counter()
        self._last_location: dict[str, SampleLocation] = {}
        self._issues: list[CheckIssue] = []
        self._frame_paths: set[str] = set()
        self._video_paths: set[str] = set()
        self._profilers = {one.is_validation: SplitProfiler() for one in ordered_inputs}
        self._sampler = PreviewSampler(seed)
        self._are_conventions_tested = False

    @property
    def sources(self) -> list[UnvalidatedSource]:
        """The opened data files in reading order."""
        return [source for _, source in self._inputs]

    @property
    def num_rows(self) -> int:
        """Total number of rows of all data files."""
        return sum(map(len, self.sources))

    def run(
        self,
        on_issue: Callable[[CheckIssue], None] = lambda _: None,
        on_progress: Callable[[int], None] = lambda _: None,
        *,
        single_process: bool = False,
    ) -> tuple[CheckResult, ImageCatalog]:
        """Check all data files.

        Args:
            on_progress: Called with the number of rows processed since the last call.
            single_process: Check images in this process instead of in worker processes.

        Returns:
            The result, with the most severe issues first, and the catalog of all images.
        """
        self._on_issue, self._on_progress = on_issue, on_progress
        with open_executor(0 if single_process else self.num_rows) as executor:
            self._catalog = catalog = ImageCatalog(executor)
            self._leakage = LeakageDetector(catalog)
            self._consistency = {
                is_validation: ConsistencyChecker(catalog) for is_validation in (True, False)
            }
            self._rare_answers = RareAnswerChecker()
            source_stats = [self._check_source(*pair) for pair in self._inputs]
            for is_validation, consistency in self._consistency.items():
                names = [str(s.path) for s, _ in self._inputs if s.is_validation is is_validation]
                for issue_location, issue in consistency.find_global_issues(", ".join(names)):
                    self._add_issue(issue, issue_location)
            for location, issue in chain(
                self._rare_answers.find_issues(), self._leakage.find_near_duplicates()
            ):
                self._add_issue(issue, location)
        code_order = list(ISSUE_TYPES)
        sorted_issues = sorted(self._issues, key=lambda issue: code_order.index(issue.code))
        issue_counts = {code: self._counts[code] for code in code_order if code in self._counts}
        result = CheckResult(
            sources=tuple(source_stats),
            issue_counts=issue_counts,
            issues=tuple(sorted_issues),
            num_images=len(catalog) - len(self._frame_paths) - len(self._video_paths),
            num_video_frames=len(self._frame_paths),
            num_video_files=len(self._video_paths),
            num_unique_images=len(catalog.image_infos),
            affected_samples={code: self._affected_samples[code] for code in issue_counts},
            skipped_checks=self._list_skipped_checks(),
            profiles={split: profiler.build() for split, profiler in self._profilers.items()},
            previews=tuple(self._sampler.previews),
        )
        return result, catalog

    def _list_skipped_checks(self) -> dict[str, str]:
        """Return the codes of issues that were not searched, with the reason."""
        reasons: dict[str, str] = {}
        if not self._are_conventions_tested:
            reason = "no source has enough samples with boxes"
            reasons |= {code: reason for code in ISSUE_TYPES if code.startswith("boxes-")}
        if len(self._profilers) < 2:
            reason = "the check has no training and validation data to compare"
            reasons |= {code: reason for code in ISSUE_TYPES if code.startswith("leaked-")}
        if self._requirements.renderer is None or self._requirements.max_length is None:
            reasons["too-long"] = "the check has no model and maximum length"
        return reasons

    def _check_source(self, check_input: CheckInput, source: UnvalidatedSource) -> SourceStats:
        claims, coordinates = BoxClaimCollector(), TextCoordinates()
        text_claims = BoxClaimCollector()
        num_samples = num_unreadable = 0
        name = str(check_input.path)
        rows = enumerate(source)
        groups = iter(lambda: list(islice(rows, ROWS_PER_GROUP)), [])
        for group in self._catalog.process_groups(groups, _iter_image_paths):
            for row_index, row in group:
                where = format_location(name, row.location)
                if row.error is not None:
                    num_unreadable += 1
                    location = SampleLocation(name, where, "", row_index, -1)
                    self._add_issue(issue_from_error(row.error, location), location)
                for sample_index, sample in enumerate(row.samples):
                    location = SampleLocation(name, where, sample.id, row_index, sample_index)
                    self._check_sample(sample, location, is_validation=check_input.is_validation)
                    text = join_text(sample.iter_parts(), "\n")
                    paths = [one.image for one in sample.iter_parts() if isinstance(one, ImagePart)]
                    coordinates.add(text, paths, lambda path: self._catalog[path].size, where)
                num_samples += len(row.samples)
                claims.add_row(row, where, self._catalog)
                text_boxes = tuple(chain.from_iterable(map(_list_text_boxes, row.samples)))
                text_claims.add_row(replace(row, boxes=text_boxes), where, self._catalog)
            self._on_progress(len(group))
        self._are_conventions_tested |= has_enough_samples(claims.claims)
        for kind, count, where, text in coordinates.describe():
            what = f"{count} samples with {kind} in their text, such as {text!r}"
            remedy = f"no model scales numbers in texts; {COORDINATE_REMEDIES[kind]}"
            found = find_convention_issues(text_claims.claims) if kind == "boxes" else []
            for issue in found:
                remedy += f"; they fit their images as {issue.description}: {issue.options}"
            self._add_issue(CheckIssue("coordinates-in-text", where, what, remedy, source=name))
        takes_options = "boxes" in source.source.data_format.supported_options
        for issue in find_convention_issues(claims.claims):
            self._add_issue(issue.to_check_issue(name, takes_options=takes_options))
        return SourceStats(
            path=name,
            is_validation=check_input.is_validation,
            format=source.source.data_format.name,
            detected_by=source.source.detected_by,
            num_rows=len(source),
            num_samples=num_samples,
            num_unreadable_rows=num_unreadable,
        )

    def _check_sample(
        self, sample: Sample, location: SampleLocation, *, is_validation: bool
    ) -> None:
        for part in sample.iter_parts():
            if isinstance(part, VideoPart):
                self._frame_paths.update(part.frames)
                self._video_paths.update(() if part.video is None else (part.video,))
        self._profilers[is_validation].add_sample(sample, self._catalog)
        self._sampler.add_sample(sample, location, is_validation=is_validation)
        special_tokens = self._requirements.special_tokens
        issues = list(find_sample_issues(sample, location, self._catalog, special_tokens))
        if all(issue.severity != "error" for issue in issues):
            issues += self._consistency[is_validation].add_sample(sample, location)
            self._rare_answers.add_sample(sample, location)
            issues += self._check_length(sample, location, self._profilers[is_validation])
        if is_validation:
            self._leakage.add_validation_sample(sample, location)
        else:
            issues += self._leakage.add_train_sample(sample, location)
        for issue in issues:
            self._add_issue(issue, location)

    def _check_length(
        self, sample: Sample, location: SampleLocation, profiler: SplitProfiler
    ) -> Iterator[CheckIssue]:
        """Yield an issue if the sample has too many tokens or cannot be rendered."""
        renderer, max_length = self._requirements.renderer, self._requirements.max_length
        if renderer is None or max_length is None:
            return
        try:
            num_tokens = renderer.tokenize(LocatedSample(sample, Path())).num_tokens
        except UserError as error:
            yield issue_from_error(error, location)
            return
        profiler.add_value("num_tokens", num_tokens)
        if num_tokens > max_length:
            yield location.create_issue(
                "too-long",
                f"{num_tokens} tokens, maximum {max_length}",
                "increase max_length, reduce the image size, or remove the sample",
            )

    def _add_issue(self, issue: CheckIssue, location: SampleLocation | None = None) -> None:
        self._counts[issue.code] += 1
        if self._counts[issue.code] <= self._max_issues:
            self._issues.append(issue)
        self._on_issue(issue)
        if location is None:
            self.fixer.add_source_issue(issue)
            return
        self.fixer.add_issue(location, issue)
        # All issues of one code in one sample are consecutive.
        if self._last_location.get(issue.code) != location:
            self._affected_samples[issue.code] += 1
            self._last_location[issue.code] = location


class BoxClaimCollector:
    """Collect the boxes of a data file for the detection of their convention.

    If there are more than `max_claims` boxes, rows are sampled evenly over the file.
    """

    def __init__(self, max_claims: int = MAX_BOX_CLAIMS) -> None:
        self._max_claims = max_claims
        self.claims: list[BoxClaim] = []
        self._step = 1
        self._num_rows = 0

    def add_row(self, row: UnvalidatedRow, location: str, catalog: ImageCatalog) -> None:
        """Add the boxes in valid images of a row, if the row is sampled."""
        self._num_rows += 1
        if not row.boxes or self._num_rows % self._step:
            return
        sample_id = row.samples[0].id if row.samples else ""
        for box in row.boxes:
            image = catalog[str(box.image_path)]
            if image.issue_code is None:
                key = location, sample_id, box.image_path, image.size, image.exif_orientation
                self.claims.append(BoxClaim(*key, box.coordinates, box.frame))
        if len(self.claims) > self._max_claims:
            self._step *= 2
            locations = list(dict.fromkeys(claim.location for claim in self.claims))
            sampled_locations = set(locations[1::2])
            self.claims = [claim for claim in self.claims if claim.location in sampled_locations]


def _list_text_boxes(sample: Sample) -> list[RawBox]:
    """Return the lists of four numbers in the answer about a single image as boxes in pixels."""
    images = [part.image for part in sample.iter_parts() if isinstance(part, ImagePart)]
    if len(images) != 1:
        return []
    lists = find_number_lists(join_text(sample.messages[-1].content, "\n"))
    return [RawBox((a, b, c, d), Path(images[0]), PIXELS) for a, b, c, d in lists]


def _open_source(check_input: CheckInput, output_folder: Path) -> UnvalidatedSource:
    output_folder.mkdir()
    path, options = check_input.path, check_input.options
    if isinstance(path, Path) and check_input.is_imported:
        return open_unvalidated(path, with_preset(path, options), output_folder)
    return open_unvalidated_samples(path, options, output_folder)


def _iter_image_paths(group: list[tuple[int, UnvalidatedRow]]) -> Iterator[str]:
    for _, row in group:
        for sample in row.samples:
            yield from iter_media_paths(sample)
        yield from (str(box.image_path) for box in row.boxes)


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
    """Selects random samples of a stream with equal probability (reservoir sampling)."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._num_samples = 0
        self.previews: list[SamplePreview] = []

    def add_sample(self, sample: Sample, location: SampleLocation, *, is_validation: bool) -> None:
        """Select a sample with probability `MAX_PREVIEWS / number of samples so far`."""
        self._num_samples += 1
        if len(self.previews) < MAX_PREVIEWS:
            # Appended samples would stay in the order of the file.
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
