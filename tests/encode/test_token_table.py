"""The token table says what the outline says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conversation_fixtures import make_conversation, make_folder, make_images

from finesight.data.sample import LocatedSample, Message, Sample, TextPart
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import (
    format_token_table,
    iter_token_rows,
    token_table_to_dict,
)
from finesight.model_folder import ModelFolder


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> NativeRenderer:
    return NativeRenderer(ModelFolder(make_folder(tmp_path_factory.mktemp("model"), "qwen2_vl")))


def test_rows_cover_every_token_once(renderer: NativeRenderer, tmp_path: Path) -> None:
    images = make_images(tmp_path)
    for number in range(20):
        outline = renderer.tokenize(make_conversation(number, images, videos=True))
        found = list(iter_token_rows(outline, renderer.tokenizer))
        assert [row.start for row in found[1:]] == [row.stop for row in found[:-1]]
        assert (found[0].start, found[-1].stop) == (0, outline.num_tokens)
        assert tuple(row.span for row in found if row.span) == outline.spans
        for row in found:
            assert set(outline.ids_T[row.start : row.stop].tolist()) == {row.id}
            assert set(outline.loss_mask_T[row.start : row.stop].tolist()) == {row.is_supervised}
            assert row.first_position == tuple(outline.position_ids_3T[:, row.start])
            assert row.last_position == tuple(outline.position_ids_3T[:, row.stop - 1])
        record = json.loads(json.dumps(token_table_to_dict(outline, renderer.tokenizer)))
        assert record["num_tokens"] == outline.num_tokens
        assert record["num_supervised_tokens"] == outline.num_supervised_tokens
        assert len(record["rows"]) == len(found)
        assert len(list(format_token_table(outline, renderer.tokenizer))) == len(found) + 3


def test_token_table_lines(renderer: NativeRenderer) -> None:
    messages = (
        Message(role="user", content=(TextPart(text="x\n"),)),
        Message(role="assistant", content=(TextPart(text="😀"),)),
    )
    outline = renderer.tokenize(LocatedSample(Sample(id="one", messages=messages), Path()))
    lines = list(format_token_table(outline, renderer.tokenizer))
    assert lines[0] == "sample one"
    assert lines[1].startswith(
        f"tokens: {outline.num_tokens}, supervised: {outline.num_supervised_tokens}, images"
    )
    supervised = [line for line in lines[3:] if "*" in line]
    assert len(supervised) == int(np.sum(outline.loss_mask_T))
    assert supervised[-1].endswith("'<|im_end|>'")
    assert not any("\ufffd" in line for line in lines)
    assert lines[-1].endswith("'\\n'")
