"""Dataset scan: every skipped sample is counted, and no sample is truncated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_task import make_task

from finesight.config import DataSettings, PixelRange, TrainFileSettings
from finesight.data.corpus import load_corpus
from finesight.data.image_header import CorruptImageError
from finesight.encode.packing import find_shared_prefix_length
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.train.dataset_stats import (
    MAX_PROMPT_CHARS,
    SCAN_CHUNK_SIZE,
    DatasetStats,
    SampleStatsMap,
    TrainingData,
    compute_dataset_stats,
    draw_subset,
)

RULE = PixelRange(min_pixels=784, max_pixels=7056)


def collect_stats(folder: Path, workers: int = 0, **settings: Any) -> DatasetStats:
    file = TrainFileSettings(path=folder / "train.jsonl")
    data = DataSettings(train=(file,), **settings)
    renderer = NativeRenderer(ModelFolder(folder / "tiny"), RULE)
    return compute_dataset_stats(load_corpus((file,)), renderer, data, workers)


def test_all_samples_are_counted(tmp_path: Path) -> None:
    make_task(tmp_path)
    found = collect_stats(tmp_path)
    assert found.sample_indices == tuple(range(11))
    assert found.skipped == ()
    renderer = NativeRenderer(ModelFolder(tmp_path / "tiny"), RULE)
    outlines = [
        renderer.tokenize(sample)
        for sample in load_corpus(
            (TrainFileSettings(path=tmp_path / "train.jsonl"),)
        ).read_samples()
    ]
    assert found.num_tokens == sum(outline.num_tokens for outline in outlines)
    assert found.num_patches == sum(outline.num_patches for outline in outlines)
    assert found.max_sample_tokens == max(outline.num_tokens for outline in outlines)
    assert [
        (glance.id, glance.num_tokens, glance.num_supervised_tokens)
        for glance in found.sample_stats
    ] == [(outline.id, outline.num_tokens, outline.num_supervised_tokens) for outline in outlines]
    assert [glance.num_patches for glance in found.sample_stats] == [
        o.num_patches for o in outlines
    ]


def test_shared_prefix_is_found(tmp_path: Path) -> None:
    make_task(tmp_path)
    renderer = NativeRenderer(ModelFolder(tmp_path / "tiny"), RULE)
    outlines = [
        renderer.tokenize(sample)
        for sample in load_corpus(
            (TrainFileSettings(path=tmp_path / "train.jsonl"),)
        ).read_samples()
    ]
    found = collect_stats(tmp_path)
    assert found.prefix_length == find_shared_prefix_length(outlines) == outlines[0].spans[0].start
    table = tmp_path / "train.jsonl"
    first, *others = table.read_text().splitlines()
    row = json.loads(first)
    row["messages"].insert(0, {"role": "system", "content": "Other words."})
    table.write_text("\n".join([json.dumps(row), *others]) + "\n")
    assert collect_stats(tmp_path).prefix_length < found.prefix_length


def test_invalid_samples_are_skipped_with_reasons(tmp_path: Path) -> None:
    make_task(tmp_path)
    lengths = collect_stats(tmp_path).max_sample_tokens
    (tmp_path / "train3.png").write_bytes(b"no picture")
    found = collect_stats(tmp_path, max_length=lengths - 1)
    reasons = dict(found.skipped)
    assert "not an image" in reasons.pop("train3")
    assert reasons
    assert set(reasons.values()) == {f"over {lengths - 1} tokens"}
    assert len(found.sample_indices) + len(found.skipped) == 11
    assert 3 not in found.sample_indices
    assert found.max_sample_tokens < lengths


def test_fail_mode_raises(tmp_path: Path) -> None:
    make_task(tmp_path)
    with pytest.raises(UserError, match=r"expected: at most 40 tokens"):
        collect_stats(tmp_path, max_length=40, on_invalid_sample="fail")
    (tmp_path / "train3.png").unlink()
    with pytest.raises(CorruptImageError, match=r"train3\.png"):
        collect_stats(tmp_path, on_invalid_sample="fail")


def test_dataset_without_readable_images_raises(tmp_path: Path) -> None:
    make_task(tmp_path)
    for path in tmp_path.glob("train*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"none of 11 samples[\s\S]*train0\.png"):
        collect_stats(tmp_path)


def test_invalid_box_is_never_skipped(tmp_path: Path) -> None:
    make_task(tmp_path)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    sample = json.loads(lines[4])
    box = {"type": "box", "label": "x", "xyxy": [0, 0, 5000, 5000]}
    sample["messages"][1]["content"] = [box]
    lines[4] = json.dumps(sample)
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(UserError, match="train4"):
        collect_stats(tmp_path)


def test_workers_give_equal_statistics(tmp_path: Path) -> None:
    make_task(tmp_path, num_samples=8 * SCAN_CHUNK_SIZE + 3)
    (tmp_path / "train70.png").write_bytes(b"")
    assert collect_stats(tmp_path, workers=2) == collect_stats(tmp_path)
    assert len(collect_stats(tmp_path).sample_indices) == 8 * SCAN_CHUNK_SIZE + 2


def test_large_dataset_is_sampled(tmp_path: Path) -> None:
    make_task(tmp_path)
    (tmp_path / "train3.png").write_bytes(b"no picture")
    (tmp_path / "train7.png").write_bytes(b"no picture")
    file = TrainFileSettings(path=tmp_path / "train.jsonl")
    corpus, data = load_corpus((file,)), DataSettings(train=(file,))
    renderer = NativeRenderer(ModelFolder(tmp_path / "tiny"), RULE)
    all_of_them = compute_dataset_stats(corpus, renderer, data, 0)
    some = compute_dataset_stats(corpus, renderer, data, 0, subset=[1, 3, 4, 9])
    assert (some.is_complete, all_of_them.is_complete) == (False, True)
    assert some.sample_indices == range(11)
    assert some.num_scanned == 4
    assert list(some.scanned_indices) == [1, 4, 9]
    assert some.skipped == ()
    assert some.num_tokens == round(11 / 4 * sum(glance.num_tokens for glance in some.sample_stats))
    glances = SampleStatsMap(corpus, some, renderer, data.max_length)
    assert {index: glances[index] for index in all_of_them.sample_indices} == dict(
        zip(all_of_them.sample_indices, all_of_them.sample_stats, strict=True)
    )
    # What cannot be used costs nothing, wherever its share of a step is dealt out.
    assert glances[3].num_tokens == glances[7].num_tokens == 0
    assert SampleStatsMap(corpus, some, renderer, max_length=5)[0].num_tokens == 0


def test_statistics_sample_is_deterministic() -> None:
    drawn = draw_subset(10_000_000)
    assert list(drawn) == list(draw_subset(10_000_000)) == sorted(set(drawn))
    assert 9_900 < len(drawn) <= 10_000
    assert 0 <= drawn[0] < 10_000
    assert 9_990_000 < drawn[-1] < 10_000_000
    assert list(drawn) != list(draw_subset(9_999_999))


def test_frequent_prompts_are_listed_without_rare_ones(tmp_path: Path) -> None:
    """A rare prompt may be private, and the manifest is published with the model."""
    # Numbers of samples and of images: a question with several answers has several samples.
    counts = {
        **{"Read it.": (5, 5), "my secret": (1, 1), "my other secret": (7, 1), " Where? ": (4, 2)},
        **{"": (2, 2), "x" * (MAX_PROMPT_CHARS + 1): (9, 9)},
    }
    samples = [
        {
            "id": f"{name[:9]} {number}",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": f"{number % num_images}.png"},
                        {"type": "text", "text": name},
                    ],
                },
                {"role": "assistant", "content": f"It {number}."},
                {"role": "user", "content": "Again"},
                {"role": "assistant", "content": "It."},
            ],
        }
        for name, (count, num_images) in counts.items()
        for number in range(count)
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples))
    corpus = load_corpus((TrainFileSettings(path=file),))
    stats = DatasetStats(range(len(samples)), (), 0, 0, 0)
    assert TrainingData(corpus, stats).list_frequent_prompts() == ("Read it.", "Where?")
    none = DatasetStats((), (), 0, 0, 0)
    assert TrainingData(corpus, none).list_frequent_prompts() == ()
