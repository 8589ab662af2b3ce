"""Data sets, recipes, runs and models in the workspace folder of the studio.

The studio only opens files that lie in the workspace after symbolic links are resolved.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count, islice
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from finesight.app.line_counter import MAX_COUNTED_BYTES, LineCount, LineCounter
from finesight.app.recipe_detector import RecipeDetector, read_recipe_text
from finesight.app.use_finder import UseFinder
from finesight.errors import Remedy, UserError, suggest_similar_path
from finesight.files.archive import is_archive, safe_join
from finesight.files.bounded_files import (
    SpecialFileError,
    is_utf8,
    open_regular_file,
    read_edge_lines,
)
from finesight.files.path_patterns import SearchBudget, iter_matches
from finesight.files.storage import (
    FileLock,
    make_folder,
    remove_leftovers,
    translate_os_errors,
    working_folder,
    write_file,
)
from finesight.files.worker_pool import JobOutput, WorkerJobError, WorkerLimitError, WorkerPool
from finesight.label.label_store import (
    EVAL_FILE,
    LABELS_FILE,
    REVIEWED_FILE,
    get_text,
    read_sources,
)
from finesight.model_folder import TINY_MODEL
from finesight.samples.sample import (
    Sample,
    build_no_samples_error,
    parse_sample,
    validate_sample,
)
from finesight.settings.config import Recipe
from finesight.settings.manifest import MANIFEST_FILE, RECIPE_FILE, find_weights
from finesight.settings.recipe import load_recipe, recipe_from_text
from finesight.settings.setting_types import is_url, iter_paths
from finesight.tracker_components import TRACKERS
from finesight.vision.image_reader import create_image_pool

STUDIO_FOLDER = ".finesight"
TRASH_FOLDER = f"{STUDIO_FOLDER}/trash"
UPLOAD_MARKER = ".finesight-upload"
"""Empty file in a folder of uploads. Other folders are neither replaced nor deleted."""

ANSWERS_FILE = "answers/{}.jsonl"
"""Proposed file for the answers of an evaluation."""

DATA_FILES = {"train.jsonl": "eval.jsonl", "data.jsonl": "eval.jsonl", LABELS_FILE: EVAL_FILE}
"""Validation file by training file that `finesight import` and `finesight label` write."""

MAPPING_FILE = "uploads/{}-mapping-{}.yaml"
"""File with the roles that a user has chosen in the form of an import.

