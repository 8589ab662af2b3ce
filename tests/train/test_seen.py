"""Features of pictures that a frozen tower saw once: the same as seen anew in every step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from looking_run import LORA, all_features, look, seen_by, session_of
from PIL import Image
from small_run import Task, final_files, losses, make_task, write_recipe

from finesight.data.headers import DamagedPicture
from finesight.data.lines import Unreadable
from finesight.encode.encoded import Outline
from finesight.errors import Interrupted
from finesight.model.tiny import TinyFamily
from finesight.report.facts import phases
from finesight.report.record import read_record
from finesight.storage import remove_folder
from finesight.train import looking, loop
from finesight.train.checkpoint import VALUES
from finesight.train.loader import Step
from finesight.train.prepare import Session
from finesight.train.step import Taken, take_step
from finesight.train.stop import Stop

TESTS = Path(__file__).parents[1]
STARTS = {"started", "seen_s"}
CACHES = ["memory", "disk"]


@pytest.mark.parametrize("cache", CACHES)
def test_features_of_a_pack_are_those_of_its_pictures_seen_anew(tmp_path: Path, cache: str) -> None:
    session = session_of(tmp_path / "task", cache=cache)
    seen = seen_by(session)
    bare = session.data.without_pictures(seen.known)
    for number in range(len(session.course)):
        step, without = session.data.step(number), bare.step(number)
        assert step.members == without.members
        for batch, other, known in zip(step.packs, without.packs, without.known, strict=True):
            assert (other.grids, len(other.patches_ND)) == ((), 0)
            assert torch.equal(batch.ids_T, other.ids_T)
            expected = session.model.see(batch.patches_ND, batch.grids)
            torch.testing.assert_close(seen.of(known), expected)


@pytest.mark.parametrize("family", get_args(TinyFamily))
def test_every_place_has_the_bits_that_the_tower_gives(tmp_path: Path, family: TinyFamily) -> None:
    """Chunk by chunk, with features of lower layers and of fixed size too; and where another run
    found them."""
    session = session_of(tmp_path / "task", mixed=True, family=family, cache="memory")
    seen = seen_by(session)
    features_MKD, shown = seen.known.features_AKD, seen.known.shown
    assert len(shown.sights) < 10, "equal pictures are one"
    for chunk in shown.chunks():
        spans = tuple(sight.span for sight in shown.sights[chunk.start : chunk.stop])
        empty = torch.empty(0, dtype=torch.int32).numpy()
        outline = Outline("", empty, empty > 0, empty.reshape(3, 0), spans)
        patches = torch.from_numpy(session.renderer.with_patches(outline).patches_ND)
        expected = session.model.see(patches, [span.grid for span in spans])
        bounds = seen.known.bounds_P1
        assert torch.equal(features_MKD[bounds[chunk.start] : bounds[chunk.stop]], expected)
    expected = all_features(session, seen)
    for cache, found in (("disk", 0), ("disk", len(shown.sights)), ("auto", len(shown.sights))):
        other = session_of(tmp_path / "task", cache=cache)
        looked = look(other)
        assert (looked.place, looked.found) == ("memory" if cache == "auto" else cache, found)
        assert looked.seen is not None
        assert torch.equal(all_features(other, looked.seen), expected)


def _insert_videos(data: Path, frames: dict[int, int]) -> None:
    """Put a video of so many frames before the image of each of these samples."""
    samples = [json.loads(line) for line in data.read_text().splitlines()]
    for number, count in frames.items():
        names = [f"{data.stem}-{number}-{frame}.png" for frame in range(count)]
        for frame, name in enumerate(names):
            Image.new("RGB", (56, 84), (frame * 40, number, 9)).save(data.parent / name)
        video = {"type": "video", "frames": names, "fps": 1.0}
        samples[number]["messages"][0]["content"].insert(0, video)
    data.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
@pytest.mark.parametrize("cache", CACHES)
def test_videos_beside_stills(tmp_path: Path, family: TinyFamily, cache: str) -> None:
    """Patches of a still hold one frame where no video is among them, and two in its company."""
    folder = tmp_path / "task"
    session_of(folder, family=family)
    _insert_videos(folder / "train.jsonl", {3: 5, 7: 2})
    session = session_of(folder, cache=cache)
    seen = seen_by(session)
    assert len(seen.known.numbers([3])) > 1
    for number in range(len(session.course)):
        step = session.data.step(number)
        bare = session.data.without_pictures(seen.known).step(number)
        for batch, known in zip(step.packs, bare.known, strict=True):
            expected = session.model.see(batch.patches_ND, batch.grids)
            torch.testing.assert_close(seen.of(known), expected)


def test_run_trains_and_evaluates_on_images_and_videos_in_one_batch(tmp_path: Path) -> None:
    """With the vision cache and without: the same losses and the same answers."""
    task = Task(tmp_path)
    _insert_videos(tmp_path / "train.jsonl", {3: 5, 7: 2, 8: 1})
    _insert_videos(tmp_path / "eval.jsonl", {1: 3, 2: 1})
    settings = {"metric": "ocr", "every": 3, "batch": 8, "max_new_tokens": 3}
    for cache in ("never", "memory"):
        task.run(f"train.cache={cache}", name=cache, tune=LORA, eval=settings)
    first, second = (losses(tmp_path / cache) for cache in ("never", "memory"))
    assert [loss for _, loss in first] == pytest.approx([loss for _, loss in second], rel=1e-5)
    for name in ("before", "step-3", "after"):
        file = Path("predictions") / f"{name}.jsonl"
        assert (tmp_path / "never" / file).read_text() == (tmp_path / "memory" / file).read_text()


def test_a_run_learns_the_same_with_features_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(tmp_path / "anew")
    steps = [session.data.step(number) for number in range(len(session.course))]
    anew = [take_step(session, step, Stop()).wait()[0] for step in steps]
    task = Task(tmp_path / "kept")
    found = []
    for number, name in enumerate(("memory", "disk", "disk-again", "auto")):
        settings = f"train.cache={name.partition('-')[0]}", f"train.workers={number % 3}"
        task.run(*settings, name=name, tune=LORA)
        found.append(losses(tmp_path / "kept" / name))
    # Places alone travel then, and features are gathered by the device that computes.
    monkeypatch.setattr(looking, "choose_place", lambda *inputs: "gpu")
    task.run(name="gpu", tune=LORA)
    assert "are kept on the GPU" in task.screen
    found.append(losses(tmp_path / "kept" / "gpu"))
    assert [loss for _, loss in found[0]] == pytest.approx(anew, rel=1e-4)
    assert found[1:] == found[:1] * 4, "bit for bit, wherever they were kept"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("budget", [1, 96])
def test_samples_without_a_picture_and_with_two(tmp_path: Path, budget: int, cache: str) -> None:
    """Alone in a pack and among others."""
    session, other = (
        session_of(tmp_path / name, mixed=True, pack_tokens=budget, cache=cache)
        for name in ("kept", "anew")
    )
    seen = seen_by(session)
    assert [number for number in range(11) if not seen.known.numbers([number])] == [1, 6]
    assert len(seen.known.numbers([2])) == 2
    bare, texts, pairs = session.data.without_pictures(seen.known), 0, 0
    for number in range(len(session.course)):
        step = other.data.step(number)
        texts += sum(not batch.grids for batch in step.packs)
        pairs += sum(2 in members and len(members) > 1 for members in step.members)
        anew = take_step(other, step, Stop()).wait()
        kept = take_step(session, bare.step(number), Stop(), seen).wait()
        assert kept == pytest.approx(anew, rel=1e-4)
    assert (texts, pairs) == ((4, 0) if budget == 1 else (0, 2))


def test_looking_takes_time_that_is_noted(tmp_path: Path) -> None:
    task = Task(tmp_path)
    task.run(tune=LORA)
    (tmp_path / "run" / "result.json").unlink()
    remove_folder(tmp_path / "run" / "checkpoints" / "step-6")
    task.run(tune=LORA, resume=True)
    lines = task.history()
    noted = [line for line in lines if "seen_s" in line]
    pictures = noted[0]["pictures"]
    assert [line["step"] for line in noted] == [0, 4]
    assert [line["features"]["found"] for line in noted] == [0, pictures]
    assert all(line["seen_s"] > 0 for line in noted)
    assert noted[0]["features"]["why"] != noted[1]["features"]["why"]
    assert noted[1]["features"]["why"] in task.screen
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4, 5, 6]
    assert lines.index(noted[0]) < next(i for i, line in enumerate(lines) if "loss" in line)
    record = read_record(tmp_path / "run")
    assert phases(record)[1].seconds == pytest.approx(sum(line["seen_s"] for line in noted))


def test_nothing_is_looked_at_after_the_last_step(tmp_path: Path) -> None:
    task = Task(tmp_path)
    task.run(tune=LORA)
    (tmp_path / "run" / "result.json").unlink()
    task.run(tune=LORA, resume=True)
    kinds = [
        "started" if "started" in line else "seen" for line in task.history() if STARTS & set(line)
    ]
    assert kinds == ["started", "seen", "started"]


def test_work_that_is_not_done_is_not_counted(tmp_path: Path) -> None:
    session = session_of(tmp_path / "task")
    seen, step = seen_by(session), session.data.step(0)
    bare = session.data.without_pictures(seen.known).step(0)
    whole, kept = take_step(session, step, Stop()), take_step(session, bare, Stop(), seen)
    assert kept.operations < whole.operations


def test_a_gpu_that_is_full_while_looking_costs_the_run_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = session_of(tmp_path / "task", cache="memory")

    def see(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    monkeypatch.setattr(session.model, "see", see)
    looked = look(session)
    assert looked.seen is None
    assert "memory was full (CUDA out of memory. Tried to allocate 2 GiB.)" in looked.why


def test_a_damaged_picture_costs_its_sample_alone(tmp_path: Path) -> None:
    """In every run: what its chunk lacks is not taken from disk."""
    task = Task(tmp_path)
    picture = tmp_path / "train3.png"
    picture.write_bytes(picture.read_bytes()[:-30])
    found = []
    for name in ("memory", "disk", "disk-again", "never"):
        task.run(f"train.cache={name.partition('-')[0]}", name=name, tune=LORA)
        lines = task.history(name)
        assert [id for line in lines for id in line.get("dropped", ())] == ["train3", "train3"]
        found.append([loss for _, loss in losses(tmp_path / name)])
    assert found[0] == found[1] == found[2]
    assert found[0] == pytest.approx(found[3], rel=1e-4)
    refusing = task.recipe["data"] | {"unusable": "refuse"}
    with pytest.raises(DamagedPicture, match=r"train3\.png: cut off"):
        task.run(name="refused", tune=LORA, data=refusing)


def test_a_picture_that_changes_its_size_on_the_way_is_not_guessed(tmp_path: Path) -> None:
    session = session_of(tmp_path / "task")
    seen = seen_by(session)
    with pytest.raises(DamagedPicture, match=r"png: a picture takes 99 places"):
        seen.known.check(0, 99)


def test_a_run_cut_off_between_looking_and_learning_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assets: Path
) -> None:
    """Features come from disk then, or are looked at again where they are gone, or have another
    place: always the same bits."""
    task = Task(tmp_path)
    task.run("train.cache=memory", name="whole", tune=LORA)

    def cut(*inputs: object) -> None:
        raise Interrupted("cut off")

    for name, first, then in (
        ("a", "auto", "disk"),
        ("b", "auto", "auto"),
        ("c", "disk", "memory"),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(loop, "take_step", cut)
            with pytest.raises(Interrupted, match="cut off"):
                task.run(f"train.cache={first}", name=name, tune=LORA)
        if name == "b":
            for file in assets.rglob("*.safetensors"):
                file.unlink()
        task.run(f"train.cache={then}", name=name, tune=LORA, resume=True)
        assert losses(tmp_path / name) == losses(tmp_path / "whole")
        ends = [tmp_path / run / "checkpoints" / "step-6" / VALUES for run in (name, "whole")]
        assert ends[0].read_bytes() == ends[1].read_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_features_lost_from_disk_cost_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, assets: Path, workers: int
) -> None:
    """They end the run with a checkpoint of what was learned so far; it goes on to the same end."""
    task = Task(tmp_path)
    settings = "train.cache=disk", f"train.workers={workers}", "train.save_every=6"
    task.run(*settings, name="whole", tune=LORA)
    real = loop.take_step

    def taking(session: Session, step: Step, *rest: Any) -> Taken:
        if step.number == 1:
            for file in assets.rglob("*.safetensors"):
                file.unlink()
        return real(session, step, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "take_step", taking)
        with pytest.raises(Unreadable, match=r"features of pictures cannot be read again"):
            task.run(*settings, tune=LORA)
    assert 2 <= len(losses(tmp_path / "run")) < 6
    task.run(*settings, tune=LORA, resume=True)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def unfinished(task: Task, *overrides: str) -> None:
    """A run whose last two steps are still to come."""
    task.run(*overrides, tune=LORA)
    (task.folder / "run" / "result.json").unlink()
    remove_folder(task.folder / "run" / "checkpoints" / "step-6")


def test_a_run_goes_on_as_it_began(tmp_path: Path) -> None:
    task = Task(tmp_path)
    unfinished(task, "train.cache=never")
    whole = losses(tmp_path / "run")
    task.run(tune=LORA, resume=True)
    assert "pictures are looked at in every step: so the run began" in task.screen
    assert losses(tmp_path / "run") == whole


def test_a_run_that_cannot_go_on_as_it_began_says_so(tmp_path: Path) -> None:
    task = Task(tmp_path)
    unfinished(task)
    whole = losses(tmp_path / "run")
    task.run("train.cache=never", tune=LORA, resume=True)
    assert "every step: train.cache=never; they were known until here" in task.screen
    found = losses(tmp_path / "run")
    assert found == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in whole]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_resumed_run_ends_like_an_uninterrupted_one(tmp_path: Path, precision: str) -> None:
    """Stopped during the fifth call of the model, and gone on with in a new process; in bf16 with
    products, norms and dropout of its own."""
    changed = make_task(tmp_path / "task") | {"tune": LORA | {"embeddings": "full"}}
    recipe = write_recipe(tmp_path / "recipe.yaml", changed, precision=precision)

    def trained(*points: str) -> list[str]:
        command = [sys.executable, str(TESTS / "stopping.py"), str(recipe), str(tmp_path), "term"]
        environment = os.environ | {"PYTHONPATH": str(TESTS)}
        done = subprocess.run([*command, *points], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return [line.split()[1] for line in done.stdout.splitlines()]

    assert trained("whole:0", "parts:5") == ["done", "stopped"]
    assert 0 < len(losses(tmp_path / "parts")) < 6
    assert trained("parts:0") == ["done"]
    begun = json.loads((tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()[0])
    assert begun["precision"] == precision
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    expected, found = (final_files(tmp_path / name) for name in ("whole", "parts"))
    assert found == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_every_place_on_a_gpu(tmp_path: Path) -> None:
    """Where the tower is off the card while steps run, and back to measure."""
    task = Task(tmp_path)
    settings = "train.device=cuda", "train.precision=bf16", "train.workers=2"
    found: dict[str, Any] = {}
    for cache in ("never", "auto", "memory", "disk"):
        evaluation = {"metric": "classification", "every": 2, "max_new_tokens": 4}
        task.run(f"train.cache={cache}", *settings, name=cache, tune=LORA, eval=evaluation)
        found[cache] = [loss for _, loss in losses(tmp_path / cache)]
        places = [line["features"]["place"] for line in task.history(cache) if "features" in line]
        assert places == [{"never": None, "auto": "gpu", "memory": "gpu"}.get(cache, cache)]
        assert found[cache] == pytest.approx(found["never"], rel=0.02)
