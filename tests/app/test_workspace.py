"""Tests of the paths and files that the studio accepts."""

import contextlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
from case_files import load_cases
from html_text import compact
from studio_fixtures import click_button, write_job, write_recipe
from web_server_fixture import get_image_pool

from finesight.app.studio_view import STEPS, Selection
from finesight.app.workspace import UPLOAD_MARKER, Workspace, WorkspaceDataset, as_argument
from finesight.errors import UserError
from finesight.files.storage import write_file
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.label.label_session import open_session
from finesight.model_folder import TINY_MODEL
from finesight.settings.config import PixelRange, TuneSettings
from finesight.settings.manifest import Manifest
from finesight.train.run_dir import RunDir

CASES = load_cases("workspace")

OPTIONS = ImportOptions(prompt="Which color?")


@pytest.fixture
def workspace(folder: Path) -> Workspace:
    (folder / ".finesight").mkdir()
    (folder.parent / "secret.txt").write_text("secret")
    (folder / "link").symlink_to(folder.parent)
    (folder / "studio-link").symlink_to(".finesight")
    return Workspace(folder, get_image_pool())


def add_data(workspace: Workspace, name: str, options: ImportOptions = OPTIONS) -> WorkspaceDataset:
    """Import the images of the workspace as a data set."""
    import_dataset(workspace.folder / "photos", workspace.folder / "data" / name, options)
    [found] = [one for one in workspace.scan().datasets if one.path == Path("data", name)]
    return found


@pytest.mark.parametrize("path", ["photos", " photos/00.png ", "./photos/../photos", "{}/photos"])
def test_path_in_the_workspace(workspace, path):
    resolved = workspace.resolve(path.format(workspace.folder), "source")
    assert not resolved.is_absolute()
    assert resolved.parts[0] == "photos"


@pytest.mark.parametrize(("path", "problem"), CASES["test_other_paths_are_rejected"])
def test_other_paths_are_rejected(workspace, path, problem):
    with pytest.raises(UserError, match=r".") as raised:
        workspace.resolve(path, "source")
    assert problem in str(raised.value)


@pytest.mark.parametrize("name", ["", "../a", "a/b", "-a", ".a", "photos"])
def test_new_name_is_checked(workspace, name):
    with pytest.raises(UserError, match=r"is not a valid name|exists"):
        workspace.check_new_name(".", name)
    assert workspace.check_new_name("data", "图-1") == Path("data/图-1")


def test_model_is_a_hub_name_or_in_the_workspace(workspace):
    for name in (TINY_MODEL, "Qwen/Qwen2-VL-2B-Instruct", "modelscope:a/b@main", "photos"):
        assert workspace.check_model(name) == name
    for name in ("/models/qwen", "../models", "link/secret.txt", "missing", "--help/x", "-o/x"):
        with pytest.raises(UserError, match=r"outside|does not exist|not a valid path"):
            workspace.check_model(name)


def test_recipe_from_a_run_continues_its_adapter(workspace):
    dataset = add_data(workspace, "a")
    run = workspace.folder / "runs" / "first"
    run.mkdir(parents=True)
    tune = TuneSettings.model_validate({"language": "lora", "lora": {"rank": 4, "alpha": 8}})
    manifest = Manifest(
        family="qwen2_vl",
        base_model="Some/model",
        base_fingerprint="",
        image_rule=PixelRange(min_pixels=784, max_pixels=1568),
        system_prompt=None,
        eos_token="<|im_end|>",
        tune=tune,
        versions={},
    )
    (run / "manifest.json").write_text(manifest.model_dump_json())
    path = workspace.create_recipe("b", [dataset], "runs/first", {})
    recipe = workspace.load_recipe(path)
    assert (recipe.model, recipe.tune, recipe.image) == ("runs/first", tune, None)


