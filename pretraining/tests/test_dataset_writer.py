"""Written tasks: a folder that the rest of finesight reads, whole or not at all."""

from __future__ import annotations

import pytest
from PIL import Image
from synthetic_tasks.dataset_writer import write_mixture, write_task
from synthetic_tasks.tasks import SyntheticTask, generate_mixture_sample, generate_sample

from finesight.errors import UserError
from finesight.files.storage import verify_folder
from finesight.samples.sample import BoxPart, ImagePart, TextPart, read_samples


def test_written_folder_contains_the_samples(tmp_path):
    data = write_task(tmp_path / "scenes", SyntheticTask("scene", "built-in"), 12, seed=4)
    samples = read_samples(data)
    assert [each.id for each in samples] == [f"scene-4-{index}" for index in range(12)]
    verify_folder(tmp_path / "scenes")
    for index, each in enumerate(samples):
        drawn = generate_sample(SyntheticTask("scene", "built-in"), 4, index)
        (image,) = [part for part in each.iter_parts() if isinstance(part, ImagePart)]
        assert Image.open(data.parent / image.image).tobytes() == drawn.image.tobytes()
        assert each.meta["kind"] == drawn.task_kind
        output = [part.text if isinstance(part, TextPart) else part for part in _answer(each)]
        assert tuple(output) == drawn.answer


def test_mixture_parts_concatenate(tmp_path):
    mixture = {"letters": 0.5, "scene": 0.5}
    full = read_samples(write_mixture(tmp_path / "whole", mixture, 3, range(12)))
    parts = [
        read_samples(write_mixture(tmp_path / f"part-{numbers.start}", mixture, 3, numbers))
        for numbers in (range(5), range(5, 12))
    ]
    assert [*parts[0], *parts[1]] == full
    assert {len(each.messages) for each in full} > {2}, "never a second question"
    for number in (0, 11):
        drawn = generate_mixture_sample(mixture, 3, number)
        (name,) = {part.image for part in full[number].iter_parts() if isinstance(part, ImagePart)}
        retained = Image.open(tmp_path / "whole" / name)
        assert retained.tobytes() == drawn.image.tobytes()


def _answer(sample):
    return sample.messages[1].content


def test_samples_of_one_question_kind(tmp_path):
    data = write_task(
        tmp_path / "w", SyntheticTask("words", "built-in"), 10, seed=1, task_kind="find"
    )
    samples = read_samples(data)
    assert [each.meta["kind"] for each in samples] == ["find"] * 10
    assert all(isinstance(_answer(each)[0], BoxPart) for each in samples)


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_task(tmp_path / "there", SyntheticTask("scene", "built-in"), 1, seed=0)


def test_failed_generation_leaves_no_files(tmp_path):
    with pytest.raises(UserError, match="no question of the kind"):
        write_task(
            tmp_path / "out", SyntheticTask("word", "built-in"), 5, seed=0, task_kind="count"
        )
    assert list(tmp_path.iterdir()) == []
