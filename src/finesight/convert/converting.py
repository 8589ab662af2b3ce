"""A configuration of another program becomes a recipe, and what cannot be said in one is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from finesight.config import Recipe
from finesight.convert import llama_factory, llama_factory_keys, ms_swift, ms_swift_keys
from finesight.convert.draft import Draft
from finesight.convert.given import Given, Program, is_nothing, shown
from finesight.convert.reading import read
from finesight.convert.rules import Lacks, Needless, Remark, Rule, Rules
from finesight.convert.shell import is_open
from finesight.errors import UserError
from finesight.storage import refuse_existing, write_file
from finesight.yaml_text import parsed

_RULES: Mapping[Program, Rules] = {
    "ms-swift": ms_swift_keys.RULES,
    "LLaMA-Factory": llama_factory_keys.RULES,
}
_FILL: Mapping[Program, Callable[[Given, Draft], None]] = {
    "ms-swift": ms_swift.fill,
    "LLaMA-Factory": llama_factory.fill,
}
_VARIABLES = {
    *("MAX_PIXELS", "MIN_PIXELS", "IMAGE_MAX_TOKEN_NUM", "IMAGE_MIN_TOKEN_NUM", "USE_HF"),
    *("NPROC_PER_NODE", "NNODES", "CUDA_VISIBLE_DEVICES", "USE_MODELSCOPE_HUB"),
}
"""Of the environment, what has a place in the recipe."""

_SECRET = ("token", "api_key", "secret", "password", "webhook")
"""In names of what is not shown again."""

_MEASURING = ("eval_steps", "eval_strategy", "evaluation_strategy")
"""When held-out data are measured."""

_ABOUT_VIDEO = ("VIDEO", "FPS", "NFRAMES")


@dataclass(frozen=True)
class Converted:
    """A recipe's text, what was told about it, and the commands that make its data."""

    program: Program
    recipe: str
    remarks: tuple[Remark, ...]
    imports: tuple[str, ...]


def convert(source: Path, target: Path) -> Converted:
    """Read `source` and write the recipe to `target`. Raises UserError for what is no configuration
    of ms-swift or LLaMA-Factory, for methods and models that finesight does not have, and where
    there is a `target` already."""
    refuse_existing(target)
    converted = converted_from(read(source))
    write_file(target, converted.recipe.encode())
    return converted


def converted_from(given: Given) -> Converted:
    """The recipe of a configuration, which loads."""
    draft = Draft()
    _FILL[given.program](given, draft)
    text = draft.text(f"From {given.program}, {Path(given.where).name}, by `finesight convert`.")
    _check(text, given)
    remarks = (*draft.remarks, *_of_values(given, draft), *_of_environment(given))
    return Converted(given.program, text, remarks, tuple(draft.imports))


def _check(text: str, given: Given) -> None:
    try:
        Recipe.model_validate(parsed(text))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(piece) for piece in first["loc"])
        raise UserError(
            f"makes no recipe: {place}: {first['msg']}, given {shown(first['input'])[:80]}",
            where=given.where,
            expected="settings that a run can have",
            remedy="correct the setting that it came from",
        ) from error


def _of_values(given: Given, draft: Draft) -> Iterator[Remark]:
    """A remark on every setting that was written and did not become one of the recipe. A finished
    run records all of its settings, most of them empty or nobody's choice: those are counted."""
    rules = _RULES[given.program]
    told = {remark.key for remark in draft.remarks}
    counted = 0
    for key, value in given.values.items():
        remark = None if key in told else _of_value(given, rules.get(key), key, value)
        if key in _MEASURING and "data.eval" not in draft.settings:
            remark = Remark("needless", key, _short(key, value), "nothing is held out")
        if remark is None:
            continue
        if given.finished and (remark.kind == "needless" or is_nothing(value) or value is False):
            counted += 1
        else:
            yield remark
    if counted:
        text = "recorded by the run, without an effect on the result"
        yield Remark("needless", f"{counted} settings", "", text)


def _of_value(given: Given, rule: Rule | None, key: str, value: object) -> Remark | None:
    shown_value = _short(key, value)
    if given.scripted and is_open(value):
        return Remark("unknown", key, shown_value, "the script does not say what stands there")
    if rule is None:
        text = f"not known of {given.program}: see whether it matters"
        return Remark("unknown", key, shown_value, text)
    if isinstance(rule, Needless):
        return Remark("needless", key, shown_value, rule.why)
    if isinstance(rule, Lacks):
        matters = _matters(value, rule.same)
        what = rule.what if matters else "the same here"
        return Remark("differs" if matters else "needless", key, shown_value, what)
    return None


def _matters(value: object, same: tuple[object, ...]) -> bool:
    """Whether a value is more than the lack of one, and none that means what happens here."""
    word = str(value).strip().lower()
    if is_nothing(value) or (word in ("false", "0") and True not in same):
        return False
    return not any(_equal(word, other) for other in same)


def _equal(word: str, other: object) -> bool:
    if isinstance(other, bool) or not isinstance(other, int | float):
        return word == str(other).lower()
    try:
        return float(word) == other
    except ValueError:
        return False


def _of_environment(given: Given) -> Iterator[Remark]:
    yield from given.aside
    for name, value in given.environment.items():
        if any(word in name.upper() for word in _ABOUT_VIDEO):
            text = "videos are read as pictures of their frames: import them so"
            yield Remark("differs", name, _short(name, value), text)
        elif name not in _VARIABLES and name.upper() == name:
            text = "a variable of the other program's run"
            yield Remark("needless", name, _short(name, value), text)


def _short(key: str, value: object) -> str:
    if any(word in key.lower() for word in _SECRET):
        return "..."
    text = shown(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
