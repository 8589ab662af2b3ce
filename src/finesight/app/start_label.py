"""Start the labelling page."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Unpack

from finesight.app.page_access import (
    NoAuthOption,
    PageHostOption,
    PasswordFileOption,
    SocketOption,
    TrustedProxyOption,
    announce_page,
    build_option_error,
    check_proxies,
    resolve_password,
)
from finesight.errors import Step, UserError
from finesight.operations.model import get_prompt_format, load_model
from finesight.operations.next_steps import build_init_step
from finesight.operations.operation import (
    EXIT_SKIPPED,
    Outcome,
    Parameter,
    StrPath,
    require_extra,
    to_path,
)
from finesight.operations.options import (
    LoadingOptions,
    MaxNewTokensOption,
    PortOption,
    RunOrModelArgument,
)
from finesight.progress import ProgressConsole

if TYPE_CHECKING:
    from finesight.settings.config import Recipe


def label(
    run_or_model: RunOrModelArgument,
    sources: Annotated[Sequence[StrPath], Parameter(metavar="IMAGES")],
    prompt: str | None = None,
    out: Annotated[StrPath | None, Parameter(metavar="FOLDER", path="folder")] = None,
    kind: Literal["text", "fields", "classes", "boxes", "points"] | None = None,
    classes: Annotated[str | None, Parameter(metavar="A,B,C")] = None,
    fields: Annotated[str | None, Parameter(metavar="A,B,C")] = None,
    review: Annotated[bool, Parameter(option="--review")] = False,
    train_fraction: Annotated[float | None, Parameter(minimum=0.0, maximum=1.0)] = None,
    suggestions: Annotated[bool, Parameter(option="--suggestions/--no-suggestions")] = True,
    suggest_only: Annotated[bool, Parameter(option="--suggest-only")] = False,
    teacher: Annotated[str | None, Parameter(metavar="URL|RUN_OR_MODEL", path="server")] = None,
    teacher_model: Annotated[str | None, Parameter(metavar="NAME")] = None,
    teacher_key: Annotated[str, Parameter(metavar="VARIABLE")] = "FINESIGHT_TEACHER_KEY",
    teacher_answers: Annotated[int, Parameter(minimum=2, maximum=32)] = 3,
    teacher_boxes: Literal["auto", "pixels", "thousandths", "thousandths-yx"] = "auto",
    teacher_pixels: Annotated[int, Parameter(minimum=1024)] = 2_000_000,
    teacher_budget: Annotated[int | None, Parameter(minimum=1, metavar="REQUESTS")] = None,
    teacher_concurrency: Annotated[int, Parameter(minimum=1, maximum=64)] = 4,
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
        teacher: Source of the suggestions instead of RUN_OR_MODEL: another run or model, or an
            OpenAI-compatible server (https://HOST/v1), which receives the images and prompts.
        teacher_model: Name of the model on the server.
        teacher_key: Environment variable with the API key of the server.
        teacher_answers: Answers of the server per image; their agreement is the confidence.
        teacher_boxes: Frame of the coordinates of the server: pixels of the sent image, or
            thousandths of its sides, x or y first. auto: that in which it finds a drawn rectangle.
        teacher_pixels: Maximum size of the images for the server; larger ones are scaled.
        teacher_budget: Maximum number of requests to the server, with retries. Default: any number.
        teacher_concurrency: Requests to the server at the same time.
        batch_size: Answers generated at the same time; halved when GPU memory is exhausted.
    """
    from finesight.label.label_session import open_session
    from finesight.label.suggestion import rank_labels, suggest_labels
    from finesight.settings.manifest import find_run_dir

    console = ProgressConsole()
    if on_record is not None and not suggest_only:
        raise build_option_error("--json", "without --suggest-only", "--json with --suggest-only")
    for option, value in (("--suggest-only", suggest_only), ("--teacher", teacher)):
        if value and not suggestions:
            raise build_option_error(option, "with --no-suggestions", "one of the two options")
    server, suggester = None, teacher or run_or_model
    if "://" in (teacher or ""):
        from finesight.label.teacher import TeacherSettings

        sizes = teacher_answers, teacher_pixels, teacher_budget, teacher_concurrency, max_new_tokens
        server = TeacherSettings(suggester, teacher_model, teacher_key, teacher_boxes, *sizes)
        suggester = server.name
    if suggestions:
        from finesight.model_folder import check_model_path

        for name in [run_or_model] if server else [run_or_model, suggester]:
            check_model_path(name)
    names, field_names = (
        [*dict.fromkeys(name.strip() for name in (text or "").split(",") if name.strip())]
        for text in (classes, fields)
    )
    if field_names and (names or kind not in (None, "fields")):
        other = f"with {'--classes' if names else f'--kind {kind}'}"
        raise build_option_error("--fields", other, "--fields with --kind fields")
    paths, run_dir = [*map(Path, sources)], find_run_dir(Path(run_or_model))
    proxies, reviewed = check_proxies(trusted_proxy), paths if review else []
    # Answers are data of the user, so a page on the network needs a password.
    password = resolve_password(host, password_file, no_auth or bool(socket_file), proxies)
    folder = to_path(out) or _select_label_folder(run_dir, reviewed, console)
    suggested: list[dict[str, Any]] = []
    missing: list[str] = []
    with ExitStack() as stack:
        listener = None
        if not suggest_only:
            require_extra("label")
            from finesight.app.label_page import make_label_app
            from finesight.app.server import serve_app
            from finesight.serve.http_protocol import bind_socket
            from finesight.vision.image_reader import create_image_pool

            # A port in use is reported before the suggestions, which take minutes.
            listener = stack.enter_context(bind_socket(host, port, socket_file))
        options: dict[str, Any] = {"prompt": prompt, "kind": kind, "review": review}
        options |= {"choices": names, "field_names": field_names, "train_fraction": train_fraction}
        with console.activity("reading the samples"):
            session = open_session(folder, run_or_model, paths, **options)
        session.model = suggester
        stack.enter_context(session.store)
        if suggestions and server is None and not review:
            prompt_format = get_prompt_format(suggester)
            for note in prompt_format.describe_difference(session.task.prompt or "", num_images=1):
                console.log(f"note: {note}")
        if suggestions and (pending := session.store.list_unsuggested(suggester)):
            suggest: Callable[..., Any]
            if server is None:
                model = load_model(suggester, **loading).value.inference_model
                rank = rank_labels if review else suggest_labels
                suggest = partial(
                    rank,
                    model,
                    max_new_tokens=max_new_tokens,
                    batch_size=batch_size,
                    log=console.log,
                )
                del model
            else:
                from finesight.label.teacher import Teacher

                suggest = Teacher(server, session, console.log).suggest
            with console.progress_stage("suggestions", len(pending)) as on_progress:
                reasons = session.add_suggestions(suggest, on_progress)
            for reason in reasons.values():
                message = f"no suggestion: {reason}"
                if suggest_only:
                    missing.append(message)
                else:
                    console.log(message)
            del suggest
        session.complete_task()
        if listener is None:
            suggested = [session.describe_item(item) for item in session.store.items]
        else:
            pool, access = create_image_pool(), announce_page("label", host, listener, password)
            serve_app(make_label_app(session, access, pool), listener, pool, proxies)
    for one in suggested:
        if on_record is not None:
            on_record({key: value for key, value in one.items() if key != "history"})
    exit_code = 0
    if missing:
        exit_code = EXIT_SKIPPED
    counts = session.store.count_events()
    console.log(f"{', '.join(f'{count} {name}' for name, count in counts.items())}: {folder}")
    has_labels = any(n for name, n in counts.items() if name not in ("open", "skipped"))
    return Outcome(
        counts,
        [*map(_format_suggestion, suggested)],
        data=[],  # given to `on_record`
        next_steps=[_find_next_step(folder, run_dir, reviewed)] if has_labels else [],
        exit_code=exit_code,
        notes=missing,
    )


