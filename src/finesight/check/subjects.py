"""What is to be checked, and by which model: files with options, or what a recipe names."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from finesight.check.texts import further
from finesight.data.opening import Request
from finesight.data.packed import holds_samples
from finesight.data.shards import PACKED, is_pattern
from finesight.data.tar_rows import is_tar, is_webdataset
from finesight.encode.rank_tokenizer import tokenizer_of
from finesight.encode.rendering import Rendering, renderer_of
from finesight.errors import UserError
from finesight.hub import locate
from finesight.recipe import load_recipe
from finesight.remote.archive import is_archive
from finesight.remote.objects import BY_THE_WEB
from finesight.yaml_text import parsed

ELSEWHERE = ("hf:", "modelscope:", "https:/", "http:/")
"""How sources begin that are not on this machine."""

_STORED = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/(?P<name>.+\.(?:tar|parquet))")
"""A file in object storage as a path, which has one slash of two."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A source to check, how it is read, and whether it is held out."""

    path: Path
    request: Request
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Packed:
    """Samples to check that are read as training reads them: of a tar or a Parquet file, of all
    files that a pattern fits, or of an address in object storage."""

    path: Path | str
    request: Request
    held_out: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """What a model has to say of samples: its special tokens, to be found in texts, and how long
    they become; over-long are those of more than `max_length` tokens."""

    specials: tuple[str, ...] = ()
    renderer: Rendering | None = None
    max_length: int | None = None


def of_files(
    train: Sequence[Path], held_out: Sequence[Path], request: Request
) -> list[Subject | Packed]:
    """Sources that are all read in the same way. Raises UserError for a file given twice, and for
    what is not read where it lies: archives, hubs and the web."""
    subjects = [_of_file(path, request, held_out=False) for path in train]
    subjects += [_of_file(path, request, held_out=True) for path in held_out]
    seen: set[Path | str] = set()
    for subject in subjects:
        path = subject.path.resolve() if isinstance(subject.path, Path) else subject.path
        if path in seen:
            raise UserError(
                "the same source is given twice",
                where=str(subject.path),
                expected="each source once: to train on, or after --against",
                remedy="leave one of the two out",
            )
        seen.add(path)
    return subjects


def _of_file(path: Path, request: Request, *, held_out: bool) -> Subject | Packed:
    stored = _STORED.fullmatch(str(path))
    if stored is not None and stored["scheme"] not in BY_THE_WEB:
        return Packed(f"{stored['scheme']}://{stored['name']}", request, held_out)
    as_samples = request.format in (None, "samples") and not request.columns
    if as_samples and holds_samples(path):
        return Packed(path, request, held_out)
    _refuse_unbrought(path)
    return Subject(path, request, held_out)


def _refuse_unbrought(source: Path) -> None:
    packed = is_archive(source.name) and source.is_file()
    if packed and is_tar(source) and is_webdataset(source):
        return
    # As a path, https:// has one slash.
    if packed or (not source.exists() and str(source).startswith(ELSEWHERE)):
        raise UserError(
            "a source that is not read where it lies",
            where=str(source),
            expected="files or folders on this machine, unpacked",
            remedy="import it first (`finesight data import SOURCE OUT`, the source written in the"
            " same way), then check OUT",
        )


def model_of(name_or_path: str | None, max_length: int | None) -> Model:
    """What a model folder or hub name says. Raises UserError for a length without a model."""
    if name_or_path is None:
        if max_length is not None:
            raise UserError(
                f"{max_length} tokens of no model",
                where="--max-length",
                expected="--model beside it: how long a sample is depends on the model",
                remedy="add --model FOLDER, or check a recipe",
            )
        return Model()
    folder = locate(name_or_path)
    if max_length is None:
        return Model(further(tokenizer_of(folder).specials()))
    renderer = renderer_of(folder)
    return Model(further(renderer.tokenizer.specials()), renderer, max_length)


def is_recipe(path: Path) -> bool:
    """Whether a file is a recipe: YAML that does not name classes, as a YOLO data set does."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        content = parsed(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True  # whoever reads recipes says what is wrong
    return not isinstance(content, dict) or "names" not in content


def _of_data(place: Path | str, limit: int | None, *, held_out: bool) -> Subject | Packed:
    """A file of a recipe's data."""
    request = Request(format="samples", limit=limit)
    if isinstance(place, str) or place.suffix.lower() in PACKED or is_pattern(place):
        return Packed(place, request, held_out)
    return Subject(place, request, held_out)


def of_recipe(recipe: Path) -> tuple[list[Subject | Packed], Model]:
    """A recipe's data files, and its model with its picture rule, system prompt and max_length.

    Raises UserError as `load_recipe` and `locate` do.
    """
    settings = load_recipe(recipe)
    subjects = [
        _of_data(file.path, file.limit, held_out=held_out)
        for held_out, files in ((False, settings.data.train), (True, settings.data.eval))
        for file in files
    ]
    renderer = renderer_of(locate(settings.model), settings.picture, settings.data.system)
    specials = further(renderer.tokenizer.specials())
    return subjects, Model(specials, renderer, settings.data.max_length)
