"""Values of Parquet that Python does not have, and files that say more than they hold."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from container_fixtures import make_png
from pyarrow import parquet

from finesight.errors import UserError
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.ingest.row_reader import open_row_file
from finesight.samples import parquet_reader
from finesight.samples.sample import Sample, join_text, read_samples


def read_values(kind: Any, *values: int) -> Any:
    """Integers taken for values of another type of the same width."""
    width = pyarrow.int32() if kind.bit_width == 32 else pyarrow.int64()
    return pyarrow.array(values, width).view(kind)


def written(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def read(path: Path) -> list[dict[str, Any]]:
    rows = open_row_file(path)
    return [row.record for row in rows.iter_range(0, rows.num_rows)]


FAR = 2**61

TIMES = [
    (read_values(pyarrow.date32(), 2**30), None),
    (read_values(pyarrow.date32(), -(2**30)), None),
    (read_values(pyarrow.date32(), 365), "1971-01-01"),
    (read_values(pyarrow.date64(), 86_400_000 * 10**8), None),
    (read_values(pyarrow.timestamp("ms"), FAR), None),
    (read_values(pyarrow.timestamp("ms", "Mars/Olympus"), FAR), None),
    (read_values(pyarrow.timestamp("ns", "Mars/Olympus"), 1), "1970-01-01 00:00:00+00:00"),
    (read_values(pyarrow.timestamp("us", "Asia/Shanghai"), 0), "1970-01-01 08:00:00+08:00"),
    (read_values(pyarrow.timestamp("us", "Asia/Shanghai"), FAR), None),
    (read_values(pyarrow.timestamp("us", "Mars/Olympus"), 0), "1970-01-01 00:00:00+00:00"),
    (read_values(pyarrow.timestamp("us", "+08:00"), 0), "1970-01-01 08:00:00+08:00"),
    (read_values(pyarrow.duration("s"), FAR), None),
    (read_values(pyarrow.duration("ms"), 1500), "0:00:01.500000"),
    (read_values(pyarrow.time64("us"), FAR), None),
    (read_values(pyarrow.time32("s"), 60), "00:01:00"),
]


@pytest.mark.parametrize(("column", "text"), TIMES)
def test_times_are_read_or_null(tmp_path: Path, column: Any, text: str | None) -> None:
    columns = {"query": ["?", "!"], "response": ["x", "y"]}
    times = pyarrow.concat_arrays([column, pyarrow.nulls(1, column.type)])
    path = written(tmp_path / "a.parquet", {**columns, "when": times})
    import_dataset(path, tmp_path / "out", ImportOptions())
    lines = (tmp_path / "out" / "data.jsonl").read_text().splitlines()
    assert [json.loads(line)["meta"] for line in lines] == [{"when": text}, {"when": None}]


def test_a_date_out_of_range_is_no_answer(tmp_path: Path) -> None:
    far = read_values(pyarrow.date32(), 2**30, 0)
    path = written(tmp_path / "a.parquet", {"query": ["?", "!"], "day": far})
    request = ImportOptions(columns={"question": "query", "answer": "day"})
    with pytest.raises(UserError, match="row 1: no answer in query, day"):
        import_dataset(path, tmp_path / "out", request)


def test_times_inside_of_lists_and_structs(tmp_path: Path) -> None:
    days = read_values(pyarrow.date32(), 2**30, 0)
    columns = {
        "list": pyarrow.ListArray.from_arrays([0, 2], days),
        "struct": pyarrow.StructArray.from_arrays([days[:1], pyarrow.array([5])], ["d", "n"]),
        "map": pyarrow.MapArray.from_arrays([0, 1], ["a"], days[:1]),
    }
    (record,) = read(written(tmp_path / "a.parquet", columns))
    assert str(record["list"]) == "[None, datetime.date(1970, 1, 1)]"
    assert record["struct"] == {"d": None, "n": 5}
    assert str(record["map"]) == "[{'key': 'a', 'value': None}]"


def test_class_numbers_have_the_names_of_the_features(tmp_path: Path) -> None:
    named = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    features = {"label": named, "objects": {"feature": {"kind": named}, "_type": "Sequence"}}
    features |= {"list": [{"kind": named}], "n": {"dtype": "int64", "_type": "Value"}}
    rows = [{"label": 1, "objects": {"kind": [0, 7]}, "list": [{"kind": 1}], "n": 1}]
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(metadata)
    parquet.write_table(table, tmp_path / "a.parquet")
    expected = {"label": "dog", "objects": {"kind": ["cat", 7]}, "list": [{"kind": "dog"}], "n": 1}
    assert read(tmp_path / "a.parquet") == [expected]


def test_several_classes_of_an_image_are_one_answer(tmp_path: Path) -> None:
    named = {"feature": {"names": ["cat", "dog"], "_type": "ClassLabel"}, "_type": "Sequence"}
    image = make_png(1)
    rows = [{"image": {"bytes": image, "path": None}, "shows": shown} for shown in ([0, 1], [1])]
    metadata = {"huggingface": json.dumps({"info": {"features": {"shows": named}}})}
    table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(metadata)
    parquet.write_table(table, tmp_path / "a.parquet")
    columns = {"image": "image", "answer": "shows"}
    import_dataset(
        tmp_path / "a.parquet", tmp_path / "out", ImportOptions(columns=columns, prompt="?")
    )
    answers = [get_text(one) for one in read_samples(tmp_path / "out" / "data.jsonl")]
    assert answers == ['["cat", "dog"]', '["dog"]']


def get_text(sample: Sample) -> str:
    return join_text(sample.messages[-1].content)


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    text = pyarrow.array([b"\xff\xfe"]).view(pyarrow.string())
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        read(written(tmp_path / "a.parquet", {"a": text}))


def test_rows_that_take_no_bytes(tmp_path: Path) -> None:
    """A million rows in 5 kB took 30 s and 1.7 GB."""
    same = pyarrow.array(["x"] * 1_000_000).dictionary_encode()
    path = written(tmp_path / "a.parquet", {"query": same, "response": same})
    with pytest.raises(UserError, match=r"1,000,000 rows in .* bytes: all rows are identical"):
        open_row_file(path)


def test_rows_over_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "a.parquet", {"a": ["x" * n for n in (10, 3000, 10)]})
    monkeypatch.setattr(parquet_reader, "MAX_ROW_BYTES", 4000)
    assert [len(record["a"]) for record in read(path)] == [10, 3000, 10]
    monkeypatch.setattr(parquet_reader, "MAX_ROW_BYTES", 2000)
    with pytest.raises(UserError, match="bytes in a sample"):
        read(path)


def test_long_values_that_repeat_are_read_few_at_a_time(tmp_path, monkeypatch):
    path = written(tmp_path / "a.parquet", {"a": ["x" * 1000] * 500, "b": list(range(500))})
    group = parquet.read_metadata(path).row_group(0)
    assert parquet_reader.get_batch_size(group) == 64
    monkeypatch.setattr(parquet_reader, "MAX_BATCH_BYTES", 10_000)
    assert 1 <= parquet_reader.get_batch_size(group) < 10
    assert [record["b"] for record in read(path)] == list(range(500))


def test_a_name_that_is_not_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "\udcd6\udcd0.parquet"
    with path.open("wb") as file:
        parquet.write_table(pyarrow.table({"a": [1, 2]}), file)
    assert read(path) == [{"a": 1}, {"a": 2}]
