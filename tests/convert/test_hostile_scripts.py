"""Scripts that try to take time or memory without limit, or to run something, when converted."""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from convert_fixtures import convert_script, load_converted_recipe

from finesight.convert.recipe_converter import convert_config
from finesight.errors import UserError

NUM_TURNS = 60
HEAD = "import os\nfrom transformers import HfArgumentParser, Trainer, TrainingArguments\n"
TAIL = """
model = AutoModel.from_pretrained("Qwen/Qwen2-VL-2B-Instruct")
args = TrainingArguments(output_dir="o", report_to=x60)
Trainer(model=model, args=args).train()
"""
SWIFT = "swift sft --model Qwen/Qwen2-VL-2B-Instruct --dataset a.jsonl --output_dir o\n"


def repeat(line: str, count: int = NUM_TURNS) -> str:
    """Return lines in which names end with numbers instead of `i` and `j`, the following one."""
    lines: list[str] = []
    for number in range(count):
        numbered = re.sub(r"i\b", str(number), line)
        lines.append(re.sub(r"j\b", str(number + 1), numbered) + "\n")
    return "".join(lines)


PYTHON = {
    "text": 'x0 = "aaaaaaaaaa"\n' + repeat("xj = xi + xi"),
    "list": "x0 = [1, 2]\n" + repeat("xj = xi + xi"),
    "nested list": "x0 = [1, 2]\n" + repeat("xj = [xi, xi]"),
    "nested dict": 'x0 = {"a": 1}\n' + repeat('xj = {"a": xi, "b": xi}'),
    "joined text": 'x0 = "aaaaaaaaaa"\n' + repeat('xj = f"{xi}{xi}"'),
    "path": 'x0 = "aaaaaaaaaa"\n' + repeat("xj = xi / xi"),
    "number": "x0 = 999\n" + repeat("xj = xi * xi"),
    "power": "x0 = 10**10**10\n" + repeat("xj = xi ** 64"),
    "product": 'x60 = "a" * 10**12\ny = [0] * 10**12\nz = 1 << 10**12\n',
    "format": 'x60 = f"{1:>1000000000000}"\n',
    "hexadecimal": "x60 = 0x" + "f" * 9000 + "\n",
    "comparison": repeat("xj = [xi, xi]") + repeat("yj = [yi, yi]") + "if x60 == y60:\n  z = 1\n",
    "merged dicts": "x60 = " + '{"a": ' * 40 + "1" + "} | b" * 40 + "\n",
    "recursion": "x60 = x60 + x60\ny = z\nz = y\n",
    "bases": repeat("class Ai(Aj, Aj):\n  n: int = 1") + "a, = HfArgumentParser(A0).parse_args()\n",
    "cycle": "class A(B): n = 1\nclass B(A): m = 1\na, = HfArgumentParser(A).parse_args()\n",
    "lines": "\n" * 190_000,
    "receiver": "(" + "model" * 30_000 + " - 1).from_pretrained()\n",
    "depth": "x60 = " + "-" * 9_000 + "1\n",
    "configs": repeat('ai = TrainingArguments("o")\nbi = LoraConfig(r=1)', 3_500),
    "parsers": repeat('ai = p.parse_args()\np.add_argument("--bi", default=1)', 2_500),
    "instances": "class A:\n" + repeat("  ai = 1", 5_000) + repeat("bi = A()", 9_000),
    "parameters of argparse": repeat("def fi(pi): 0\nfi(a)", 3_000)
    + repeat('p.add_argument("-bi", default=1)', 3_000)
    + "a = p.parse_args()\n",
    "parameters of dataclasses": repeat("def fi(pi): 0\nfi(a)", 3_000)
    + "class A:\n"
    + repeat("  bi: int = 1", 6_000)
    + "a, = HfArgumentParser(A).parse_args_into_dataclasses()\n",
    "size": "x60 = 1\n" * 400_000,
    "commands": "import os\nos.system(\"touch ran\")\nx60 = eval(\"open('ran', 'w')\")\n",
}
SHELL = {
    "variable": "A=aaaaaaaaaa\n" + "A=$A$A\n" * NUM_TURNS + SWIFT,
    "variables": "A0=aaaaaaaaaa\n" + repeat("Aj=$Ai$Ai") + SWIFT,
    "array": "A=(a b)\n" + 'A+=("${A[@]}")\n' * NUM_TURNS + SWIFT,
    "word": f"A={'a' * 2_000}\nB={'$A' * 80_000}\n{SWIFT}",
    "arithmetic": "A=$((10**10**10))\n" + "A=$((A*A))\n" * NUM_TURNS + SWIFT,
    "here documents": repeat("cat <<Ei", 15_000) + SWIFT,
    "substitutions": "$(" * 40_000 + SWIFT,
    "exports": repeat("export Ai=", 7_000) + "swift sft\n" * 7_000,
    "shells": "sh -\n" * 30_000 + SWIFT,
    "arithmetic marks": 'A="' + "$\2\2" * 60_000 + f'"\n{SWIFT}',
    "shifts": "bash ./shifted.sh a\n" * 8,
    "shifted": repeat("Ai=", 13_000) + "shift\n" * 16_000 + SWIFT,
    "itself": "bash itself.sh\nsource itself.sh\n",
    "run": f"$(touch ran)\n`touch ran`\necho > ran\ntouch ran\n{SWIFT}",
}
CONVERT = """
import json
import time
from pathlib import Path
from finesight.convert.recipe_converter import convert_config
from finesight.errors import UserError
seconds = {}
for path in sorted(Path().glob("*.*")):
    start = time.process_time()
    try:
        convert_config(path, Path("out") / path.name)
    except UserError as error:
        print(path.name, "refused", error.what)
    else:
        print(path.name, "converted")
    seconds[path.name] = time.process_time() - start
# The maximum of `resource.getrusage` includes the memory of the process that starts this one.
status = Path("/proc/self/status").read_text()
memory = int(status.partition("VmHWM:")[2].split()[0]) << 10
Path("used.json").write_text(json.dumps({"seconds": seconds, "memory": memory}))
"""
MAX_SECONDS = 15
MAX_MEMORY = 512 << 20
"""Bounds of each script and of all, more than twice of what they use."""


