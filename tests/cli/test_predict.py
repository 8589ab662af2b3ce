import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import openpyxl
import pytest
from engine_fixtures import make_sample, write_noise_image
from PIL import Image
from run_dir_fixtures import MANIFEST
from tiny_model import create_tiny_model
from video_fixtures import write_video

from finesight.evaluate import answer_tables, generation_eval
from finesight.evaluate.answer_tables import CSV_FILE, JSONL_FILE, XLSX_FILE
from finesight.infer.model_loader import load_inference_model
from finesight.infer.prediction import build_question, generate
from finesight.samples.sample import ImagePart, write_samples
from finesight.settings.manifest import MANIFEST_FILE

ASK = ("--prompt", "What?", "--max-new-tokens", 3, "--device", "cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("images")
    second = write_noise_image(folder / "b.png", 60, 120, seed=1)
    return write_noise_image(folder / "a.png", 80, 60), second


def test_one_json_line_per_image(tiny, image_paths, cli):
    lines = cli("predict", tiny, *image_paths, *ASK, "--json").records
    assert [line["image"] for line in lines] == [str(path) for path in image_paths]
    assert all(set(line) >= {"image", "prompt", "answer", "raw_text", "boxes"} for line in lines)
    assert all(line["prompt"] == "What?" for line in lines)


@pytest.fixture
def set_manifest(tiny):
    """Write the manifest of a model folder, with the forms of its training questions."""
    file = tiny / MANIFEST_FILE
    yield lambda **values: file.write_text(json.dumps(MANIFEST | {"format_version": 2} | values))
    file.unlink(missing_ok=True)


def make_template(template, num_images, share=1.0):
    numbers = {"min_images": num_images, "max_images": num_images}
    return {"template": template, **numbers, "share": share}


def test_several_images_are_one_question(tiny, image_paths, set_manifest, tmp_path, cli):
    """By default as many as in the training; the images of a question follow one another."""
    first, second = map(str, image_paths)
    pair = ["--images-per-question", 2]

    def ask(*words):
        lines = cli("predict", tiny, *words, *ASK, "--json").records
        return [line["image"] for line in lines]

    assert ask(first, second, *pair) == [[first, second]]
    assert ask(first, second, second, first, *pair) == [[first, second], [second, first]]
    assert ask(image_paths[0].parent, *pair) == [[first, second]]
    error = cli("predict", tiny, first, first, second, *ASK, *pair, code=2).err
    assert "3 image files for questions about 2 images each" in error
    set_manifest(prompt_templates=[make_template("<image>{question}", 2)])
    assert ask(first, second) == [[first, second]]
    assert "as in the training" in cli("predict", tiny, first, *ASK, code=2).err
    document, page = tmp_path / "a.pdf", Image.new("RGB", (56, 56))
    page.save(document, save_all=True, append_images=[page, page])
    error = cli("predict", tiny, first, document, *ASK, code=2).err
    assert "1 image file besides 1 document of several pages for questions about 2 images" in error
    printed = cli("predict", tiny, first, *ASK, "--images-per-question", 1)
    assert "note: Number of images: 1, but 2 in the training questions." in printed.err
    error = cli("predict", tiny, "--data", "a.jsonl", *pair, code=2).err
    assert "--images-per-question, no --prompt and --data" in error


def test_placeholders_set_the_positions_of_images(
    tiny, image_paths, set_manifest, monkeypatch, cli
):
    asked = []

    def record(model, renderer, samples, **options):
        asked.extend(samples)
        return []

    monkeypatch.setattr(generation_eval, "predict", record)
    forms = [
        make_template("<image>{question}", 1, 0.6),
        make_template("{question}\n<image>", 1, 0.4),
    ]
    set_manifest(prompt_templates=forms)
    printed = cli("predict", tiny, image_paths[0], "--prompt", "What?")
    assert (
        r"note: The training questions have several forms: '<image>{question}' (60%)" in printed.err
    )
    assert "note" not in cli("predict", tiny, image_paths[0], "--prompt", "What?<image>").err
    pair = (*image_paths, "--images-per-question", 2)
    cli("predict", tiny, *pair, "--prompt", "From <image> to <image>?")
    types = [[part.type for part in one.sample.messages[0].content] for one in asked]
    assert types == [
        ["image", "text"],
        ["text", "image"],
        ["text", "image", "text", "image", "text"],
    ]
    error = cli("predict", tiny, image_paths[0], "--prompt", "<image> or <image>?", code=2).err
    assert "2 times <image> for 1 image" in error


def test_answers_of_a_folder_are_a_table(tiny, image_paths, tmp_path, monkeypatch, cli):
    out, folder = tmp_path / "answers", image_paths[0].parent
    fields = {"id": "=1+1", "boxes": [1, 2], "cost": -1e-5, "\ud83d": "\udc80"}
    answers = ['=HYPERLINK("x"),\n1', f"```json\n{json.dumps(fields)}\n```"]
    predict = generation_eval.predict

    def read(*arguments, **options):
        found = zip(predict(*arguments, **options), answers, strict=True)
        return [replace(one, answer=answer) for one, answer in found]

    monkeypatch.setattr(generation_eval, "predict", read)
    cli("predict", tiny, folder, *ASK, "--out", out)
    with (out / CSV_FILE).open(encoding="utf-8-sig", newline="") as file:
        head, *rows = csv.reader(file)
    assert head[:7] == ["id", "image", "prompt", "answer", "answer.id", "boxes", "cost"]
    assert [Path(row[1]).name for row in rows] == ["a.png", "b.png"]
    assert [row[3:7] for row in rows] == [
        [f"'{answers[0]}", "", "", ""],
        [answers[1], "'=1+1", "[1, 2]", "-1e-05"],
    ]
    lines = (out / JSONL_FILE).read_text().splitlines()
    assert [json.loads(line)["answer"] for line in lines] == answers
    sheet = openpyxl.load_workbook(out / XLSX_FILE).active
    assert [cell.value for cell in sheet["E"]] == ["answer", *answers]
    for suffix in ("csv", "xlsx", "jsonl"):
        file = tmp_path / f"own.{suffix}"
        cli("predict", tiny, folder, *ASK, "--out", file)
        if suffix != "xlsx":  # a workbook has the time at which it was written
            assert file.read_bytes() == (out / f"answers.{suffix}").read_bytes()
    assert openpyxl.load_workbook(file.with_suffix(".xlsx")).active.max_row == 3
    assert "exists already" in cli("predict", tiny, folder, *ASK, "--out", out, code=2).err
    monkeypatch.undo()
    (hidden := tmp_path / ".photos").mkdir()
    assert "without images" in cli("predict", tiny, hidden, *ASK, code=2).err
    shutil.copy(image_paths[0], hidden)
    assert cli("predict", tiny, hidden, *ASK).out.startswith(str(hidden))


def test_workbook_without_its_package(tiny, image_paths, tmp_path, monkeypatch, cli):
    """A folder of answers has the other files; a workbook fails before the model is loaded."""
    monkeypatch.setattr(answer_tables, "can_write_workbooks", lambda: False)
    out = tmp_path / "answers"
    printed = cli("predict", tiny, image_paths[0], *ASK, "--out", out)
    assert "without answers.xlsx" in printed.err
    assert {file.name for file in out.iterdir()} == {CSV_FILE, JSONL_FILE, "sha256.json"}
    file = tmp_path / "own.XLSX"
    error = cli("predict", "gone/model", image_paths[0], *ASK, "--out", file, code=2).err
    assert "finesight[xlsx]" in error
    assert not file.exists()


def test_annotated_images_are_written_beside_text(tiny, image_paths, tmp_path, cli):
    drawn = tmp_path / "drawn"
    printed = cli("predict", tiny, image_paths[0], *ASK, "--draw", drawn)
    assert printed.out.startswith(f"{image_paths[0]}: ")
    assert [path.name for path in drawn.iterdir()] == ["a.png"]
    assert f"{drawn}/a.png" in printed.err


def test_video_files_are_accepted(tiny, image_paths, tmp_path, cli):
    clip = write_video(tmp_path / "clip.webm", codec="libvpx-vp9")
    ask = ("predict", tiny, clip, image_paths[0], *ASK)
    video, image = cli(*ask, "--json").records
    assert (video["id"], video["image"]) == (str(clip), None)
    assert image["image"] == str(image_paths[0])
    assert cli(*ask).out.startswith(f"{clip}: ")
    clip.write_bytes(clip.read_bytes()[:300])
    printed = cli(*ask, code=4)
    assert printed.out.startswith(f"{image_paths[0]}: ")
    assert f"skipped: {clip}: " in printed.err


def test_thinking_mode_is_selected(tiny, image_paths, tmp_path, cli):
    model = create_tiny_model(tmp_path / "qwen3_5", "qwen3_5")
    ask = ("predict", model, image_paths[0], *ASK)
    for options, has_reasoning in (([], False), (["--thinking"], True), (["--no-thinking"], False)):
        assert ("reasoning" in cli(*ask, *options, "--json").json) == has_reasoning
    assert "no reasoning effort" in cli(*ask, "--reasoning-effort", "low", code=2).err
    # A model without the mode rejects it.
    error = cli("predict", tiny, *ASK, "--thinking", code=2).err
    assert "non-thinking mode" in error


def test_invalid_arguments_are_rejected(tiny, image_paths, tmp_path, monkeypatch, cli):
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").touch()
    Path("model").mkdir()
    image, other = image_paths
    ask = ("--prompt", "What?")
    for words, message in (
        ((tiny, *ask, "--data", "x.jsonl"), "--data"),
        ((tiny, image, "--data", "x.jsonl"), "1 image"),
        ((tiny, "--data", "empty.jsonl"), "contains no samples"),
        (("model", image, *ask), "no config.json"),
        (("gone/model", image, *ask), "gone/model"),
    ):
        error = cli("predict", *words, code=2).err
        assert message in error
        assert "\n  expected: " in error
        assert "\n  remedy: " in error
    for options in (("--draw", other), ("--max-new-tokens", 0), ("--weight-format", "int3")):
        assert options[0] in cli("predict", tiny, image, *ask, *options, code=2).err


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_weight_format_is_that_of_the_loader(kind, tiny, image_paths, cli):
    ask = ("predict", tiny, image_paths[0], "--prompt", "What?", "--max-new-tokens", 12, "--json")
    found = cli(*ask, "--device", "cpu", "--weight-format", kind).json["raw_text"]
    loaded = load_inference_model(str(tiny), "cpu", "auto", kind)
    prompt = loaded.renderer.encode_prompt(build_question([image_paths[0]], "What?", "0"))
    options = {"max_new_tokens": 12, "end_ids": loaded.renderer.end_ids}
    (ids,) = generate(loaded.model, [prompt], **options)
    assert found == loaded.renderer.decode_completion(ids).raw_text
    # With random weights, 4-bit quantization changes every answer.
    baseline = cli(*ask, "--device", "cpu").json["raw_text"]
    assert kind != "nf4" or found != baseline


def write_folder(folder: Path) -> set[str]:
    """Write two images, and files that are none; return the names of these."""
    folder.mkdir()
    for name in ("a.png", "z.jpg"):
        Image.effect_noise((200, 150), 90).save(folder / name)
    for name in ("truncated.png", "truncated.jpg"):
        content = (folder / ("a.png" if name.endswith("png") else "z.jpg")).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    (folder / "header.png").write_bytes((folder / "a.png").read_bytes()[:30])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("text")
    (folder / "damaged.pdf").write_bytes(b"%PDF-1.4 damaged")
    Image.new("1", (10_000, 10_000)).save(folder / "bomb.png")
    Image.new("RGB", (3000, 4)).save(folder / "thin.png")
    return {path.name for path in folder.iterdir()} - {"a.png", "z.jpg"}


@pytest.mark.parametrize("is_data", [False, True])
def test_unreadable_images_are_skipped_and_named(tiny, tmp_path, cli, is_data):
    folder, out = tmp_path / "images", tmp_path / "answers"
    invalid = write_folder(folder)
    options = ("--json", "--out", out, "--draw", tmp_path / "drawn")
    words = (folder, *ASK)
    if is_data:
        names = sorted(path.name for path in folder.iterdir())
        parts = [(ImagePart(image=name), "What?") for name in names]
        samples = [make_sample(part[0].image, folder, *part).sample for part in parts]
        write_samples(folder / "data.jsonl", samples)
        words = ("--data", folder / "data.jsonl", *ASK[2:])
    printed = cli("predict", tiny, *words, *options, code=4)
    assert [Path(one["image"]).name for one in printed.records] == ["a.png", "z.jpg"]
    assert printed.records == list(map(json.loads, (out / JSONL_FILE).open()))
    lines = printed.err.splitlines()[-len(invalid) - 1 :]
    assert lines.pop() == f"{len(invalid)} questions skipped"
    assert {Path(line.split(": ")[1]).name for line in lines} == invalid
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"a.png", "z.png"}


