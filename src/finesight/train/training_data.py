"""Loading and checking of the training and validation data of a run."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass

from finesight.config import DataSettings, Recipe
from finesight.data.corpus import Corpus, load_corpus
from finesight.encode.renderer import Renderer
from finesight.errors import UserError
from finesight.evaluate import custom_metric
from finesight.train.console import TrainingConsole
from finesight.train.dataloader import StepDataset
from finesight.train.dataset_stats import (
    MAX_FULL_SCAN_SAMPLES,
    DatasetStats,
    SampleStatsMap,
    compute_dataset_stats,
    draw_subset,
    list_image_paths,
)
from finesight.train.sampler import StepSampler


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Samples of one split, and their statistics with the selection of valid samples."""

    corpus: Corpus
    stats: DatasetStats

    @property
    def index_signature(self) -> str:
        """Text that identifies the valid samples of the split, compared on resume."""
        indices = self.stats.sample_indices
        # A list of millions of indices would be too long.
        return json.dumps(indices) if self.stats.is_complete else f"all of {len(indices)}"

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
            renderer: Tokenizer and image processor.
            sampler: Samples of each step.
            pack_tokens: Maximum number of tokens of a pack.
            data: Data settings of the recipe.
            use_shared_prefix: Whether each pack stores the prefix shared by all samples of a step
                only once.
        """
        source = self.corpus, renderer, sampler, pack_tokens, data.on_invalid_sample
        max_length = None if self.stats.is_complete else data.max_length
        return StepDataset(*source, max_length=max_length, use_shared_prefix=use_shared_prefix)


def load_training_data(
    recipe: Recipe, renderer: Renderer, num_workers: int, console: TrainingConsole
) -> tuple[TrainingData, TrainingData | None]:
    """Load and check the training and validation samples of a recipe.

    Skipped samples are logged. A large training split is scanned partially.

    Returns:
        Training split, and validation split or None.

    Raises:
        UserError: The data are invalid, or a metric is set without validation data.
    """
    if recipe.eval is not None and not recipe.data.eval:
        raise UserError(
            f"eval.metric is {recipe.eval.metric}, but there is no validation data",
            where="data.eval",
            expected="a JSONL file of validation samples",
            remedy="set data.eval, for example by `finesight data import --train-fraction 0.9`",
        )
    metric_location = (
        custom_metric.parse_metric_path(
            custom_metric.resolve_metric_path(recipe.eval.metric, recipe.output_dir)
        )
        if recipe.eval
        else None
    )
    if metric_location is not None:
        custom_metric.require_metric_file(
            metric_location[0]
        )  # not executed here: a plan does not need it
    corpus = load_corpus(recipe.data.train)
    if not recipe.data.eval:
        return _scan_split(corpus, recipe, renderer, num_workers, console, "train"), None
    validation_corpus = load_corpus(recipe.data.eval)
    watched_images = {
        path for sample in validation_corpus.read_samples() for path in list_image_paths(sample)
    }
    train_data = _scan_split(
        corpus, recipe, renderer, num_workers, console, "train", watched_images
    )
    if train_data.stats.leaked_images:
        console.log(
            f"{len(train_data.stats.leaked_images)} images of data.eval are also in data.train:"
            " metrics on them do not measure generalization"
        )
    return train_data, _scan_split(
        validation_corpus, recipe, renderer, num_workers, console, "eval"
    )


def _scan_split(
    corpus: Corpus,
    recipe: Recipe,
    renderer: Renderer,
    num_workers: int,
    console: TrainingConsole,
    split_name: str,
    watched_images: Set[str] = frozenset(),
) -> TrainingData:
    # Validation data are always read completely.
    subset = (
        draw_subset(len(corpus))
        if split_name == "train" and len(corpus) > MAX_FULL_SCAN_SAMPLES
        else None
    )
    num_samples = len(corpus) if subset is None else len(subset)
    with console.progress_stage(
        f"reading headers of data.{split_name}", num_samples
    ) as on_progress:
        stats = compute_dataset_stats(
            corpus, renderer, recipe.data, num_workers, on_progress, watched_images, subset
        )
    if not stats.is_complete:
        _log_partial_scan(stats, console, split_name)
        return TrainingData(corpus, stats)
    console.log(
        f"data.{split_name}: {len(stats.sample_indices)} samples, {stats.num_tokens} tokens"
        f" (longest {stats.max_sample_tokens}),"
        f" {stats.num_patches} patches, {len(stats.skipped)} samples skipped"
    )
    for skipped in stats.skipped[:5]:
        console.log(f"  skipped {skipped.id}: {skipped.reason}")
    if len(stats.skipped) > 5:
        console.log(f"  and {len(stats.skipped) - 5} more, listed in skipped_samples.jsonl")
    return TrainingData(corpus, stats)


def _log_partial_scan(stats: DatasetStats, console: TrainingConsole, split_name: str) -> None:
    num_invalid = stats.num_scanned - len(stats.scanned_indices)
    console.log(
        f"data.{split_name}: {len(stats.sample_indices)} samples, too many for a full scan;"
        f" {stats.num_scanned} samples scanned, {num_invalid} of them invalid; estimated total:"
        f" {stats.num_tokens} tokens (longest {stats.max_sample_tokens}),"
        f" {stats.num_patches} patches"
    )
    console.log(
        "  other samples are checked when they are read, and skipped if they are invalid; only the"
        " scanned samples are compared with the images of data.eval"
    )
