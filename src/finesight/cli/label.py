"""`finesight label`: suggest labels, and accept or correct them on a page."""

from __future__ import annotations

import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import click

from finesight.cli.servers import (
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
from finesight.errors import LABEL_TRAIN_FRACTION, UserError, format_command
from finesight.manifest import RECIPE_FILE, find_run_dir
from finesight.operations.model import load_model
from finesight.operations.operation import Parameter
from finesight.operations.options import (
    JSON_OUTPUT,
    DeviceOption,
    MaxNewTokensOption,
    PortOption,
    PrecisionOption,
    RunOrModelArgument,
    WeightFormatOption,
    echo_json,
)

if TYPE_CHECKING:
    import socket
    from collections.abc import Sequence

    from finesight.config import Recipe
    from finesight.label.label_session import LabelSession


def label(
    run_or_model: RunOrModelArgument,
    sources: Annotated[
        list[Path],
        Parameter(
            "Images, folders of images, or a JSONL file.", metavar="IMAGES", is_positional=True
        ),
    ],
    prompt: Annotated[
        str | None,
        Parameter("Question about every image. Default: that of FOLDER or else the run."),
    ] = None,
    out: Annotated[
        Path | None,
        Parameter(
            "Folder of the labels (labels.jsonl) and their history (journal.jsonl). An "
            "existing one is continued. Default: that of the run's training data, else labels.",
            metavar="FOLDER",
            path="folder",
        ),
    ] = None,
    kind: Annotated[
        Literal["text", "fields", "classes", "boxes"] | None,
        Parameter("Kind of the answers. Default: detected from the training data."),
    ] = None,
    classes: Annotated[
        str | None,
        Parameter(
            "Classes to choose from: the answers, or the labels of boxes. Default: those of "
            "the training data.",
            metavar="A,B,C",
        ),
    ] = None,
    fields: Annotated[
        str | None,
        Parameter(
            "Keys of the JSON answers, with --kind fields. Default: those of the training "
            "data or of the existing labels.",
            metavar="A,B,C",
        ),
    ] = None,
    review: Annotated[
        bool,
        Parameter(
            "Review the existing answers of a JSONL file, most probably wrong first.",
            option="--review",
        ),
    ] = False,
    train_fraction: Annotated[
        float | None,
        Parameter(
            "Fraction of the labels for training; the others are in labels_eval.jsonl. "
            "Default: that of FOLDER, else 1.",
            minimum=0.0,
            maximum=1.0,
        ),
    ] = None,
    suggestions: Annotated[
        bool, Parameter("Suggest answers with the model.", option="--suggestions/--no-suggestions")
    ] = True,
    suggest_only: Annotated[
        bool, Parameter("Print the suggestions, and start no page.", option="--suggest-only")
    ] = False,
    max_new_tokens: MaxNewTokensOption = 512,
    batch_size: Annotated[int, Parameter("Answers generated at the same time.", minimum=1)] = 16,
    host: PageHostOption = "127.0.0.1",
    port: PortOption = 7873,
    password_file: PasswordFileOption = None,
    no_auth: NoAuthOption = False,
    trusted_proxy: TrustedProxyOption = None,
    socket_file: SocketOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    weight_format: WeightFormatOption = "auto",
    as_json: Annotated[
        bool, Parameter(f"Print one JSON object per suggestion {JSON_OUTPUT}", option="--json")
    ] = False,
) -> None:
    """Suggest labels for images, and accept, correct or skip them on a page.

    The least certain suggestions come first. Each decision is saved at once. `finesight train`
    reads labels.jsonl. The next command is printed at the end. The page requires finesight[web].

    Example: finesight label runs/receipts photos
    """

    from finesight.label.label_session import open_session
    from finesight.progress import ProgressConsole

    if as_json and not suggest_only:
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
    run_dir, proxies = find_run_dir(Path(run_or_model)), check_proxies(trusted_proxy)
    out = out or _select_label_folder(run_dir, sources if review else ())
    with ExitStack() as stack:
        listener = None
        if not suggest_only:
            require_web("finesight label")
            # A port in use is reported before the suggestions, which take minutes.
            listener = stack.enter_context(bind_page(host, port, socket_file))
        options: dict[str, Any] = {"prompt": prompt, "kind": kind, "review": review}
        options |= {"choices": names, "field_names": field_names, "train_fraction": train_fraction}
        with ProgressConsole().activity("reading the samples"):
            session = open_session(out, run_or_model, sources, **options)
        stack.enter_context(session.store)
        if suggestions and (pending := session.store.list_unsuggested(run_or_model)):
            loaded = load_model(
                run_or_model, device=device, precision=precision, weight_format=weight_format
            )
            model = loaded.value.inference_model
            with ProgressConsole().progress_stage("suggestions", len(pending)) as on_progress:
                limits = {"max_new_tokens": max_new_tokens, "batch_size": batch_size}
                reasons = session.add_suggestions(model, **limits, on_progress=on_progress)
            for reason in reasons.values():
                click.echo(f"skipped: {reason}", err=True)
            del model
        session.complete_task()
        if listener is None:
            _print_suggestions(session, as_json)
        else:
            # Answers are data of the user, so a page on the network needs a password.
            no_auth = no_auth or socket_file is not None
            password, is_generated = resolve_password(host, password_file, no_auth, proxies)
            print_page_address(host, listener, password if is_generated else None)
            _run_page(session, listener, password, proxies)
    counts = session.store.count_events()
    text = ", ".join(f"{count} {name}" for name, count in counts.items())
    click.echo(f"{text}: {out}", err=True)
    if any(count for name, count in counts.items() if name not in ("open", "skipped")):
        words = _suggest_command(out, run_dir, sources if review else ())
        click.echo(f"next: {format_command(*words)}", err=True)


def _build_option_error(option: str, other: str, expected: str) -> UserError:
    remedy = "add or remove one of the options"
    return UserError(f"{option} is given {other}", where=option, expected=expected, remedy=remedy)


def _select_label_folder(run_dir: Path, reviewed: Sequence[Path]) -> Path:
    """Return the folder of a review, of the labels in the recipe of the run, or `labels`."""
    from finesight.label.label_store import REVIEWED_FILE, can_review, find_label_folder
    from finesight.recipe import load_recipe
    from finesight.train.run_dir import RunDir

    if reviewed:
        default = Path("labels-review")
        folders = [file.parent for file in sorted(Path().glob(f"{default}*/{REVIEWED_FILE}"))]
        folders += [default, RunDir(default).next_path]
        out = next(one for one in folders if can_review(one, reviewed))
        click.echo(f"reviewed labels: {out}", err=True)
        return out
    folder = None
    if (run_dir / RECIPE_FILE).is_file():
        with suppress(UserError):
            folder = find_label_folder(load_recipe(run_dir / RECIPE_FILE))
    if folder is not None:
        click.echo(f"continuing the labels in {folder}, training data of {run_dir}", err=True)
    return folder or Path("labels")


def find_label_command(recipe: Recipe) -> list[str]:
    """Return the command that labels further images with a run; empty if it trained no labels."""
    from finesight.label.label_store import find_label_folder, read_sources

    folder = find_label_folder(recipe)
    if folder is None:
        return []
    sources = [source for source in read_sources(folder) if os.path.exists(source)]
    return ["finesight", "label", str(recipe.output_dir), *(sources or ["IMAGES"])]


def _suggest_command(out: Path, run_dir: Path, reviewed: Sequence[Path]) -> list[str]:
    """Return the next command for the labels in `out`.

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
        words = ["train", str(recipe)]
        eval_paths = {os.path.abspath(file.path) for file in settings.data.eval}
        eval_labels = os.path.abspath(out / EVAL_FILE)
        if eval_labels in eval_paths and not (reviewed or os.path.exists(eval_labels)):
            # The recipe requires validation labels, but all labels are for training.
            known = list(filter(os.path.exists, read_sources(out)))
            options = ["--out", str(out), "--train-fraction", str(LABEL_TRAIN_FRACTION)]
            return ["label", str(run_dir), *(known or ["IMAGES"]), *options]
        files = (*settings.data.train, *settings.data.eval)
        if os.path.abspath(labels) not in {os.path.abspath(file.path) for file in files}:
            if recipe.parent != run_dir:
                continue
            folders = [Path(file.path).parent for file in settings.data.train]
            reviews = {folder: read_sources(folder, REVIEWED_FILE) for folder in folders}
            for folder, names in reviews.items():
                if os.path.realpath(labels) in names:
                    sources = map(os.path.relpath, names)
                    return ["label", str(run_dir), *sources, "--review", "--out", str(folder)]
            is_copy = not reviewed and is_imported(out, run_dir)
            if is_copy and not any(reviews.values()):
                break
            changes = [] if is_copy else _replace_reviewed_files(settings, out, reviewed)
            if not changes:
                # No file of the recipe has exactly these samples, or one has copies of them.
                return ["check", str(labels)]
            words += changes
        if settings.output_dir.exists():
            words.append(f"output_dir={RunDir(settings.output_dir).next_path}")
        return words
    default = Path(f"{labels.stem}-finetune")
    option = ["--out", str(RunDir(default).next_path)] if os.path.lexists(default) else []
    return ["init", str(labels), *option]


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


def _print_suggestions(session: LabelSession, as_json: bool) -> None:
    """Print the open samples in the order of the page."""
    for item in session.store.items:
        values = session.describe_item(item)
        if as_json:
            echo_json({key: value for key, value in values.items() if key != "history"})
            continue
        score = values["confidence"] if values["score"] is None else values["score"]
        answer = values["suggestion"] or values["answer"]
        boxes = (f"{box['label'] or 'box'} {box['xyxy']}" for box in answer["boxes"])
        text = answer["text"] or ", ".join(boxes)
        click.echo(f"{'-' if score is None else f'{score:.3f}'}  {values['id']}  {text}")


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
