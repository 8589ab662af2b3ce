"""Written tasks: a folder that the rest of finesight reads, whole or not at all."""

from __future__ import annotations

import pytest
from PIL import Image

from finesight.data.jsonl import read_samples
from finesight.data.sample import BoxPart, ImagePart, TextPart
from finesight.digests import verify_folder
from finesight.errors import UserError
from finesight.synth.tasks import Task, mixed, sample
from finesight.synth.writing import write_mixture, write_task


def test_a_folder_holds_the_samples(tmp_path):
    data = write_task(tmp_path / "scenes", Task("scene", "built-in"), 12, seed=4)
    samples = read_samples(data)
    assert [each.id for each in samples] == [f"scene-4-{index}" for index in range(12)]
    verify_folder(tmp_path / "scenes")
    for index, each in enumerate(samples):
        drawn = sample(Task("scene", "built-in"), 4, index)
        (picture,) = [part for part in each.parts() if isinstance(part, ImagePart)]
        assert Image.open(data.parent / picture.image).tobytes() == drawn.picture.tobytes()
        assert each.meta["kind"] == drawn.kind
        said = [part.text if isinstance(part, TextPart) else part for part in _answer(each)]
        assert tuple(said) == drawn.answer


def test_a_mixture_goes_on_where_another_part_ended(tmp_path):
    mixture = {"letters": 0.5, "scene": 0.5}
    whole = read_samples(write_mixture(tmp_path / "whole", mixture, 3, range(12)))
    parts = [
        read_samples(write_mixture(tmp_path / f"part-{numbers.start}", mixture, 3, numbers))
        for numbers in (range(5), range(5, 12))
    ]
    assert [*parts[0], *parts[1]] == whole
    assert {len(each.messages) for each in whole} > {2}, "never a second question"
    for number in (0, 11):
        drawn = mixed(mixture, 3, number)
        (name,) = {part.image for part in whole[number].parts() if isinstance(part, ImagePart)}
        kept = Image.open(tmp_path / "whole" / name)
        assert kept.tobytes() == drawn.picture.tobytes()


def _answer(sample):
    return sample.messages[1].content


def test_one_kind_of_question_is_picked(tmp_path):
    data = write_task(tmp_path / "w", Task("words", "built-in"), 10, seed=1, kind="find")
    samples = read_samples(data)
    assert [each.meta["kind"] for each in samples] == ["find"] * 10
    assert all(isinstance(_answer(each)[0], BoxPart) for each in samples)


def test_what_exists_is_not_overwritten(tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(UserError, match="exists already"):
        write_task(tmp_path / "there", Task("scene", "built-in"), 1, seed=0)


def test_nothing_is_left_when_drawing_fails(tmp_path):
    with pytest.raises(UserError, match="no question of the kind"):
        write_task(tmp_path / "out", Task("word", "built-in"), 5, seed=0, kind="count")
    assert list(tmp_path.iterdir()) == []
