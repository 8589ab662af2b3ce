"""Dataset scan: every skipped sample is counted, no sample is truncated, large data are sampled."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_task import TinyTask, edit_samples, make_task, read_final_files, read_losses
from video_fixtures import write_video

from finesight.encode.packing import find_shared_prefix_length
from finesight.encode.renderer import NativeRenderer
from finesight.errors import UserError
from finesight.model_folder import ModelFolder
from finesight.samples.corpus import Corpus, draw_subset, load_corpus, open_sample_source
from finesight.samples.image_file import CorruptImageError
from finesight.samples.question_forms import MAX_PROMPT_CHARS
from finesight.settings.config import DataSettings, PixelRange, TrainFileSettings
from finesight.train import dataset_stats
from finesight.train.sample_scan import SCAN_CHUNK_SIZE

NUM_SAMPLES = 11


def open_task(folder: Path) -> tuple[Corpus, NativeRenderer]:
    renderer = NativeRenderer(
        ModelFolder(folder / "tiny"), PixelRange(min_pixels=784, max_pixels=7056)
    )
    return load_corpus((TrainFileSettings(path=folder / "train.jsonl"),)), renderer


def collect_stats(
    folder: Path, workers: int = 0, subset: list[int] | None = None, **settings: Any
) -> dataset_stats.DatasetStats:
    data = DataSettings(train=(TrainFileSettings(path=folder / "train.jsonl"),), **settings)
    return dataset_stats.compute_dataset_stats(*open_task(folder), data, workers, subset=subset)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_task(tmp_path)
    return tmp_path


def test_all_samples_are_counted(folder):
    found = collect_stats(folder)
    assert (found.sample_indices, found.skipped) == (tuple(range(NUM_SAMPLES)), ())
    corpus, renderer = open_task(folder)
    outlines = [renderer.tokenize(sample) for sample in corpus.read_samples()]
    for name in ("id", "num_tokens", "num_supervised_tokens", "num_patches"):
        expected = [getattr(outline, name) for outline in outlines]
        assert [getattr(sample, name) for sample in found.sample_stats] == expected
    assert found.num_tokens == sum(outline.num_tokens for outline in outlines)
    assert found.num_patches == sum(outline.num_patches for outline in outlines)
    assert found.prefix_length == find_shared_prefix_length(outlines) == outlines[0].spans[0].start
    with edit_samples(folder / "train.jsonl") as samples:
        samples[0]["messages"].insert(0, {"role": "system", "content": "Other words."})
    assert collect_stats(folder).prefix_length < found.prefix_length


def test_invalid_samples_are_skipped_with_reasons(folder):
    longest = max(sample.num_tokens for sample in collect_stats(folder).sample_stats)
    (folder / "train3.png").write_bytes(b"no picture")
    found = collect_stats(folder, max_length=longest - 1)
    reasons = dict(found.skipped)
    assert "not an image" in reasons.pop("train3")
    assert set(reasons.values()) == {f"over {longest - 1} tokens"}
    assert len(found.sample_indices) + len(found.skipped) == NUM_SAMPLES
    assert 3 not in found.sample_indices
    assert max(sample.num_tokens for sample in found.sample_stats) < longest
    with pytest.raises(UserError, match=r"expected: at most 40 tokens"):
        collect_stats(folder, max_length=40, on_invalid_sample="fail")
    with pytest.raises(CorruptImageError, match=r"train3\.png"):
        collect_stats(folder, on_invalid_sample="fail")
    for path in folder.glob("train*.png"):
        path.unlink()
    with pytest.raises(UserError, match=r"none of 11 samples[\s\S]*train0\.png"):
        collect_stats(folder)


def test_invalid_box_is_never_skipped(folder):
    with edit_samples(folder / "train.jsonl") as samples:
        box = {"type": "box", "label": "x", "xyxy": [0, 0, 5000, 5000]}
        samples[4]["messages"][1]["content"] = [box]
    with pytest.raises(UserError, match="train4"):
        collect_stats(folder)


def test_workers_give_equal_statistics(tmp_path):
    make_task(tmp_path, num_samples=8 * SCAN_CHUNK_SIZE + 3)
    (tmp_path / "train70.png").write_bytes(b"")
    found = collect_stats(tmp_path)
    assert collect_stats(tmp_path, workers=2) == found
    assert len(found.sample_indices) == 8 * SCAN_CHUNK_SIZE + 2


def test_statistics_of_a_subset_are_scaled(folder):
    for number in (3, 7):
        (folder / f"train{number}.png").write_bytes(b"no picture")
    full, some = collect_stats(folder), collect_stats(folder, subset=[1, 3, 4, 9])
    assert (some.is_complete, full.is_complete) == (False, True)
    assert (some.sample_indices, some.num_scanned) == (range(NUM_SAMPLES), 4)
    assert (list(some.scanned_indices), some.skipped) == ([1, 4, 9], ())
    assert some.num_tokens == round(11 / 4 * sum(one.num_tokens for one in some.sample_stats))
    corpus, renderer = open_task(folder)
    stats = dataset_stats.SampleStatsMap(corpus, some, renderer, max_length=8192)
    for index, expected in zip(full.sample_indices, full.sample_stats, strict=True):
        assert stats[index] == expected
    # An invalid sample costs nothing when the samples of a step are distributed.
    assert stats[3].num_tokens == stats[7].num_tokens == 0
    assert dataset_stats.SampleStatsMap(corpus, some, renderer, max_length=5)[0].num_tokens == 0


def test_frequent_prompts_are_listed_without_rare_ones(tmp_path):
    """A rare prompt may be private, and the manifest is published with the model."""
    # Numbers of samples and of images: a question with several answers has several samples.
    counts = {
        **{"Read it.": (5, 5), "my secret": (1, 1), "my other secret": (7, 1), " Where? ": (4, 2)},
        **{"": (2, 2), "x" * (MAX_PROMPT_CHARS + 1): (9, 9)},
    }
    lines = []
    for prompt, (count, num_images) in counts.items():
        for number in range(count):
            image = {"type": "image", "image": f"{number % num_images}.png"}
            turns = [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": [image, {"type": "text", "text": prompt}]},
                {"role": "assistant", "content": f"It {number}."},
                {"role": "user", "content": "Again"},
                {"role": "assistant", "content": "It."},
            ]
            lines.append(json.dumps({"id": f"{prompt[:9]} {number}", "messages": turns}) + "\n")
    file = tmp_path / "train.jsonl"
    file.write_text("".join(lines))
    corpus = load_corpus((TrainFileSettings(path=file),))
    marked = ("<image>Read it.", "<image> Where? ")
    for indices, prompts in ((range(len(lines)), marked), ((), ())):
        stats = dataset_stats.DatasetStats(indices, (), 0, 0)
        assert dataset_stats.TrainingData(corpus, stats).find_prompt_format().prompts == prompts


@pytest.fixture
def large_task(task: TinyTask, monkeypatch: pytest.MonkeyPatch) -> TinyTask:
    """Task whose eleven samples count as a large dataset, of which three are scanned."""
    monkeypatch.setattr("finesight.train.dataset_stats.MAX_FULL_SCAN_SAMPLES", NUM_SAMPLES - 1)
    monkeypatch.setattr("finesight.train.dataset_stats.PARTIAL_SCAN_SAMPLES", 3)
    return task


def corrupt_samples(task: TinyTask) -> dict[str, str]:
    scanned = draw_subset(NUM_SAMPLES, dataset_stats.PARTIAL_SCAN_SAMPLES)
    unscanned = [index for index in range(NUM_SAMPLES) if index not in scanned]
    broken, reversed_, long, damaged = unscanned[:4]
    path = task.folder / "train.jsonl"
    with edit_samples(path) as samples:
        samples[reversed_]["messages"].reverse()
        samples[long]["messages"][1]["content"] = "red " * 200
    lines = path.read_text().splitlines()
    lines[broken] = lines[broken][:-5]
    path.write_text("\n".join(lines) + "\n")
    (task.folder / f"train{damaged}.png").write_bytes(b"none")
    task.recipe["data"]["max_length"] = 100
    return {
        f"{path}:{broken + 1}": "broken JSON",
        f"{path}:{reversed_ + 1}": "roles are assistant, user",
        f"train{long}": "tokens",
        f"train{damaged}": "not an image",
    }


def test_statistics_of_large_dataset_are_estimates(large_task, monkeypatch):
    large_task.recipe["tune"] = {"language": "lora"}
    run = large_task.rewind_to_checkpoint()
    for text in (
        "data.train: 11 samples, too many for a full scan; 3 samples scanned, 0 of them invalid",
        "data.eval: 3 samples, ",
        "the dataset is too large for a full scan",
    ):
        assert text in large_task.console_output
    metrics = large_task.read_metrics()
    steps = [line for line in metrics if "loss" in line]
    assert sum(line["num_samples"] for line in steps) == 2 * NUM_SAMPLES
    num_tokens = sum(line["num_tokens"] for line in steps) / 2
    assert metrics[0]["data"]["train"]["num_tokens"] == pytest.approx(num_tokens, rel=0.2)
    # A full scan belongs to another run.
    monkeypatch.setattr("finesight.train.dataset_stats.MAX_FULL_SCAN_SAMPLES", NUM_SAMPLES)
    with pytest.raises(UserError, match=r"samples of data\.train"):
        large_task.run(resume=True)
    assert not (run / "result.json").exists()


def test_invalid_samples_of_large_dataset_are_found_while_reading(large_task):
    reasons = corrupt_samples(large_task)
    large_task.run("train.epochs=1")
    steps = [line for line in large_task.read_metrics() if "loss" in line]
    skipped = [name for line in steps for name in line["skipped_samples"]]
    assert sorted(skipped) == sorted(reasons)
    assert sum(line["num_samples"] for line in steps) == NUM_SAMPLES - len(reasons)
    lines = large_task.console_output.splitlines()
    for name, reason in reasons.items():
        (line,) = (line for line in lines if f"skipped {name}: " in line)
        assert reason in line
    with pytest.raises(UserError, match=r"broken JSON|roles are|tokens|not an image"):
        large_task.run("data.on_invalid_sample=fail", name="strict")


def test_resumed_run_on_large_dataset_equals_uninterrupted_run(large_task):
    corrupt_samples(large_task)
    run, whole = large_task.rewind_to_checkpoint(), large_task.folder / "whole"
    large_task.run(resume=True)
    assert read_losses(run) == read_losses(whole)
    assert read_final_files(run) == read_final_files(whole)


def test_fingerprint_covers_the_video_file(tmp_path):
    path = write_video(tmp_path / "1.mp4")
    video = {"type": "video", "video": path.name}
    turns = [{"role": "user", "content": [video]}, {"role": "assistant", "content": "x"}]
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"id": "1", "messages": turns}) + "\n")
    sample = open_sample_source(data).read_sample(0)
    assert dataset_stats.list_image_paths(sample) == {str(path)}
    state = dataset_stats.read_image_state(sample)
    assert dataset_stats.read_image_state(sample) == state
    write_video(path, num_frames=15)
    assert dataset_stats.read_image_state(sample)[0] != state[0]
