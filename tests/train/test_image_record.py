"""Images that change between the start of a run and its resumption."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from container_fixtures import write_tar_shards
from PIL import Image
from tiny_task import TinyTask, read_final_files

from finesight import storage
from finesight.data.corpus import open_sample_source
from finesight.errors import UserError
from finesight.train.dataset_stats import (
    EDGE_BYTES,
    ImageStates,
    load_image_record,
    read_image_state,
    save_image_record,
)


@pytest.fixture
def task(tmp_path: Path) -> TinyTask:
    return TinyTask(tmp_path)


def replace_image(path: Path) -> None:
    """Replace an image by another one of the same name and size."""
    with Image.open(path) as image:
        size = image.size
    Image.new("RGB", size, (1, 2, 3)).save(path)


@pytest.mark.parametrize("name", ["train4.png", "eval1.png"])
def test_resume_refuses_a_replaced_image(task: TinyTask, name: str) -> None:
    run = task.rewind_to_checkpoint()
    replace_image(task.folder / name)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as error:
        task.run(resume=True)
    assert str(task.folder / name) in str(error.value)
    assert f"delete {run / 'images.safetensors'}" in str(error.value)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_message_names_five_of_many_images(task: TinyTask) -> None:
    task.rewind_to_checkpoint()
    for number in range(7):
        replace_image(task.folder / f"train{number}.png")
    with pytest.raises(UserError, match=r"images of 7 samples[\s\S]*train4\.png and 2 more"):
        task.run(resume=True)


def test_deleted_record_accepts_the_images_as_they_are(task: TinyTask) -> None:
    run = task.rewind_to_checkpoint()
    replace_image(task.folder / "train4.png")
    (run / "images.safetensors").unlink()
    task.run(resume=True)
    assert "images are not compared" in task.console_output
    assert (run / "images.safetensors").exists()


def test_resume_with_copied_dataset_is_bit_identical(task: TinyTask) -> None:
    task.run(name="whole")
    run = task.rewind_to_checkpoint()
    copy = task.folder / "copy"
    copy.mkdir()
    for file in task.folder.glob("*.*"):
        shutil.copyfile(file, copy / file.name)
        os.utime(copy / file.name, (1, 1))
    data = {split: str(copy / f"{split}.jsonl") for split in ("train", "eval")}
    task.run(resume=True, data=data)
    assert (
        "data.train: the images of 11 samples have another modification time" in task.console_output
    )
    assert read_final_files(run) == read_final_files(task.folder / "whole")


def test_unchanged_images_are_not_mentioned(task: TinyTask) -> None:
    task.rewind_to_checkpoint()
    task.run(resume=True)
    assert "modification time" not in task.console_output
    assert "images are not compared" not in task.console_output


def test_replaced_image_inside_a_tar_is_refused(task: TinyTask) -> None:
    task.recipe["data"]["train"] = write_tar_shards(
        task.folder / "train.jsonl", task.folder / "tars", 4
    )
    task.rewind_to_checkpoint()
    tar = task.folder / "tars" / "001.tar"
    image = (task.folder / "train5.png").read_bytes()
    assert image in tar.read_bytes()
    tar.write_bytes(tar.read_bytes().replace(image, image[:-20] + b"\0" + image[-19:]))
    with pytest.raises(UserError, match=r"have changed[\s\S]*001\.tar/@.*train5\.0\.png"):
        task.run(resume=True)


def test_damaged_record_is_refused(task: TinyTask) -> None:
    record = task.rewind_to_checkpoint() / "images.safetensors"
    data = bytearray(record.read_bytes())
    data[-3] ^= 1
    record.write_bytes(data)
    with pytest.raises(UserError, match=r"checksum[\s\S]*delete .*images\.safetensors"):
        task.run(resume=True)
    record.write_bytes(data[:40])
    with pytest.raises(UserError, match=r"cannot be read[\s\S]*delete .*images\.safetensors"):
        task.run(resume=True)


def make_image_state(folder: Path, data: bytes) -> tuple[int, int]:
    """The fingerprints of a sample whose image file holds `data`."""
    (folder / "a.bin").write_bytes(data)
    line = (
        '{"id": "a", "messages": [{"role": "user", "content": [{"type": "image", "image": "a.bin"}'
        ', {"type": "video", "frames": ["a.bin", "a.bin"], "fps": 1}]},'
        ' {"role": "assistant", "content": "b"}]}\n'
    )
    (folder / "a.jsonl").write_text(line)
    return read_image_state(open_sample_source(folder / "a.jsonl").read_sample(0))


def test_fingerprint_covers_size_start_and_end(tmp_path: Path) -> None:
    data = random.Random(0).randbytes(3 * EDGE_BYTES)
    content, time = make_image_state(tmp_path, data)
    os.utime(tmp_path / "a.bin", ns=(5, 5))
    assert (
        read_image_state(open_sample_source(tmp_path / "a.jsonl").read_sample(0)).content == content
    )
    assert read_image_state(open_sample_source(tmp_path / "a.jsonl").read_sample(0)).time != time
    others = [data + b"x", data[:-1], b"\0" + data[1:], data[:-1] + b"\0"]
    others += [data[: EDGE_BYTES - 1] + b"\0" + data[EDGE_BYTES:]]
    found = {make_image_state(tmp_path, other)[0] for other in others}
    assert len(found) == len(others)
    assert content not in found


@pytest.mark.parametrize(
    "size", [0, 1, EDGE_BYTES - 1, EDGE_BYTES, EDGE_BYTES + 1, 2 * EDGE_BYTES - 1, 2 * EDGE_BYTES]
)
def test_fingerprint_covers_all_bytes_of_small_files(tmp_path: Path, size: int) -> None:
    data = random.Random(0).randbytes(size)
    full = make_image_state(tmp_path, data)[0]
    for location in random.Random(1).sample(range(size), min(size, 20)):
        other = bytearray(data)
        other[location] ^= 1
        assert make_image_state(tmp_path, bytes(other))[0] != full


def test_record_survives_saving(tmp_path: Path) -> None:
    states = ImageStates.from_states([1, 4, 9], [(1, -(2**63)), (2**63 - 1, 3), (5, 6)])
    save_image_record(tmp_path / "r", {"train": states, "eval": ImageStates.empty()})
    loaded = load_image_record(tmp_path / "r")
    assert loaded.keys() == {"train", "eval"}
    assert loaded["train"].digest == states.digest
    assert np.array_equal(loaded["train"].times_N, states.times_N)
    assert len(loaded["eval"].samples_N) == 0


def test_only_common_samples_are_compared() -> None:
    recorded = ImageStates.from_states([1, 4, 9], [(1, 1), (2, 2), (3, 3)])
    found = ImageStates.from_states([0, 4, 9], [(7, 7), (2, 8), (5, 3)])
    assert found.find_changed(recorded) == [9]
    assert found.count_touched(recorded) == 1


@pytest.mark.parametrize("on_invalid_sample", ["skip", "fail"])
def test_damaged_image_may_be_repaired(task: TinyTask, on_invalid_sample: str) -> None:
    image = task.folder / "train4.png"
    full = image.read_bytes()
    image.write_bytes(full[:60])
    settings = (f"data.on_invalid_sample={on_invalid_sample}", "train.save_every=1")
    if on_invalid_sample == "fail":
        with pytest.raises(UserError, match=r"train4\.png"):
            task.run(*settings)
    else:
        task.run(*settings)
        run = task.folder / "run"
        (run / "result.json").unlink()
        storage.remove_folder(run / "checkpoints" / "step-6")
    image.write_bytes(full)
    task.run(*settings, resume=True)
    assert "data.train: corrupt images of 1 samples were replaced" in task.console_output


@pytest.mark.parametrize(("name", "num_bytes"), [("eval1", 60), ("eval1", 9), ("train4", 9)])
def test_skipped_image_may_be_repaired_if_the_samples_stay(
    task: TinyTask, name: str, num_bytes: int
) -> None:
    image = task.folder / f"{name}.png"
    full = image.read_bytes()
    image.write_bytes(full[:num_bytes])
    task.run()
    (task.folder / "run" / "result.json").unlink()
    image.write_bytes(full)
    if num_bytes == 60:  # the header is readable, so that each evaluation reads the sample
        task.run(resume=True)
        assert "data.eval: corrupt images of 1 samples were replaced" in task.console_output
        return
    expected = rf"skipped at the start[\s\S]*{name}\.png[\s\S]*restore these files"
    with pytest.raises(UserError, match=expected):
        task.run(resume=True)
