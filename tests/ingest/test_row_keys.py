"""Every key of a row is used, stored in `meta`, named in the summary, or refused with an error."""

import base64
import copy
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from case_files import load_cases
from fuzzed_sources import JPEG, MAPPED, PNG, ROWS, SOURCES

from finesight.errors import UserError
from finesight.ingest.formats import detect_format, get_format
from finesight.ingest.formats.conversation_rows import REASONING_KEYS
from finesight.ingest.formats.dataset_format import ImportContext
from finesight.ingest.formats.row_keys import count_keys
from finesight.ingest.image_resolver import ImageResolver
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import NOTE_UNFINISHED_REASONING, import_dataset
from finesight.ingest.row_reader import SourceRow
from finesight.samples.sample import join_text, read_samples, sample_from_dict, sample_to_dict

CASES = load_cases("row_keys")

FORMATS = {"alpaca": "llama-factory", "swift-pairs": "ms-swift"}
TRL = {
    "prompt": [{"role": "user", "content": "Where is the dog?"}],
    "completion": [{"role": "assistant", "content": "There."}],
    "images": ["a.png"],
}
KINDS = {kind: ROWS[kind] for kind in ROWS} | {"trl": TRL}
FORMATS["trl"] = "openai"
NAMES = (
    *("image2", "depth_image", "photo", "videos", "reasoning_content", "thinking", "rationale"),
    *("label", "answer", "bbox", "weight", "loss", "train", "mask", "tools", "chosen", "caption"),
    *("note", "source", "Score", "name", "图片", "text", "value", "content", "url", "index"),
)
VALUES = ("fresh zebra", "b.jpg", ["b.jpg", "a.png"], {"inner": "fresh zebra"}, 0, 1, False, None)
STRUCTURE = {"role", "from", "type", "bbox_type", "detail"}
"""Keys whose values do not occur in samples."""


def iter_objects(value: Any) -> Iterator[dict[str, Any]]:
    """Yield all objects of a JSON value."""
    if isinstance(value, dict):
        yield value
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from iter_objects(item)


