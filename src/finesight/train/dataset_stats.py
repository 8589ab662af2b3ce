"""Loading and scan of the data of a run: checks samples, counts tokens, fingerprints images.

Large datasets are scanned partially, and their statistics are estimates.

Fingerprints detect images that changed before a resume. They cover the size of each image file and
its first and last `EDGE_BYTES` bytes, which cost little in addition to reading the header.
Modification times are recorded but do not count as changes, because copying a dataset changes them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from finesight.encode.family import ThinkingOptions
from finesight.encode.packing import SharedPrefix
from finesight.encode.renderer import Renderer
from finesight.encode.tokenization import find_sample_error
from finesight.errors import Step, UserError, format_count
from finesight.evaluate import custom_metric
from finesight.files.storage import write_file
from finesight.progress import ProgressCallback, ProgressConsole
from finesight.samples.corpus import Corpus, draw_subset, load_corpus
from finesight.samples.image_file import CorruptImageError, get_file, resolve_content
from finesight.samples.prompt_format import PromptFormat
from finesight.samples.question_forms import read_prompt_format
from finesight.samples.sample import LocatedSample, Sample, list_media_paths
from finesight.settings.config import DataFileSettings, DataSettings, Recipe
from finesight.train.run_dir import RunDir, Split
from finesight.train.sample_scan import scan_samples
from finesight.train.sampler import StepSampler
from finesight.train.step_batch import SkippedSample
from finesight.train.step_dataset import StepDataset
from finesight.vision.image_processing import GridTHW

EDGE_BYTES = 8 * 1024
"""Number of bytes read at the start and at the end of an image file."""

MAX_LISTED_IMAGES = 5
"""Maximum number of changed images in a message."""

MAX_MISMATCHED_TRIES = 32
"""Maximum number of samples to search for another question."""

_CHECKSUM_KEY = "sha256"


ImageState = tuple[int, int]
"""Hashes of all images of a sample: of their sizes and edges, and of their modification times."""


def read_image_state(sample: LocatedSample) -> ImageState:
    """Compute the fingerprints of the images of a sample.

    Raises:
        CorruptImageError: An image cannot be read.
    """
    contents = hashlib.blake2b(digest_size=8)
    times = hashlib.blake2b(digest_size=8)
    paths: list[Path] = []
    if not _is_parquet_file(sample.folder):
        # The fingerprint of the data covers the images in rows of a Parquet file.
        paths = list_sample_images(sample)
    for path in paths:
        try:
            size, ends, time = _read_edges(path)
        except OSError as error:
            raise CorruptImageError(
                f"cannot be read: {error.strerror or error}",
                where=str(path),
                expected="a readable image during the complete run",
                remedy="restore the image, or correct its permissions",
            ) from error
        contents.update(size.to_bytes(8) + ends)
        times.update(time.to_bytes(8, signed=True))
    content_hash = int.from_bytes(contents.digest(), signed=True)
    time_hash = int.from_bytes(times.digest(), signed=True)
    return content_hash, time_hash


def _is_parquet_file(path: Path) -> bool:
    return path.suffix.lower() == ".parquet" and path.is_file()


def list_sample_images(sample: LocatedSample) -> list[Path]:
    """Return the paths of the images and video frames of a sample, in order."""
    paths = []
    for part in sample.sample.iter_parts():
        for name in list_media_paths(part):
            paths.append(sample.resolve_path(name))
    return paths


def _read_edges(path: Path) -> tuple[int, bytes, int]:
    """Return size, first and last bytes, and modification time of an image file."""
    content = resolve_content(path)
    with content.open("rb") if isinstance(content, Path) else content as file:
        ends = file.read(EDGE_BYTES)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(EDGE_BYTES, size - EDGE_BYTES))
        ends += file.read()
    return size, ends, get_file(path).stat().st_mtime_ns


ImageStates = NDArray[np.int64]
"""Image fingerprints of several samples: rows of corpus index, content and time, [N, 3]."""


def build_image_states(samples: Sequence[int], states: Iterable[ImageState]) -> ImageStates:
    """Combine the fingerprints of single samples; `samples` are their corpus indices."""
    rows = [(index, *state) for index, state in zip(samples, states, strict=True)]
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def save_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Write tensors with their checksum to a safetensors file, atomically."""
    write_file(path, save(dict(tensors), {_CHECKSUM_KEY: _checksum(tensors)}))


