"""Tickets: what the table says is what is printed, mostly new, and not known to pre-training."""

import csv
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from finesight.errors import UserError
from finesight.synth import tickets
from finesight.synth.tickets import TICKET_FIELDS, draw_ticket, sample_ticket, write_tickets
from finesight.vision.drawing import load_builtin_font


@pytest.fixture(scope="module")
def ticket_table(tmp_path_factory):
    """The table of 60 tickets."""
    return write_tickets(tmp_path_factory.mktemp("drawn") / "tickets", 60, seed=3)


def _rows(table):
    with table.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_each_row_has_an_image_and_all_fields(ticket_table):
    rows = _rows(ticket_table)
    assert len(rows) == 60
    for row in rows:
        assert list(row) == ["image", *TICKET_FIELDS]
        assert all(row.values())
        with Image.open(ticket_table.parent / row["image"]) as image:
            assert image.size in {(224, 112), (224, 140)}
    assert len({(ticket_table.parent / row["image"]).read_bytes() for row in rows}) == 60


def test_table_matches_the_image():
    """One field changed changes the ink at a place of its own, and nowhere else."""
    for number in range(30):
        output = sample_ticket(random.Random(number))
        boxes = list(_ink(output, random.Random(number)).values())
        for at, box in enumerate(boxes):
            for other in boxes[:at]:
                assert _overlap(box, other) <= 2, f"ticket {number}: {output}"


def _ink(message, rng):
    """Left, top, right and bottom of what changes where a field says something else, by name."""
    state, drawn = rng.getstate(), []
    for changed in (message, *({**message, name: "l"} for name in TICKET_FIELDS)):
        rng.setstate(state)
        drawn.append(np.asarray(draw_ticket(changed, rng), dtype=int))
    boxes = {}
    for name, other in zip(TICKET_FIELDS, drawn[1:], strict=True):
        y, x = np.abs(drawn[0] - other).sum(-1).nonzero()
        assert len(y), f"{name} of {message} is not printed"
        boxes[name] = (x.min(), y.min(), x.max(), y.max())
    return boxes


def _overlap(box, other):
    """Pixels down that two boxes share; 0 where they stand side by side."""
    across = min(box[2], other[2]) - max(box[0], other[0])
    return 0 if across < 0 else min(box[3], other[3]) - max(box[1], other[1])


def test_widest_city_name_fits_every_layout():
    """The widest of 5,000 at both ends of a journey, in each layout and size, beside any price."""
    journeys = [sample_ticket(random.Random(number)) for number in range(2500)]
    output = dict(journeys[0])
    cities = [said[name] for said in journeys for name in ("from", "to")]
    output["from"] = output["to"] = _widest(cities)
    output["price"] = _widest(said["price"] for said in journeys)
    seen = set()
    for number in range(40):
        boxes = _ink(output, random.Random(number))
        for name in ("to", "price"):
            assert _overlap(boxes["from"], boxes[name]) <= 0, f"ticket {number}: {output}"
        seen.add((boxes["to"][0], boxes["to"][2]))
    assert len(seen) == len(tickets.LAYOUTS) * len(tickets.FONT_SIZES)


def _widest(texts):
    font = load_builtin_font(max(tickets.FONT_SIZES))
    return max(texts, key=font.getlength)


def test_city_names_of_eval_tickets_are_new():
    trained = [sample_ticket(random.Random(number)) for number in range(1700)]
    known = {said[name] for said in trained[:1600] for name in ("from", "to")}
    validation = [said[name] for said in trained[1600:] for name in ("from", "to")]
    assert sum(name not in known for name in validation) > len(validation) / 2
    assert max(map(len, validation)) <= 10
    assert all(said["from"] != said["to"] for said in trained)
    assert Counter(said["price"] for said in trained).most_common(1)[0][1] < 10


def test_equal_seed_gives_equal_bytes(ticket_table, tmp_path):
    again = write_tickets(tmp_path / "again", 60, seed=3).parent
    for path in (path for path in ticket_table.parent.rglob("*") if path.is_file()):
        other = again / path.relative_to(ticket_table.parent)
        assert path.read_bytes() == other.read_bytes(), path
    fewer = write_tickets(tmp_path / "fewer", 5, seed=3)
    assert _rows(fewer) == _rows(ticket_table)[:5]
    other = write_tickets(tmp_path / "other", 5, seed=4)
    assert [row["from"] for row in _rows(other)] != [row["from"] for row in _rows(fewer)]
    with pytest.raises(UserError, match="exists already"):
        write_tickets(again, 1, seed=0)