def mutate(record: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Rename, add, nest, duplicate, move or clear keys of objects at any depth."""
    mutated = copy.deepcopy(record)
    for _ in range(rng.choice((1, 1, 2, 3))):
        target = rng.choice(list(iter_objects(mutated)))
        key = rng.choice(list(target) or ["note"])
        match rng.randrange(7):
            case 0:
                target[rng.choice(NAMES)] = target.pop(key, None)
            case 1:
                target[key] = None
            case 2:
                target[key] = {rng.choice(NAMES): target.get(key)}
            case 3:
                target[f"{key}_{rng.choice(NAMES)}"] = copy.deepcopy(target.get(key))
            case 4:
                source = copy.deepcopy(rng.choice(list(iter_objects(record))))
                target.update(rng.sample(list(source.items()), min(1, len(source))))
            case _:
                target[rng.choice(NAMES)] = copy.deepcopy(rng.choice(VALUES))
    return mutated


def iter_texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text of a JSON value with its key."""
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else ()
    for name, item in items:
        yield from iter_texts(item, name)
    for item in value if isinstance(value, list) else ():
        yield from iter_texts(item, key)


def find_lost(record: dict[str, Any], output: str, known: set[str]) -> list[str]:
    """Return the keys and texts of a row that its samples and the summary do not contain."""
    keys = {str(key) for target in iter_objects(record) for key in target}
    lost = [key for key in keys - known if key not in output]
    for key, text in iter_texts(record):
        words = re.findall(r"[^\W\d_]{2,}", re.sub(r"<[^>]*>|Pic[a-z]*|bbox_2d|label", " ", text))
        is_named = f"{key} of " in output or f'"{key}"' in output
        if key not in STRUCTURE and not is_named and any(word not in output for word in words):
            lost.append(f"{key}: {text}")
    return lost


def check_mutations(kind: str, count: int, folder: Path) -> None:
    """Parse mutated rows of a format, and fail if one of them loses a key or a text."""
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.jpg").write_bytes(JPEG)
    data_format = get_format(FORMATS.get(kind, kind))
    columns = MAPPED if kind == "table" else {}
    context = ImportContext(ImageResolver(folder, folder / "out"), columns=columns, prompt="Go.")
    known = {*REASONING_KEYS, "videos", "index", "weight", "loss", "train", "mask"}
    known |= {"tools", "name"}
    known |= {key for row in KINDS.values() for target in iter_objects(row) for key in target}
    num_parsed = 0
    for number in range(count):
        record = mutate(KINDS[kind], random.Random(f"{kind} {number}"))
        try:
            examples = data_format.parse_examples(SourceRow(1, "row 1", record, "rows"), context)
        except UserError:
            continue
        num_parsed += 1
        samples = [sample.model_dump() for one in examples for sample in one.to_train_samples()]
        output = json.dumps([samples, context.other_keys], ensure_ascii=False)
        if kind == "table":  # a column is used or named as a whole
            record = {key: value for key, value in record.items() if key in MAPPED}
        lost = find_lost(record, output, known)
        assert not lost, f"{kind} {number}: {lost} of {record} in {output}"
    assert num_parsed > count / 20


@pytest.mark.parametrize("kind", KINDS)
def test_some_mutated_rows(tmp_path: Path, kind: str) -> None:
    check_mutations(kind, 100, tmp_path)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", KINDS)
def test_many_mutated_rows(tmp_path: Path, kind: str) -> None:
    check_mutations(kind, 5000, tmp_path)


DOCUMENT_FILES = dict.fromkeys(("coco", "labelme", "label-studio"), "a.json")
DOCUMENT_FILES["fiftyone"] = "labels.json"
DOCUMENTS = {kind: SOURCES[kind]["files"][name] for kind, name in DOCUMENT_FILES.items()}


def check_documents(kind: str, count: int, folder: Path) -> None:
    """Import annotation files with further keys, and fail if one is neither stored nor named."""
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.jpg").write_bytes(JPEG)
    file = folder / DOCUMENT_FILES[kind]
    (folder / "data.json").write_text('{"a.png": "a.png", "b.jpg": "b.jpg"}')
    num_imported = 0
    for number in range(count):
        rng = random.Random(f"{kind} {number}")
        document = copy.deepcopy(DOCUMENTS[kind])
        targets = [one for one in iter_objects(document) if one.keys() & SHAPE_KEYS]
        rng.choice(targets)["note_zebra"] = copy.deepcopy(rng.choice(VALUES[:-1]))
        file.write_text(json.dumps(document))
        out = folder / str(number)
        try:
            summary = import_dataset(
                file if kind != "fiftyone" else folder, out, ImportOptions(format=kind)
            )
        except UserError:
            continue
        num_imported += 1
        output = f"{summary.other_keys}{(out / 'data.jsonl').read_text()}"
        assert "note_zebra" in output, f"{kind} {number}: {document}"
        shutil.rmtree(out)
    assert num_imported > count / 2


SHAPE_KEYS = {
    *("bbox", "file_name", "points", "bounding_box", "rectanglelabels", "from_name", "name"),
    *("annotations", "shapes", "result", "labels"),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_further_keys_of_annotations(tmp_path: Path, kind: str) -> None:
    check_documents(kind, 12, tmp_path)


@pytest.mark.fuzz
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_many_further_keys_of_annotations(tmp_path: Path, kind: str) -> None:
    check_documents(kind, 5000, tmp_path)


def chat(*turns: dict[str, Any], **row: Any) -> dict[str, Any]:
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Where?"}]
    return {"messages": [{"role": "user", "content": question}, *turns], **row}


USER = {"role": "user", "content": "<image>Where?"}
ANSWER = {"role": "assistant", "content": "There."}
WORSE = {"role": "assistant", "content": "Here."}
TURNS = [{"from": "human", "value": "<image>Where?"}]


@pytest.mark.parametrize("name", CASES["pairs"])
def test_preference_rows_become_pairs(tmp_path: Path, name: str) -> None:
    (sample,) = parse(CASES["pairs"][name], tmp_path)[0].to_train_samples()
    assert [part.type for part in sample.messages[0].content] == ["image", "text"]
    assert sample.messages[0].content[1].text == "Where?"
    assert join_text(sample.messages[1].content) == "There."
    assert join_text(sample.rejected) == "Here."
    assert sample_from_dict(sample_to_dict(sample), "here") == sample
    assert set(sample.meta) <= {"score_chosen"}


def test_prompt_beside_turns_is_a_copy_or_part_of_the_question(tmp_path: Path) -> None:
    pair = {
        "chosen": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "a"}]
    }
    pair["rejected"] = [pair["chosen"][0], {"role": "assistant", "content": "b"}]
    for prompt, expected in (("Where?\n", "Where?"), ("Be brief.", "Be brief.\nWhere?")):
        (sample,) = parse({"prompt": prompt, **pair}, tmp_path)[0].to_train_samples()
        assert join_text(sample.messages[0].content) == expected


