"""Tasks with pairs and labels, for tests of preference tuning."""

import itertools

import pytest
from tiny_task import TinyTask, edit_samples

from finesight.encode.renderer import NativeRenderer
from finesight.model_folder import ModelFolder
from finesight.samples.corpus import Corpus, load_corpus
from finesight.settings.config import DataSettings

LONG_RUN = "train.epochs=8", "train.save_every=null"


def add_preferences(task: TinyTask, labels: tuple[bool | None, ...] = (None,)) -> None:
    """Add a rejected answer to each sample, another color, or a label and the answer it has.

    Args:
        labels: Labels of successive samples; None for a pair.
    """
    colors = ["red", "green", "light blue", "white", "red"]
    for split in ("train", "eval"):
        with edit_samples(task.folder / f"{split}.jsonl") as samples:
            for sample, label in zip(samples, itertools.cycle(labels), strict=False):
                chosen = sample["messages"][-1]["content"]
                rejected = colors[colors.index(chosen) + 1]
                if label is None:
                    sample["rejected"] = rejected
                    continue
                sample["label"] = label
                sample["messages"][-1]["content"] = chosen if label else rejected


@pytest.fixture
def pair_task(tmp_path) -> TinyTask:
    task = TinyTask(tmp_path)
    add_preferences(task)
    return task


@pytest.fixture
def labeled_task(tmp_path) -> TinyTask:
    task = TinyTask(tmp_path)
    add_preferences(task, (True, False, None))
    return task


def load_train_data(task: TinyTask) -> tuple[Corpus, NativeRenderer]:
    corpus = load_corpus(DataSettings.model_validate(task.recipe["data"]).train)
    return corpus, NativeRenderer(ModelFolder(task.folder / "tiny"))