def test_recipe_is_created_and_validated(workspace):
    dataset = add_data(workspace, "a")
    assert (dataset.path, dataset.num_train, dataset.num_eval) == (Path("data/a"), 24, 0)
    settings = {"train.epochs": "2", "train.learning_rate": "", "eval.metric": ""}
    path = workspace.create_recipe("a", [dataset], TINY_MODEL, settings)
    assert workspace.scan().recipes == [path] == [Path("recipes/a.yaml")]
    recipe = workspace.load_recipe(path)
    assert (recipe.train.epochs, recipe.output_dir) == (2, Path("runs/a"))
    text = (workspace.folder / path).read_text()
    changes = CASES["test_recipe_is_created_and_validated"]
    for old, new, problem in (*changes, (text, "text", "not a recipe")):
        with pytest.raises(UserError, match=problem):
            workspace.save_recipe(path, text.replace(old, new))
    grpo = workspace.create_recipe("g", [dataset], TINY_MODEL, {"train.objective": "grpo"})
    assert workspace.load_recipe(grpo).rewards[0].name == "classification"
    (workspace.folder / grpo).unlink()
    with pytest.raises(UserError, match="has changed"):
        workspace.save_recipe(path, text, "digest of another text")
    # Of several studios that save changes of the same text, one succeeds.
    digest = workspace.read_recipe(path)[1]

    def save(number: int) -> bool:
        try:
            workspace.save_recipe(path, f"{text}# {number}\n", digest)
        except UserError as error:
            return "has changed" not in error.what
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(save, range(24))) == 1
    workspace.save_recipe(path, text)
    assert workspace.read_recipe(path)[0] == text
    workspace.save_recipe(path, text, workspace.read_recipe(path)[1])
    for epochs in ("{3", "[" * 5000, "{a: " * 3000, "9" * 5000):
        with pytest.raises(UserError, match=r"train.epochs"):
            workspace.create_recipe("b", [dataset], TINY_MODEL, {"train.epochs": epochs})
    with pytest.raises(UserError, match=r"recipes/a.yaml exists"):
        workspace.create_recipe("a", [dataset], TINY_MODEL, settings)


def test_recipe_of_several_data_sets(workspace):
    for name, fraction in (("a", None), ("b", 0.5)):
        images = shutil.copytree(workspace.folder / "photos", workspace.folder / f"photos-{name}")
        options = replace(OPTIONS, train_fraction=fraction)
        import_dataset(images, workspace.folder / "data" / name, options)
    datasets = sorted(workspace.scan().datasets, key=lambda one: one.path)
    data = workspace.load_recipe(workspace.create_recipe("a", datasets, TINY_MODEL, {})).data
    assert [str(file.path) for file in data.train] == ["data/a/data.jsonl", "data/b/train.jsonl"]
    assert [str(file.path) for file in data.eval] == ["data/b/eval.jsonl"]


def test_prompt_is_that_of_the_run_or_of_the_data_set(workspace):
    dataset = add_data(workspace, "a")
    assert workspace.read_prompt(None, None) == ""
    assert workspace.read_prompt(None, dataset) == "Which color?"
    run = workspace.folder / "runs" / "a"
    run.mkdir(parents=True)
    for name, prompt in (("data/a/data.jsonl", "Which color?"), ("../secret.txt", "")):
        (run / "recipe.yaml").write_text(
            f"model: finesight-tiny\ndata: {{train: {name}}}\noutput_dir: runs/a\n"
        )
        assert workspace.read_prompt(Path("runs/a"), None) == prompt
    (workspace.folder / dataset.train_file).write_text("no sample\n")
    assert workspace.read_prompt(None, dataset) == ""


def test_uploads_are_copied_into_a_new_folder(workspace, tmp_path):
    files = [tmp_path / name for name in ("a.png", "b.png", "labels.csv")]
    for file in files:
        file.write_text(file.name)
    assert workspace.save_uploads(files, "all") == Path("uploads/all/labels.csv")
    assert workspace.save_uploads(files[:2], "images") == Path("uploads/images")
    assert workspace.save_uploads(files[:1], "one") == Path("uploads/one/a.png")
    assert (workspace.folder / "uploads/all/a.png").read_text() == "a.png"
    with pytest.raises(UserError, match="several uploaded files are named"):
        workspace.save_uploads([files[0], files[0]], "twice")
    with pytest.raises(OSError, match="missing"):
        workspace.save_uploads([files[0], tmp_path / "missing"], "twice")
    assert workspace.save_uploads(files[:1], "twice") == Path("uploads/twice/a.png")


