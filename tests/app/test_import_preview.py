"""Previews in the import form: what would be imported, by which roles, before it is written."""

import contextlib
import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pool_jobs
import pytest
from browser import XSS_PAYLOADS
from html_text import compact
from PIL import Image
from starlette.testclient import TestClient
from studio_fixtures import make_page, open_client

from finesight.app import import_preview, studio_page, workspace
from finesight.app.import_preview import ROLE_LABELS
from finesight.app.server import Access
from finesight.app.studio_page import StudioPage, make_studio_app
from finesight.cli.app import run_command
from finesight.ingest.role_choices import CHOICES
from finesight.report.i18n import get_translations, use_language
from finesight.samples.sample import join_text, read_samples

ROLES = {"file": "images", "size": "meta", "qa.*.q": "question", "qa.*.a": "answer"}


@pytest.fixture
def client(folder: Path) -> Iterator[TestClient]:
    app = make_studio_app(make_page(folder), Access(max_upload_bytes=1 << 20))
    with TestClient(app, base_url="http://127.0.0.1") as opened:
        yield opened


def preview(
    client: TestClient,
    source: str = "",
    *files: Path,
    roles: dict[str, str] | None = None,
    lang: str = "en",
    **texts: str,
) -> dict[str, str]:
    """Press the button Preview, and return the reply of the server."""
    uploads = []
    for file in files:
        reply = client.post(f"/uploads?name={file.name}", content=file.read_bytes())
        uploads.append(reply.json()["id"])
    values = {"source": source, "out": "a", "train_fraction": "0.9", **texts}
    body = {
        "texts": {f"import:{name}": text for name, text in values.items()},
        "uploads": uploads,
        "roles": roles or {},
    }
    reply = client.post(f"/preview?step=data&lang={lang}", json=body)
    assert reply.status_code in (200, 422)
    return dict(reply.json())


def list_mappings(folder: Path) -> list[Path]:
    """Return the mapping files of chosen roles."""
    return sorted((folder / "uploads").glob("a-mapping-*.yaml"))


def read_roles(section: str) -> dict[str, str]:
    """Return the selected role of each dropdown of a preview by its path."""
    roles = {}
    for path, options in re.findall(
        r'<select[^>]*data-path="(.*?)".*?>(.*?)</select>', section, re.S
    ):
        selected = re.search(r'value="([^"]*)"\s+selected', options)
        roles[html.unescape(path)] = selected[1] if selected else ""
    return roles


def read_text(section: str) -> str:
    return html.unescape(compact(re.sub("<[^>]*>", " ", section)))


def read_answers(section: str) -> list[str]:
    found = re.findall(r"<dt>Answer</dt>\s*<dd>(.*?)</dd>", section, re.S)
    return [read_text(answer).strip() for answer in found]


def list_files(folder: Path) -> set[str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)) for file in files}


def write_table(folder: Path, header: str, cells: str) -> Path:
    lines = [header, *(f"photos/{number:02}.png,{cells}" for number in range(6))]
    (folder / "rows.csv").write_text("\n".join(lines))
    return folder / "rows.csv"


def write_nested(folder: Path) -> None:
    records = []
    for number in range(4):
        turns = [{"q": "How many?", "a": f"{number} cups"}, {"q": "Which?", "a": "Blue ones"}]
        records.append({"file": f"photos/{number:02}.png", "size": 20, "qa": turns})
    (folder / "rows.json").write_text(json.dumps(records))


def run_import(page: StudioPage, started: list[list[str]], folder: Path) -> list[list[str]]:
    """Run the command that the page has started, and return the texts of the samples."""
    with contextlib.chdir(folder):
        assert run_command(started[-1]) == 0
    samples = []
    for file in ("train.jsonl", "eval.jsonl"):
        samples += read_samples(folder / "data/a" / file)
    return sorted([join_text(one.content) for one in sample.messages] for sample in samples)


