"""Tests of invalid input: exit code 2, a complete message, and no partial files."""

import errno
import json
import shutil
import zlib
from contextlib import chdir
from pathlib import Path

import pytest
from tiny_task import make_task, write_recipe

from finesight import storage
from finesight.cli.app import run_command

TRAIN = "train recipe.yaml output_dir=run "
STRICT = f"{TRAIN} data.on_invalid_sample=fail"
PREDICT = "predict done a.png --prompt Which?"
TURNS = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
SAMPLE = json.dumps({"id": "a", "messages": TURNS})
IMAGES = {f"task/train{n}.png": b"a letter" for n in range(11)}


def make_bomb() -> bytes:
    """Return a PNG of 10,000 x 10,000 black pixels with 1 bit each, about 12 KB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    side = (10_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([1, 0, 0, 0, 0]))
    pixels = chunk(b"IDAT", zlib.compress(bytes(10_000 * 1251), 9))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


BOMB = make_bomb()
# Command line, changed files (None: removed), and words of the message.
CASES: dict[str, tuple[str, dict[str, bytes | None], list[str]]] = {
    "missing-image": (STRICT, {"task/train3.png": None}, ["train3.png", "no such image"]),
    "missing-question": (PREDICT, {}, ["a.png", "no such image"]),
    "empty-data": (f"{TRAIN} data.train=a.jsonl", {"a.jsonl": b""}, ["a.jsonl", "no samples"]),
    "broken-line": (
        f"{TRAIN} data.train=a.jsonl",
        {"a.jsonl": f'{SAMPLE}\n{{"id": \n'.encode()},
        ["a.jsonl:2", "JSON"],
    ),
    "line-of-wrong-type": (
        f"{TRAIN} data.train=a.jsonl",
        {"a.jsonl": f"{SAMPLE}\n[]\n".encode()},
        ["a.jsonl:2"],
    ),
    "no-image": (STRICT, {"task/train3.png": b"a letter"}, ["train3.png", "not an image"]),
    "no-valid-image": (TRAIN, IMAGES, ["data", "none of 11 samples", "not an image"]),
    "no-image-for-predict": (PREDICT, {"a.png": b"a letter"}, ["a.png", "not an image"]),
    "bomb": (STRICT, {"task/train3.png": BOMB}, ["train3.png", "10000 x 10000", "at most"]),
    "bomb-for-predict": (PREDICT, {"a.png": BOMB}, ["a.png", "10000 x 10000", "at most"]),
    "model-without-weights": (TRAIN, {"task/tiny/model.safetensors": None}, ["tiny", "weights"]),
    "long-samples": (f"{TRAIN} data.max_length=3", {}, ["none of 11 samples"]),
    "long-warmup": (
        f"{TRAIN} train.warmup=50",
        {},
        ["train.warmup", "50 warmup steps in a run of 6 steps"],
    ),
    "two-adapters": (
        f"{TRAIN} model=done adapter=done/adapter",
        {},
        ["adapter", "already has an adapter", "remove adapter"],
    ),
}


@pytest.fixture(scope="module")
def template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a task and its finished run once."""
    folder = tmp_path_factory.mktemp("original")
    with chdir(folder):
        write_recipe(Path("recipe.yaml"), make_task(Path("task")) | {"output_dir": "none"})
        assert run_command(["train", "recipe.yaml", "output_dir=done"]) == 0
    return folder


@pytest.fixture(autouse=True)
def folder(template_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copy the task and run for a test that corrupts them, into the working directory."""
    shutil.copytree(template_folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def read_contents() -> dict[Path, tuple[int, int]]:
    files = [path for path in Path().rglob("*") if path.is_file()]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files}


def check_message(printed_text: str, words: list[str]) -> None:
    """Check location, problem, expected value and remedy."""
    message = printed_text[printed_text.index("error: ") :]
    for word in (*words, "\n  expected: ", "\n  remedy: "):
        assert word in message, message


@pytest.mark.parametrize("name", CASES)
def test_bad_input_exits_with_2_and_writes_no_files(name, cli):
    command, files, words = CASES[name]
    for file, content in files.items():
        if content is None:
            Path(file).unlink()
        else:
            Path(file).write_bytes(content)
    before = read_contents()
    check_message(cli(*command.split(), code=2).err, words)
    assert read_contents() == before
    assert not Path("run").exists()


@pytest.mark.parametrize(
    "name", ["optimizer.safetensors", "trainable.safetensors", "state.json", "sha256.json"]
)
@pytest.mark.parametrize("missing", [False, True], ids=["flipped bit", "missing"])
def test_damaged_checkpoint_is_rejected(name, missing, cli):
    Path("done/result.json").unlink()
    storage.remove_folder(Path("done/checkpoints/step-4"))
    file = Path("done/checkpoints/step-6", name)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if not missing:
        file.write_bytes(data)
    before = read_contents()
    resume = ("train", "recipe.yaml", "output_dir=done", "--resume")
    # A changed digest is reported at its file.
    location = "step-6" if name == "sha256.json" else name
    remedy = f"delete {file.parent.parent} to restart the run from step 0"
    check_message(cli(*resume, code=2).err, [location, remedy])
    assert read_contents() == before
    storage.remove_folder(file.parent)
    cli(*resume)


class FullDiskFor(storage.FileSystem):
    """File system without space for one file."""

    def __init__(self, name: str) -> None:
        self.name = name

    def refuse(self, path: Path) -> None:
        if self.name in path.name:
            raise OSError(errno.ENOSPC, "no space")

    def create(self, path: Path) -> int:
        self.refuse(path)
        return super().create(path)

    def open_append(self, path: Path) -> int:
        self.refuse(path)
        return super().open_append(path)

    def sync_path(self, path: Path) -> None:
        self.refuse(path)
        super().sync_path(path)


@pytest.mark.parametrize(
    "name",
    [
        *("manifest.json", "recipe.yaml", "skipped_samples.jsonl", "metrics.jsonl"),
        *("optimizer.safetensors", "sha256.json", "param_audit.json", "model.safetensors"),
        *("adapter_model.safetensors", "images.safetensors", "result.json"),
    ],
)
def test_full_disk_leaves_no_partial_files(name, cli):
    before = read_contents()
    with storage.use_file_system(FullDiskFor(name)):
        error = cli(*TRAIN.split(), code=2).err
    check_message(error, ["cannot be written: no space left on device"])
    assert {path: read_contents()[path] for path in before} == before
    run = Path("run")
    assert [path for path in run.rglob("*") if path.name.startswith(".")] == []
    for full in (run / "model", run / "adapter", *run.glob("checkpoints/*")):
        if full.exists():
            storage.verify_folder(full)
    assert not (run / "result.json").exists()
    cli(*TRAIN.split(), "--resume")
