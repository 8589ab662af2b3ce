"""The samples that a run learns from and measures on: found, looked at, and told of."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass

from finesight.config import Data, Recipe
from finesight.data.sources import Corpus, load_sources
from finesight.encode.rendering import Rendering
from finesight.errors import UserError
from finesight.evaluate import own
from finesight.train.course import Members
from finesight.train.loader import StepData
from finesight.train.progress import Screen
from finesight.train.survey import MOST, Glances, Survey, pictures_of, spread, survey


@dataclass(frozen=True, slots=True)
class Texts:
    """Samples to learn from or to measure on, and which of them are usable."""

    corpus: Corpus
    survey: Survey

    @property
    def usable(self) -> str:
        """The indices of the samples that will be used, as a text that names them."""
        kept = self.survey.kept
        # A list of millions would be as long as their file.
        return json.dumps(kept) if self.survey.whole else f"all of {len(kept)}"

    def glances(self, renderer: Rendering, data: Data) -> Glances:
        """What was seen of each sample."""
        return Glances(self.corpus, self.survey, renderer, data.max_length)

    def in_steps(
        self,
        renderer: Rendering,
        members: Members,
        pack_tokens: int,
        data: Data,
        *,
        branched: bool = False,
    ) -> StepData:
        """The samples in these steps, in packs of at most so many tokens. In `branched` ones, what
        all samples of a step begin with is computed once for each pack."""
        source = self.corpus, renderer, members, pack_tokens, data.unusable
        most = None if self.survey.whole else data.max_length
        return StepData(*source, max_length=most, branched=branched)


def texts_of(
    recipe: Recipe, renderer: Rendering, workers: int, screen: Screen
) -> tuple[Texts, Texts | None]:
    """The samples to learn from and those to measure on, every one checked unless there are very
    many to learn from, and what is left out said on the screen. Raises UserError for mistakes in
    them, and for a metric without held-out ones."""
    if recipe.eval is not None and not recipe.data.eval:
        raise UserError(
            f"eval.metric is {recipe.eval.metric}, and there is no held-out data",
            where="data.eval",
            expected="a JSONL file of held-out samples",
            remedy="set data.eval, for example by `finesight data import --split 0.9`",
        )
    place = own.split(own.found(recipe.eval.metric, recipe.output)) if recipe.eval else None
    if place is not None:
        own.require_file(place[0])  # not executed here: a plan needs no figures
    corpus = load_sources(recipe.data.train)
    if not recipe.data.eval:
        return _surveyed(corpus, recipe, renderer, workers, screen, "train"), None
    held_out = load_sources(recipe.data.eval)
    watched = {picture for located in held_out.read() for picture in pictures_of(located)}
    train = _surveyed(corpus, recipe, renderer, workers, screen, "train", watched)
    if train.survey.met:
        screen.say(
            f"{len(train.survey.met)} pictures of data.eval are in data.train too: figures measured"
            " on them say nothing about new ones"
        )
    return train, _surveyed(held_out, recipe, renderer, workers, screen, "eval")


def _surveyed(
    corpus: Corpus,
    recipe: Recipe,
    renderer: Rendering,
    workers: int,
    screen: Screen,
    name: str,
    watched: Set[str] = frozenset(),
) -> Texts:
    # What is measured on is read as a whole anyway.
    some = spread(len(corpus)) if name == "train" and len(corpus) > MOST else None
    number = len(corpus) if some is None else len(some)
    with screen.stage(f"reading headers of data.{name}", number) as advance:
        found = survey(corpus, renderer, recipe.data, workers, advance, watched, some)
    if not found.whole:
        _say_some(found, screen, name)
        return Texts(corpus, found)
    screen.say(
        f"data.{name}: {len(found.kept)} samples, {found.tokens} tokens (longest {found.longest}),"
        f" {found.patches} patches, {len(found.dropped)} samples dropped"
    )
    for dropped in found.dropped[:5]:
        screen.say(f"  dropped {dropped.id}: {dropped.reason}")
    if len(found.dropped) > 5:
        screen.say(f"  and {len(found.dropped) - 5} more, all of them listed in the run folder")
    return Texts(corpus, found)


def _say_some(found: Survey, screen: Screen, name: str) -> None:
    bad = found.looked_at - len(found.seen)
    screen.say(
        f"data.{name}: {len(found.kept)} samples, too many to look at all beforehand;"
        f" {found.looked_at} were looked at, {bad} of them cannot be used; in all about"
        f" {found.tokens} tokens (longest seen {found.longest}) and {found.patches} patches"
    )
    screen.say(
        "  each other sample is checked when it is read, and left out of its step if it cannot be"
        " used; pictures of data.eval are looked for in those alone that were looked at"
    )
