"""Tests of the command `finesight show`."""

from pathlib import Path

import pytest
from conversation_fixtures import make_folder
from html_text import read_script_data
from image_fixtures import write_jsonl
from PIL import Image


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = make_folder(Path("model"), "qwen2_5_vl")
    Image.new("RGB", (100, 50)).save("a.png")
    question = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "x"}]
    write_jsonl(Path("data.jsonl"), ({"id": f"s{n}", "messages": turns} for n in range(3)))
    text = f"model: {model}\ndata: {{train: data.jsonl}}\noutput_dir: run\n"
    Path("recipe.yaml").write_text(text)


SHOW = ("show", "recipe.yaml", "--num-samples")


def test_token_table_is_printed(cli):
    printed = cli(*SHOW, 2)
    lines = printed.lines
    assert [line for line in lines if line.startswith("sample")] == ["sample s0", "sample s1"]
    (image, _) = [line for line in lines if "<|image_pad|>" in line]
    assert "8 x <|image_pad|>" in image
    assert "a.png, 100x50 as 112x56, grid 1 x 4 x 8" in image
    assert sum(line.endswith("'<|im_end|>'") and "*" in line for line in lines) == 2
    assert printed.next_steps == "finesight plan recipe.yaml"


def test_json_output_with_overrides(cli):
    records = cli(*SHOW, 9, "image.height=28", "image.width=28", "--json").records
    assert [record["id"] for record in records] == ["s0", "s1", "s2"]
    assert records[0]["images"][0]["resized_size"] == [28, 28]
    (supervised,) = {sum(row["is_supervised"] for row in record["rows"]) for record in records}
    assert supervised == records[0]["num_supervised_tokens"] == 2
    error = cli("show", "recipe.yaml", "--eval", code=2).err
    assert "data.eval of recipe.yaml is empty" in error


def test_html_page_of_samples(cli):
    page = Path("pages/show.html")
    printed = cli(*SHOW, 2, "--html", page)
    assert printed.out == f"page: {page}\n"
    text = page.read_text()
    assert "The first 2 of data.jsonl" in text
    assert [record["id"] for record in read_script_data(text)["samples"]] == ["s0", "s1"]
    again = cli(*SHOW, 2, "--html", page, "--json")
    assert [record["id"] for record in again.records] == ["s0", "s1"]


def test_variants_of_augmented_samples_are_shown(cli):
    page = Path("show.html")
    Image.effect_noise((100, 50), 80).save("a.png")
    cli(*SHOW, 1, "--augmented", 3, "data.augment=strong", "--html", page)
    found = read_script_data(page.read_text())["samples"]
    assert [record["id"] for record in found] == ["s0"] * 3
    assert len({record["num_tokens"] for record in found}) == 1
    assert len({str(record["images"][0]["frames"]) for record in found}) == 3
    error = cli(*SHOW, 1, "--augmented", 3, code=2).err
    assert "data.train of recipe.yaml has no variants" in error
    assert "add data.augment=light" in error


def test_samples_with_truncated_images_are_skipped(cli):
    Image.effect_noise((90, 90), 80).save("b.jpg")
    content = Path("b.jpg").read_bytes()
    Path("b.jpg").write_bytes(content[: len(content) // 2])
    data, page = Path("data.jsonl"), Path("show.html")
    data.write_text(data.read_text().replace("a.png", "b.jpg", 1))
    assert "truncated" in cli(*SHOW, 1, "--html", page, code=2).err
    assert "skipped: s0: b.jpg: truncated" in cli(*SHOW, 3, "--html", page).err
    found = read_script_data(page.read_text())["samples"]
    assert [record["id"] for record in found] == ["s1", "s2"]
    Path("b.jpg").unlink()
    printed = cli(*SHOW, 3, "--json")
    assert [record["id"] for record in printed.records] == ["s1", "s2"]
    assert "skipped: s0: b.jpg: no such image" in printed.err
