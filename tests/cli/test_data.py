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


def test_image_rule_of_a_model_scales_boxes(cli):
    limits = {"min_pixels": 3136, "max_pixels": 160000, "patch_size": 14, "merge_size": 2}
    Path("model").mkdir()
    Path("model/config.json").write_text('{"model_type": "qwen2_5_vl"}')
    Path("model/preprocessor_config.json").write_text(json.dumps(limits))
    convert = (*CONVERT, "qwen2_5_vl", "--model", "model")
    found = cli(*convert, "--json").json
    assert (found["num_boxes"], found["unconverted"]) == (1, ["line 1"])
    assert read_box()["bbox_2d"] == [56, 56, 168, 252]
    Path("new.jsonl").unlink()
    cli(*CONVERT, "qwen2_5_vl", "--image", "height=280", "--image", "width=560")
    assert read_box()["bbox_2d"] == [56, 56, 168, 252]
    Path("model/config.json").write_text('{"model_type": "qwen2_vl"}')
    assert "the model family is qwen2_vl" in cli(*convert, code=2).err


@pytest.mark.parametrize("pair", ["height=280", "longest_side=x", "size=5", "longest_side"])
def test_invalid_image_rules_are_rejected(pair, cli):
    error = cli(*CONVERT, "qwen2_5_vl", "--image", pair, code=2).err
    assert "--image height=112" in error.partition("remedy: ")[2]