def test_ambiguous_folders_of_an_uploaded_table_are_refused(workspace):
    table = workspace.folder.parent / "t.csv"
    table.write_text("image,class\na/00.png,red\nb/00.png,blue\n")
    with pytest.raises(UserError, match=r"names a/00.png and b/00.png[^!]*upload a zip archive"):
        workspace.save_uploads([table, workspace.folder / "photos/00.png"], "a")
    assert not (workspace.folder / "uploads/a").exists()


def test_names_in_a_table_that_no_file_can_have_are_left_to_the_import(workspace, monkeypatch):
    # Workers read tables, which may be bombs.
    monkeypatch.setattr("finesight.ingest.row_reader.open_row_file", None)
    table, image = workspace.folder.parent / "t.jsonl", workspace.folder / "photos/00.png"
    names = ("a\0/00.png", "a\ud800/00.png", "a" * 300 + "/00.png", "t.jsonl/00.png", "../00.png")
    for number, name in enumerate(names):
        table.write_text(json.dumps({"image": name}))
        path = workspace.save_uploads([table, image], f"a{number}")
        assert (workspace.folder / path).with_name("00.png").is_file()


@pytest.mark.parametrize("new_name", ["t.csv", "corrected.csv"])
def test_upload_of_the_same_name_is_added(workspace, tmp_path, new_name):
    images = sorted((workspace.folder / "photos").glob("*.png"))
    table, outside = tmp_path / "t.csv", tmp_path / "outside.csv"
    table.write_text("image,class\n" + "".join(f"shapes/{file.name},red\n" for file in images))
    assert workspace.save_uploads([*images[:-1], table], "a") == Path("uploads/a/t.csv")
    # A missing image.
    assert workspace.save_uploads(images[-1:], "a") == Path("uploads/a/t.csv")
    uploads = workspace.folder / "uploads/a"
    assert len([*uploads.glob("shapes/*.png")]) == len(images)
    text = table.read_text().replace("shapes/", "")
    (tmp_path / new_name).write_text(text)
    outside.write_text("unchanged")
    (uploads / "t.csv").unlink()
    (uploads / "t.csv").symlink_to(outside)
    new_image = tmp_path / images[0].name
    new_image.write_bytes(images[1].read_bytes())
    source = workspace.save_uploads([tmp_path / new_name, new_image], "a")
    assert (source, (workspace.folder / source).read_text()) == (Path("uploads/a", new_name), text)
    assert len([*uploads.glob("*.png")]) == len(images)
    assert (uploads / images[0].name).read_bytes() == images[1].read_bytes()
    assert outside.read_text() == "unchanged"


def test_uploads_in_use_are_not_replaced(workspace):
    files = sorted((workspace.folder / "photos").iterdir())
    uploads = workspace.folder / workspace.save_uploads(files, "a")
    assert workspace.save_uploads(files[:24], "a") == Path("uploads/a")
    assert len([*uploads.glob("[!.]*")]) == len(files)
    import_dataset(uploads, workspace.folder / "data/b", OPTIONS)
    with pytest.raises(UserError, match="uploads/a exists"):
        workspace.save_uploads(files[:1], "a")
    assert len([*uploads.glob("[!.]*")]) == len(files)
    # Images that a session labels, and folders that the studio has not created.
    workspace.save_uploads(files, "c")
    label = workspace.folder / "data/labels"
    write_file(label / "sources.json", b'["uploads/c"]')
    shutil.copytree(workspace.folder / "photos", workspace.folder / "uploads/own")
    for name in ("c", "own"):
        with pytest.raises(UserError, match=f"uploads/{name} exists"):
            workspace.save_uploads(files[:2], name)


