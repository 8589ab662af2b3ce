"""Tests of model families as components: light halves, and no other module knows their names."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import finesight
from finesight.family_components import FAMILIES, FamilyComponent, TrainerModels
from finesight.model_folder import TINY_MODEL_FOLDER, ModelFolder

SOURCE = Path(finesight.__file__).parent

WITHOUT_TORCH = """
import sys
for name in ("torch", "numpy", "transformers", "PIL"):
    sys.modules[name] = None  # an import fails
from finesight.family_components import FAMILIES
from finesight.model_folder import TINY_MODEL_FOLDER, ModelFolder

assert not [name for name in sys.modules if name.startswith("finesight.families")]
folder = ModelFolder(TINY_MODEL_FOLDER)
assert folder.preprocessor_config and folder.tokenizer_file
assert folder.family_component is FAMILIES[folder.family]
"""


def test_light_halves_need_no_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_families_have_no_problem_and_an_architecture():
    for component in FAMILIES.list_built_in():
        assert component.find_problem() is None
        assert component.architecture


def test_family_without_native_code_has_defaults(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    component = ModelFolder(tmp_path).family_component
    assert component == FamilyComponent(kind="families", name="llava", title="llava")
    assert ModelFolder(TINY_MODEL_FOLDER).family_component.title == "Qwen2-VL"


MODELS = {
    "names": ("acme",),
    "pattern": "acme",
    "token_size": 28,
    "min_pixels": 0,
    "max_length": 1024,
    "vision": ("qkv",),
    "merger": ("fc1",),
    "language": ("q_proj",),
}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"names": "acme"}, "'acme' is no tuple of texts"),
        ({"vision": ("qkv", 1)}, "is no tuple of texts"),
        ({"token_size": "28"}, "'28' is no integer"),
        ({"pattern": ""}, "the pattern '' fits every model"),
        ({"pattern": "(acme)?"}, "fits every model"),
        ({"pattern": "("}, "missing"),
    ],
)
def test_wrong_models_of_other_trainers_are_rejected(change, problem):
    with pytest.raises((TypeError, ValueError, re.error), match=re.escape(problem)):
        TrainerModels(**MODELS | change)


FOREIGN_NAMES = {
    "convert/external_config.py": "a text model of that name",
    "settings/trainer_settings.yaml": "values of settings of other trainers",
}
"""Files in which the name of a family has another meaning, and which."""


def list_texts(path: Path) -> list[str]:
    """List the strings and imported modules of a Python file, without docstrings."""
    texts = []
    tree = ast.parse(path.read_text("utf-8"))
    documentation = {id(one.value) for one in ast.walk(tree) if isinstance(one, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation:
                texts.append(node.value)
        elif isinstance(node, ast.ImportFrom):
            texts += [f"{node.module}.{name.name}" for name in node.names]
        elif isinstance(node, ast.Import):
            texts += [name.name for name in node.names]
    return texts


def test_no_other_file_names_a_family():
    # The data format and the extra `qwen-vl` and the file `qwen.tiktoken` are no families.
    pattern = re.compile(rf"\b(?:{'|'.join(FAMILIES)})\b(?!-vl|\.tiktoken)")
    found = {}
    for path in sorted(SOURCE.rglob("*")):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith("families/"):
            continue
        if path.suffix == ".py":
            texts = list_texts(path)
        elif path.suffix in {".yaml", ".html", ".js", ".sh", ".j2"} and path.stem != "zh":
            texts = path.read_text("utf-8").splitlines()
        else:
            continue
        named = {match for text in texts for match in pattern.findall(text)}
        if named:
            found[name] = named
    assert {*found} <= {*FOREIGN_NAMES}, found