def load_tensors(
    path: Path, content: str, remedy: str, required: str = ""
) -> dict[str, NDArray[Any]]:
    """Read the tensors that `save_tensors` wrote.

    Args:
        content: Description of the tensors for the error message.
        required: Name of a tensor that must exist, if any.

    Raises:
        UserError: The file is missing or corrupt.
    """
    try:
        reader: Any = safe_open(path, framework="numpy")  # its methods are untyped
        with reader as file:
            tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
            checksum = (file.metadata() or {}).get(_CHECKSUM_KEY)
        if checksum != _checksum(tensors):
            raise ValueError(f"the checksum {checksum} does not match")
        if required and required not in tensors:
            raise ValueError(f"no tensor {required}")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(
            f"{content} cannot be read: {error}",
            where=str(path),
            expected="the file as the run wrote it",
            remedy=remedy,
        ) from error
    return tensors


def _checksum(tensors: Mapping[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {len(tensors[name])}\n".encode() + tensors[name].tobytes())
    return digest.hexdigest()


def check_image_record(
    run_dir: RunDir, splits: Mapping[Split, TrainingData], log: Callable[[str], None]
) -> None:
    """Compare the images with their fingerprints at the start of a resumed run.

    Changed modification times and repaired images are logged.

    Raises:
        UserError: Images have changed that the run had not reported as corrupt, or were repaired
            or damaged so that other samples are valid than at the start.
    """
    path = run_dir.images_path
    if not path.exists():
        log(f"{path} is missing: images are not compared with the start of the run")
        return
    remedy = f"delete {path} to resume without comparing images"
    recorded = load_tensors(path, "the fingerprints of the images", remedy, required="train")
    # The user may have repaired the images that the run reported as corrupt.
    messages = []
    for row in run_dir.read_skipped_samples():
        messages += [json.dumps(row.id), row.reason]
    reported_errors = "\n".join(messages)
    for split, data in splits.items():
        if split in recorded:
            _check_images(split, data, recorded[split], path, reported_errors, log)


def _check_images(
    split: str,
    data: TrainingData,
    recorded: ImageStates,
    path: Path,
    reported_errors: str,
    log: Callable[[str], None],
) -> None:
    current = data.stats.images
    _, rows, recorded_rows = np.intersect1d(
        current[:, 0], recorded[:, 0], assume_unique=True, return_indices=True
    )
    differs = current[rows] != recorded[recorded_rows]
    changed: list[str] = []
    num_repaired = 0
    for index in current[rows[differs[:, 1]], 0].tolist():
        sample = data.corpus[index]
        first, *others = map(str, list_sample_images(sample))
        names = json.dumps(sample.sample.id), first, *others
        if any(name in reported_errors for name in names):
            num_repaired += 1
        elif others:
            changed.append(f"{first} (or one of {len(others)} others of its sample)")
        else:
            changed.append(first)
    extra = _find_extra_samples(split, data, recorded, reported_errors)
    if extra and data.stats.is_complete:
        files: set[str] = set()
        for index in extra:
            files.update(map(str, list_sample_images(data.corpus[index])))
        raise UserError(
            f"data.{split}: {len(extra)} samples were skipped at the start of the run and are"
            f" readable now, or the reverse: {join_names(sorted(files))}",
            where=str(path),
            expected="the images of the start of the run, whose samples it fixed",
            remedy="restore these files as they were, or start a new run with another output_dir",
        )
    if num_repaired:
        log(f"data.{split}: corrupt images of {num_repaired} samples were replaced")
    if changed:
        raise UserError(
            f"data.{split}: the images of {len(changed)} samples have changed since the start of"
            f" the run: {join_names(changed)}",
            where=str(path),
            expected="the images of the start of the run",
            remedy=f"restore them, or delete {path} to resume with the current images",
        )
    if touched := np.count_nonzero(differs[:, 2]):
        log(
            f"data.{split}: the images of {touched} samples have another modification time than"
            f" at the start of the run; their sizes and their first and last"
            f" {EDGE_BYTES // 1024} KiB are equal, so they count as unchanged"
        )


def _find_extra_samples(
    split: str, data: TrainingData, recorded: ImageStates, reported_errors: str
) -> list[int]:
    """Return the samples that were skipped at the start and are readable now, or the reverse."""
    indices: list[int] = np.setxor1d(data.stats.images[:, 0], recorded[:, 0]).tolist()
    if split != "train":
        return indices
    # A scan of more samples than at the start is no change of images.
    known = {*recorded[:, 0].tolist()}
    extra = []
    for index in indices:
        if index in known or json.dumps(data.corpus[index].sample.id) in reported_errors:
            extra.append(index)
    return extra


def join_names(names: Iterable[str], max_names: int = MAX_LISTED_IMAGES) -> str:
    """List different names in a message, up to a maximum number."""
    unique = list(dict.fromkeys(names))
    listed = ", ".join(unique[:max_names])
    if len(unique) <= max_names:
        return listed
    return f"{listed} and {len(unique) - max_names} more"


MAX_FULL_SCAN_SAMPLES = 500_000
"""Maximum number of samples of a completely scanned dataset; limits time and memory."""

PARTIAL_SCAN_SAMPLES = 10_000
"""Number of samples that a partial scan of a larger dataset reads."""


@dataclass(frozen=True, slots=True)
class DatasetStats:
    """Statistics of a dataset, and the selection of its valid samples.

    After a partial scan, all samples count as valid, and the totals are estimates.

    Attributes:
        sample_indices: Corpus indices of the valid samples.
        skipped: Skipped samples with reasons.
        num_images: Number of image files and video frames over the scanned samples.
        num_unique_images: Number of distinct image paths.
        leaked_images: Validation images that also occur in the samples.
        sample_stats: Statistics of each sample in `scanned_indices`.
        scanned_indices: Corpus indices of the scanned samples that are valid.
        num_scanned: Number of scanned samples, including invalid ones.
        prefix_length: Number of tokens of the prefix shared by all valid scanned samples.
        images: Fingerprints of the images, to detect changes on resume.
    """

    sample_indices: Sequence[int]
    skipped: tuple[SkippedSample, ...]
    num_tokens: int
    num_patches: int
    num_images: int = 0
    num_unique_images: int = 0
    leaked_images: frozenset[str] = frozenset()
    sample_stats: tuple[SampleStats, ...] = ()
    scanned_indices: Sequence[int] = ()
    num_scanned: int = 0
    prefix_length: int = 0
    images: ImageStates = field(default_factory=partial(build_image_states, (), ()), compare=False)

    @property
    def is_complete(self) -> bool:
        """True if all samples were scanned."""
        return self.num_scanned == len(self.sample_indices) + len(self.skipped)

    def count_image_uses(self, num_samples: int) -> float:
        """Return how often a run of `num_samples` samples uses an image on average."""
        num_uses = self.num_images * num_samples / len(self.sample_indices)
        return num_uses / max(1, self.num_unique_images)


class SampleStats(NamedTuple):
    """Statistics of one sample, small enough to keep for all samples of a dataset.

    Attributes:
        num_packed_tokens: Number of tokens that the sample takes in a pack.
        grid_thw: Patch grid of each image or video.
        image_hashes: Short digests of the image paths.
        is_thinking: Whether the sample is rendered in thinking mode.
        num_answer_tokens: Number of supervised tokens of the last answer.
        response_starts: Start of each response of a preference pair.
    """

    id: str
    num_tokens: int
    num_packed_tokens: int
    num_supervised_tokens: int
    grid_thw: tuple[GridTHW, ...]
    image_hashes: tuple[bytes, ...]
    is_thinking: bool = False
    num_answer_tokens: int = 0
    response_starts: tuple[int, ...] = ()

    @property
    def num_patches(self) -> int:
        """Total number of patches of all images and videos."""
        return sum(t * h * w for t, h, w in self.grid_thw)


ScanResult = tuple[SampleStats, SharedPrefix, ImageState, Set[str]]
"""Statistics, prefix and images of a sample, and the validation images that occur in it."""


def _scan_sample(
    corpus: Corpus, renderer: Renderer, watched_images: Set[str], index: int
) -> ScanResult:
    sample = corpus.read_validated(index)
    tokenized = renderer.tokenize(sample)
    paths = list_image_paths(sample)
    stats = SampleStats(
        id=tokenized.id,
        num_tokens=tokenized.num_tokens,
        num_packed_tokens=tokenized.num_packed_tokens,
        num_supervised_tokens=tokenized.num_supervised_tokens,
        grid_thw=tuple(span.grid_thw for span in tokenized.spans),
        image_hashes=tuple(map(_hash_path, paths)),
        is_thinking=tokenized.is_thinking,
        num_answer_tokens=tokenized.num_answer_tokens,
        response_starts=tokenized.response_starts,
    )
    prefix = SharedPrefix.from_sample(tokenized)
    images = read_image_state(sample)
    return stats, prefix, images, paths & watched_images


def _hash_path(path: str) -> bytes:
    return hashlib.blake2b(os.fsencode(path), digest_size=8).digest()


class SampleStatsMap(dict[int, SampleStats]):
    """Mapping from corpus indices to sample statistics, which scans missing samples on access.

    A sample that turns out to be invalid has empty statistics. All scanned samples share a prefix
    of `prefix_length` tokens.
    """

    def __init__(
        self, corpus: Corpus, stats: DatasetStats, renderer: Renderer, max_length: int
    ) -> None:
        super().__init__(zip(stats.scanned_indices, stats.sample_stats, strict=True))
        self.prefix_length = stats.prefix_length
        self._max_length = max_length
        self._scan_sample = partial(_scan_sample, corpus, renderer, frozenset())

    def __missing__(self, index: int) -> SampleStats:
        with suppress(UserError):
            stats, *_ = self._scan_sample(index)
            if find_sample_error(stats, self._max_length) is None:
                return stats
        return SampleStats("", 0, 0, 0, (), ())


def list_image_paths(sample: LocatedSample) -> set[str]:
    """Return the absolute paths of all images and video frames of a sample."""
    return {*map(os.path.abspath, list_sample_images(sample))}


def compute_dataset_stats(
    corpus: Corpus,
    renderer: Renderer,
    data: DataSettings,
    num_workers: int,
    on_progress: ProgressCallback | None = None,
    watched_images: Set[str] = frozenset(),
    subset: Sequence[int] | None = None,
) -> DatasetStats:
    """Scan a dataset: check and tokenize its samples, and select the valid ones.

    Samples that are too long, lack supervised tokens or have corrupt images are skipped, or raise
    an error with `on_invalid_sample=fail`. All other errors of a sample are raised.

    Args:
        watched_images: Absolute paths of validation images to search for in the samples.
        subset: Corpus indices for a partial scan; None scans all samples.

    Raises:
        UserError: A sample is invalid, or no valid sample is left.
    """
    indices = range(len(corpus)) if subset is None else subset
    scan_sample = partial(_scan_sample, corpus, renderer, watched_images)
    valid: list[tuple[int, SampleStats, ImageState]] = []
    skipped: list[SkippedSample] = []
    too_long: list[SkippedSample] = []
    unsupervised: list[SkippedSample] = []
    leaked_images: set[str] = set()
    shared_prefix: SharedPrefix | None = None
    max_tokens = 0
    results = scan_samples(scan_sample, indices, num_workers, on_progress)
    for index, result in zip(indices, results, strict=True):
        if isinstance(result, CorruptImageError) and data.on_invalid_sample == "skip":
            reason = str(result).splitlines()[0]
            skipped.append(SkippedSample(corpus[index].sample.id, reason))
            continue
        if isinstance(result, UserError):
            raise result
        stats, prefix, images, leaked = result
        leaked_images.update(leaked)
        max_tokens = max(max_tokens, stats.num_tokens)
        error = find_sample_error(stats, data.max_length)
        if error is None:
            if shared_prefix is not None:
                prefix = shared_prefix.intersect(prefix)
            shared_prefix = prefix
            valid.append((index, stats, images))
        elif data.on_invalid_sample == "fail":
            raise error
        elif stats.num_tokens > data.max_length:
            too_long.append(SkippedSample(stats.id, f"over {data.max_length} tokens"))
        else:
            unsupervised.append(SkippedSample(stats.id, "no supervised tokens"))
    if not max_tokens:
        raise UserError(
            f"none of {len(indices)} samples has readable images",
            where="data",
            expected="valid images at the paths in the samples",
            remedy=f"fix the images; the first error is: {skipped[0].reason}",
        )
    if not valid:
        # A truncated sample would lose its answer or part of an image.
        raise UserError(
            f"none of {len(too_long) + len(unsupervised)} samples is valid: {len(too_long)}"
            f" exceed {data.max_length} tokens (the longest has {max_tokens}), {len(unsupervised)}"
            " have no answer",
            where="data",
            expected="samples with an assistant turn and at most data.max_length tokens",
            remedy="raise data.max_length, or set a smaller image size",
        )
    valid_indices, sample_stats, image_states = zip(*valid, strict=True)
    skipped += too_long + unsupervised
    image_hashes: list[bytes] = []
    num_tokens = 0
    num_patches = 0
    for stats in sample_stats:
        image_hashes += stats.image_hashes
        num_tokens += stats.num_tokens
        num_patches += stats.num_patches
    # Totals are of the complete dataset, of which a partial scan has read a part.
    scale = len(corpus) / len(indices)
    return DatasetStats(
        sample_indices=valid_indices if subset is None else range(len(corpus)),
        skipped=tuple(skipped) if subset is None else (),
        num_tokens=round(scale * num_tokens),
        num_patches=round(scale * num_patches),
        num_images=len(image_hashes),
        num_unique_images=len({*image_hashes}),
        leaked_images=frozenset(leaked_images),
        sample_stats=sample_stats,
        scanned_indices=valid_indices,
        num_scanned=len(indices),
        prefix_length=0 if shared_prefix is None else shared_prefix.length,
        images=build_image_states(valid_indices, image_states),
    )


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Samples of one split, and their statistics with the selection of valid samples."""

    corpus: Corpus
    stats: DatasetStats

    @property
    def first_sample(self) -> Sample:
        return self.corpus.read_validated(self.stats.sample_indices[0]).sample

    def select_thinking_mode(self, renderer: Renderer) -> Renderer:
        """Return the renderer in the thinking mode of the majority of the scanned samples."""
        modes = [stats.is_thinking for stats in self.stats.sample_stats]
        return renderer.with_thinking(ThinkingOptions(enable_thinking=2 * sum(modes) > len(modes)))

    def find_prompt_format(self) -> PromptFormat:
        """Find the forms of the questions and the frequent prompts of some of the samples."""
        return read_prompt_format(self.corpus, self.stats.sample_indices)

    def build_sample_stats(self, renderer: Renderer, data: DataSettings) -> SampleStatsMap:
        """Return a mapping from corpus indices to sample statistics."""
        return SampleStatsMap(self.corpus, self.stats, renderer, data.max_length)

    def build_step_dataset(
        self,
        renderer: Renderer,
        sampler: StepSampler,
        pack_tokens: int,
        data: DataSettings,
        *,
        use_shared_prefix: bool = False,
    ) -> StepDataset:
        """Create the dataset of packed steps of the split.

        Args:
            use_shared_prefix: Whether each pack stores the prefix shared by all samples of a step
                only once.
        """
        source = self.corpus, renderer, sampler, pack_tokens, data.on_invalid_sample
        max_length = None if self.stats.is_complete else data.max_length
        return StepDataset(*source, max_length=max_length, use_shared_prefix=use_shared_prefix)


class MismatchedCorpus(Corpus):
    """Corpus whose samples have the answer to another question, for the baseline of a step."""

    def read_validated(self, index: int) -> LocatedSample:
        """Read and fully validate a sample, with the answer to one half a corpus away.

        Samples with the same question, invalid ones, and answers without loss are passed over.
        """
        found = super().read_validated(index)
        for offset in range(min(len(self), MAX_MISMATCHED_TRIES)):
            with suppress(UserError):
                other = super().read_validated((index + len(self) // 2 + offset) % len(self))
                *question, answer = other.sample.messages
                is_same = (other.folder, *question) == (found.folder, *found.sample.messages[:-1])
                if answer.role == "assistant" and answer.loss and not is_same:
                    return replace(found, mismatched=answer)
        return found


def load_training_data(
    recipe: Recipe, renderer: Renderer, num_workers: int, console: ProgressConsole
) -> tuple[TrainingData, TrainingData | None]:
    """Load and check the training and validation samples of a recipe.

    Skipped samples are logged. A large training split is scanned partially.

    Returns:
        Training split, and validation split or None.

    Raises:
        UserError: The data are invalid, or a metric is set without validation data.
    """
    _check_metric(recipe)
    scan_split = partial(_scan_split, recipe, renderer, num_workers, console)
    mismatches_answers = recipe.needs.mismatched_answers

    def load(files: Sequence[DataFileSettings]) -> Corpus:
        corpus = load_corpus(files)
        fields = corpus.sources, corpus.weights, corpus.fingerprint
        if mismatches_answers:
            return MismatchedCorpus(*fields)
        return corpus

    with console.activity("reading data.train"):
        corpus = load(recipe.data.train)
    if not recipe.data.eval:
        return scan_split("train", corpus), None
    with console.activity("reading data.eval"):
        validation_corpus = load(recipe.data.eval)
        watched_images: set[str] = set()
        for sample in validation_corpus.read_samples():
            watched_images |= list_image_paths(sample)
    train_data = scan_split("train", corpus, watched_images)
    if train_data.stats.leaked_images:
        console.log(
            f"{format_count(len(train_data.stats.leaked_images), 'image')} of data.eval also in"
            " data.train: metrics on them do not measure generalization"
        )
    return train_data, scan_split("eval", validation_corpus)


def _check_metric(recipe: Recipe) -> None:
    """Check that `eval` has validation data and an existing metric.

    Raises:
        UserError: There is no validation data, or no file of the metric.
    """
    if recipe.eval is None:
        return
    if not recipe.data.eval:
        arguments = {"source": "SOURCE", "out": "OUT", "train_fraction": 0.9}
        raise UserError(
            f"eval.metric is {recipe.eval.metric}, but there is no validation data",
            where="data.eval",
            expected="a JSONL file of validation samples",
            remedy=Step("import", arguments, "set data.eval, for example by an import"),
        )
    metric = custom_metric.resolve_metric_path(recipe.eval.metric, recipe.output_dir)
    if (location := custom_metric.parse_metric_path(metric)) is not None:
        # A plan computes no scores, so it is enough that the file exists.
        custom_metric.require_metric_file(location[0])


def _scan_split(
    recipe: Recipe,
    renderer: Renderer,
    num_workers: int,
    console: ProgressConsole,
    split: str,
    corpus: Corpus,
    watched_images: Set[str] = frozenset(),
) -> TrainingData:
    subset = None
    num_samples = len(corpus)
    # Validation data are always read completely.
    if split == "train" and len(corpus) > MAX_FULL_SCAN_SAMPLES:
        subset = draw_subset(len(corpus), PARTIAL_SCAN_SAMPLES)
        num_samples = len(subset)
    with console.progress_stage(f"reading headers of data.{split}", num_samples) as on_progress:
        stats = compute_dataset_stats(
            corpus, renderer, recipe.data, num_workers, on_progress, watched_images, subset
        )
    _log_scan(split, stats, console.log)
    return TrainingData(corpus, stats)


def _log_scan(split: str, stats: DatasetStats, log: Callable[[str], None]) -> None:
    """Log the sizes of a split, and the first skipped samples."""
    longest = max(sample.num_tokens for sample in stats.sample_stats)
    totals = f"{stats.num_tokens} tokens (longest {longest}), {stats.num_patches} patches"
    if not stats.is_complete:
        log(
            f"data.{split}: {len(stats.sample_indices)} samples, too many for a full scan;"
            f" {stats.num_scanned} samples scanned,"
            f" {stats.num_scanned - len(stats.scanned_indices)} of them invalid;"
            f" estimated total: {totals}"
        )
        log(
            "  other samples are checked when they are read, and skipped if they are invalid; only"
            " the scanned samples are compared with the images of data.eval"
        )
        return
    log(
        f"data.{split}: {format_count(len(stats.sample_indices), 'sample')}, {totals},"
        f" {format_count(len(stats.skipped), 'sample')} skipped"
    )
    for skipped in stats.skipped[:5]:
        log(f"  skipped {skipped.id}: {skipped.reason}")
    if len(stats.skipped) > 5:
        log(f"  and {len(stats.skipped) - 5} more, listed in skipped_samples.jsonl")