@pytest.mark.parametrize("label", CASES["test_labels_of_rows_are_verdicts"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "<image>Where?", "completion": "There.", "images": ["a.png"]},
        {"messages": [USER, ANSWER], "images": ["a.png"]},
        {"query": "<image>Where?", "response": "There.", "images": ["a.png"]},
        {"conversations": [*TURNS, {"from": "gpt", "value": "There."}], "images": ["a.png"]},
        chat(ANSWER),
    ],
)
def test_labels_of_rows_are_verdicts(tmp_path: Path, row: dict[str, Any], label: bool) -> None:
    for key in ("label", "kto_tag"):
        example, other_keys = parse({**row, key: label}, tmp_path)
        (sample,) = example.to_train_samples()
        assert (sample.label, sample.meta, sum(other_keys.values())) == (label, {}, 0)
        assert sample_from_dict(sample_to_dict(sample), "here") == sample


def parse(record: dict[str, Any], folder: Path) -> tuple[Any, Counter[str]]:
    """Detect the format of a row and parse it; return the example and the counted keys."""
    (folder / "a.png").write_bytes(PNG)
    (folder / "b.jpg").write_bytes(JPEG)
    context = ImportContext(ImageResolver(folder, folder / "out"))
    data_format, _ = detect_format([record], "here")
    (example,) = data_format.parse_examples(SourceRow(1, "row 1", record, "rows"), context)
    return example, context.other_keys


CALL = {"name": "a", "arguments": {"b": b""}}
REFUSED = [*CASES["test_content_of_further_keys_is_refused"]]
REFUSED.append([[{**ANSWER, "tool_calls": [CALL]}], {}, "the tool call"])
REFUSED.append([[ANSWER], {"tools": [{"name": "a", "parameters": {"b": b""}}]}, "the tool "])


@pytest.mark.parametrize(("turns", "row", "what"), REFUSED)
def test_content_of_further_keys_is_refused(tmp_path, turns, row, what):
    with pytest.raises(UserError, match=what):
        parse(chat(*turns, **row), tmp_path)


@pytest.mark.parametrize(("key", "value", "what"), [
    ("image_crop", [0, 0, 20, 10], "a part of the image"),
    ("roi", {"x": 1, "y": 2}, "a part of the image"),
    ("image_mask", "b.jpg", "an image, a video or audio"),
    ("image_array", [[[0, 0, 0]]], "an image, a video or audio"),
])  # fmt: skip
def test_keys_of_image_parts_that_change_what_is_seen_are_refused(tmp_path, key, value, what):
    for part in (
        {"type": "image_url", "image_url": {"url": "a.png", key: value}},
        {"type": "image", "image": "a.png", key: value},
    ):
        question = [part, {"type": "text", "text": "Where?"}]
        with pytest.raises(UserError, match=what):
            parse({"messages": [{"role": "user", "content": question}, ANSWER]}, tmp_path)


def test_several_lists_of_turns_are_refused(tmp_path: Path) -> None:
    row = {**ROWS["llava"], "messages": [{"role": "user", "content": "Why?"}, ANSWER]}
    with pytest.raises(UserError, match="turns under messages and conversations") as caught:
        parse(row, tmp_path)
    assert caught.value.remedy
    _, other_keys = parse({**ROWS["llava"], "query": "Why?", "response": "So."}, tmp_path)
    assert other_keys.keys() == {"query in meta", "response in meta"}


def test_keys_of_rows_that_change_no_training_are_metadata(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "There."}]
    metadata = CASES["metadata"]
    row = {"conversations": turns, "images": ["a.png"], **metadata}
    example, other_keys = parse(row, tmp_path)
    assert example.meta == metadata
    assert other_keys == {f"{key} in meta": 1 for key in metadata}


