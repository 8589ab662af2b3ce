"""Rows of conversation formats: samples, errors and detection, as in cases/row_formats.

The rows follow the documentation of each format: ms-swift's "Custom Dataset", the README of
LLaMA-Factory's folder `data`, LLaVA's "Finetune LLaVA on Custom Datasets", OpenAI's guide "Vision
fine-tuning", and the tutorials of Qwen2-VL. Images are a.png of 40 x 20 pixels and b.png of
1000 x 500.
"""

import base64
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from box_fixtures import list_turns, parse_record
from case_files import load_cases
from image_fixtures import write_jsonl

from finesight.errors import UserError
from finesight.ingest.formats import detect_format, get_format
from finesight.ingest.formats.dataset_format import UnexpectedPlaceholderError, split_preference
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.samples.sample import join_text, read_samples, sample_to_dict, validate_sample

CASES = load_cases("row_formats")
TOOL_ROWS = load_cases("tools_in_rows")


def list_cases(kind: str) -> list[tuple[str, dict[str, Any]]]:
    return [(name, case) for name, group in CASES.items() for case in group.get(kind, ())]


def parse(folder: Path, name: str, case: dict[str, Any]) -> Any:
    """Parse the record of a case, with the folder of the images in place of FOLDER."""
    (folder / "out").mkdir(exist_ok=True)
    record = json.loads(json.dumps(case["record"]).replace("FOLDER", str(folder)))
    return parse_record(get_format(name), record, folder, **case.get("options", {}))


def summarize(content: list[Any], folder: Path) -> list[object]:
    """Return images as {"image": name}, and boxes as lists of image, label and corners."""
    return [
        {"image": part.relative_to(folder).as_posix()}
        if isinstance(part, Path)
        else part
        if isinstance(part, str)
        else [*part[:2], *(round(value, 6) for value in part[2])]
        for part in content
    ]


@pytest.mark.parametrize(("name", "case"), list_cases("samples"))
def test_rows_become_samples(folder: Path, name: str, case: dict[str, Any]) -> None:
    example = parse(folder, name, case)
    turns = [[role, summarize(content, folder)] for role, content in list_turns(example)]
    assert turns == case["turns"]
    assert (example.id, example.meta) == (case.get("id", "rows-3"), case.get("meta", {}))
    assert list(example.to_eval_sample().references) == case.get("references", [])


@pytest.mark.parametrize("header", ["", "data:image/png;base64,"])
def test_image_part_in_base64_is_saved(folder: Path, header: str) -> None:
    content = (folder / "a.png").read_bytes()
    part = {"type": "image", "base64": header + base64.b64encode(content).decode()}
    question = [part, {"type": "text", "text": "Where?"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "There."}]
    (_, (image, text)), _ = list_turns(parse(folder, "openai", {"record": {"messages": turns}}))
    assert (image.read_bytes(), text) == (content, "Where?")
    part["base64"] = "?"
    with pytest.raises(UserError, match="of 14 characters"):
        parse(folder, "openai", {"record": {"messages": turns}})


def test_list_of_objects_names_the_form_of_one_object(folder: Path) -> None:
    answer = {"role": "assistant", "content": "<ref-object><bbox>"}
    turns = [{"role": "user", "content": "<image>Where?"}, answer]
    boxes = [{"caption": "dog", "bbox": [[100, 100, 500, 200]], "bbox_type": "norm_1000"}]
    row = {"messages": turns, "images": ["b.png"], "objects": boxes}
    with pytest.raises(UserError, match="objects") as caught:
        parse(folder, "ms-swift", {"record": row})
    assert "boxes under bbox" in str(caught.value.remedy)
    assert "thousandths divided by 1000" in str(caught.value.remedy)
    row["objects"] = {"ref": ["dog"], "bbox": [[0.1, 0.1, 0.5, 0.2]], "bbox_type": "norm1"}
    ((box,),) = parse(folder, "ms-swift", {"record": row}).answers
    assert (box.label, box.xyxy) == ("dog", (100, 50, 500, 100))