def limit_resources() -> None:
    """Limit memory to 4 GB and the processor time to some minutes."""
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))


def test_scripts_take_limited_time_and_memory(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name, text in PYTHON.items():
        (tmp_path / f"{name}.py").write_text(HEAD + text + TAIL)
    for name, text in SHELL.items():
        (tmp_path / f"{name}.sh").write_text(text)
    command = [sys.executable, "-c", CONVERT]
    done = subprocess.run(
        command, cwd=tmp_path, preexec_fn=limit_resources, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == len(PYTHON) + len(SHELL)
    used = json.loads((tmp_path / "used.json").read_text())
    slow = {name: time for name, time in used["seconds"].items() if time > MAX_SECONDS}
    assert not slow
    assert used["memory"] < MAX_MEMORY
    assert "text.py converted" in done.stdout
    assert "characters of code" in done.stdout
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a" * 5_000, "\\0", "\\ud800", "\\x07"])
@pytest.mark.parametrize("key", ["output_dir", "model"])
def test_names_that_no_file_can_have_are_refused_or_converted(name, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = HEAD + "x60 = 1\n" + TAIL.replace("Qwen/", f"{name}Qwen/" if key == "model" else "Qwen/")
    if key == "output_dir":
        text = text.replace('"o"', f'"{name}"')
    try:
        convert_script(tmp_path, text, "train.py")
    except UserError:
        assert not (tmp_path / "recipe.yaml").exists()
        return
    load_converted_recipe(tmp_path)


@pytest.mark.parametrize("command", ["python {}.py", "swift sft {}.yaml", "bash {}.sh"])
def test_long_names_in_commands_are_refused(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="aaaa"):
        convert_script(tmp_path, command.format("a" * 5_000) + "\n")


@pytest.mark.parametrize("name", ["train.py", "train.sh", "train.ipynb", "train.yaml"])
def test_sparse_file_is_refused_before_it_is_read(name, tmp_path):
    with (tmp_path / name).open("wb") as file:
        file.truncate(300 << 30)
    with pytest.raises(UserError, match="bytes"):
        convert_config(tmp_path / name, tmp_path / "recipe.yaml")