def test_images_that_vanish_are_skipped(tiny, image_paths, tmp_path, cli, monkeypatch):
    paths = [shutil.copy(image_paths[0], tmp_path / f"{n}.png") for n in range(3)]
    predict = generation_eval.predict

    def remove_one_before_and_one_after(model, renderer, samples, **options):
        paths[0].unlink()
        found = predict(model, renderer, samples, **options)
        paths[1].unlink()
        return found

    monkeypatch.setattr(generation_eval, "predict", remove_one_before_and_one_after)
    printed = cli("predict", tiny, *paths, *ASK, "--draw", tmp_path / "drawn", "--json", code=4)
    assert [one["image"] for one in printed.records] == [*map(str, paths[1:])]
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["2.png"]
    skipped = [line for line in printed.err.splitlines() if line.startswith("skipped: ")]
    assert skipped == [f"skipped: {path}: no such image" for path in paths[:2]]


@pytest.mark.parametrize("is_recorded", [False, True])
def test_group_with_an_unreadable_image_is_skipped(
    tiny, image_paths, tmp_path, set_manifest, cli, is_recorded
):
    (tmp_path / "damaged.pdf").write_bytes(b"%PDF-1.4 damaged")
    first, second = map(str, image_paths)
    words = [first, tmp_path / "damaged.pdf", second, first]
    if is_recorded:
        set_manifest(prompt_templates=[make_template("<image>{question}", 2)])
    else:
        words += ["--images-per-question", 2]
    printed = cli("predict", tiny, *words, *ASK, "--json", code=4)
    assert [one["image"] for one in printed.records] == [[second, first]]
    assert "1 question skipped" in printed.err


def test_no_readable_image_is_an_error(tiny, tmp_path, cli):
    out = tmp_path / "answers"
    (tmp_path / "empty.png").touch()
    (tmp_path / "truncated.png").write_bytes(b"\x89PNG\r\n")
    printed = cli("predict", tiny, tmp_path, *ASK, "--out", out, code=2)
    assert "empty.png: an empty file" in printed.err
    assert (printed.out, out.exists()) == ("", False)
