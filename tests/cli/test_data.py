"""Tests of the commands `finesight data export` and `finesight data convert-boxes`."""

import json
from pathlib import Path

import pytest
from image_fixtures import write_gray_image, write_jsonl

OLD_BOX = "<ref>dog</ref><box>(100,200),(300,900)</box>"
CONVERT = ("data", "convert-boxes", "old.jsonl", "new.jsonl", "--from", "qwen_vl", "--to")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write samples and records with boxes into the working directory."""
    monkeypatch.chdir(tmp_path)
    write_gray_image(Path("a.png"), 1000, 500)
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Where?"}]
    answer = [{"type": "box", "label": "door", "xyxy": [1, 2, 30, 14]}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sample = {"id": "1", "messages": turns}
    write_jsonl(Path("data.jsonl"), [sample | {"references": ["There."]}])
    turns = [{"role": "user", "content": question[::-1]}, turns[1]]
    write_jsonl(Path("image_last.jsonl"), [sample | {"messages": turns}])
    rows = [
        {"image": "a.png", "query": "Where is the dog? Answer as JSON.", "response": OLD_BOX},
        {"image": "a.png", "query": "What is it?", "response": "A dog."},
    ]
    write_jsonl(Path("old.jsonl"), rows)


def test_exported_samples_are_checked_by_the_next_command(cli):
    printed = cli("data", "export", "data.jsonl", "out", "--to", "llama-factory")
    assert "out: 1 sample in the format llama-factory" in printed.out
    assert "out/data.jsonl, out/dataset_info.json" in printed.out
    assert "not supported: 1 references" in printed.out
    assert "note: the boxes of 1 samples are JSON in the answers" in printed.out
    command = "check out/data.jsonl --format llama-factory"
    assert printed.next_steps == f"finesight {command}"
    cli(*command.split())


def test_invalid_export_is_rejected(cli):
    export = ("data", "export", "image_last.jsonl", "out")
    assert "error: --to: " in cli(*export, "--to", "swift", code=2).err
    assert "remedy: " in cli(*export, "--to", "image-path", code=2).err
    assert "--to" in cli(*export, code=2).err
    assert not Path("out").exists()


def read_box() -> dict[str, object]:
    response = Path("new.jsonl").read_text(encoding="utf-8").splitlines()[0]
    return dict(json.loads(json.loads(response)["response"]))


def test_converted_boxes_are_counted(cli):
    output = cli(*CONVERT, "qwen3_vl").out
    assert "new.jsonl: 2 records, 1 box rewritten in 1 answer" in output
    assert "1 answer without boxes" in output
    assert "in other texts of 1 record" in output
    assert "(line 1)" in output
    assert read_box() == {"bbox_2d": [100, 200, 300, 900], "label": "dog"}


@pytest.mark.parametrize(
    "rule",
    [
        ["height=280", "width=560"],
        ["longest_side=560"],
        ["min_pixels=3136", "max_pixels=160000"],
        None,
    ],
)
def test_image_rule_of_options_or_model_scales_boxes(rule, cli):
    options = [word for pair in rule or () for word in ("--image", pair)]
    if rule is None:
        limits = {"min_pixels": 3136, "max_pixels": 160000, "patch_size": 14, "merge_size": 2}
        Path("model").mkdir()
        Path("model/config.json").write_text('{"model_type": "qwen2_5_vl"}')
        Path("model/preprocessor_config.json").write_text(json.dumps(limits))
        options = ["--model", "model"]
    assert json.loads(cli(*CONVERT, "qwen2_5_vl", *options, "--json").out) == {
        "file": "new.jsonl",
        "num_records": 2,
        "num_boxes": 1,
        "answers_with_boxes": 1,
        "answers_without_boxes": 1,
        "unconverted": ["line 1"],
    }
    assert read_box()["bbox_2d"] == [56, 56, 168, 252]
    if rule is None:
        Path("new.jsonl").unlink()
        Path("model/config.json").write_text('{"model_type": "qwen2_vl"}')
        error = cli(*CONVERT, "qwen2_5_vl", *options, code=2).err
        assert "the model family is qwen2_vl" in error


@pytest.mark.parametrize("pair", ["height=280", "longest_side=x", "size=5", "longest_side"])
def test_invalid_image_rules_are_rejected(pair, cli):
    error = cli(*CONVERT, "qwen2_5_vl", "--image", pair, code=2).err
    assert "--image height=112" in error.partition("remedy: ")[2]