def press_import(client: TestClient, roles: dict[str, str], **texts: str) -> dict[str, str]:
    values = {"out": "a", "train_fraction": "0.5", **texts}
    body = {"texts": {f"import:{name}": text for name, text in values.items()}, "roles": roles}
    reply = client.post("/actions/import?step=data&lang=en", json=body)
    return dict(reply.json())


def test_two_value_columns_are_parts_of_one_answer(folder, client, page, started):
    write_table(folder, "file,category,color", "cup,red")
    section = preview(client, "rows.csv", prompt="Read.")["section"]
    # Names of columns do not tell which of the two is the answer.
    assert 'data-blocked="yes"' in section
    roles = {"file": "images", "category": "fields", "color": "fields"}
    section = preview(client, "rows.csv", prompt="Read.", roles=roles)["section"]
    assert read_roles(section) == roles
    assert 'data-blocked=""' in section
    assert json.loads(read_answers(section)[0]) == {"category": "cup", "color": "red"}
    assert len(read_answers(section)) == 5
    assert section.count("data:image/png;base64,") == 5
    assert "Rows: 6." in read_text(section)
    assert "url" in press_import(client, roles, source="rows.csv", prompt="Read.")
    samples = run_import(page, started, folder)
    assert len(samples) == 6
    assert [*map(json.loads, samples[0][1:])] == [{"category": "cup", "color": "red"}]


def test_read_fields_makes_all_columns_a_part_of_the_answer(folder, client, page, started):
    write_table(folder, "file,category,color", "cup,red")
    section = preview(client, "rows.csv", kind="fields", prompt="Read.")["section"]
    roles = {"file": "images", "category": "fields", "color": "fields"}
    assert read_roles(section) == roles
    assert 'data-blocked=""' in section
    assert 'data-chosen="yes"' in section
    assert json.loads(read_answers(section)[0]) == {"category": "cup", "color": "red"}
    assert "url" in press_import(client, roles, source="rows.csv", kind="fields", prompt="Read.")
    assert len(run_import(page, started, folder)) == 6


def test_chosen_roles_of_nested_records_are_imported(folder, client, page, started):
    write_nested(folder)
    before = list_files(folder)
    section = preview(client, "rows.json")["section"]
    assert {*read_roles(section)} == {*ROLES}
    assert "Choose a role for each key" in section
    assert list_files(folder) == before
    section = preview(client, "rows.json", roles=ROLES)["section"]
    assert read_roles(section) == ROLES
    assert read_answers(section)[:3] == ["0 cups", "Blue ones", "1 cups"]
    (mapping,) = list_mappings(folder)
    assert list_files(folder) - before == {f"uploads/{mapping.name}"}
    # Options that would contradict the roles are not passed on.
    assert "url" in press_import(client, ROLES, source="rows.json", columns="image=file")
    assert "--map" not in started[0]
    assert f"uploads/{mapping.name}" in started[0]
    samples = run_import(page, started, folder)
    assert len(samples) == 8
    assert ["How many?", "3 cups"] in samples
    # The mapping file is that of the data set, and is deleted with it.
    assert client.post("/actions/delete?step=data&data=data/a", json={}).status_code == 200
    assert not mapping.exists()


def test_boxes_are_drawn_and_have_no_dropdowns(folder, client):
    images = [
        {"id": n, "file_name": f"{n:02}.png", "width": 56 + n, "height": 56} for n in range(4)
    ]
    boxes = [{"id": n, "image_id": n, "category_id": 1, "bbox": [14, 7, 28, 14]} for n in range(4)]
    content = {"images": images, "annotations": boxes, "categories": [{"id": 1, "name": "cup"}]}
    (folder / "photos/coco.json").write_text(json.dumps(content))
    section = preview(client, "photos/coco.json")["section"]
    assert 'data-blocked=""' in section
    assert "<select" not in section
    assert "left: 25.0%; top: 12.5%; width: 50.0%; height: 25.0%" in section
    assert "cup [14, 7, 42, 21]" in read_answers(section)[0]