@pytest.mark.parametrize("key", ["screenshot", "doc", "scan", "page", "figure", "b64", "data"])
def test_images_under_other_keys_are_refused(tmp_path: Path, key: str) -> None:
    value = {"screenshot": "s3://b/0", "page": "x/0.pdf"}.get(key, base64.b64encode(PNG).decode())
    messages = [{"role": "user", "content": "Where?"}, ANSWER]
    with pytest.raises(UserError, match="an image, a video or audio") as caught:
        parse({"messages": messages, key: value}, tmp_path)
    assert "move it to `images`" in str(caught.value.remedy)


@pytest.mark.parametrize("key", ["image_id", "imageIdx", "video_ids", "photo"])
def test_numbers_of_images_are_refused_in_rows_without_images(tmp_path: Path, key: str) -> None:
    row = {"prompt": "Is it red?", "chosen": "Yes.", "rejected": "No.", key: 7}
    with pytest.raises(UserError, match=f"'{key}' with 7 in rows: it may stand for an image") as e:
        parse(row, tmp_path)
    assert f'images: {{template: "FOLDER/{{{key}}}.jpg"}}' in e.value.remedy
    for others in ({"images": ["a.png"]}, {key: None}, {key: True}, {key: -1}):
        assert parse({**row, **others}, tmp_path)


@pytest.mark.parametrize("key", ["has_image", "n_images", "image_required", "num_frames"])
def test_flags_and_counts_of_images_are_metadata(tmp_path: Path, key: str) -> None:
    row = {"prompt": "Is it red?", "chosen": "Yes.", "rejected": "No.", key: 0}
    assert parse(row, tmp_path)


@pytest.mark.parametrize(
    "name", ["image_b", "depth", "sam_mask", "cropped_image", "next_image", "sound"]
)
def test_further_images_are_refused(tmp_path: Path, name: str) -> None:
    value = "a.mp3" if name == "sound" else "b.jpg"
    with pytest.raises(UserError, match="an image, a video or audio"):
        parse(chat(ANSWER, **{name: value}), tmp_path)


@pytest.mark.parametrize("as_type", [bool, int])
def test_loss_of_turns_is_used_unless_it_is_the_default(tmp_path: Path, as_type: type[int]) -> None:
    for key, default in CASES["loss"].items():
        _, other_keys = parse(chat({**ANSWER, key: as_type(default)}), tmp_path)
        assert other_keys == {f"{key} of turns, not imported": 1}
        example, other_keys = parse(chat({**ANSWER, key: as_type(not default)}), tmp_path)
        assert (example.loss, other_keys) == (False, {})
    for key in ("analysis", "scratchpad", "inner_monologue", "explanation"):
        with pytest.raises(UserError, match="a reasoning text"):
            parse(chat({**ANSWER, key: "So."}), tmp_path)


@pytest.mark.parametrize(("record", "counts"), CASES["test_further_keys_are_counted"])
def test_further_keys_are_counted(tmp_path, record, counts):
    example, other_keys = parse(record, tmp_path)
    assert other_keys.items() >= counts.items()
    assert [part.type for part in example.prompt_messages[0].content] == ["image", "text"]
    assert example.answers[0][0].text == "There."


def test_parts_of_parquet_and_qwen_vl_utils(tmp_path: Path) -> None:
    """Null keys, sizes of images and the index of a listed image."""
    parts = [
        {"type": "image", "text": None, "image": {"bytes": PNG, "path": None}, "min_pixels": 9},
        {"type": "image", "text": None, "image": {"bytes": None, "path": None}, "index": 1},
        {"type": "image", "text": None, "image": None, "index": None},
        {"type": "text", "text": "Where?", "image": None},
    ]
    record = {
        "messages": [{"role": "user", "content": parts}, ANSWER],
        "images": ["a.png", "b.jpg"],
    }
    (tmp_path / "out").mkdir()
    example, other_keys = parse(record, tmp_path)
    *images, _ = example.prompt_messages[0].content
    assert [Path(part.image).name for part in images] == ["000001.png", "b.jpg", "a.png"]
    assert other_keys == {"min_pixels of content parts, not imported": 1}


@pytest.mark.parametrize("key", REASONING_KEYS)
def test_reasoning_becomes_part_of_the_answer(tmp_path: Path, key: str) -> None:
    example, _ = parse(chat({**ANSWER, key: "It is there.\n"}), tmp_path)
    assert example.answers[0][0].text == "<think>\nIt is there.\n</think>\n\nThere."
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There.", key: "So."}]
    example, _ = parse({"conversations": turns}, tmp_path)
    assert example.answers[0][0].text == "<think>\nSo.\n</think>\n\nThere."


