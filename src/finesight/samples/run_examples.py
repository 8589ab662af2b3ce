"""Training samples of a run as examples of its questions and answers."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from finesight.errors import UserError
from finesight.samples.corpus import load_corpus
from finesight.samples.sample import LocatedSample
from finesight.settings.manifest import RECIPE_FILE, find_run_dir
from finesight.settings.recipe import load_recipe

MAX_EXAMPLES = 500
"""Maximum number of samples."""


def read_run_examples(run_or_model: str, *, is_local: bool = False) -> list[LocatedSample]:
    """Return training samples of a run, evenly distributed; empty without readable data.

    Args:
        is_local: Do not read data in object storage.
    """
    path = find_run_dir(Path(run_or_model)) / RECIPE_FILE
    with suppress(UserError):
        files = load_recipe(path).data.train
        corpus = load_corpus(
            [] if is_local and any(isinstance(file.path, str) for file in files) else files
        )
        # Data may be sorted by class.
        num_examples = min(MAX_EXAMPLES, len(corpus))
        return [corpus[index * len(corpus) // num_examples] for index in range(num_examples)]
    return []


def has_single_questions(run_or_model: str) -> bool:
    """Return whether the readable training samples of a run have one question each."""
    messages = [one.sample.messages for one in read_run_examples(run_or_model, is_local=True)]
    return bool(messages) and all(sum(t.role == "user" for t in one) == 1 for one in messages)