The second part of the name is a digest of the roles, so that another form changes no file of a
running import.
"""

MAPPING_DIGEST_CHARS = 12

MAPPING_HEADER = "# Roles that were chosen in the studio. SHA-256 of the lines below: {}\n"
"""First line of such a file. One that was edited is not replaced."""

MAX_MAPPING_BYTES = 1 << 20

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".xlsx")

LISTED_SUFFIXES = (".json", ".jsonl", ".safetensors", ".yaml", ".yml")
"""Suffixes of the files by which the studio finds items."""

MAX_DEPTH, MAX_FOLDERS = 3, 2000
"""Maximum depth and number of folders in which the studio searches."""

PREVIEW_BYTES, MAX_SAMPLE_BYTES = 1 << 24, 100_000
"""Number of bytes of a large data file that a new recipe considers, and of its first sample."""

MAX_LISTED_UPLOADS = 100
"""Maximum number of folders of uploads that a field proposes."""

MAX_REVIEWED_BYTES = 1 << 14
"""Maximum size of the list of a review of the studio, which names one file."""

JOB_CPU_SECONDS = 60.0
"""Limit of a job that reads files of the user, in a process of its own."""

NAME_PATTERN = re.compile(r"\w[\w.-]{0,63}")
HUB_NAME_PATTERN = re.compile(r"(?:(?:hf|modelscope):)?\w[\w.-]*/[\w.-]+(?:@[\w./-]+)?")


@dataclass(frozen=True, slots=True)
class WorkspaceDataset:
    """Folder with samples from `finesight import` or `label`, relative to the workspace.

    Attributes:
        source: Reviewed file of another data set, whose other file belongs to this one. None for
            a data set that is not a review.
        is_estimate: Whether the numbers of samples are estimates, as of large files.
    """

    path: Path
    train_file: Path
    eval_file: Path | None
    num_train: int
    num_eval: int
    source: Path | None = None
    is_estimate: bool = False

    @property
    def files(self) -> set[Path]:
        """Training file, validation file and reviewed file. Reviews share them with the source."""
        return {file for file in (self.train_file, self.eval_file, self.source) if file}

    @property
    def check_page(self) -> Path:
        """Page of the last check of the training file, whose earlier page it replaces."""
        name = str(self.train_file).replace("%", "%25").replace("/", "%2F")
        return Path(STUDIO_FOLDER, "check", f"{name}.html")


@dataclass(slots=True)
class WorkspaceContent:
    """Items of a workspace by kind, each newest first, relative to the workspace."""

    datasets: list[WorkspaceDataset] = field(default_factory=list)
    recipes: list[Path] = field(default_factory=list)
    runs: list[Path] = field(default_factory=list)
    models: list[Path] = field(default_factory=list)


class Workspace:
    """Folder that the studio works in. It is the working directory of all commands.

    Args:
        pool: Worker processes that read tables and archives, and render reports. A job starts them.
    """

    def __init__(self, folder: Path, pool: WorkerPool | None = None) -> None:
        self.folder = folder.resolve()
        self.pool = pool or create_image_pool(module="finesight.report.compare_page")
        self._lines = LineCounter()
        self._recipes = RecipeDetector()

    def remove_leftovers(self) -> None:
        """Remove the folders that killed commands left in the folders of the studio."""
        for name in (".", STUDIO_FOLDER, "answers", "data", "gguf", "models", "runs", "uploads"):
            remove_leftovers(self.folder / name)

    def scan(self) -> WorkspaceContent:
        """Return all data sets, recipes, runs and models."""
        content = WorkspaceContent()
        self._lines.start_page()
        self._recipes.start_page()
        for folder, names in self._walk():
            path = folder.relative_to(self.folder)
            train_name = next((name for name in DATA_FILES if name in names), None)
            if MANIFEST_FILE in names and RECIPE_FILE in names:
                content.runs.append(path)
            elif "config.json" in names and any(n.endswith(".safetensors") for n in names):
                content.models.append(path)
            elif train_name is not None:
                eval_name = DATA_FILES[train_name]
                eval_file = path / eval_name if eval_name in names else None
                with contextlib.suppress(OSError):
                    content.datasets.append(self._read_dataset(path / train_name, eval_file))
            else:
                recipes = (path / name for name in names if name.endswith((".yaml", ".yml")))
                content.recipes += [
                    path for path in recipes if self._recipes.is_recipe(self.folder / path)
                ]

        def by_time(path: Path) -> float:
            # An item may be deleted during the search.
            with contextlib.suppress(OSError):
                return (self.folder / path).stat().st_mtime
            return 0.0

        content.datasets.sort(key=lambda dataset: by_time(dataset.train_file), reverse=True)
        for paths in (content.recipes, content.runs, content.models):
            paths.sort(key=by_time, reverse=True)
        content.datasets = [_join_review(one, content.datasets) for one in content.datasets]
        return content

    def _read_dataset(self, train_file: Path, eval_file: Path | None) -> WorkspaceDataset:
        train = self._lines.count(self.folder / train_file)
        evaluation = LineCount(0, is_estimate=False)
        if eval_file is not None:
            evaluation = self._lines.count(self.folder / eval_file)
        return WorkspaceDataset(
            train_file.parent,
            train_file,
            eval_file,
            train.number,
            evaluation.number,
            self._read_source(train_file.parent),
            train.is_estimate or evaluation.is_estimate,
        )

    def _read_source(self, folder: Path) -> Path | None:
        """Return the reviewed file of the folder of a review; None for other folders."""
        names = read_sources(self.folder / folder, REVIEWED_FILE, MAX_REVIEWED_BYTES)
        with contextlib.suppress(ValueError):
            return Path(names[0]).relative_to(self.folder) if len(names) == 1 else None
        return None

    def open_review(self, file: Path) -> tuple[Path, Path]:
        """Return the file to review and the folder of its review, which may be new.

        Args:
            file: File of a data set. That of a review stands for the reviewed file.
        """
        file = self.resolve(str(self._read_source(file.parent) or file), "review")
        for review in sorted((self.folder / "data").glob(f"*/{REVIEWED_FILE}")):
            if self._read_source(folder := review.parent.relative_to(self.folder)) == file:
                return file, folder
        suffix = "-eval-review" if file.name in DATA_FILES.values() else "-review"
        name = re.sub(r"\W+", "-", file.parent.name + suffix).strip("-")[-50:]
        return file, Path("data", self.find_free_name(name, "data/{}"))

    def _walk(self) -> Iterator[tuple[Path, frozenset[str]]]:
        """Yield folders with their file names, without those inside of runs and models."""
        for num_folders, (name, subfolders, files) in enumerate(os.walk(self.folder)):
            folder = Path(name)
            # Links may dangle or lead out of the workspace, and a page cannot contain names that
            # are not UTF-8.
            listed = (n for n in files if n.endswith(LISTED_SUFFIXES) and is_utf8(n))
            paths = (folder / n for n in listed)
            names = frozenset(p.name for p in paths if os.path.isfile(p) and self.contains(p))
            is_item = MANIFEST_FILE in names or "config.json" in names
            depth = len(folder.relative_to(self.folder).parts)
            subfolders[:] = sorted(n for n in subfolders if not n.startswith(".") and is_utf8(n))
            if is_item or depth >= MAX_DEPTH or num_folders >= MAX_FOLDERS:
                subfolders.clear()
            yield folder, names

    def find_weights(self, run: Path) -> Path | None:
        """Return a finished run, or the newest checkpoint of unfinished LoRA training, or None."""
        weights = find_weights(self.folder / run)
        return None if weights is None else weights.relative_to(self.folder)

    def contains(self, path: Path) -> bool:
        """Return whether a path is in the workspace after its links are resolved."""
        # Unlike Path.resolve, it accepts links in a loop.
        return Path(os.path.realpath(path)).is_relative_to(self.folder)

    def _is_internal(self, path: Path) -> bool:
        """Return whether a path in the workspace is a file of the studio, or a link to one."""
        return STUDIO_FOLDER in Path(os.path.realpath(path)).relative_to(self.folder).parts

    def resolve(self, text: str, where: str, *, must_exist: bool = True) -> Path:
        """Return the path that a user has entered, relative to the workspace.

        Raises:
            UserError: It is missing, outside of the workspace, or would be read as an option.
        """
        name = text.strip()
        expected = "a file or folder in the workspace"
        remedy: Remedy = "enter a path relative to the workspace, or upload the files"
        path, problem = Path(os.path.normpath(self.folder / name)), ""
        if not name or name.startswith("-") or "\0" in name:
            problem = f"{name!r} is not a valid path"
        # Before the check of existence, so that the error does not reveal files elsewhere.
        elif not path.is_relative_to(self.folder) or not self.contains(path):
            problem = f"{name} is outside of the workspace {self.folder}"
            remedy = "move or copy it into the workspace, or start the studio in its folder"
        elif self._is_internal(path):
            problem = f"{name} is a file of the studio"
        elif is_url(name):
            problem, remedy = f"{name:.300} is a URL", "use it in a terminal, or upload the files"
        elif must_exist and not os.path.exists(path):
            problem, remedy = f"{name:.300} does not exist", suggest_similar_path(path)
            if isinstance(remedy, str):
                remedy = remedy.replace(f"{self.folder}{os.sep}", "")
        if problem:
            raise UserError(problem, where=where, expected=expected, remedy=remedy)
        return path.relative_to(self.folder)

    def check_new_name(self, parent: str, name: str, suffix: str = "") -> Path:
        """Return the path of a new file or folder in the workspace.

        Raises:
            UserError: The name is invalid, or exists already.
        """
        name = name.strip()
        path = Path(parent, f"{name}{suffix}")
        is_valid, full = NAME_PATTERN.fullmatch(name) is not None, self.folder / path
        if not is_valid or os.path.lexists(full) or not self.contains(full):
            raise UserError(
                f"{path} exists" if is_valid else f"{name!r} is not a valid name",
                where=parent,
                expected="a new name of 1 to 64 letters, digits, ., - or _",
                remedy="choose another name",
            )
        return path

    def check_new_file(self, text: str, taken: Collection[str]) -> Path:
        """Return the path of a new file that a user has entered.

        Args:
            taken: Files that running commands write.

        Raises:
            UserError: `resolve` rejects the path, or it exists already.
        """
        path = self.resolve(text, "", must_exist=False)
        if os.path.lexists(self.folder / path) or str(path) in taken:
            raise UserError(
                f"{path} exists already and is never overwritten",
                expected="an unused name",
                remedy=f"choose another name, such as {self.find_answers_file(path.stem, taken)}",
            )
        return path

    def find_answers_file(self, name: str, taken: Collection[str]) -> str:
        """Return an unused path for the answers of an evaluation."""
        free = self.find_free_name(name, ANSWERS_FILE, taken=taken)
        return ANSWERS_FILE.format(free)

    def find_free_name(self, name: str, *paths: str, taken: Collection[str] = ()) -> str:
        """Return a name, with a number if necessary, by which no path exists: `data/{}`."""

        def is_used(path: str) -> bool:
            return path in taken or os.path.lexists(self.folder / path)

        def is_free(one: str) -> bool:
            return not any(is_used(path.format(one)) for path in paths)

        return next(filter(is_free, chain([name], (f"{name}-{number}" for number in count(2)))))

    def check_model(self, name: str) -> str:
        """Return a model name that a user has entered: a hub name, or a folder in the workspace."""
        name = name.strip()
        is_hub_name = HUB_NAME_PATTERN.fullmatch(name) and ".." not in name
        if name == TINY_MODEL or (is_hub_name and not (self.folder / name).exists()):
            return name
        return str(self.resolve(name, "model"))

    def save_uploads(self, files: Sequence[Path], name: str) -> Path:
        """Copy uploaded files into a folder, and return the path to import.

        It is the only table or the only file, else the folder. The files of a failed import, which
        no data set or recipe uses, are kept, except for those with the names of new ones.
        """
        folder = Path("uploads", name)
        is_leftover = (
            NAME_PATTERN.fullmatch(name) is not None
            and self.contains(self.folder / folder)
            and (self.folder / folder / UPLOAD_MARKER).is_file()
        )
        if not is_leftover or self.find_uses(folder):
            self.check_new_name("uploads", name)
        names = [file.name for file in files]
        if duplicates := [name for name in names if names.count(name) > 1]:
            raise UserError(
                f"several uploaded files are named {duplicates[0]}",
                where="upload",
                expected="files with different names",
                remedy="upload a zip archive of the folders",
            )
        # An error leaves no folder, so the same name can be used again.
        with working_folder(self.folder / folder) as partial:
            if is_leftover:
                shutil.copytree(self.folder / folder, partial, symlinks=True, dirs_exist_ok=True)
            earlier = {file.name: file for file in partial.rglob("[!.]*") if file.is_file()}
            for file in files:
                target = earlier.get(file.name, partial / file.name)
                # Writing through a link would change another file.
                target.unlink(missing_ok=True)
                shutil.copyfile(file, target)
            old, new = (
                {name for name in group if Path(name).suffix.lower() in TABLE_SUFFIXES}
                for group in (earlier, names)
            )
            # A corrected table may have another name.
            tables = new if new and len(old) == 1 else old | new
            if len(tables) == 1:
                with contextlib.suppress(WorkerLimitError, WorkerJobError):
                    self.run_job(restore_folders, partial, *tables)
            (partial / UPLOAD_MARKER).touch()
            if is_leftover:
                self.move_to_trash(folder)
            partial.rename(self.folder / folder)
        is_single = len(tables) != 1 and len(names) == 1 and is_archive(names[0])
        if is_single:
            sources = {*names}
        elif len(tables) == 1:
            sources = tables
        else:
            sources = {*earlier, *names}
        return folder / sources.pop() if len(sources) == 1 else folder

    def list_uploads(self) -> list[str]:
        """Return the folders of uploaded files, newest first, relative to the workspace."""
        found: list[tuple[float, str]] = []
        with contextlib.suppress(OSError), os.scandir(self.folder / "uploads") as entries:
            for entry in entries:
                is_shown = not entry.name.startswith(".") and is_utf8(entry.name)
                if is_shown and entry.is_dir(follow_symlinks=False):
                    found.append((entry.stat().st_mtime, f"uploads/{entry.name}"))
        return [name for _, name in sorted(found, reverse=True)[:MAX_LISTED_UPLOADS]]

    def create_sample(self, name: str, num_images: int) -> Path:
        """Draw the images of a sample project as an upload, and return their table."""
        folder = self.check_new_name("uploads", name)
        make_folder(self.folder / folder.parent)
        table = self.run_job(draw_sample, self.folder / folder, num_images)
        (self.folder / folder / UPLOAD_MARKER).touch()
        return folder / str(table)

    def save_mapping(self, name: str, text: str) -> Path:
        """Write the mapping file of an import. An existing file is never changed."""
        digest = hashlib.sha256(text.encode()).hexdigest()
        path = Path(MAPPING_FILE.format(name, digest[:MAPPING_DIGEST_CHARS]))
        file = self.folder / path
        is_own = self.is_own_mapping(path)
        if not self.contains(file) or (os.path.lexists(file) and not is_own):
            raise UserError(
                f"{path} exists, and was not written by this form or has been edited",
                where="import:out",
                expected="a new name, or that of an earlier preview",
                remedy="choose another name, or move the file away",
            )
        if not is_own:
            write_file(file, f"{MAPPING_HEADER.format(digest)}{text}".encode())
        return path

    def is_own_mapping(self, path: Path) -> bool:
        """Return whether `save_mapping` has written a file, which has not changed since then."""
        file = self.folder / path
        with contextlib.suppress(OSError, SpecialFileError):
            if self.contains(file) and not file.is_symlink():
                with open_regular_file(file) as stream:
                    first_line = stream.readline(200)
                    digest = hashlib.sha256(stream.read(MAX_MAPPING_BYTES)).hexdigest()
                return first_line == MAPPING_HEADER.format(digest).encode()
        return False

    def run_job(self, function: Callable[..., JobOutput], *args: Any) -> Any:
        """Run a function that reads files of the user in a worker process, and return its value.

        Raises:
            UserError: The function raised it, or exceeded a limit of time or memory.
        """
        with self.pool.borrow_worker() as worker:
            return worker.call(function, *args, max_cpu_s=JOB_CPU_SECONDS).value

    def move_to_trash(self, *paths: Path) -> None:
        """Move the existing files and folders to a new trash folder. An error moves all back.

        The trash keeps their paths, so they can be moved back.
        """
        parent = trash = self.folder / TRASH_FOLDER
        moved: list[tuple[Path, Path]] = []
        try:
            parent.mkdir(parents=True, exist_ok=True)
            trash = Path(mkdtemp(prefix=f"{paths[0].name[:40]}-", dir=parent))
            existing = [path for path in paths if os.path.lexists(self.folder / path)]
            for source, target in [(self.folder / path, trash / path) for path in existing]:
                if not (self.contains(source) and self.contains(target)):
                    raise OSError(errno.EXDEV, "it is a link to another folder")
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)
                moved.append((source, target))
        except OSError as error:
            # If a file cannot be moved back, the trash is not removed, so that no file is lost.
            with contextlib.suppress(OSError):
                for source, target in moved:
                    target.rename(source)
                if trash != parent:
                    shutil.rmtree(trash)
            raise UserError(
                f"cannot be moved to the trash: {error.strerror}",
                where=str(paths[0]),
                expected="files of this workspace, and a trash that can be written",
                remedy="free some disk space, or delete them with another program",
            ) from error

    def find_uses(self, folder: Path, running: Sequence[Path] = ()) -> list[str]:
        """Return the recipes, labelling sessions, and data sets elsewhere that use a folder.

        Args:
            running: Runs in progress, whose recipes count, too.
        """
        finder = UseFinder(self.folder, folder)
        uses = list[str]()
        recipes = [run / RECIPE_FILE for run in running]
        for home, names in self._walk():
            path = home.relative_to(self.folder)
            if MANIFEST_FILE not in names:
                recipes += [path / name for name in names if name.endswith((".yaml", ".yml"))]
            files = [home / name for name in names.intersection(chain(*DATA_FILES.items()))]
            if finder.is_used_by_data(home, files):
                uses.append(f"the data set {path}")
        uses += [f"the recipe {recipe}" for recipe in recipes if finder.is_used_by_recipe(recipe)]
        for session in finder.list_open_sessions():
            uses.append(f"the labelling page of {session.relative_to(self.folder)}")
        return [*dict.fromkeys(uses)]

    def is_overlapping(self, name: str, folder: Path) -> bool:
        """Return whether a path is in a folder, or contains it below the workspace."""
        return UseFinder(self.folder, folder).is_overlapping(name)

    def uses_files(self, recipe: Path, folder: Path) -> bool:
        """Return whether a recipe, also an invalid one, uses data or weights of a folder."""
        return UseFinder(self.folder, folder).is_used_by_recipe(recipe)

    def list_deleted(self, dataset: WorkspaceDataset, running: Sequence[Path]) -> list[Path]:
        """Return the paths to delete with a data set: also check page, mapping, unused uploads."""
        paths, uploads = [dataset.path, dataset.check_page], Path("uploads", dataset.path.name)
        is_upload = (self.folder / uploads / UPLOAD_MARKER).is_file()
        own = {f"the data set {dataset.path}"}
        is_unused = is_upload and own.issuperset(self.find_uses(uploads, running))
        if is_unused and not self.list_inside(uploads):
            paths.append(uploads)
        return [*paths, *self._list_own_mappings(dataset.path.name)]

    def _list_own_mappings(self, name: str) -> list[Path]:
        """Return the mapping files of an import, except those that were edited."""
        pattern = re.compile(rf"{re.escape(name)}-mapping-[0-9a-f]{{{MAPPING_DIGEST_CHARS}}}\.yaml")
        mappings: list[Path] = []
        for file in (self.folder / "uploads").glob("*-mapping-*.yaml"):
            path = Path("uploads", file.name)
            if pattern.fullmatch(file.name) and self.is_own_mapping(path):
                mappings.append(path)
        return sorted(mappings)

    def list_inside(self, folder: Path) -> list[Path]:
        """Return the data sets, recipes, runs and models in subfolders of a folder."""
        content = Workspace(self.folder / folder).scan()
        items = [dataset.path for dataset in content.datasets]
        items += [*content.recipes, *content.runs, *content.models]
        return [folder / item for item in items if item.parts]

    def create_recipe(
        self,
        name: str,
        datasets: Sequence[WorkspaceDataset],
        model: str,
        settings: Mapping[str, str],
    ) -> Path:
        """Write a recipe for data sets, with the values of `finesight init` if empty.

        Args:
            settings: `eval.metric`, and the settings of `format_recipe`.
        """
        from finesight.settings.recipe_template import (
            StartModel,
            describe_run,
            detect_task,
            format_recipe,
        )

        path = self.check_new_name("recipes", name, ".yaml")
        run = self.check_new_name("runs", name)
        metric, samples = settings.get("eval.metric", "").strip(), []
        objective = settings.get("train.objective", "").strip()
        for dataset in datasets:
            samples += _read_preview(self.folder / dataset.train_file)
        task = detect_task(samples)
        task = replace(task, metric=metric or task.metric, objective=objective or task.objective)
        files = dict[Path, str]()
        for one in datasets:
            about = ""
            if one.is_estimate:
                about = "about "
            files[one.train_file] = f"{about}{one.num_train} samples"
            if one.eval_file is not None:
                files[one.eval_file] = f"{about}{one.num_eval} samples"
        model = self.check_model(model)
        start = describe_run(model, self.folder / model)
        start = start or StartModel(model, is_tiny=model == TINY_MODEL)
        inputs = (path, run, start, "finesight studio", task, files)
        num_samples = sum(one.num_train for one in datasets)
        text = format_recipe(*inputs, num_samples, settings=settings, num_train_files=len(datasets))
        self.save_recipe(path, text, hashlib.sha256(b"").hexdigest())
        return path

    def read_prompt(self, run: Path | None, dataset: WorkspaceDataset | None) -> str:
        """Return the first question of a run, else of a data set; empty if it is unreadable."""
        file: Path | str | None = dataset.train_file if dataset else None
        with contextlib.suppress(UserError, OSError, ValueError):
            if run is not None:
                file = self.load_recipe(run / RECIPE_FILE).data.train[0].path
            with open_regular_file(self.folder / (file or "")) as lines:
                sample = Sample.model_validate_json(lines.readline(MAX_SAMPLE_BYTES))
            turns = [turn for turn in sample.messages if turn.role == "user"]
            return get_text(turns[-1].content) if turns else ""
        return ""

    def read_recipe(self, path: Path) -> tuple[str, str]:
        """Return the text of a recipe and its digest; empty if it cannot be read."""
        return read_recipe_text(self.folder / path)

    def save_recipe(self, path: Path, text: str, digest: str | None = None) -> None:
        """Validate the text of a recipe, and write it.

        Args:
            digest: Digest of the content to replace, that of no bytes for a new file. None replaces
                any.

        Raises:
            UserError: The content has changed.
            UserError: A setting is invalid, or `check_recipe_paths` rejects the recipe.
        """
        self.check_recipe_paths(recipe_from_text(text, path), path)
        file = self.folder / path
        make_folder(file.parent)
        with translate_os_errors(file), FileLock(file.parent) as lock:
            # Another studio may save the recipe at the same time.
            lock.acquire()
            if digest not in (None, self.read_recipe(path)[1]):
                raise UserError(
                    "the recipe has changed since the page showed it",
                    where=str(path),
                    expected="an unchanged recipe",
                    remedy="copy your changes, reload the page, and edit the recipe again",
                )
            write_file(file, text.encode())

    def change_recipe(self, path: Path, overrides: Sequence[str]) -> None:
        """Change settings of a recipe."""
        from finesight.settings.recipe_template import override_settings

        text, digest = self.read_recipe(path)
        self.save_recipe(path, override_settings(text, overrides), digest)

    def copy_recipe(self, path: Path, overrides: Sequence[str]) -> Path:
        """Write the recipe of a further run, unless it exists, with the name of the run."""
        from finesight.settings.recipe_template import override_settings

        text = override_settings(self.read_recipe(path)[0], overrides)
        copy = Path("recipes", f"{recipe_from_text(text, path).output_dir.name}.yaml")
        if not (self.folder / copy).is_file():
            self.check_new_name("recipes", copy.stem, copy.suffix)
            self.save_recipe(copy, text, hashlib.sha256(b"").hexdigest())
        return copy

    def load_recipe(self, path: Path) -> Recipe:
        """Load a recipe that `check_recipe_paths` accepts."""
        recipe = load_recipe(self.folder / path)
        self.check_recipe_paths(recipe, path)
        return recipe

    def check_recipe_paths(self, recipe: Recipe, where: Path) -> None:
        """Raise UserError if a recipe would run code or open files outside of the workspace."""
        from finesight.evaluate.custom_metric import list_functions

        models = [recipe.model, recipe.adapter, *recipe.train.list_models()]
        models += iter_paths(recipe.rewards)
        teacher = recipe.needs.teacher
        if teacher is not None:
            models.append(teacher.model)
        for model in filter(None, models):
            self.check_model(str(model))
        problem = ""
        budget = SearchBudget()
        for path in (*(f.path for f in (*recipe.data.train, *recipe.data.eval)), recipe.output_dir):
            if is_url(path):
                problem = f"the URL {path} is outside of the workspace {self.folder}"
                continue
            # A glob pattern may match files beyond symbolic links.
            own, pattern = self.folder / path, str(self.folder / path)
            files = chain([own], map(Path, iter_matches(pattern, budget)))
            if not all(self.contains(file) and not self._is_internal(file) for file in files):
                problem = f"{path} is outside of the workspace {self.folder}, or of the studio"
        for section, name, _ in list_functions(recipe):
            problem = f"{section} {name} is a Python file, which the studio never runs"
        for tracker in recipe.track:
            if tracker.uri is not None and tracker.uri not in TRACKERS[tracker.kind].modes:
                problem = f"track.uri {tracker.uri} is not a local mode of {tracker.kind}"
        if problem:
            raise UserError(
                problem,
                where=str(where),
                expected="data and output_dir in the workspace, names of metrics, no track.uri",
                remedy="change the setting, or train in a terminal",
            )


def _join_review(
    dataset: WorkspaceDataset, datasets: Sequence[WorkspaceDataset]
) -> WorkspaceDataset:
    """Return the training and validation file of a data set, of which one or both are reviewed."""
    for one in datasets if dataset.source else ():
        if one.source is None and dataset.source in one.files and one.eval_file is not None:
            reviews = {review.source: (review.train_file, review.num_train) for review in datasets}
            train = reviews.get(one.train_file, (one.train_file, one.num_train))
            evaluation = reviews.get(one.eval_file, (one.eval_file, one.num_eval))
            return WorkspaceDataset(
                dataset.path,
                train[0],
                evaluation[0],
                train[1],
                evaluation[1],
                dataset.source,
                dataset.is_estimate or one.is_estimate,
            )
    return dataset


def draw_sample(state: object, folder: Path, num_images: int) -> JobOutput:
    """Draw train tickets in a worker process, and return the name of their table."""
    from finesight.synth.tickets import write_tickets

    return JobOutput(write_tickets(folder, num_images, seed=0).name)


def restore_folders(state: Any, folder: Path, table: str) -> JobOutput:
    """Move uploaded files into the folders that a table names; browsers send no folders.

    The import reports names that are no files of the folder.
    """
    from finesight.ingest.row_reader import open_row_file

    paths: dict[str, set[Path]] = {}
    files = {file.name: file for file in folder.rglob("[!.]*") if file.is_file()}
    files.pop(table, None)
    with contextlib.suppress(UserError):
        reader = open_row_file(folder / table)
        records = (row.record for row in reader.iter_range(0, reader.num_rows))
        for value in chain.from_iterable(record.values() for record in records):
            path = Path(value.strip().replace("\\", "/")) if isinstance(value, str) else Path()
            if path.name in files:
                paths.setdefault(path.name, set()).add(path)
    for name, (path, *others) in paths.items():
        if others:
            raise UserError(
                f"{table} names {' and '.join(sorted(map(str, (path, *others))))}",
                where="upload",
                expected="files with different names",
                remedy="upload a zip archive of the folders",
            )
        with contextlib.suppress(UserError, OSError, ValueError):
            target = safe_join(folder, str(path), table)
            make_folder(target.parent)
            files[name].rename(target)
    return JobOutput()


def as_argument(path: Path) -> str:
    """Return a path as a command-line argument that is never read as an option or a hub name."""
    return f"./{path}" if str(path).startswith("-") or ":" in str(path) else str(path)


def _read_preview(file: Path) -> list[Sample]:
    """Return valid samples of a data file, of all its parts unless it is large."""
    from finesight.ingest.import_source import NUM_PREVIEW_ROWS
    from finesight.samples.corpus import open_sample_source

    samples = []
    if file.stat().st_size > MAX_COUNTED_BYTES:
        # To find a line in the middle, the whole file would be read.
        lines = read_edge_lines(file, PREVIEW_BYTES, expected="samples", remedy="import the data")
        for number, line in enumerate(islice(lines, NUM_PREVIEW_ROWS), 1):
            samples.append(parse_sample(line, f"{file}:{number}"))
            validate_sample(samples[-1], f"{file}:{number}")
        if not samples:
            raise build_no_samples_error(file)
        return samples
    source = open_sample_source(file)
    for index in range(0, len(source), max(1, len(source) // NUM_PREVIEW_ROWS)):
        samples.append(source.read_sample(index).sample)
        validate_sample(samples[-1], source.location(index))
    return samples
