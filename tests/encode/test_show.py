"""The token table says what the outline says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conversations import make_conversation, make_folder, make_pictures

from finesight.data.jsonl import Located
from finesight.data.sample import Message, Sample, TextPart
from finesight.encode.render import Renderer
from finesight.encode.show import as_lines, as_record, rows
from finesight.hub import ModelFolder


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer(ModelFolder(make_folder(tmp_path_factory.mktemp("model"), "qwen2_vl")))


def test_rows_cover_every_token_once(renderer: Renderer, tmp_path: Path) -> None:
    pictures = make_pictures(tmp_path)
    for number in range(20):
        outline = renderer.outline(make_conversation(number, pictures, videos=True))
        found = list(rows(outline, renderer.tokenizer))
        assert [row.start for row in found[1:]] == [row.stop for row in found[:-1]]
        assert (found[0].start, found[-1].stop) == (0, outline.tokens)
        assert tuple(row.span for row in found if row.span) == outline.spans
        for row in found:
            assert set(outline.ids_T[row.start : row.stop].tolist()) == {row.id}
            assert set(outline.learned_T[row.start : row.stop].tolist()) == {row.learned}
            assert row.first == tuple(outline.positions_3T[:, row.start])
            assert row.last == tuple(outline.positions_3T[:, row.stop - 1])
        record = json.loads(json.dumps(as_record(outline, renderer.tokenizer)))
        assert record["tokens"] == outline.tokens
        assert record["learned"] == outline.supervised
        assert len(record["rows"]) == len(found)
        assert len(list(as_lines(outline, renderer.tokenizer))) == len(found) + 3


def test_lines(renderer: Renderer) -> None:
    messages = (
        Message(role="user", content=(TextPart(text="x\n"),)),
        Message(role="assistant", content=(TextPart(text="😀"),)),
    )
    outline = renderer.outline(Located(Sample(id="one", messages=messages), Path()))
    lines = list(as_lines(outline, renderer.tokenizer))
    assert lines[0] == "sample one"
    assert lines[1].startswith(f"tokens: {outline.tokens}, learned: {outline.supervised}, pictures")
    learned = [line for line in lines[3:] if "*" in line]
    assert len(learned) == int(np.sum(outline.learned_T))
    assert learned[-1].endswith("'<|im_end|>'")
    assert not any("\ufffd" in line for line in lines)
    assert lines[-1].endswith("'\\n'")