def test_unfinished_reasoning_is_counted(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    answers = ("<think>\nIt barks.", "<think>It barks.</think>a dog", "No <think> in it.")
    rows = [{"image": "a.png", "query": "Which pet?", "response": answer} for answer in answers]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    summary = import_dataset(tmp_path / "rows.json", tmp_path / "out", ImportOptions())
    assert summary.source_notes == {NOTE_UNFINISHED_REASONING: 1}


def test_empty_values_of_annotations_are_not_named() -> None:
    counts: Counter[str] = Counter()
    count_keys([{"flags": {}, "a": None, "b": "", "c": 0, "d": {"e": [1]}}], (), "shapes", counts)
    assert [name.partition(" ")[0] for name in counts] == ["c", "d", "d.e"]


@pytest.mark.parametrize(
    "text",
    ['{"query": "?", "response": "x", "query": "y"}', '[{"messages": [{"role": 1, "role": 2}]}]'],
)
def test_duplicate_json_keys_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "rows.jsonl").write_text(f"{text}\n")
    with pytest.raises(UserError, match="occurs twice in one object"):
        import_dataset(tmp_path / "rows.jsonl", tmp_path / "out", ImportOptions())


@pytest.mark.parametrize(
    "notation",
    [
        *("[200,250,600,700]", "[[200, 250], [600, 700]]", "(200,250,600,700)", "200 250 600 700"),
        *("(200,250), (600,700)", "\n[200,\n250,600,700]\n", "[(200,250),(600,700)]"),
    ],
)
def test_notations_of_box_tokens(tmp_path: Path, notation: str) -> None:
    for start, end, image in (
        ("<|box_start|>", "<|box_end|>", "<image>"),
        ("<box>", "</box>", "Picture 1: <img>a.png</img>"),
    ):
        turns = [
            {"from": "human", "value": f"{image}Where?"},
            {"from": "gpt", "value": f"{start}{notation}{end}"},
        ]
        row = {"conversations": turns} | ({"images": ["a.png"]} if image == "<image>" else {})
        (box,) = parse(row, tmp_path)[0].answers[0]
        assert box.xyxy == (8, 7.5, 24, 21)


@pytest.mark.parametrize(("answer", "what"), CASES["test_unsupported_boxes_are_named"])
def test_unsupported_boxes_are_named(tmp_path: Path, answer: str, what: str) -> None:
    with pytest.raises(UserError, match="(?s)" + what):
        parse({"query": "<image>Where?", "response": answer, "images": ["a.png"]}, tmp_path)


def test_two_worse_answers_are_refused(tmp_path):
    turns = [{"from": "human", "value": "<image>Where?"}, {"from": "gpt", "value": "There."}]
    worse = [turns[0], {"from": "gpt", "value": "Here."}]
    row = {
        "conversations": turns,
        "images": ["a.png"],
        "rejected_conversations": worse,
        "rejected_response": "Nowhere.",
    }
    (tmp_path / "a.png").write_bytes(PNG)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"the key 'rejected_(response|conversations)'"):
        import_dataset(tmp_path / "rows.jsonl", tmp_path / "out", ImportOptions())


@pytest.mark.parametrize("has_text_only", [True, False])
def test_preferred_outputs_of_openai_are_a_pair(tmp_path: Path, has_text_only: bool) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    content: Any = "Which seat?"
    if not has_text_only:
        image = {"type": "image_url", "image_url": {"url": "a.png"}}
        content = [image, {"type": "text", "text": "Which seat?"}]
    row = {
        "input": {"messages": [{"role": "user", "content": content}], "tools": []},
        "preferred_output": [{"role": "assistant", "content": "47A"}],
        "non_preferred_output": [{"role": "assistant", "content": "12B"}],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    import_dataset(tmp_path / "rows.jsonl", tmp_path / "out", ImportOptions())
    (sample,) = read_samples(tmp_path / "out" / "data.jsonl")
    assert [part.text for part in sample.messages[-1].content] == ["47A"]
    assert [part.text for part in sample.rejected] == ["12B"]
    row["chosen"] = "49D"
    (tmp_path / "two.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(UserError):
        import_dataset(tmp_path / "two.jsonl", tmp_path / "out-2", ImportOptions())