def _select_label_folder(run_dir: Path, reviewed: Sequence[Path], console: ProgressConsole) -> Path:
    """Return the folder of a review, of the labels in the recipe of the run, or `labels`."""
    from finesight.label.label_store import REVIEWED_FILE, can_review, find_label_folder
    from finesight.settings.manifest import RECIPE_FILE
    from finesight.settings.recipe import load_recipe
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

    It trains with them, continues their review, or checks reviewed labels that replace no file of
    the recipe of the run. Without a recipe, it is `init`.

    Args:
        reviewed: Data files whose samples the labels contain.
    """
    from finesight.label.label_session import is_imported
    from finesight.label.label_store import LABELS_FILE, REVIEWED_FILE, read_sources
    from finesight.settings.manifest import RECIPE_FILE
    from finesight.settings.recipe import load_recipe
    from finesight.train.run_dir import RunDir

    labels, recipe = out / LABELS_FILE, run_dir / RECIPE_FILE
    init_step = build_init_step(labels)
    try:
        settings = load_recipe(recipe)
    except UserError:
        return init_step
    overrides: list[str] = []
    files = (*settings.data.train, *settings.data.eval)
    if os.path.abspath(labels) not in {os.path.abspath(file.path) for file in files}:
        folders = [Path(file.path).parent for file in settings.data.train]
        reviews = {folder: read_sources(folder, REVIEWED_FILE) for folder in folders}
        for folder, names in reviews.items():
            if os.path.realpath(labels) in names:
                arguments = {"sources": [*map(os.path.relpath, names)], "review": True}
                return Step("label", {"run_or_model": run_dir, **arguments, "out": folder})
        is_copy = not reviewed and is_imported(out, run_dir)
        if is_copy and not any(reviews.values()):
            return init_step
        overrides = [] if is_copy else _replace_reviewed_files(settings, out, reviewed)
        if not overrides:
            # No file of the recipe has exactly these samples, or one has copies of them.
            return Step("check", {"sources": [labels]})
    if settings.output_dir.exists():
        overrides.append(f"output_dir={RunDir(settings.output_dir).next_path}")
    return Step("train", {"recipe": recipe, "overrides": overrides})


def _replace_reviewed_files(recipe: Recipe, out: Path, reviewed: Sequence[Path]) -> list[str]:
    """Return the overrides of a recipe that train with labels instead of the reviewed files.

    New labels are added to the training data. Empty if no split of the recipe has all reviewed
    files.
    """
    from finesight.label.label_store import EVAL_FILE, LABELS_FILE
    from finesight.settings.config import DataFileSettings

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
