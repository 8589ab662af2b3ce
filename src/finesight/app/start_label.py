"""Label images: suggest labels, and accept or correct them on a page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

from finesight.app.start import (
    NoAuthOption,
    PageHostOption,
    PasswordFileOption,
    SocketOption,
    TrustedProxyOption,
    bind_page,
    check_proxies,
    make_access,
    print_page_address,
    require_web,
    resolve_password,
)
from finesight.errors import LABEL_TRAIN_FRACTION, UserError
from finesight.manifest import RECIPE_FILE, find_run_dir
from finesight.operations.model import load_model
from finesight.operations.operation import Outcome, Parameter, Step, StrPath, to_path
from finesight.operations.options import (
    LoadingOptions,
    MaxNewTokensOption,
    PortOption,
    RunOrModelArgument,
)

if TYPE_CHECKING:
    import socket

    from finesight.config import Recipe
    from finesight.label.label_session import LabelSession
    from finesight.progress import ProgressConsole


def label(
    run_or_model: RunOrModelArgument,
    sources: Annotated[Sequence[StrPath], Parameter(metavar="IMAGES")],
    prompt: str | None = None,
    out: Annotated[StrPath | None, Parameter(metavar="FOLDER", path="folder")] = None,
    kind: Literal["text", "fields", "classes", "boxes"] | None = None,
    classes: Annotated[str | None, Parameter(metavar="A,B,C")] = None,
    fields: Annotated[str | None, Parameter(metavar="A,B,C")] = None,
    review: Annotated[bool, Parameter(option="--review")] = False,
    train_fraction: Annotated[float | None, Parameter(minimum=0.0, maximum=1.0)] = None,
    suggestions: Annotated[bool, Parameter(option="--suggestions/--no-suggestions")] = True,
    suggest_only: Annotated[bool, Parameter(option="--suggest-only")] = False,
    max_new_tokens: MaxNewTokensOption = 512,
    batch_size: Annotated[int, Parameter(minimum=1)] = 16,
    host: PageHostOption = "127.0.0.1",
    port: PortOption = 7873,
    password_file: PasswordFileOption = None,
    no_auth: NoAuthOption = False,
    trusted_proxy: TrustedProxyOption = None,
    socket_file: SocketOption = None,
    on_record: Callable[[Mapping[str, Any]], None] | None = None,
    **loading: Unpack[LoadingOptions],
) -> Outcome[Mapping[str, int]]:
    """Suggest labels for images, and accept, correct or skip them on a page.

    The least certain suggestions come first. Each decision is saved at once. `finesight train`
    reads labels.jsonl. The next command is printed at the end. The page requires finesight[web].

    Example: finesight label runs/receipts photos

    Args:
        sources: Images, folders of images, or a JSONL file.
        prompt: Question about every image. Default: that of FOLDER or else the run.
        out: Folder of the labels (labels.jsonl) and their history (journal.jsonl). An existing one
            is continued. Default: that of the run's training data, else labels.
        kind: Kind of the answers. Default: detected from the training data.
        classes: Classes to choose from: the answers, or the labels of boxes. Default: those of the
            training data.
        fields: Keys of the JSON answers, with --kind fields. Default: those of the training data or
            of the existing labels.
        review: Review the existing answers of a JSONL file, most probably wrong first.
        train_fraction: Fraction of the labels for training; the others are in labels_eval.jsonl.
            Default: that of FOLDER, else 1.
        suggestions: Suggest answers with the model.
        suggest_only: Print the suggestions, and start no page.
        batch_size: Answers generated at the same time.
    """
    from finesight.label.label_session import open_session
    from finesight.progress import ProgressConsole

    console = ProgressConsole()
    if on_record is not None and not suggest_only:
        raise _build_option_error("--json", "without --suggest-only", "--json with --suggest-only")
    if suggest_only and not suggestions:
        raise _build_option_error(
            "--suggest-only", "with --no-suggestions", "one of the two options"
        )
    if suggestions:
        from finesight.model_folder import check_model_path

        check_model_path(run_or_model)
    names, field_names = (
        [*dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip())]
        for text in (classes, fields)
    )
    if field_names and (names or kind not in (None, "fields")):
        other = f"with {'--classes' if names else f'--kind {kind}'}"
        raise _build_option_error("--fields", other, "--fields with --kind fields")
    paths, run_dir = [*map(Path, sources)], find_run_dir(Path(run_or_model))
    proxies, reviewed = check_proxies(trusted_proxy), paths if review else []
    folder = to_path(out) or _select_label_folder(run_dir, reviewed, console)
    suggested: list[dict[str, Any]] = []
    with ExitStack() as stack:
        listener = None
        if not suggest_only:
            require_web("finesight label")
            # A port in use is reported before the suggestions, which take minutes.
            listener = stack.enter_context(bind_page(host, port, socket_file))
        options: dict[str, Any] = {"prompt": prompt, "kind": kind, "review": review}
        options |= {"choices": names, "field_names": field_names, "train_fraction": train_fraction}
        with console.activity("reading the samples"):
            session = open_session(folder, run_or_model, paths, **options)
        stack.enter_context(session.store)
        if suggestions and (pending := session.store.list_unsuggested(run_or_model)):
            loaded = load_model(run_or_model, **loading)
            with console.progress_stage("suggestions", len(pending)) as on_progress:
                reasons = session.add_suggestions(
                    loaded.value.inference_model,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    on_progress=on_progress,
                )
            for reason in reasons.values():
                console.log(f"skipped: {reason}")
            del loaded
        session.complete_task()
        if listener is None:
            suggested = [session.describe_item(item) for item in session.store.items]
        else:
            # Answers are data of the user, so a page on the network needs a password.
            no_auth = no_auth or socket_file is not None
            password, is_generated = resolve_password(host, password_file, no_auth, proxies)
            print_page_address(host, listener, password if is_generated else None)
            _run_page(session, listener, password, proxies)
    for one in suggested:
        if on_record is not None:
            on_record({key: value for key, value in one.items() if key != "history"})
    counts = session.store.count_events()
    console.log(f"{', '.join(f'{count} {name}' for name, count in counts.items())}: {folder}")
    has_labels = any(n for name, n in counts.items() if name not in ("open", "skipped"))
    return Outcome(
        counts,
        [*map(_format_suggestion, suggested)],
        data=[],  # given to `on_record`
        next_steps=[_find_next_step(folder, run_dir, reviewed)] if has_labels else [],
    )


def _build_option_error(option: str, other: str, expected: str) -> UserError:
    remedy = "add or remove one of the options"
    return UserError(f"{option} is given {other}", where=option, expected=expected, remedy=remedy)


def _select_label_folder(run_dir: Path, reviewed: Sequence[Path], console: ProgressConsole) -> Path:
    """Return the folder of a review, of the labels in the recipe of the run, or `labels`."""
    from finesight.label.label_store import REVIEWED_FILE, can_review, find_label_folder
    from finesight.recipe import load_recipe
    from finesight.train.run_dir import RunDir

    if reviewed:
        default = Path("labels-review")
        folders = [file.parent for file in sorted(Path().glob(f"{default}*/{REVIEWED_FILE}"))]
        folders += [default, RunDir(default).next_path]
        out = next(one for one in folders if can_review(one, reviewed))
        console.log(f"reviewed labels: {out}")
        return out
    folder = None
    if (run_dir / RECIPE_FILE).is_file():
        with suppress(UserError):
            folder = find_label_folder(load_recipe(run_dir / RECIPE_FILE))
    if folder is not None:
        console.log(f"continuing the labels in {folder}, training data of {run_dir}")
    return folder or Path("labels")


def _find_next_step(out: Path, run_dir: Path, reviewed: Sequence[Path]) -> Step:
    """Return the next step for the labels in `out`.

    It trains with them, reserves some for validation, continues their review, or checks reviewed
    labels that replace no file of the recipe. Without a recipe, it is `init`.

    Args:
        reviewed: Data files whose samples the labels contain.
    """
    from finesight.label.label_session import is_imported
    from finesight.label.label_store import EVAL_FILE, LABELS_FILE, REVIEWED_FILE, read_sources
    from finesight.recipe import load_recipe
    from finesight.train.run_dir import RunDir

    labels = out / LABELS_FILE
    # A recipe that `finesight init` has written for these labels, or that of the run.
    for recipe in (out.parent / RECIPE_FILE, run_dir / RECIPE_FILE):
        try:
            settings = load_recipe(recipe)
        except UserError:
            continue
        overrides: list[str] = []
        eval_paths = {os.path.abspath(file.path) for file in settings.data.eval}
        eval_labels = os.path.abspath(out / EVAL_FILE)
        if eval_labels in eval_paths and not (reviewed or os.path.exists(eval_labels)):
            # The recipe requires validation labels, but all labels are for training.
            known = list(filter(os.path.exists, read_sources(out)))
            sources = known or ["IMAGES"]
            fraction = LABEL_TRAIN_FRACTION
            return _label_step(run_dir, sources, out=out, train_fraction=fraction)
        files = (*settings.data.train, *settings.data.eval)
        if os.path.abspath(labels) not in {os.path.abspath(file.path) for file in files}:
            if recipe.parent != run_dir:
                continue
            folders = [Path(file.path).parent for file in settings.data.train]
            reviews = {folder: read_sources(folder, REVIEWED_FILE) for folder in folders}
            for folder, names in reviews.items():
                if os.path.realpath(labels) in names:
                    sources = [*map(os.path.relpath, names)]
                    return _label_step(run_dir, sources, review=True, out=folder)
            is_copy = not reviewed and is_imported(out, run_dir)
            if is_copy and not any(reviews.values()):
                break
            changes = [] if is_copy else _replace_reviewed_files(settings, out, reviewed)
            if not changes:
                # No file of the recipe has exactly these samples, or one has copies of them.
                return Step("check", {"sources": [labels]})
            overrides += changes
        if settings.output_dir.exists():
            overrides.append(f"output_dir={RunDir(settings.output_dir).next_path}")
        return Step("train", {"recipe": recipe, "overrides": overrides})
    default = Path(f"{labels.stem}-finetune")
    other = RunDir(default).next_path if os.path.lexists(default) else None
    return Step("init", {"data": labels, "out": other})


def _label_step(run_dir: Path, sources: Sequence[str], **options: object) -> Step:
    return Step("label", {"run_or_model": run_dir, "sources": sources, **options})


def _replace_reviewed_files(recipe: Recipe, out: Path, reviewed: Sequence[Path]) -> list[str]:
    """Return the overrides of a recipe that train with labels instead of the reviewed files.

    New labels are added to the training data. Empty if no split of the recipe has all reviewed
    files.
    """
    from finesight.config import DataFileSettings
    from finesight.label.label_store import EVAL_FILE, LABELS_FILE

    labels, paths = out / LABELS_FILE, {*map(os.path.abspath, reviewed)}
    has_eval_labels = bool(reviewed) and (out / EVAL_FILE).exists()
    splits: dict[str, Sequence[DataFileSettings]] = {"train": recipe.data.train}
    if not has_eval_labels:
        splits["eval"] = recipe.data.eval
    for split, files in splits.items():
        replaced = [file for file in files if os.path.abspath(file.path) in paths]
        if not paths <= {os.path.abspath(file.path) for file in replaced}:
            continue
        added = replaced[0] if len(replaced) == 1 else DataFileSettings(path=labels)
        others = [file for file in files if file not in replaced]
        data = [*others, added.model_copy(update={"path": labels})]
        entries = [file.model_dump(mode="json", exclude_defaults=True) for file in data]
        items = [entry if len(entry) > 1 else entry["path"] for entry in entries]
        changes = [f"data.{split}={json.dumps(items)}"]
        return [*changes, f"data.eval={out / EVAL_FILE}"] if has_eval_labels else changes
    return []


def _format_suggestion(values: Mapping[str, Any]) -> str:
    score = values["confidence"] if values["score"] is None else values["score"]
    answer = values["suggestion"] or values["answer"]
    boxes = (f"{box['label'] or 'box'} {box['xyxy']}" for box in answer["boxes"])
    text = answer["text"] or ", ".join(boxes)
    return f"{'-' if score is None else f'{score:.3f}'}  {values['id']}  {text}"


def _run_page(
    session: LabelSession,
    listener: socket.socket,
    password: str | None,
    trusted_proxies: Sequence[str],
) -> None:
    from finesight.app.label_page import make_label_app
    from finesight.app.server import serve_app
    from finesight.vision.image_reader import create_image_pool

    pool, access = create_image_pool(), make_access("label", listener, password)
    serve_app(make_label_app(session, access, pool), listener, pool, trusted_proxies)
