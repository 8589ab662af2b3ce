"""Images that change between the start of a run and its resumption."""

import os
import random
import shutil
from pathlib import Path

import pytest
from container_fixtures import write_tar_shards
from PIL import Image
from tiny_task import TinyTask, read_final_files

from finesight.errors import UserError
from finesight.samples.corpus import open_sample_source
from finesight.samples.sample import Sample
from finesight.train.dataset_stats import EDGE_BYTES, read_image_state


def replace_images(task: TinyTask, *names: str) -> None:
    for name in names:
        path = task.folder / f"{name}.png"
        with Image.open(path) as image:
            size = image.size
        Image.new("RGB", size, (1, 2, 3)).save(path)


def test_resume_refuses_replaced_images(task):
    run = task.rewind_to_checkpoint()
    record = run / "images.safetensors"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    replace_images(task, "eval1")
    with pytest.raises(UserError, match=r"eval1\.png") as error:
        task.run(resume=True)
    assert f"delete {record}" in str(error.value)
    replace_images(task, *(f"train{number}" for number in range(7)))
    with pytest.raises(UserError, match=r"images of 7 samples[\s\S]*train4\.png and 2 more"):
        task.run(resume=True)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # Without the record, the images are accepted.
    record.unlink()
    task.run(resume=True)
    assert "images are not compared" in task.console_output
    assert record.exists()


def test_resume_with_copied_dataset_is_bit_identical(task):
    run = task.rewind_to_checkpoint()
    shutil.copytree(run, task.folder / "same-data")
    copy = task.folder / "copy"
    copy.mkdir()
    for file in task.folder.glob("*.*"):
        shutil.copyfile(file, copy / file.name)
        os.utime(copy / file.name, (1, 1))
    note = "data.train: the images of 11 samples have another modification time"
    task.run(resume=True, name="same-data")
    assert note not in task.console_output
    assert "images are not compared" not in task.console_output
    data = {split: str(copy / f"{split}.jsonl") for split in ("train", "eval")}
    task.run(resume=True, data=data)
    assert note in task.console_output
    assert read_final_files(run) == read_final_files(task.folder / "same-data")


def test_replaced_image_inside_a_tar_is_refused(task):
    tars = task.folder / "tars"
    task.recipe["data"]["train"] = write_tar_shards(task.folder / "train.jsonl", tars, 4)
    task.rewind_to_checkpoint()
    tar, image = tars / "001.tar", (task.folder / "train5.png").read_bytes()
    assert image in tar.read_bytes()
    tar.write_bytes(tar.read_bytes().replace(image, image[:-20] + b"\0" + image[-19:]))
    with pytest.raises(UserError, match=r"have changed[\s\S]*001\.tar/@.*train5\.0\.png"):
        task.run(resume=True)


def test_damaged_record_is_refused(task):
    record = task.rewind_to_checkpoint() / "images.safetensors"
    data = bytearray(record.read_bytes())
    data[-3] ^= 1
    for content, words in ((data, "checksum"), (data[:40], "cannot be read")):
        record.write_bytes(content)
        with pytest.raises(UserError, match=rf"{words}[\s\S]*delete .*images\.safetensors"):
            task.run(resume=True)


def make_sample(folder: Path, data: bytes) -> Sample:
    """Create a sample whose image and video frames have the content `data`."""
    (folder / "a.bin").write_bytes(data)
    line = (
        '{"id": "a", "messages": [{"role": "user", "content": [{"type": "image", "image": "a.bin"}'
        ', {"type": "video", "frames": ["a.bin", "a.bin"], "fps": 1}]},'
        ' {"role": "assistant", "content": "b"}]}\n'
    )
    (folder / "a.jsonl").write_text(line)
    return open_sample_source(folder / "a.jsonl").read_sample(0)


@pytest.mark.parametrize(
    "size", [0, 1, *(EDGE_BYTES + n for n in (-1, 0, 1)), 2 * EDGE_BYTES, 3 * EDGE_BYTES]
)
def test_fingerprint_covers_size_start_and_end(tmp_path, size):
    """Of larger files, it covers the edges."""
    data = random.Random(0).randbytes(size)
    content, time = read_image_state(make_sample(tmp_path, data))
    sample = make_sample(tmp_path, data)
    os.utime(tmp_path / "a.bin", ns=(5, 5))
    assert read_image_state(sample)[0] == content
    assert read_image_state(sample)[1] != time
    others = [data + b"x", data[:-1]] if data else [b"x"]
    edges = [*range(min(size, EDGE_BYTES)), *range(max(EDGE_BYTES, size - EDGE_BYTES), size)]
    for location in {*random.Random(1).sample(edges, min(len(edges), 20)), *edges[:1], *edges[-1:]}:
        other = bytearray(data)
        other[location] ^= 1
        others.append(bytes(other))
    found = {read_image_state(make_sample(tmp_path, other))[0] for other in others}
    assert len(found) == len(others)
    assert content not in found


@pytest.mark.parametrize(("name", "num_bytes"), [("eval1", 60), ("eval1", 9), ("train4", 9)])
def test_skipped_image_may_be_repaired_if_the_samples_stay(task, name, num_bytes):
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