@pytest.mark.parametrize(("name", "case"), list_cases("errors"))
def test_invalid_rows_are_rejected(folder: Path, name: str, case: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=case["error"]) as caught:
        parse(folder, name, case)
    assert caught.value.expected
    assert caught.value.remedy
    assert case.get("remedy", "") in caught.value.remedy


@pytest.mark.parametrize(("name", "case"), list_cases("detected"))
def test_format_of_rows_is_detected(name: str, case: dict[str, Any]) -> None:
    data_format, reason = detect_format(case["records"], "here")
    assert data_format.name == name
    assert case.get("reason", "") in reason


def test_turns_in_a_row_and_results_out_of_order(folder: Path) -> None:
    calls = [{"id": one, "function": {"name": "zoom", "arguments": {"k": one}}} for one in "ab"]
    turns = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "I zoom.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "b", "content": "second"},
        {"role": "tool", "tool_call_id": "a", "content": "first"},
        {"role": "assistant", "content": "One.", "tool_calls": calls[:1]},
        {"role": "assistant", "content": "Two."},
    ]
    record = {"messages": turns}
    example = parse_record(get_format("openai"), record, folder)
    assert [join_text(one.content) for one in example.prompt_messages[2:]] == ["first", "second"]
    assert join_text(example.answers[0]).startswith("One.\nTwo.")
    sample = parse_record(get_format("ms-swift"), record, folder).to_train_samples()[0]
    with pytest.raises(UserError, match="assistant, assistant"):
        validate_sample(sample, "")


@pytest.mark.parametrize(("key", "solution"), [
    ("prompt", {"solution": "4"}),
    ("messages", {"solution": 4}),
    ("prompt", {"reward_model": {"style": "rule", "ground_truth": "4"}}),
])  # fmt: skip
def test_solution_of_reinforcement_tuning_is_the_answer(folder: Path, key, solution) -> None:
    record = {"images": ["a.png"], key: [{"role": "user", "content": "<image>How many?"}]}
    (row,) = split_preference(record | solution)
    data_format, _ = detect_format([row], "")
    example = parse_record(data_format, row, folder)
    assert [join_text(answer) for answer in example.answers] == ["4"]
    both = record | solution | {"completion": [{"role": "assistant", "content": "5"}]}
    assert split_preference(both) == [both]


SOLUTIONS = load_cases("solutions")


@pytest.mark.parametrize("case", SOLUTIONS["answers"])
def test_separate_answers_are_the_last_turn(folder: Path, case: dict[str, Any]) -> None:
    record = {"images": ["a.png"], **case["record"]}
    (row,) = split_preference(record)
    data_format, _ = detect_format([row], "")
    example = parse_record(data_format, row, folder)
    assert [join_text(answer) for answer in example.answers] == [case["answer"]]
    assert join_text(example.prompt_messages[-1].content) == "How many?"


@pytest.mark.parametrize("record", SOLUTIONS["unclear"])
def test_unclear_answers_are_not_chosen(record: dict[str, Any]) -> None:
    assert split_preference(record) == [record]


def test_pairs_of_the_cauldron_are_turns(folder: Path) -> None:
    pairs = [{"user": one, "assistant": one.upper(), "source": "x"} for one in "ab"]
    (row,) = split_preference({"images": ["a.png"], "texts": pairs})
    example = parse_record(detect_format([row], "")[0], row, folder)
    assert [join_text(answer) for answer in example.answers] == ["B"]
    assert (len(example.prompt_messages), example.meta) == (3, {"source": "x"})
    other = {"texts": [*pairs, {"user": "c"}]}
    assert split_preference(other) == [other]


