"""Tests of data formats as components: order, names in other modules, and plug-ins."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from image_fixtures import write_gray_image, write_jsonl
from plugin_fixtures import install, write_package

import finesight
from finesight.errors import UserError
from finesight.ingest.formats import FORMATS, get_format, get_native_format, get_writable_format
from finesight.ingest.formats.dataset_format import InvalidOptionError
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.operations import find_operation
from finesight.operations.operation import list_parameters
from finesight.samples.sample import read_samples

SOURCE = Path(finesight.__file__).parent

WITHOUT_TORCH = """
import sys
for name in ("torch", "transformers", "pyarrow"):
    sys.modules[name] = None  # an import fails
from finesight.ingest.formats import FORMATS
assert "finesight.ingest.formats.coco" not in sys.modules
assert all(FORMATS[name].description for name in FORMATS)
"""


def test_registry_imports_no_format_and_formats_need_no_torch():
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_general_formats_are_tried_last():
    formats = FORMATS.list_built_in()
    assert len({one.position for one in formats}) == len(formats)
    assert [*FORMATS][-2:] == ["conversations", "table"]
    assert get_native_format().name == "samples"


def test_help_names_the_formats():
    """The help is read without NumPy, and so without the formats."""
    parameters = {one.option: one.help for one in list_parameters(find_operation("import"))}
    names = [one.name for one in FORMATS.list_built_in()]
    assert f": {', '.join(sorted(names))}. " in parameters["--format"]


@pytest.mark.parametrize(("name", "problem"), [
    ("other", "unknown format 'other'"), ("voc", "voc can be imported only")
])  # fmt: skip
def test_format_that_cannot_be_written_is_answered_with_those_that_can(name, problem):
    with pytest.raises(UserError) as caught:
        get_writable_format(name, "--to")
    writable = [one.name for one in FORMATS.list_built_in() if one.write_files is not None]
    assert caught.value.what == problem
    assert caught.value.expected == f"one of {', '.join(writable)}"
    assert get_writable_format("openai", "--to").name == "openai"


SEVERAL_MEANINGS = {"samples", "openai", "conversations", "table", "folder", "classes"}
"""Names that are words of other meanings, too."""

NAMING_FILES = {
    "app/start.py": "path of the backend for the program",
    "cli/app.py": "example of a command",
    "ingest/exporter.py": "a program",
    "doctor/model_check.py": "extra of a model family",
    "encode/tokenization.py": "extra of a model family",
    "ingest/data_operations.py": "example of a command",
    "serve/request_middleware.py": "path of the backend for the program",
}
"""Files with names of formats, and why. Those of convert/ and families/ are of other things."""


def iter_texts(path: Path):
    """Yield the texts of a module except docstrings. Those of operations are help."""
    tree = ast.parse(path.read_text("utf-8"))
    docstrings = set()
    if path.parent.name != "operations" and "_operation" not in path.stem:
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and node not in docstrings:
            yield node.value


def test_no_other_module_names_a_format():
    names = {one.name for one in FORMATS.list_built_in()} - SEVERAL_MEANINGS
    pattern = re.compile(rf"(?<![\w-])(?:{'|'.join(sorted(names))})(?![\w-])")
    found = set()
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith(("ingest/formats/", "convert/", "families/")):
            continue
        if any(pattern.search(text) for text in iter_texts(path)):
            found.add(name)
    assert found == {*NAMING_FILES}


def test_other_modules_import_only_formats_of_listed_uses():
    """Tables are sources of any columns, as mappings; the backend of Label Studio has its tasks."""
    modules = {one.name.replace("-", "_") for one in FORMATS.list_built_in()}
    found = set()
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).as_posix()
        if name.startswith("ingest/formats/"):
            continue
        text = path.read_text("utf-8")
        imported = re.findall(r"finesight\.ingest\.formats(?:\.| import )(\w+)", text)
        found |= {(name, one) for one in imported if one in modules}
    assert found == {
        ("ingest/import_source.py", "table"),
        ("ingest/role_proposal.py", "table"),
        ("ingest/mapped_rows.py", "table"),
        ("ingest/mapping_draft.py", "table"),
        ("ingest/data_operations.py", "table"),
        ("ingest/init_operation.py", "table"),
        ("serve/label_studio_backend.py", "label_studio"),
        ("serve/media_sources.py", "label_studio"),
        ("serve/preprocessing_jobs.py", "label_studio"),
    }


METERS = """
from dataclasses import dataclass

from finesight.ingest.formats.dataset_format import DatasetFormat, RowImages, build_example
from finesight.samples.sample import Message, TextPart
from finesight.settings.setting_types import SettingsSection


class Settings(SettingsSection):
    size: int = 1


def parse_row(row, context):
    question = context.add_prompt([RowImages(context).add_image(row.record["photo"])])
    answer = (TextPart(text=str(row.record["kwh"])),)
    turns = [Message(role="user", content=question), Message(role="assistant", content=answer)]
    return build_example(row.id, turns, {})


def detect(records):
    return "readings" if all("kwh" in record for record in records) else None


OLD = DatasetFormat("meters", '{"photo": "path", "kwh": 1}', parse_row)
OLD_LIST = DatasetFormat("meters", '{"photo": "path"}', parse_row, None, ["prompt"])
ARGUMENTS = {"name": "meters", "description": '{"photo": "path"}', "parse_row": parse_row}
NEW = DatasetFormat(kind="formats", title="Meters", detect=detect, **ARGUMENTS)


