"""Tests of `finesight import --mapping`."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from image_fixtures import write_gray_image

from finesight.samples.sample import read_samples


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a.png and b.png."""
    write_gray_image(tmp_path / "a.png", 40, 20)
    write_gray_image(tmp_path / "b.png", 100, 50, gray_level=9)
    return tmp_path


def write_rows(folder: Path, records: list[dict[str, Any]], mapping: dict[str, Any]) -> list[str]:
    """Write records and a mapping, and return the arguments of an import."""
    lines = [json.dumps(record) for record in records]
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "m.yaml").write_text(yaml.safe_dump({"version": 1, **mapping}), encoding="utf-8")
    return [str(folder / "rows.jsonl"), str(folder / "out"), "--mapping", str(folder / "m.yaml")]


RECORDS = [
    {"image": "a.png", "q": {"text": "How many?"}, "a": "Two.", "score": 4},
    {"image": "b.png", "q": {"text": "Which?"}, "a": "Blue.", "score": 5},
]
ROLES = {"images": "image", "question": "q.text", "answer": "a"}


def test_explanation_lists_roles_and_writes_nothing(folder, cli) -> None:
    arguments = write_rows(folder, RECORDS, ROLES)
    printed = cli("import", *arguments, "--explain", "2")
    words = [line.split() for line in printed.out.splitlines()]
    assert ["q.text", "question", '"Which?"'] in words
    assert ["score", "no", "role", "5"] in words
    assert "  user: [image b.png] Which?" in printed.out.splitlines()
    assert not (folder / "out").exists()


