"""Tests of invalid input: exit code 2, a complete message, and no partial files."""

import errno
import shutil
from contextlib import chdir
from pathlib import Path

import pytest
from case_files import load_cases
from PIL import Image
from tiny_task import make_task, write_recipe

from finesight import storage
from finesight.cli.app import run_command

TRAIN = "train recipe.yaml output_dir=run "
CASES = load_cases("bad_input")


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
    for pattern, content in files.items():
        for file in [*Path().glob(pattern)] or [Path(pattern)]:
            if content is None:
                file.unlink()
            elif content == "BOMB":
                Image.new("1", (10_000, 10_000)).save(file)
            else:
                file.write_text(content)
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