@dataclass(frozen=True, slots=True)
class SlotFormat(DatasetFormat):
    unit: str | None = "kWh"


class OwnFormat(DatasetFormat):
    def __init__(self):
        super().__init__(**ARGUMENTS)


SLOTS = SlotFormat(unit=None, **ARGUMENTS)
OWN = OwnFormat()
"""


def install_meters(
    folder: Path, monkeypatch: pytest.MonkeyPatch, target: str, more: str = ""
) -> None:
    write_package(folder, "meters", {"formats meters": f"meters:{target}"}, METERS + more)
    monkeypatch.delitem(sys.modules, "meters", raising=False)
    install(folder, monkeypatch)


@pytest.mark.parametrize(("target", "name"), [
    ("OLD", "meters"), ("OLD_LIST", "meters"), ("NEW", "meters"), ("NEW", None),
    ("SLOTS", "meters"), ("OWN", "meters"),
])  # fmt: skip
def test_format_of_a_plugin_reads_rows(target, name, tmp_path, monkeypatch):
    install_meters(tmp_path / "site", monkeypatch, target)
    write_gray_image(tmp_path / "a.png")
    source = write_jsonl(tmp_path / "rows.jsonl", [{"photo": "a.png", "kwh": 4711}])
    options = ImportOptions(format=name, prompt="Read the meter.")
    summary = import_dataset(source, tmp_path / "out", options)
    assert summary.format == "meters"
    (sample,) = read_samples(tmp_path / "out" / "data.jsonl")
    assert sample.messages[-1].content[0].text == "4711"
    assert [*FORMATS][-1] == "meters"


BROKEN = {
    "does not implement DatasetFormat": "3",
    "the format is named 'gauges'": "DatasetFormat(**ARGUMENTS | {'name': 'gauges'})",
    "its kind is 'trackers'": "DatasetFormat(kind='trackers', **ARGUMENTS)",
    "it has settings": "DatasetFormat(settings=Settings, **ARGUMENTS)",
    "is_native is 'no'": "DatasetFormat(is_native='no', **ARGUMENTS)",
    "supported_options is 3": "DatasetFormat(supported_options=3, **ARGUMENTS)",
    "parse_row is None": "DatasetFormat(**ARGUMENTS | {'parse_row': None})",
    "detect is 'always'": "DatasetFormat(detect='always', **ARGUMENTS)",
    "it has settings or": "DatasetFormat(implementation='a:b', **ARGUMENTS)",
}


@pytest.mark.parametrize("problem", BROKEN)
def test_broken_format_of_a_plugin_is_a_user_error(problem, tmp_path, monkeypatch):
    install_meters(tmp_path, monkeypatch, "BROKEN", f"\nBROKEN = {BROKEN[problem]}\n")
    for get in (get_format, get_writable_format):
        with pytest.raises(UserError, match=re.escape(problem)) as caught:
            get("meters", "--format")
        assert "plug-in meters of meters 1.0" in str(caught.value)


BOXES = """
from finesight.samples.frames import BoxFrame, get_frame


def parse_boxes(row, context):
    images = RowImages(context)
    photo = images.add_image(row.record["photo"])
    box = images.create_box(row.record["box"], "meter", FRAME)
    question = context.add_prompt([photo])
    turns = [Message(role="user", content=question), Message(role="assistant", content=(box,))]
    return build_example(row.id, turns, {})


WITH_BOXES = DatasetFormat("meters", '{"photo": "path"}', parse_boxes, None, ["prompt", "boxes"])
"""


@pytest.mark.parametrize(
    ("frame", "box"),
    [
        ("get_frame('xyxy', 'pixel')", [16, 12, 48, 36]),
        ("get_frame('xywh', '1')", [0.25, 0.25, 0.5, 0.5]),
        ("get_frame('yxyx', '1000')", [250, 250, 750, 750]),
    ],
)
def test_boxes_of_a_plugin_are_converted_to_pixels(frame, box, tmp_path, monkeypatch):
    install_meters(tmp_path / "site", monkeypatch, "WITH_BOXES", f"{BOXES}FRAME = {frame}")
    write_gray_image(tmp_path / "a.png", 64, 48)
    source = write_jsonl(tmp_path / "rows.jsonl", [{"photo": "a.png", "box": box}])
    import_dataset(source, tmp_path / "out", ImportOptions(format="meters", prompt="Where?"))
    (sample,) = read_samples(tmp_path / "out" / "data.jsonl")
    assert sample.messages[-1].content[0].xyxy == (16, 12, 48, 36)


@pytest.mark.parametrize("base", ["stored", "longest", "fixed"])
def test_boxes_of_a_plugin_in_a_frame_without_unit_end_the_import(base, tmp_path, monkeypatch):
    """In contrast to errors of single rows, which are left out."""
    code = f"{BOXES}FRAME = BoxFrame(base='{base}', width=640)"
    install_meters(tmp_path / "site", monkeypatch, "WITH_BOXES", code)
    write_gray_image(tmp_path / "a.png", 64, 48)
    row = {"photo": "a.png", "box": [16, 12, 48, 36]}
    source = write_jsonl(tmp_path / "rows.jsonl", [row, row])
    options = ImportOptions(format="meters", on_invalid_row="skip", on_invalid_box="drop")
    with pytest.raises(InvalidOptionError, match="has no unit") as caught:
        import_dataset(source, tmp_path / "out", options)
    assert "pixel, resized, 1, 100, 1000" in str(caught.value)
    assert not (tmp_path / "out").exists()