def test_files_that_cannot_be_read_are_skipped(workspace):
    for name in ("a", "b", "c", "d"):
        (workspace.folder / name).mkdir()
    (workspace.folder / "a" / "train.jsonl").write_text("{}\n")
    (workspace.folder / "a" / "eval.jsonl").symlink_to(workspace.folder.parent / "secret.txt")
    (workspace.folder / "b" / "train.jsonl").symlink_to("missing")
    (workspace.folder / "c" / "train.jsonl").symlink_to("train.jsonl")
    os.mkfifo(workspace.folder / "d" / "train.jsonl")
    recipe = b"model: finesight-tiny\ndata: {train: a.jsonl}\n"
    for file in (b"\xff.yaml", b"-a.yaml"):
        Path(os.fsdecode(os.fsencode(workspace.folder) + b"/" + file)).write_bytes(recipe)
    content = workspace.scan()
    assert [(item.path, item.eval_file) for item in content.datasets] == [(Path("a"), None)]
    assert content.recipes == [Path("-a.yaml")]
    assert as_argument(Path("-a.yaml")) == "./-a.yaml"
    assert as_argument(Path("hf:a/b")) == "./hf:a/b"


@pytest.mark.parametrize("pattern", ["*/../" * 12 + "x", "**/" * 9 + "x", "../" * 9 + "**/x"])
def test_pattern_of_another_person_is_searched_once(workspace, page, pattern):
    for index in range(9):
        (workspace.folder / f"loop-{index}").symlink_to(".")
    write_recipe(workspace.folder, "a", f"['{pattern}']")
    assert "a.yaml" in page.render(Selection(step="plan"))
    with contextlib.suppress(UserError):
        workspace.load_recipe(Path("a.yaml"))
    (check := workspace.folder / add_data(workspace, "b").check_page).parent.mkdir()
    check.symlink_to(workspace.folder.parent / "secret.txt")
    with pytest.raises(UserError, match="no check"):
        page.view.read_check_page(Selection(data="data/b"))


def test_large_data_file_delays_no_page(workspace, page):
    """A sparse file of 300 GB, and that of a data set in use."""
    folder = workspace.folder
    small = add_data(workspace, "small")
    add_data(workspace, "big")
    os.truncate(folder / "data/big/data.jsonl", 300 << 30)
    [big] = [one for one in page.view.workspace.scan().datasets if one.path == Path("data/big")]
    assert big.is_estimate
    for step in STEPS:
        for data in ("data/big", "data/small"):
            assert "<title>" in page.render(Selection(step=step, data=data, recipe="r.yaml"))
    shown = compact(page.render(Selection(step="data")))
    assert ">about " in shown
    assert ">24<" in shown
    recipe = workspace.create_recipe("r", [big, small], TINY_MODEL, {})
    assert "# about " in (folder / recipe).read_text()
    assert "is too large to search" in click_button(page, "delete", "step=data&data=data/small")
    (folder / "data/big/data.jsonl").unlink()
    assert "is used by the recipe" in click_button(page, "delete", "step=data&data=data/small")
    (folder / recipe).unlink()
    assert click_button(page, "delete", "step=data&data=data/small") == ""


def test_recursive_alias_of_another_recipe_leaves_delete_possible(workspace, page):
    add_data(workspace, "a")
    for name, text in (
        ("a", "data: &a [*a]"),
        ("b", "data: &a {train: *a}"),
        ("c", "x: &x {y: *x}"),
    ):
        (workspace.folder / f"{name}.yaml").write_text(f"model: m\n{text}\n")
    assert click_button(page, "delete", "step=data&data=data/a") == ""
    assert not (workspace.folder / "data/a").exists()


