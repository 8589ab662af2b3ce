"""Image inspection in worker processes: each content once, in input order."""

import json
import os
import subprocess
import sys
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np
import pytest
from image_fixtures import encode_image, write_gray_image
from PIL import Image, ImageDraw
from shape_images import write_shape_images

from finesight.errors import UserError
from finesight.ingest.check.image_catalog import (
    MIN_PARALLEL_SAMPLES,
    ImageCatalog,
    NearDuplicateIndex,
    compute_thumbnail,
    has_contrast,
    inspect_images,
    is_same_image,
    open_executor,
    prefetch_map,
)
from finesight.samples.image_file import TruncatedImageError
from finesight.vision.image_processing import load_image


class CountingPool(Executor):
    """Does the work here and counts the files that each kind of work was asked for."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}

    def submit(self, work, /, *args, **kwargs):
        self.files[work.__name__] = self.files.get(work.__name__, 0) + len(args[-1])
        future: Future = Future()
        future.set_result(work(*args, **kwargs))
        return future


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(10):
        write_gray_image(tmp_path / f"{number}.png", gray_level=number)
    for number in range(10):
        (tmp_path / f"copy-{number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes())
        (tmp_path / f"link-{number}.png").hardlink_to(tmp_path / f"{number}.png")
    return tmp_path


def image_groups(folder: Path) -> list[list[str]]:
    """Groups of three names of each content, all names twice, and one without a file."""
    groups = [
        [str(folder / f"{kind}{number}.png") for kind in ("", "copy-", "link-")]
        for number in range(10)
    ]
    return [*groups, *groups, [str(folder / "gone.png")]]


def test_each_file_is_hashed_once_and_each_content_decoded_once(folder):
    pool = CountingPool()
    album = ImageCatalog(pool)
    assert list(album.process_groups(image_groups(folder), lambda group: group)) == image_groups(
        folder
    )
    assert pool.files == {"_hash_files": 20, "inspect_images": 10}
    assert (len(album), len(album.image_infos)) == (31, 11)
    for group in image_groups(folder)[:10]:
        assert len({album.image_index(path) for path in group}) == 1
        assert album[group[0]].size == (20, 40)
    assert album[str(folder / "gone.png")].issue_code == "image-missing"


def test_falls_back_to_threads_without_multiprocessing(folder, monkeypatch):
    def refused(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("multiprocessing.context.BaseContext.Lock", refused)
    monkeypatch.setattr("multiprocessing.context.BaseContext.BoundedSemaphore", refused)
    with open_executor(MIN_PARALLEL_SAMPLES) as pool:
        assert pool.submit(os.getpid).result() == os.getpid()


def crash_while_reading() -> None:
    with open_executor(MIN_PARALLEL_SAMPLES) as pool:
        pool.submit(os._exit, 3).result()


def test_dead_worker_raises_user_error():
    with pytest.raises(UserError, match="an image worker process died"):
        crash_while_reading()


def test_image_workers_do_not_import_torch():
    code = (
        "import sys, json, finesight.ingest.check.image_catalog;"
        " print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "torch" not in json.loads(done.stdout)


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_detected_at_reduced_size(tmp_path, progressive):
    noise = Image.effect_noise((320, 240), 60).convert("RGB")
    full = tmp_path / "whole.jpg"
    noise.save(full, quality=80, progressive=progressive)
    content = full.read_bytes()
    small = load_image(full, min_side=64)
    assert small.size == (160, 120), "a quarter would have a side below 64"
    cut = tmp_path / "cut.jpg"
    for end in (len(content) // 3, len(content) // 2, len(content) - 200, len(content) - 3):
        cut.write_bytes(content[:end])
        for at_least in (None, 64):
            with pytest.raises(TruncatedImageError):
                load_image(cut, min_side=at_least)
        assert inspect_images([str(cut)])[0].issue_code == "image-truncated"


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = write_shape_images(tmp_path_factory.mktemp("alike") / "scenes", 60, seed=2)
    return sorted((folder / "images").iterdir())


def reencode(path: Path, out: Path, kind: str, scale: float = 1.0, quality: int = 50) -> Path:
    image = Image.open(path).convert("RGB")
    size = [max(1, round(side * scale)) for side in image.size]
    out.write_bytes(encode_image(image.resize((size[0], size[1])), kind, quality=quality))
    return out


def build_index(paths: list[Path]) -> NearDuplicateIndex:
    images = [load_image(path) for path in paths]
    return NearDuplicateIndex(
        [compute_thumbnail(i) for i in images], [(i.height, i.width) for i in images]
    )


def find_candidates(index: NearDuplicateIndex, path: Path) -> list[int]:
    image = load_image(path, min_side=64)
    size = load_image(path).size
    return index.find_similar(compute_thumbnail(image), (size[1], size[0]))


@pytest.mark.parametrize(
    ("kind", "scale", "quality"),
    [("JPEG", 1.0, 40), ("JPEG", 0.7, 75), ("JPEG", 1.25, 85), ("PNG", 0.9, 0), ("WEBP", 1.0, 60)],
)
def test_reencoded_image_is_found_as_duplicate(scenes, tmp_path, kind, scale, quality):
    index = build_index(scenes)
    for location in range(0, len(scenes), 6):
        copy = reencode(scenes[location], tmp_path / f"{location}.{kind}", kind, scale, quality)
        found = find_candidates(index, copy)
        assert location in found[:2], f"{scenes[location].name} as {kind} is not among {found}"
        assert is_same_image(scenes[location], copy), f"{scenes[location].name} as {kind}"


def test_different_scenes_are_not_duplicates(scenes):
    index = build_index(scenes)
    pairs = [
        (a, b) for a in range(len(scenes)) for b in find_candidates(index, scenes[a]) if b != a
    ]
    same = [(a, b) for a, b in pairs if is_same_image(scenes[a], scenes[b])]
    assert same == []


def formula(path: Path, words: str) -> Path:
    image = Image.new("L", (320, 48), 255)
    ImageDraw.Draw(image).text((8, 12), words, fill=0, font_size=20)
    image.save(path)
    return path


@pytest.mark.parametrize("other", ["a + b = 7 - c / 4 + x", "a + b = 3 - d / 4 + x"])
def test_one_changed_character_is_not_a_duplicate(tmp_path, other):
    one = formula(tmp_path / "one.png", "a + b = 3 - c / 4 + x")
    two = formula(tmp_path / "two.png", other)
    assert find_candidates(build_index([one]), two) == [0], "they look alike"
    assert not is_same_image(one, two)
    assert is_same_image(one, reencode(one, tmp_path / "one.jpg", "JPEG", 1.0, 60))


def test_changed_color_is_not_a_duplicate(tmp_path):
    # The same brightness: only the colours tell them apart.
    for name, colour in (("one", (200, 60, 60)), ("two", (60, 122, 106))):
        image = Image.new("RGB", (160, 120), (250, 250, 250))
        ImageDraw.Draw(image).ellipse((30, 30, 110, 100), fill=colour)
        image.save(tmp_path / f"{name}.png")
    assert not is_same_image(tmp_path / "one.png", tmp_path / "two.png")


def test_index_finds_all_near_thumbnails():
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 256, (200, 256)).astype(np.uint8)
    near = (grey.astype(np.int16) + rng.integers(-3, 4, grey.shape)).clip(0, 255).astype(np.uint8)
    index = NearDuplicateIndex([row.tobytes() for row in grey], [(100, 200)] * 200)
    for location, row in enumerate(near):
        assert index.find_similar(row.tobytes(), (100, 200)) == [location]


def test_different_aspect_ratio_is_not_a_duplicate(scenes, tmp_path):
    wide = tmp_path / "wide.png"
    Image.open(scenes[0]).resize((336, 168)).save(wide)
    assert find_candidates(build_index(scenes), wide) == []


def test_prefetch_keeps_order_and_limits_pending_work():
    started: list[int] = []
    finished: list[int] = []

    def begin(item: int) -> int:
        started.append(item)
        assert len(started) - len(finished) <= 3, f"{started} begun, {finished} finished"
        return item * item

    def finish(item: int, square: int) -> tuple[int, int]:
        finished.append(item)
        return item, square

    assert list(prefetch_map(range(9), begin, finish, max_pending=2)) == [
        (n, n * n) for n in range(9)
    ]


def test_blank_page_has_no_duplicates(tmp_path):
    blank = tmp_path / "blank.png"
    Image.new("L", (100, 50), 255).save(blank)
    assert not has_contrast(compute_thumbnail(Image.open(blank)))
    assert find_candidates(build_index([blank]), blank) == []