@pytest.mark.parametrize("tag", ["<image>", "<video>", "<tool_call>", "<tool_response>"])
def test_texts_with_tags_are_no_samples(tag: str) -> None:
    turns = [{"role": "user", "content": f"{tag}?"}, {"role": "assistant", "content": "x"}]
    assert detect_format([{"messages": turns}], "")[0].name == "ms-swift"


@pytest.mark.parametrize("tag", ["<image 1>", "<image_01>", "<image2>"])
@pytest.mark.parametrize("turn", ["QUESTION", "ANSWER"])
@pytest.mark.parametrize(("name", "keys"), [
    ("llava", {"conversations": [
        {"from": "human", "value": "<image>QUESTION"}, {"from": "gpt", "value": "ANSWER"}
    ]}),
    ("ms-swift", {"messages": [
        {"role": "user", "content": "<image>QUESTION"}, {"role": "assistant", "content": "ANSWER"}
    ]}),
    ("conversations", {"conversations": [
        {"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}
    ]}),
    ("query-response", {"query": "QUESTION", "response": "ANSWER"}),
])  # fmt: skip
def test_numbers_of_images_do_not_stay_as_text(folder: Path, name, keys, turn, tag) -> None:
    text = json.dumps({"images": ["a.png"], **keys}).replace(turn, f"See {tag}")
    with pytest.raises(UnexpectedPlaceholderError, match=f"the placeholder '{tag}' in the text"):
        parse_record(get_format(name), json.loads(text), folder)


@pytest.mark.parametrize("name", TOOL_ROWS)
def test_tool_calls_of_all_formats_are_equal(folder: Path, name: str) -> None:
    """Calls, results and definitions are structured data, from text in tags as well."""
    record = TOOL_ROWS[name]
    data_format, _ = detect_format([record], "here")
    assert data_format.name == name.split()[0]
    sample = parse_record(data_format, record, folder).to_train_samples()[0]
    validate_sample(sample, "")
    record = sample_to_dict(sample)
    function = {"name": "zoom", "parameters": {"type": "object", "properties": {}}}
    assert record["tools"] == [{"type": "function", "function": function}]
    (_, image, question), called, result, answer = (
        [message["role"], *message["content"]] for message in record["messages"]
    )
    assert (image["type"], question["text"]) == ("image", "Which?")
    call = {"type": "tool_call", "name": "zoom", "arguments": {"box": [1, 2.5], "x": "a"}}
    assert called == ["assistant", call]
    assert result == ["tool", {"type": "text", "text": "blank"}]
    assert answer == ["assistant", {"type": "text", "text": "None."}]
    assert [message.loss for message in sample.messages] == [True, "masked" not in name, True, True]


def test_reasoning_before_the_call_of_a_tool_is_kept(folder: Path) -> None:
    row = copy.deepcopy(TOOL_ROWS["llama-factory"])
    row["conversations"][1]["value"] = "<think>Too small.</think>\n" + json.dumps(
        [{"name": "zoom", "arguments": {"box": [1, 2]}}, {"name": "zoom", "arguments": {}}]
    )
    source = write_jsonl(folder / "rows.jsonl", [row])
    import_dataset(source, folder / "out", ImportOptions())
    (sample,) = read_samples(folder / "out" / "data.jsonl")
    thought, *calls = sample.messages[1].content
    assert thought.text == "<think>Too small.</think>"
    assert [call.arguments for call in calls] == [{"box": [1, 2]}, {}]


def test_error_of_a_placeholder_names_other_keys_with_files(folder: Path) -> None:
    turns = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "Two."}]
    row = {"conversations": turns, "stills": ["a.png", "a.png"]}
    source = write_jsonl(folder / "rows.jsonl", [row])
    with pytest.raises(UserError, match="placeholder without an image") as caught:
        import_dataset(source, folder / "out", ImportOptions())
    assert "files under 'stills'" in str(caught.value.remedy)
    fixed = {"conversations": turns, "videos": [row["stills"]]}
    write_jsonl(source, [fixed])
    import_dataset(source, folder / "fixed", ImportOptions())
