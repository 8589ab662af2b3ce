"""Tests of invalid input: exit code 2, a complete message, and no partial files."""

from __future__ import annotations

import errno
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_task import make_task, write_recipe

from finesight import storage
from finesight.cli.app import run_command


@pytest.fixture(scope="module")
def template_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create a task and its finished run once."""
    folder = tmp_path_factory.mktemp("original")
    recipe = write_recipe(
        folder / "recipe.yaml", make_task(folder / "task") | {"output_dir": "none"}
    )
    assert run_command(["train", str(recipe), f"output_dir={folder / 'done'}"]) == 0
    return folder


@pytest.fixture
def folder(template_folder: Path, tmp_path: Path) -> Path:
    """Copy the task and run for a test that corrupts them."""
    shutil.copytree(template_folder, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "recipe.yaml").read_text()
    (tmp_path / "recipe.yaml").write_text(text.replace(str(template_folder), str(tmp_path)))
    return tmp_path


def read_contents(folder: Path) -> dict[Path, tuple[int, int]]:
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*") if p.is_file()}


def train(folder: Path, *more: str, output_dir: str = "run") -> list[str]:
    return ["train", str(folder / "recipe.yaml"), f"output_dir={folder / output_dir}", *more]


def check_message(printed_text: str, words: tuple[str, ...]) -> None:
    """Check location, problem, expected value and remedy, without a traceback."""
    message = printed_text[printed_text.index("error: ") :]
    assert "Traceback" not in printed_text
    for word in (*words, "\n  expected: ", "\n  remedy: "):
        assert word in message, message


def with_lines(folder: Path, *lines: str) -> str:
    """Write a data file with these lines after the first valid one."""
    good = (folder / "task" / "train.jsonl").read_text().splitlines()[0]
    data = folder / "task" / "bad.jsonl"
    data.write_text("".join(f"{line}\n" for line in (good, *lines)))
    return f"data.train={data}"


def unknown_setting(folder: Path) -> list[str]:
    text = (folder / "recipe.yaml").read_text().replace("  batch_size: 4", "  bach_size: 4")
    (folder / "recipe.yaml").write_text(text)
    return train(folder)


def unknown_override(folder: Path) -> list[str]:
    return train(folder, "train.learnig_rate=1e-4")


def wrong_type(folder: Path) -> list[str]:
    return train(folder, "train.batch_size=many")


def endless_epochs(folder: Path) -> list[str]:
    return train(folder, "train.epochs=.inf")


def wrong_betas(folder: Path) -> list[str]:
    return train(folder, "train.betas=[0.9, 1.5]")


def missing_recipe(folder: Path) -> list[str]:
    return ["train", str(folder / "recpe.yaml")]


def missing_data(folder: Path) -> list[str]:
    return train(folder, f"data.train={folder / 'none.jsonl'}")


def missing_image(folder: Path) -> list[str]:
    (folder / "task" / "train3.png").unlink()
    return train(folder, "data.on_invalid_sample=fail")


def missing_question(folder: Path) -> list[str]:
    return ["predict", str(folder / "done"), str(folder / "none.png"), "--prompt", "Which colour?"]


def empty_data(folder: Path) -> list[str]:
    (folder / "empty.jsonl").touch()
    return train(folder, f"data.train={folder / 'empty.jsonl'}")


def broken_line(folder: Path) -> list[str]:
    return train(folder, with_lines(folder, '{"id": '))


def line_of_wrong_type(folder: Path) -> list[str]:
    return train(folder, with_lines(folder, "[]"))


def not_an_image(folder: Path) -> list[str]:
    (folder / "task" / "train3.png").write_text("a letter")
    return train(folder, "data.on_invalid_sample=fail")


def no_valid_image(folder: Path) -> list[str]:
    for path in (folder / "task").glob("train*.png"):
        path.write_text("a letter")
    return train(folder)


def not_an_image_for_predict(folder: Path) -> list[str]:
    (folder / "letter.png").write_text("a letter")
    return ["predict", str(folder / "done"), str(folder / "letter.png"), "--prompt", "Which?"]


def bomb(path: Path) -> None:
    """Write a PNG of 10,000 x 10,000 black pixels with 1 bit each, about 12 KB."""

    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return len(data).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")

    side = (10_000).to_bytes(4, "big")
    pixels = zlib.compress(bytes(10_000 * 1251), 9)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", side + side + bytes([1, 0, 0, 0, 0]))
        + chunk(b"IDAT", pixels)
        + chunk(b"IEND", b"")
    )
    assert 11_000 < path.stat().st_size < 13_000


def bomb_in_training_data(folder: Path) -> list[str]:
    bomb(folder / "task" / "train3.png")
    return train(folder, "data.on_invalid_sample=fail")


def bomb_for_predict(folder: Path) -> list[str]:
    bomb(folder / "bomb.png")
    return ["predict", str(folder / "done"), str(folder / "bomb.png"), "--prompt", "Which?"]


def model_without_weights(folder: Path) -> list[str]:
    (folder / "task" / "tiny" / "model.safetensors").unlink()
    return train(folder)


def wrong_family(folder: Path) -> list[str]:
    path = folder / "task" / "tiny" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llava"}))
    return train(folder)


def missing_model(folder: Path) -> list[str]:
    return train(folder, f"model={folder / 'absent'}")


def all_samples_too_long(folder: Path) -> list[str]:
    return train(folder, "data.max_length=3")


def warmup_too_long(folder: Path) -> list[str]:
    return train(folder, "train.warmup=50")


def two_adapters(folder: Path) -> list[str]:
    adapter = folder / "done" / "adapter"
    return train(folder, f"model={folder / 'done'}", f"adapter={adapter}")


def name_too_long(folder: Path) -> list[str]:
    return train(folder, output_dir="long" * 100)


def folder_below_file(folder: Path) -> list[str]:
    return train(folder, output_dir="recipe.yaml/run")


def another_run(folder: Path) -> list[str]:
    return train(folder, output_dir="done")


def other_files(folder: Path) -> list[str]:
    return train(folder, output_dir="task")


CASES: dict[Callable[[Path], list[str]], tuple[str, ...]] = {
    unknown_setting: (
        "recipe.yaml:10",
        "train.bach_size: unknown setting",
        "did you mean train.batch_size?",
    ),
    unknown_override: ("override train.learnig_rate", "did you mean train.learning_rate"),
    wrong_type: ("override train.batch_size=many", "'many'", "an integer"),
    endless_epochs: ("train.epochs", "inf", "a finite number"),
    wrong_betas: ("train.betas.1", "1.5", "a number below 1.0"),
    missing_recipe: ("recpe.yaml", "no such file", "recipe.yaml?"),
    missing_data: ("none.jsonl", "no such file"),
    missing_image: ("train3.png", "no such image"),
    missing_question: ("none.png", "no such image"),
    empty_data: ("empty.jsonl", "no samples"),
    broken_line: ("bad.jsonl:2", "JSON"),
    line_of_wrong_type: ("bad.jsonl:2",),
    not_an_image: ("train3.png", "not an image"),
    no_valid_image: ("data", "none of 11 samples", "not an image"),
    not_an_image_for_predict: ("letter.png", "not an image"),
    bomb_in_training_data: ("train3.png", "10000 x 10000", "at most"),
    bomb_for_predict: ("bomb.png", "10000 x 10000", "at most"),
    model_without_weights: ("tiny", "weights"),
    wrong_family: ("config.json", "llava", "qwen2_vl"),
    missing_model: ("absent",),
    all_samples_too_long: ("none of 11 samples",),
    warmup_too_long: ("train.warmup", "50 warmup steps in a run of 6 steps"),
    two_adapters: ("adapter", "already has an adapter", "remove adapter"),
    name_too_long: ("longlong", "file name too long", "shorter"),
    folder_below_file: ("recipe.yaml/run", "not a directory"),
    another_run: ("done", "contains a finished run", "output_dir="),
    other_files: ("task", "but no run"),
}


@pytest.mark.parametrize("spoil", CASES, ids=lambda spoil: spoil.__name__)
def test_bad_input_exits_with_2_and_writes_no_files(
    folder: Path, spoil: Callable[[Path], list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = spoil(folder)
    before = read_contents(folder)
    assert run_command(arguments) == 2
    check_message(capsys.readouterr().err, CASES[spoil])
    assert read_contents(folder) == before
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    "name", ["optimizer.safetensors", "trainable.safetensors", "state.json", "sha256.json"]
)
@pytest.mark.parametrize("missing", [False, True], ids=["flipped bit", "missing"])
def test_damaged_checkpoint_is_rejected(
    folder: Path, name: str, missing: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "done" / "result.json").unlink()
    storage.remove_folder(folder / "done" / "checkpoints" / "step-4")
    file = folder / "done" / "checkpoints" / "step-6" / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if not missing:
        file.write_bytes(data)
    before = read_contents(folder)
    assert run_command(train(folder, "--resume", output_dir="done")) == 2
    # A changed digest is reported at its file.
    location = "step-6" if name == "sha256.json" else name
    remedy = f"delete {file.parent.parent} to restart the run from step 0"
    check_message(capsys.readouterr().err, (location, remedy))
    assert read_contents(folder) == before
    storage.remove_folder(file.parent)
    assert run_command(train(folder, "--resume", output_dir="done")) == 0


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
def test_full_disk_leaves_no_partial_files(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_contents(folder)
    with storage.use_file_system(FullDiskFor(name)):
        assert run_command(train(folder)) == 2
    check_message(capsys.readouterr().err, ("cannot be written: no space left on device",))
    assert {path: read_contents(folder)[path] for path in before} == before
    written = folder / "run"
    assert [path for path in written.rglob("*") if path.name.startswith(".")] == []
    for full in (written / "model", written / "adapter", *written.glob("checkpoints/*")):
        if full.exists():
            storage.verify_folder(full)
    assert not (written / "result.json").exists()
    assert run_command(train(folder, "--resume")) == 0
