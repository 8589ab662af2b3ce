"""Inputs of a data check: data files with import options, recipe, and model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from finesight.bounded_yaml import load_yaml
from finesight.check.text_issues import filter_known_tokens
from finesight.data.corpus import PACKED_SUFFIXES, is_glob
from finesight.data.import_source import ImportOptions, is_sample_source
from finesight.data.row_reader import is_tar_file, is_webdataset
from finesight.encode.renderer import Renderer, build_renderer
from finesight.encode.tiktoken_tokenizer import load_tokenizer
from finesight.errors import UserError
from finesight.hub.archive import is_archive
from finesight.hub.object_storage import WEB_SCHEMES
from finesight.model_folder import locate_model
from finesight.recipe import load_recipe

REMOTE_PREFIXES = ("hf:", "modelscope:", "https:/", "http:/")
"""Prefixes of remote sources, as they appear after conversion to a path."""

_OBJECT_STORE_PATH = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]+):/(?P<name>.+\.(?:tar|parquet))")
"""Pattern of an object storage URL converted to a path, with a single slash."""


@dataclass(frozen=True, slots=True)
class ImportCheckInput:
    """A dataset to check that must be imported before training."""

    path: Path
    options: ImportOptions
    is_validation: bool = False


@dataclass(frozen=True, slots=True)
class SampleCheckInput:
    """Samples to check that training reads directly, without an import.

    These are tar and Parquet files of samples, glob patterns, and object storage URLs.
    """

    path: Path | str
    options: ImportOptions
    is_validation: bool = False


@dataclass(frozen=True, slots=True)
class ModelRequirements:
    """Properties of a model that samples are checked against.

    Attributes:
        special_tokens: Special tokens of the tokenizer, which must not occur in texts.
        renderer: Renderer that computes the number of tokens of a sample; None skips this check.
        max_length: Maximum number of tokens per sample.
    """

    special_tokens: tuple[str, ...] = ()
    renderer: Renderer | None = None
    max_length: int | None = None


def inputs_from_files(
    train: Sequence[Path], validation: Sequence[Path], options: ImportOptions
) -> list[ImportCheckInput | SampleCheckInput]:
    """Build the check inputs of files given on the command line.

    Args:
        train: Training files.
        validation: Validation files.
        options: Import options of all files.

    Raises:
        UserError: A file is given more than once, or is an archive or a remote source.
    """
    inputs = [_input_from_file(path, options, is_validation=False) for path in train]
    inputs += [_input_from_file(path, options, is_validation=True) for path in validation]
    seen: set[Path | str] = set()
    for check_input in inputs:
        path = (
            check_input.path.resolve() if isinstance(check_input.path, Path) else check_input.path
        )
        if path in seen:
            raise UserError(
                "source is given more than once",
                where=str(check_input.path),
                expected="each source once: as training data, or with --against",
                remedy="remove one of the two",
            )
        seen.add(path)
    return inputs


def _input_from_file(
    path: Path, options: ImportOptions, *, is_validation: bool
) -> ImportCheckInput | SampleCheckInput:
    match = _OBJECT_STORE_PATH.fullmatch(str(path))
    if match is not None and match["scheme"] not in WEB_SCHEMES:
        return SampleCheckInput(f"{match['scheme']}://{match['name']}", options, is_validation)
    is_sample_format = options.format in (None, "samples") and not options.columns
    if is_sample_format and is_sample_source(path):
        return SampleCheckInput(path, options, is_validation)
    _reject_remote_source(path)
    return ImportCheckInput(path, options, is_validation)


def _reject_remote_source(source: Path) -> None:
    is_archive_file = is_archive(source.name) and source.is_file()
    if is_archive_file and is_tar_file(source) and is_webdataset(source):
        return
    # A URL that was converted to a path has one slash.
    if is_archive_file or (not source.exists() and str(source).startswith(REMOTE_PREFIXES)):
        raise UserError(
            "archives and remote sources cannot be checked directly",
            where=str(source),
            expected="local files or folders, unpacked",
            remedy="import it first (`finesight data import SOURCE OUT`, the source written in the"
            " same way), then check OUT",
        )


def load_model_requirements(name_or_path: str | None, max_length: int | None) -> ModelRequirements:
    """Load the requirements of a local or hub model on samples.

    A renderer is loaded only if `max_length` is given. Without a model there are no requirements.

    Raises:
        UserError: `max_length` is given without a model.
    """
    if name_or_path is None:
        if max_length is not None:
            raise UserError(
                f"{max_length} tokens without a model",
                where="--max-length",
                expected="--model as well: sample lengths depend on the tokenizer",
                remedy="add --model FOLDER, or check a recipe",
            )
        return ModelRequirements()
    folder = locate_model(name_or_path)
    if max_length is None:
        return ModelRequirements(filter_known_tokens(load_tokenizer(folder).list_special_tokens()))
    renderer = build_renderer(folder)
    return ModelRequirements(
        filter_known_tokens(renderer.tokenizer.list_special_tokens()), renderer, max_length
    )


def is_recipe(path: Path) -> bool:
    """Return whether a file is a recipe: YAML, but not of a YOLO dataset."""
    if path.suffix.lower() not in (".yaml", ".yml"):
        return False
    try:
        content = load_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True  # the recipe loader reports the error
    return not isinstance(content, dict) or "names" not in content


def _input_from_data_file(
    path_or_url: Path | str, limit: int | None, *, is_validation: bool
) -> ImportCheckInput | SampleCheckInput:
    """Build the check input of a data file in a recipe."""
    options = ImportOptions(format="samples", limit=limit)
    if (
        isinstance(path_or_url, str)
        or path_or_url.suffix.lower() in PACKED_SUFFIXES
        or is_glob(path_or_url)
    ):
        return SampleCheckInput(path_or_url, options, is_validation)
    return ImportCheckInput(path_or_url, options, is_validation)


def inputs_from_recipe(
    recipe: Path,
) -> tuple[list[ImportCheckInput | SampleCheckInput], ModelRequirements]:
    """Build check inputs and model requirements from a recipe.

    Sample lengths are computed with the image settings, system prompt and max_length of the recipe.

    Raises:
        UserError: The recipe is invalid, or the model is not found.
    """
    settings = load_recipe(recipe)
    inputs = [
        _input_from_data_file(file.path, file.limit, is_validation=is_validation)
        for is_validation, files in ((False, settings.data.train), (True, settings.data.eval))
        for file in files
    ]
    renderer = build_renderer(
        locate_model(settings.model), settings.image, settings.data.system_prompt
    )
    special_tokens = filter_known_tokens(renderer.tokenizer.list_special_tokens())
    return inputs, ModelRequirements(special_tokens, renderer, settings.data.max_length)
