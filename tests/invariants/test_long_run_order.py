"""The sample order of a run on a million samples, with stops, kills and other world sizes."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finesight.samples.corpus import Corpus
from finesight.samples.line_index import SampleIndex
from finesight.samples.sample import JsonlSamples
from finesight.settings.config import TrainSettings
from finesight.train.parallel.distributed import ProcessGroup
from finesight.train.sampler import DistributedSampler, SampleOrder, TrainSampler

SIZES, WEIGHTS = (700_000, 300_000), (1.0, 1.0)
SAMPLES = sum(SIZES)
BATCH = 256
SAVE_EVERY = 50
LIVES = 6
EPOCHS = 1.02
"""A little more than one, so that the border of epochs is crossed."""

CHECKED = 10
"""Steps of each life whose shares are computed in every process."""


def make_sampler() -> TrainSampler:
    """Build the order from file sizes and settings, as a starting or resumed process does."""
    empty = np.empty(0, np.int64)
    # Every line begins at byte 0: they are counted and never read.
    indices = [SampleIndex(np.broadcast_to(np.int64(0), size + 1), empty, "") for size in SIZES]
    files = [JsonlSamples(Path(), index, (0, 0)) for index in indices]
    corpus = Corpus(tuple(files), WEIGHTS, "fingerprint")
    train = TrainSettings(batch_size=BATCH, epochs=EPOCHS, seed=11)
    return TrainSampler(corpus, range(SAMPLES), train)


@dataclass(slots=True)
class SimulatedRun:
    """Samples of every step so far; steps lost by a kill are repeated."""

    taken_SB: NDArray[np.int64]
    step: int = 0
    again: int = 0

    def live(self, until: int, killed: bool, ranks: int, rng: random.Random) -> None:
        """One process group, from the newest checkpoint to step `until`."""
        course = make_sampler()
        start = self.step
        shown = {rng.randrange(start, until) for _ in range(CHECKED)} | {start, until - 1}
        for step in range(start, until):
            members = course.batch_indices(step)
            row = self.taken_SB[step]
            if row[0] >= 0:
                assert row[: len(members)].tolist() == members, "another order after a kill"
                self.again += 1
            row[: len(members)] = members
            if step in shown:
                assert_shared(course, step, ranks)
        self.step = until // SAVE_EVERY * SAVE_EVERY if killed else until


def cost(index: int) -> float:
    return float(1 + index * 2_654_435_761 % 97)


def assert_shared(course: TrainSampler, step: int, count: int) -> None:
    """Each sample of the step goes to one process, and none has much more to do than another."""
    shares = [
        DistributedSampler(course, ProcessGroup(rank, count), cost, None, 1).batch_indices(step)
        for rank in range(count)
    ]
    assert sorted(index for share in shares for index in share) == sorted(
        course.batch_indices(step)
    )
    costs = [sum(map(cost, share)) for share in shares]
    assert max(costs) - min(costs) <= max(map(cost, course.batch_indices(step)))


def test_elastic_restarts_visit_each_sample_once_per_epoch():
    rng = random.Random(5)
    steps = len(make_sampler())
    run = SimulatedRun(np.full((steps, BATCH), -1, np.int64))
    stops = sorted(rng.sample(range(SAVE_EVERY + 1, steps), LIVES - 1))
    for number, until in enumerate([*stops, steps]):
        last = until == steps
        run.live(until, not last and number % 2 == 0, rng.choice([1, 2, 3, 8, 64]), rng)
    assert run.step == steps
    assert run.again > 0, "no kill has undone a step"

    row = run.taken_SB[run.taken_SB >= 0]
    order = SampleOrder(SIZES, WEIGHTS, seed=11)
    first, second = order.epoch_indices(0), order.epoch_indices(1)
    assert len(row) == round(EPOCHS * SAMPLES)
    counts = np.bincount(row[:SAMPLES], minlength=SAMPLES)
    assert counts.min() == counts.max() == 1, "a sample twice in the epoch, or never"
    assert np.array_equal(row, np.concatenate([first, second])[: len(row)])
    assert not np.array_equal(first, second)
