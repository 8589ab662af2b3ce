"""Tickets: what the table says is what is printed, mostly new, and not known to pre-training."""

from __future__ import annotations

import csv
import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from finesight.data.importing import import_file
from finesight.data.jsonl import read_samples
from finesight.data.opening import Request
from finesight.errors import UserError
from finesight.synth import sheet, tickets
from finesight.synth.questions import CHINESE, ENGLISH
from finesight.synth.tasks import HELD_OUT, MIXTURE, TASKS
from finesight.synth.tickets import FIELDS, draw_tickets, invented, printed


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The table of 60 tickets."""
    return draw_tickets(tmp_path_factory.mktemp("drawn") / "tickets", 60, seed=3)


def _rows(table):
    with table.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_each_row_has_a_small_picture_and_every_field(drawn):
    rows = _rows(drawn)
    assert len(rows) == 60
    for row in rows:
        assert list(row) == ["picture", *FIELDS]
        assert all(row.values())
        with Image.open(drawn.parent / row["picture"]) as picture:
            assert picture.size in {(224, 112), (224, 140)}
    assert len({(drawn.parent / row["picture"]).read_bytes() for row in rows}) == 60


def test_what_is_noted_is_what_is_printed():
    """One field changed changes the ink at a place of its own, and nowhere else."""
    for number in range(30):
        said = invented(random.Random(number))
        boxes = list(_ink(said, random.Random(number)).values())
        for at, box in enumerate(boxes):
            for other in boxes[:at]:
                assert _overlap(box, other) <= 2, f"ticket {number}: {said}"


def _ink(said, rng):
    """Left, top, right and bottom of what changes where a field says something else, by name."""
    state, drawn = rng.getstate(), []
    for changed in (said, *({**said, name: "l"} for name in FIELDS)):
        rng.setstate(state)
        drawn.append(np.asarray(printed(changed, rng), dtype=int))
    boxes = {}
    for name, other in zip(FIELDS, drawn[1:], strict=True):
        y, x = np.abs(drawn[0] - other).sum(-1).nonzero()
        assert len(y), f"{name} of {said} is not printed"
        boxes[name] = (x.min(), y.min(), x.max(), y.max())
    return boxes


def _overlap(box, other):
    """Pixels down that two boxes share; 0 where they stand side by side."""
    across = min(box[2], other[2]) - max(box[0], other[0])
    return 0 if across < 0 else min(box[3], other[3]) - max(box[1], other[1])


def test_the_widest_place_fits_every_layout_twice():
    """The widest of 5,000 at both ends of a journey, in each layout and size, beside any price."""
    journeys = [invented(random.Random(number)) for number in range(2500)]
    said = dict(journeys[0])
    said["from"] = said["to"] = _widest(said[name] for said in journeys for name in ("from", "to"))
    said["price"] = _widest(said["price"] for said in journeys)
    seen = set()
    for number in range(40):
        boxes = _ink(said, random.Random(number))
        for name in ("to", "price"):
            assert _overlap(boxes["from"], boxes[name]) <= 0, f"ticket {number}: {said}"
        seen.add((boxes["to"][0], boxes["to"][2]))
    assert len(seen) == len(tickets._LAYOUTS) * len(tickets._SIZES)


def _widest(texts):
    return max(texts, key=lambda text: tickets._length(text, max(tickets._SIZES)))


def test_a_place_that_was_too_wide_is_not_drawn():
    rng = random.Random("ticket 2 562")
    assert printed(invented(rng), rng).width == tickets.WIDTH


def test_print_stands_out():
    for band in tickets._BANDS:
        assert sheet.brightness(tickets._WHITE) - sheet.brightness(band) >= sheet.CONTRAST
    for paper in tickets._PAPERS:
        for ink in (tickets._INK, tickets._PALE):
            assert sheet.brightness(paper) - sheet.brightness(ink) >= sheet.CONTRAST


def test_places_are_new_time_after_time():
    trained = [invented(random.Random(number)) for number in range(1700)]
    known = {said[name] for said in trained[:1600] for name in ("from", "to")}
    held_out = [said[name] for said in trained[1600:] for name in ("from", "to")]
    assert sum(name not in known for name in held_out) > len(held_out) / 2
    assert max(map(len, held_out)) <= 10
    assert all(said["from"] != said["to"] for said in trained)
    assert Counter(said["price"] for said in trained).most_common(1)[0][1] < 10


def test_same_seed_same_bytes_and_another_seed_another_task(drawn, tmp_path):
    again = draw_tickets(tmp_path / "again", 60, seed=3).parent
    for path in (path for path in drawn.parent.rglob("*") if path.is_file()):
        assert path.read_bytes() == (again / path.relative_to(drawn.parent)).read_bytes(), path
    other = draw_tickets(tmp_path / "other", 60, seed=4)
    assert [row["from"] for row in _rows(other)] != [row["from"] for row in _rows(drawn)]


def test_more_tickets_begin_with_the_same_ones(drawn, tmp_path):
    fewer = draw_tickets(tmp_path / "fewer", 5, seed=3)
    assert _rows(fewer) == _rows(drawn)[:5]


def test_existing_folder_is_left_alone(drawn):
    with pytest.raises(UserError, match="exists already"):
        draw_tickets(drawn.parent, 1, seed=0)


def test_the_table_imports_as_json_answers(drawn, tmp_path):
    columns = {"image": "picture", "fields": ", ".join(FIELDS)}
    request = Request(columns=columns, prompt="Read the ticket.", eval_last=10)
    summary = import_file(drawn, tmp_path / "data", request)
    assert [part.rows for part in summary.written] == [50, 10]
    assert summary.unused_columns == ()
    row = _rows(drawn)[0]
    answer = read_samples(tmp_path / "data" / "train.jsonl")[0].messages[-1].content[0].text
    assert {"picture": row["picture"], **json.loads(answer)} == row


def test_pre_training_knows_no_tickets():
    names = {*TASKS, *MIXTURE, *HELD_OUT, *(held_out.kind for held_out in HELD_OUT.values())}
    asked = [text for side in (ENGLISH, CHINESE) for texts in side.values() for text in texts]
    assert not [text for text in (*names, *asked) if "ticket" in text.lower()]