def test_columns_of_boxes_have_roles_as_text(folder, client):
    write_table(folder, "image,box,label", '"[1, 2, 9, 8]",cup')
    section = preview(client, "rows.csv", prompt="Find all objects.")["section"]
    assert "<select" not in section
    assert "class of the box" in section
    assert section.count('class="box"') == 5


def test_pages_of_uploaded_documents_are_images(folder, client, page, started):
    files = []
    for number in range(3):
        pages = [Image.new("RGB", (100, 140), color) for color in ("red", "blue")]
        files.append(folder.parent / f"{number}.pdf")
        pages[0].save(files[-1], save_all=True, append_images=pages[1:])
    table = folder.parent / "answers.csv"
    table.write_text("file,total\n" + "".join(f"{file.name},{file.stem}0\n" for file in files))
    before = list_files(folder)
    reply = preview(client, "", table, *files, columns="image=file answer=total", prompt="Total?")
    assert reply["source"] == "uploads/a/answers.csv"
    assert read_answers(reply["section"]) == ["00", "10", "20"]
    assert reply["section"].count("<img") == 6
    names = {"answers.csv", "0.pdf", "1.pdf", "2.pdf", workspace.UPLOAD_MARKER}
    assert list_files(folder) - before == {f"uploads/a/{name}" for name in names}
    # The page fills in the path of the upload.
    reply = preview(client, reply["source"], columns="image=file answer=total", prompt="Total?")
    assert read_answers(reply["section"]) == ["00", "10", "20"]
    # Images without a table go to the step Label, as with the button Import.
    reply = preview(client, "", *files, out="b")
    assert "step=label" in reply["url"]


def test_column_without_a_role_is_chosen(folder, client, page, started):
    write_table(folder, "image,caption,license", "a cup,CC0")
    section = preview(client, "rows.csv", prompt="Describe.")["section"]
    assert read_roles(section) == {"image": "images", "caption": "answer", "license": ""}
    assert "license" in read_text(section).partition("The import would fail")[2]
    # Commands and options of a terminal have no place on the page.
    assert "--map" not in section
    assert "“Columns”" in section
    roles = {"image": "images", "caption": "answer", "license": "meta"}
    section = preview(client, "rows.csv", prompt="Describe.", roles=roles)["section"]
    assert 'data-blocked=""' in section
    press_import(client, roles, source="rows.csv", prompt="Describe.")
    run_import(page, started, folder)
    sample = read_samples(folder / "data/a/train.jsonl")
    assert next(iter(sample)).meta == {"license": "CC0"}
    # A key without a role is an error of the import, which the preview shows.
    section = preview(client, "rows.csv", out="b", roles={"image": "images", "caption": "answer"})
    assert "license" in read_text(section["section"]).partition("The import would fail")[2]


def test_images_in_the_only_folder_are_found_with_chosen_roles(folder, client):
    lines = ["image,caption,license", *(f"{number:02}.png,a cup,CC0" for number in range(6))]
    (folder / "rows.csv").write_text("\n".join(lines))
    roles = {"image": "images", "caption": "answer", "license": "ignore"}
    section = preview(client, "rows.csv", prompt="Describe.", roles=roles)["section"]
    assert 'data-blocked=""' in section
    assert section.count("<img") == 5


