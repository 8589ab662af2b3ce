"""Tests of the command `finesight show`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from conversation_fixtures import make_folder
from PIL import Image
from typer.testing import CliRunner

from finesight.cli.data import show
from finesight.errors import UserError

app = typer.Typer()
app.command()(show)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    model = make_folder(tmp_path / "model", "qwen2_5_vl")
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    lines = [
        {
            "id": f"s{number}",
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "x"}]},
            ],
        }
        for number in range(3)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("\n".join(json.dumps(line) for line in lines))
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: {model}\ndata: {{train: {data}}}\noutput_dir: {tmp_path / 'run'}\n")
    return path


def test_token_table_is_printed(recipe: Path) -> None:
    result = CliRunner().invoke(app, [str(recipe), "--num-samples", "2"], catch_exceptions=False)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line for line in lines if line.startswith("sample")] == ["sample s0", "sample s1"]
    (image, _) = [line for line in lines if "<|image_pad|>" in line]
    assert "8 x <|image_pad|>" in image
    assert "a.png, 100x50 as 112x56, grid 1 x 4 x 8" in image
    assert sum(line.endswith("'<|im_end|>'") and "*" in line for line in lines) == 2
    assert lines[-1] == f"next: finesight plan {recipe}"


def test_json_output_with_overrides(recipe: Path) -> None:
    arguments = [str(recipe), "image.height=28", "image.width=28", "--json", "--num-samples", "9"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [record["id"] for record in records] == ["s0", "s1", "s2"]
    assert records[0]["images"][0]["resized_size"] == [28, 28]
    (supervised,) = {sum(row["is_supervised"] for row in record["rows"]) for record in records}
    assert supervised == records[0]["num_supervised_tokens"] == 2


def test_eval_option_needs_eval_data(recipe: Path) -> None:
    with pytest.raises(UserError, match=r"data\.eval of recipe\.yaml is empty"):
        CliRunner().invoke(app, [str(recipe), "--eval"], catch_exceptions=False)


def test_html_page_of_samples(recipe: Path, tmp_path: Path) -> None:
    page = tmp_path / "pages" / "show.html"
    arguments = [str(recipe), "--num-samples", "2", "--html", str(page)]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert (result.exit_code, result.stdout) == (0, "")
    assert f"page: {page}" in result.stderr
    text = page.read_text()
    assert f"The first 2 of {tmp_path / 'data.jsonl'}" in text
    data = text.partition('<script type="application/json" id="data">')[2].partition("<")[0]
    assert [record["id"] for record in json.loads(data)["samples"]] == ["s0", "s1"]
    again = CliRunner().invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert [json.loads(line)["id"] for line in again.stdout.splitlines()] == ["s0", "s1"]


def test_samples_with_truncated_images_are_skipped(recipe: Path, tmp_path: Path) -> None:
    Image.effect_noise((90, 90), 80).save(tmp_path / "b.jpg")
    content = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "b.jpg").write_bytes(content[: len(content) // 2])
    data = tmp_path / "data.jsonl"
    data.write_text(data.read_text().replace("a.png", "b.jpg", 1))
    page = tmp_path / "show.html"
    arguments = [str(recipe), "--html", str(page)]
    with pytest.raises(UserError, match="truncated"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    arguments += ["--num-samples", "3"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert f"skipped: s0: {tmp_path / 'b.jpg'}: truncated" in result.stderr
    text = page.read_text().partition('<script type="application/json" id="data">')[2]
    records = json.loads(text.partition("<")[0])["samples"]
    assert [record["id"] for record in records] == ["s1", "s2"]
    (tmp_path / "b.jpg").unlink()
    arguments = [str(recipe), "--json", "--num-samples", "3"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert [json.loads(line)["id"] for line in result.stdout.splitlines()] == ["s1", "s2"]
    assert f"skipped: s0: {tmp_path / 'b.jpg'}: no such image" in result.stderr


def test_seed_selects_random_samples(recipe: Path) -> None:
    selections = []
    for seed in range(9):
        arguments = [str(recipe), "--num-samples", "2", "--seed", str(seed), "--json"]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        selections.append(tuple(json.loads(line)["id"] for line in result.stdout.splitlines()))
    assert set(selections) == {("s0", "s1"), ("s0", "s2"), ("s1", "s2")}


def test_page_never_overwrites_other_files(recipe: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    before = data.read_bytes()
    with pytest.raises(UserError, match=r"data\.jsonl exists and is not a page"):
        CliRunner().invoke(app, [str(recipe), "--html", str(data)], catch_exceptions=False)
    assert data.read_bytes() == before