def test_key_without_a_role_is_an_error_until_it_is_ignored(folder, cli) -> None:
    arguments = write_rows(folder, RECORDS, ROLES)
    printed = cli("import", *arguments, code=2)
    assert "score with '4' has no role" in printed.err
    assert "ignore: [score]" in printed.err
    assert not (folder / "out").exists()
    arguments = write_rows(folder, RECORDS, {**ROLES, "ignore": ["score"]})
    printed = cli("import", *arguments)
    assert "score, ignored by the mapping (2)" in printed.out
    lines = (folder / "out" / "data.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2


@pytest.mark.parametrize("options", [{"B": "red", "A": "blue"}, "{'B': 'red', 'A': 'blue'}"])
def test_mapping_of_a_remedy_is_imported(folder, cli, options) -> None:
    record = {"image": "a.png", "q": "Which?", "options": options, "a": "A", "score": 4}
    source, out, _, mapping = write_rows(folder, [record], {})
    roles = ("--map", "image=image", "--map", "question=q,options", "--map", "answer=a")
    printed = cli("import", source, out, *roles, code=2)
    Path(mapping).write_text(re.findall("write ({version.*}) into a file", printed.err)[0])
    printed = cli("import", source, out, "--mapping", mapping, "--explain", "1")
    assert "  user: [image a.png] Which?\\nB. red\\nA. blue" in printed.out.splitlines()


def test_where_counts_what_it_leaves_out(folder, cli) -> None:
    where = {"path": "score", "equals": [5]}
    arguments = write_rows(folder, RECORDS, {**ROLES, "where": where})
    printed = cli("import", *arguments)
    assert "left out by `where` of the mapping (score)" in printed.out
    assert len((folder / "out" / "data.jsonl").read_text("utf-8").splitlines()) == 1


def test_records_of_a_document(folder, cli) -> None:
    rows = {"00": RECORDS[0], "01": RECORDS[1]}
    (folder / "rows.json").write_text(json.dumps({"info": "x", "rows": rows}), encoding="utf-8")
    roles = {**ROLES, "rows": {"path": "rows.*", "key": "id"}, "meta": ["score"]}
    arguments = write_rows(folder, RECORDS, roles)
    printed = cli("import", str(folder / "rows.json"), *arguments[1:])
    assert "info of the document" in printed.out
    samples = [json.loads(line) for line in (folder / "out" / "data.jsonl").open("rb")]
    assert [sample["id"] for sample in samples] == ["00", "01"]


@pytest.mark.parametrize(
    ("options", "what"),
    [
        (["--map", "image=image"], "--mapping is given, too"),
        (["--format", "llava"], "--mapping is given, too"),
        (["--explain", "3"], "row 3 of 2"),
        (["--box-format", "xywh"], "does not support it"),
    ],
)
def test_options_that_contradict_a_mapping(folder, cli, options, what) -> None:
    arguments = write_rows(folder, RECORDS, {**ROLES, "ignore": ["score"]})
    printed = cli("import", *arguments, *options, code=2)
    assert what in printed.err
    assert not (folder / "out").exists()


def test_explanation_requires_a_mapping(folder, cli) -> None:
    rows, out, *_ = write_rows(folder, RECORDS, ROLES)
    printed = cli("import", rows, out, "--explain", "1", code=2)
    assert "no mapping is given" in printed.err


NESTED = {"image": "a.png", "height": 20, "meta": {"note": "Two cups."}}


@pytest.mark.parametrize("command", ["import", "init"])
def test_unknown_roles_of_inner_texts_end_with_a_draft(folder, cli, monkeypatch, command) -> None:
    """The draft lists all keys; with a role each, it is a mapping."""
    monkeypatch.chdir(folder)
    (folder / "rows.json").write_text(json.dumps([NESTED, NESTED]), encoding="utf-8")
    words = {"import": ["out"], "init": ["--out", "out", "--yes", "--model", "finesight-tiny"]}
    printed = cli(command, "rows.json", *words[command], code=2)
    assert "may be the question or the answer: meta ({'note': 'Two cups.'})" in printed.err
    assert "edit out-mapping.yaml" in printed.err
    assert not (folder / "out").exists()
    draft = (folder / "out-mapping.yaml").read_text(encoding="utf-8")
    assert 'images: "image"' in draft
    assert '#   meta.note: "Two cups."' in draft
    draft = draft.replace("question:\n", "question: {const: How many cups?}\n")
    draft = draft.replace("answer:\n", "answer: meta.note\n").replace(
        "ignore: []", "ignore: [height]"
    )
    (folder / "out-mapping.yaml").write_text(draft, encoding="utf-8")
    cli(command, "rows.json", *words[command], "--mapping", "out-mapping.yaml")


def test_draft_replaces_no_file(folder, cli, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "rows.json").write_text(json.dumps([NESTED, NESTED]), encoding="utf-8")
    (folder / "out-mapping.yaml").write_text("mine", encoding="utf-8")
    printed = cli("import", "rows.json", "out", code=2)
    assert "edit out-mapping-2.yaml" in printed.err
    assert (folder / "out-mapping.yaml").read_text(encoding="utf-8") == "mine"
    printed = cli("import", "rows.json", "out", code=2)
    assert "edit out-mapping-2.yaml" in printed.err
    assert not (folder / "out-mapping-3.yaml").exists()


@pytest.mark.parametrize(
    "key",
    [
        "a\nsystem: {const: x} #",
        "a\u2028system: x",
        "a\u0085b",
        "a\x07",
        "a: [",
        '"',
        "#",
        "- a",
        "\U0001f600\u00a0",
    ],
    ids=repr,
)
def test_keys_cannot_change_a_draft(folder, cli, monkeypatch, key) -> None:
    monkeypatch.chdir(folder)
    row = {"image": "a.png", "caption": "cups", key: "x"}
    (folder / "rows.json").write_text(json.dumps([row, row]), encoding="utf-8")
    cli("import", "rows.json", "out", code=2)
    draft = yaml.safe_load((folder / "out-mapping.yaml").read_text(encoding="utf-8"))
    assert [*draft] == ["version", "images", "question", "answer", "meta", "ignore"]
    row = {key: "a.png", "note": {"text": "cups"}}
    (folder / "rows.json").write_text(json.dumps([row, row]), encoding="utf-8")
    cli("import", "rows.json", "other", code=2)
    draft = yaml.safe_load((folder / "other-mapping.yaml").read_text(encoding="utf-8"))
    assert [*draft] == ["version", "images", "question", "answer", "meta", "ignore"]


def test_draft_never_makes_an_image_optional(folder, cli, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    rows = [{"image": name, "question": "?", "answer": "x", "n": 1} for name in ("a.png", None)]
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    cli("import", "rows.json", "out", code=2)
    assert '\nimages: "image"\n' in (folder / "out-mapping.yaml").read_text(encoding="utf-8")


def test_draft_of_a_table_without_header_lists_numbers(folder, cli, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "rows.csv").write_text("one,a word\ntwo,a text\n", encoding="utf-8")
    cli("import", "rows.csv", "out", "--no-header", code=2)
    assert '#   1: "one"' in (folder / "out-mapping.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("columns", "num_samples", "note"),
    [
        ("123", 3, "tab-separated, UTF-8; no header, columns 1 to 3"),
        (("a", "red?", "no"), 2, "'a' names a column and is one of its values"),
    ],
)
@pytest.mark.parametrize("is_mapping", [True, False])
def test_named_columns_decide_whether_there_is_a_header(
    folder, cli, columns, num_samples, note, is_mapping
) -> None:
    source = folder / "rows.tsv"
    source.write_text("a\tred?\tno\na\tblue?\tyes\nb\tred?\tno\n", encoding="utf-8")
    for name in ("a", "b"):
        (folder / f"{name}.png").rename(folder / name)
    options = ["--map", "image={}", "--map", "question={}", "--map", "answer={}"]
    if is_mapping:
        paths = [json.dumps(name) for name in columns]
        roles = dict(zip(("images", "question", "answer"), paths, strict=True))
        (folder / "m.yaml").write_text(yaml.safe_dump({"version": 1, **roles}), encoding="utf-8")
        options = ["--mapping", folder / "m.yaml"]
    else:
        named = iter(columns)
        options = [one.format(next(named)) if "{}" in one else one for one in options]
    printed = cli("import", source, folder / "out", *options)
    assert f"out/data.jsonl: {num_samples} samples" in printed.out
    assert note in printed.out


@pytest.mark.parametrize(
    ("first", "roles", "num_samples"),
    [
        # 0 is the first row of the group.
        ("a.png,0,tan", {"group": "3", "images": "rows.0.1", "answer": "rows.0.3"}, 3),
        # Columns of a header that are numbers, also in another order.
        ("0,1,2", {"images": "0", "answer": "2"}, 2),
        ("2,1,3", {"images": "2", "answer": "3"}, 2),
    ],
)
def test_only_columns_decide_whether_there_is_a_header(
    folder, cli, first, roles, num_samples
) -> None:
    source = folder / "rows.csv"
    source.write_text(f"{first}\na.png,1,red\nb.png,2,blue\n", encoding="utf-8")
    mapping = {"version": 1, **roles, "ignore": ["*"]}
    (folder / "m.yaml").write_text(yaml.safe_dump(mapping), encoding="utf-8")
    options = ["--mapping", folder / "m.yaml", "--prompt", "Which?"]
    printed = cli("import", source, folder / "out", *options)
    assert f"out/data.jsonl: {num_samples} samples" in printed.out


def test_names_that_are_values_need_no_header(folder, cli, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    Path("rows.tsv").write_text("a\tred?\tno\na\tblue?\tyes\n", encoding="utf-8")
    printed = cli("import", "rows.tsv", "out", code=2)
    assert "if the first line contains values, import with --no-header" in printed.err


def test_columns_of_an_image_folder_need_a_role(folder, cli) -> None:
    rows = ["file_name,caption,verdict", "a.png,a cup,wrong", "b.png,a jug,right"]
    (folder / "metadata.csv").write_text("\n".join(rows), encoding="utf-8")
    options = ["--prompt", "Describe."]
    printed = cli("import", folder, folder / "out", *options, code=2)
    assert "1 column without a known role: verdict ('wrong')" in printed.err
    roles = ["--map", "image=file_name", "--map", "answer=caption"]
    printed = cli("import", folder, folder / "out", *options, *roles)
    assert "unused columns: verdict" in printed.out


@pytest.mark.parametrize("value", ["b.png", "hand-written"])
def test_column_that_is_empty_in_the_first_rows_is_not_lost(folder, cli, value) -> None:
    """Roles are guessed from the first rows only."""
    row = {"image": "a.png", "caption": "Two cups.", "second": None}
    lines = [json.dumps(row) for _ in range(400)]
    lines.append(json.dumps({**row, "second": value}))
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = ["--prompt", "Describe."]
    printed = cli("import", folder / "rows.jsonl", folder / "out", *options, code=2)
    assert "line 401: the column 'second' has no role" in printed.err
    assert not (folder / "out").exists()
    roles = ["--map", "image=image", "--map", "answer=caption"]
    cli("import", folder / "rows.jsonl", folder / "out", *options, *roles)


UNKNOWN = [
    {"img_file": "a.png", "scene": {"regions": [{"phrase": "a cup"}]}},
    {"pic": "a.png", "ask": "What?", "idx_true": 2, "c0": "hat", "c1": "pen"},
]


@pytest.mark.parametrize("record", UNKNOWN, ids=["nested", "plain"])
def test_rows_of_unknown_keys_end_with_a_draft(folder, cli, monkeypatch, record) -> None:
    monkeypatch.chdir(folder)
    (folder / "rows.json").write_text(json.dumps([record, record]), encoding="utf-8")
    printed = cli("import", "rows.json", "out", code=2)
    assert "or edit out-mapping.yaml" in printed.err
    draft = (folder / "out-mapping.yaml").read_text(encoding="utf-8")
    assert f'images: "{next(iter(record))}"' in draft
    assert "\nanswer:\n" in draft or "\nfields: " in draft


@pytest.mark.parametrize(
    ("file", "role", "template"),
    [
        ("scans/s-{}.png", "images", "scans/s-{scan}.png"),
        ("clips/{:04}.mp4", "videos", "clips/{scan:04}.mp4"),
    ],
)
def test_draft_has_the_template_of_the_files(
    folder, cli, monkeypatch, file, role, template
) -> None:
    """The draft has the columns that the message of the same run proposes."""
    monkeypatch.chdir(folder)
    Path(file).parent.mkdir()
    Path("a.png").rename(file.format(17))
    Path("b.png").rename(file.format(18))
    Path("rows.csv").write_text("scan,caption\n17,two cups\n18,a jug\n", encoding="utf-8")
    printed = cli("import", "rows.csv", "out", code=2)
    assert "--map answer=caption" in printed.err
    text = Path("out-mapping.yaml").read_text(encoding="utf-8")
    draft = yaml.safe_load(text)
    assert draft[role] == {"template": template}
    assert draft["answer"] == "caption"
    assert text.endswith("with an example:\n")
    if role == "images":
        options = ["--mapping", "out-mapping.yaml", "--prompt", "Describe."]
        assert "2 samples" in cli("import", "rows.csv", "out", *options).out


TURNS = [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "red"}]
UNFOUND = [
    {"prompt": "Which?", "completion": "red"},
    {"question": "Which?", "chosen": "red", "rejected": "blue"},
    {"messages": [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}]},
    {"conversations": TURNS},
]


@pytest.mark.parametrize("command", ["import", "init"])
@pytest.mark.parametrize("row", UNFOUND, ids=["prompt", "pair", "messages", "conversations"])
def test_rows_with_the_number_of_an_image_end_with_a_mapping(
    folder, cli, monkeypatch, row, command
) -> None:
    monkeypatch.chdir(folder)
    (folder / "a.png").rename(folder / "photos-7.jpg")
    rows = [{"image_id": 7, "source": "web", **row}] * 3
    Path("rows.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in rows))
    words = {"import": ["out"], "init": ["--out", "out", "--yes", "--model", "finesight-tiny"]}
    printed = cli(command, "rows.jsonl", *words[command], code=2)
    remedy = "write the folder of the images instead of FOLDER in out-mapping.yaml, and give"
    assert f"{remedy} --mapping out-mapping.yaml" in printed.err
    draft = Path("out-mapping.yaml")
    draft.write_text(draft.read_text().replace("FOLDER/", "photos-"))
    # A key without a role is asked for.
    error = cli("import", "rows.jsonl", "out", "--mapping", draft, code=2).err
    assert "source with 'web' has no role" in error
    draft.write_text(f"{draft.read_text()}meta: [source]\n")
    cli("import", "rows.jsonl", "out", "--mapping", draft)
    sample = read_samples(Path("out/data.jsonl"))[0]
    assert sample.messages[0].content[0].image.endswith("photos-7.jpg")
    assert [message.content[-1].text for message in sample.messages] == ["Which?", "red"]
    assert sample.meta == {"source": "web"}
    assert bool(sample.rejected) == ("rejected" in row)


def test_draft_names_the_folder_of_images(folder, cli, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "photos").mkdir()
    for name in ("a.png", "b.png"):
        (folder / name).rename(folder / "photos" / name)
    (folder / "rows.json").write_text(json.dumps([NESTED, NESTED]), encoding="utf-8")
    cli("import", "rows.json", "out", code=2)
    draft = (folder / "out-mapping.yaml").read_text(encoding="utf-8")
    assert 'images: [{"template": "photos/{image}"}]' in draft


@pytest.mark.parametrize(
    "text",
    [
        "10,10,90,10,90,20,10,20,SHOP\n10,30,80,30,80,40,10,40,TOTAL",
        "imagesource:web\n2 2 9 2 9 9 2 9 plane 0",
        "Car 0.00 0 -1.57 614.24 181.78 727.31 284.77",
    ],
    ids=["receipt", "aerial", "driving"],
)
def test_texts_of_coordinates_beside_images_are_no_captions(folder, cli, text) -> None:
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    printed = cli("import", folder, folder / "out", "--prompt", "Describe.", code=2)
    assert "annotations with coordinates" in printed.err
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("a cup, 10 cm high, 4 of 5", encoding="utf-8")
    cli("import", folder, folder / "out", "--prompt", "Describe.")


def test_keys_beside_rows_end_with_a_draft_of_the_rows(folder, cli, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    rows = [{"image": "a.png", "ask": "How many?", "count": 2}]
    (folder / "rows.json").write_text(json.dumps({"prompt": "Count.", "data": rows}))
    printed = cli("import", "rows.json", "out", code=2)
    assert "the draft out-mapping.yaml" in printed.err
    draft = (folder / "out-mapping.yaml").read_text(encoding="utf-8")
    assert 'rows: "data"' in draft
    draft = draft.replace("question:\n", "question: ask\n").replace("answer:\n", "answer: count\n")
    (folder / "out-mapping.yaml").write_text(draft, encoding="utf-8")
    cli("import", "rows.json", "out", "--mapping", "out-mapping.yaml")