@pytest.mark.parametrize("user", ["", "recipe", "labels", "foreign", "table"])
def test_uploads_in_use_are_not_deleted_with_their_data_set(workspace, user):
    folder = workspace.folder
    uploads = folder / workspace.save_uploads(sorted((folder / "photos").iterdir()), "a")
    import_dataset(uploads, folder / "data/a", OPTIONS)
    if user == "recipe":
        recipe = b"model: finesight-tiny\ndata: {train: [{path: uploads/a/*.jsonl}]}\n"
        write_file(folder / "mine.yaml", recipe)
    elif user == "labels":
        write_file(folder / "data/b/sources.json", b'["uploads"]')
    elif user == "foreign":
        (uploads / UPLOAD_MARKER).unlink()
    elif user == "table":
        import_dataset(folder / "photos", uploads / "b", OPTIONS)
    (uploads / "own.jsonl").touch()
    [dataset] = [one for one in workspace.scan().datasets if one.path == Path("data/a")]
    workspace.move_to_trash(*workspace.list_deleted(dataset, ()))
    assert not (folder / "data/a").exists()
    assert uploads.exists() == bool(user)


@pytest.mark.parametrize(("user", "problem"), CASES["test_data_set_in_use_is_not_deleted"])
def test_data_set_in_use_is_not_deleted(workspace, page, user, problem):
    folder, (kind, _, name) = workspace.folder, user.partition(" ")
    add_data(workspace, "a", replace(OPTIONS, copy_images=True))
    with ExitStack() as stack:
        if kind == "recipe":
            write_recipe(folder, "mine", name)
        elif name == "in progress":
            # A run that holds the lock of its folder is in progress.
            run = folder / "runs/a"
            write_file(run / "manifest.json", b"{}")
            write_recipe(folder, "mine", "data/a/data.jsonl").rename(run / "recipe.yaml")
            stack.enter_context(RunDir(run).lock())
        elif kind == "run":
            for file in ("manifest.json", "recipe.yaml"):
                write_file(folder / "data/a/run" / file, b"{}")
        elif kind == "data":
            add_data(workspace, "a/v2")
        elif kind == "labels":
            labels = json.loads((folder / "data/a/data.jsonl").read_text().splitlines()[0])
            labels["messages"][0]["content"][0]["image"] = "../a/images/00.png"
            write_file(folder / "data/labels/labels.jsonl", json.dumps(labels).encode())
        elif kind == "session":
            photos = [folder / "photos"]
            session = open_session(folder / "data/a", TINY_MODEL, photos, prompt="Q")
            stack.enter_context(session.store)
        else:
            write_job(folder, "label", f"label finesight-tiny {name}", exit_code=None)
        assert problem in click_button(page, "delete", "step=data&data=data/a&lang=en")
    assert (folder / "data/a/data.jsonl").exists()
    if kind == "session":
        assert click_button(page, "delete", "step=data&data=data/a") == ""


def test_words_of_a_command_that_are_no_folders_do_not_count(workspace):
    for word in (".", "..", "/", "--out=data", "data/ab", "dat", "Read data"):
        assert not workspace.is_overlapping(word, Path("data/a")), word
    for word in ("data", "./data/", "data/a", "data/a/b.png", str(workspace.folder / "data")):
        assert workspace.is_overlapping(word, Path("data/a")), word


def test_trash_that_cannot_be_written_is_reported(workspace):
    long_name = "a" * 250
    add_data(workspace, "a")
    (workspace.folder / "data" / long_name).mkdir()
    workspace.move_to_trash(Path("data", long_name))
    assert not (workspace.folder / "data" / long_name).exists()
    shutil.rmtree(workspace.folder / ".finesight/trash")
    (workspace.folder / ".finesight/trash").write_text("no folder")
    with pytest.raises(UserError, match="cannot be moved to the trash"):
        workspace.move_to_trash(Path("data/a"))
    (workspace.folder / ".finesight/trash").unlink()
    (workspace.folder / ".finesight/trash").symlink_to(workspace.folder.parent)
    with pytest.raises(UserError, match="a link to another folder"):
        workspace.move_to_trash(Path("data/a"))
    assert (workspace.folder / "data/a/data.jsonl").exists()