def test_texts_of_the_data_run_nothing(folder, client):
    payload = "".join(XSS_PAYLOADS)
    records = []
    for number in range(3):
        record = {"image": f"photos/{number:02}.png", payload: payload, "caption": payload}
        records.append(record)
    (folder / "rows.json").write_text(json.dumps(records))
    roles = read_roles(preview(client, "rows.json", prompt="Describe.")["section"])
    (path,) = roles.keys() - {"image", "caption"}
    roles |= {path: "rejected", "image": "images", "caption": "answer"}
    section = preview(client, "rows.json", prompt=payload[:5000], roles=roles)["section"]
    assert read_roles(section) == roles
    tags = {*re.findall(r"<(\w+)", section)}
    known = {"section", "h3", "h4", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
    known |= {"code", "select", "option", "ol", "li", "div", "figure", "img", "span", "dl", "dt"}
    assert tags <= {*known, "dd"}
    assert set(re.findall(r'src="(.{15})', section)) <= {"data:image/png;", "data:image/jpeg"}


def test_unusual_characters_of_keys_are_shown(folder, client):
    record = {"image": "photos/00.png", "a\u202e.b": "x", "caption": "a", "tab\t": "\ud800"}
    (folder / "rows.json").write_text(json.dumps([record]))
    section = preview(client, "rows.json", prompt="Describe.")["section"]
    assert "\u202e" not in re.sub('data-path=".*?"', "", section)
    section.encode()


@pytest.mark.parametrize(
    ("texts", "roles", "words"),
    [
        ({"source": "../secret.csv"}, {}, "outside of the workspace"),
        ({"source": "link/secret.csv"}, {}, "outside of the workspace"),
        ({"source": ""}, {}, "Upload files, or enter"),
        ({"out": "../b"}, {}, "not a valid name"),
        ({"mapping": "/etc/passwd"}, {}, "outside of the workspace"),
        ({}, {**ROLES, "size": "owner"}, "unknown role 'owner'"),
        ({}, {**ROLES, "color": "meta"}, "no key 'color'"),
        ({}, {**ROLES, "size": "answer"}, "2 keys have the same role: size, qa.*.a"),
        ({}, {"file": "images"}, "no key is the answer"),
        ({}, dict.fromkeys(map(str, range(300)), "meta"), "roles of 300 keys"),
    ],
)
def test_invalid_forms_are_errors_and_write_nothing(folder, client, texts, roles, words):
    (folder.parent / "secret.csv").write_text("image,caption\nphotos/00.png,secret\n")
    (folder / "link").symlink_to(folder.parent)
    write_nested(folder)
    before = list_files(folder)
    values = {"source": "rows.json", **texts}
    assert words in preview(client, values.pop("source"), roles=roles, **values)["error"]
    assert list_files(folder) == before


def test_refused_preview_leaves_no_upload(folder, client):
    file = folder.parent / "rows.jsonl"
    file.write_text('{"image": "a.png", "caption": "a"}\n')
    reply = preview(client, "", file, roles={"image": "images", "other": "answer"})
    assert "no key 'other'" in reply["error"]
    assert not (folder / "uploads/a").exists()


def test_images_elsewhere_are_not_shown(folder, client):
    Image.new("RGB", (50, 50), "red").save(folder.parent / "secret.png")
    table = f"image,caption\n{folder.parent}/secret.png,a\nphotos/00.png,b\n"
    (folder / "rows.csv").write_text(table)
    section = preview(client, "rows.csv", prompt="Describe.")["section"]
    assert "secret.png: outside of the workspace" in read_text(section)
    assert section.count("<img") == 1


def test_source_that_cannot_be_read_shows_its_error(folder, client):
    (folder / "rows.csv").write_text("a,b\n1,2,3\n")
    section = preview(client, "rows.csv")["section"]
    assert "The import would fail" in section
    assert "more or fewer cells" in section
    section = preview(client, "photos/00.png")["section"]
    assert "The import would fail" in section


def test_mapping_files_are_never_changed(folder, client):
    """A running import reads the roles of its own form."""
    write_nested(folder)
    preview(client, "rows.json", roles=ROLES)
    (file,) = list_mappings(folder)
    first = file.read_text()
    preview(client, "rows.json", roles={**ROLES, "size": "ignore"})
    preview(client, "rows.json", roles=ROLES)
    assert len(list_mappings(folder)) == 2
    assert file.read_text() == first
    file.write_text(first + "# edited\n")
    reply = preview(client, "rows.json", roles=ROLES)
    assert "has been edited" in reply["error"]
    assert reply["field"] == "import:out"
    assert file.read_text() == first + "# edited\n"
    file.unlink()
    target = folder / "other.yaml"
    target.write_text(first)
    file.symlink_to(target)
    assert "error" in preview(client, "rows.json", roles=ROLES)
    assert target.read_text() == first


def test_mapping_of_the_user_is_not_replaced_by_dropdowns(folder, client):
    write_nested(folder)
    preview(client, "rows.json", roles=ROLES)
    (mapping,) = list_mappings(folder)
    # That of the form can be changed after a failed import, whose form names it.
    section = preview(client, "rows.json", mapping=f"uploads/{mapping.name}")["section"]
    assert read_roles(section) == ROLES
    (folder / "m.yaml").write_bytes(mapping.read_bytes() + b"#\n")
    section = preview(client, "rows.json", mapping="m.yaml")["section"]
    assert read_roles(section) == {}
    assert read_answers(section)[0] == "0 cups"


def test_records_of_an_archive_are_previewed(folder, client):
    home = folder.parent / "packed"
    home.mkdir()
    write_table(home, "image,caption,license", "a cup,CC0")
    # With captions beside them, the images would be a data set of their own.
    for file in (folder / "photos").glob("*.txt"):
        file.unlink()
    (folder / "photos").rename(home / "photos")
    shutil.make_archive(str(folder / "rows"), "zip", home)
    roles = {"image": "images", "caption": "answer", "license": "meta"}
    section = preview(client, "rows.zip", prompt="Describe.", roles=roles)["section"]
    assert read_answers(section) == ["a cup"] * 5
    assert section.count("<img") == 5


def test_pairs_and_verdicts_are_shown(folder, client):
    write_table(folder, "image,q,good,bad", "What?,a cup,a jug")
    roles = {"image": "images", "q": "question", "good": "answer", "bad": "rejected"}
    section = preview(client, "rows.csv", roles=roles)["section"]
    assert "Worse answer a jug" in read_text(section)
    records = [
        {"image": "photos/00.png", "q": "What?", "a": "a cup", "ok": True},
        {"image": "photos/01.png", "q": "What?", "a": "a jug", "ok": False},
    ]
    (folder / "rows.json").write_text(json.dumps(records))
    roles = {"image": "images", "q": "question", "a": "answer", "ok": "verdict"}
    text = read_text(preview(client, "rows.json", roles=roles)["section"])
    assert "Verdict desirable" in text
    assert "Verdict undesirable" in text


def test_every_text_is_translated(folder, client):
    write_table(folder, "image,caption,license", "a cup,CC0")
    section = preview(client, "rows.csv", lang="zh", prompt="Describe.")["section"]
    for words in ("导入将会失败", "记录的键", "请选择角色"):
        assert words in section
    roles = {"image": "images", "caption": "answer", "license": "meta"}
    section = preview(client, "rows.csv", lang="zh", prompt="描述图像。", roles=roles)["section"]
    assert "前几个样本" in section
    with use_language("zh"):
        known = get_translations()
    assert {*ROLE_LABELS.values(), *import_preview.TEXT_ROLES.values()} <= {*known}
    assert {*import_preview.MESSAGE_LABELS.values()} <= {*known}
    assert tuple(ROLE_LABELS) == CHOICES


def test_preview_needs_the_password(folder):
    with open_client(folder, "right-password") as client:
        assert client.post("/preview", json={}).status_code == 401


def test_slow_preview_is_an_error_of_the_form(folder, client, monkeypatch):
    write_nested(folder)
    monkeypatch.setattr(workspace, "JOB_CPU_SECONDS", 0.1)
    monkeypatch.setattr(studio_page, "preview_source", pool_jobs.hang)
    assert "there is no preview" in preview(client, "rows.json")["error"]
