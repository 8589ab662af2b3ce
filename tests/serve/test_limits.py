from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

from typer.main import get_command

from finesight.cli.app import app
from finesight.infer.service import LONGEST, ROWS, WAITING
from finesight.serve.limits import MEANINGS, Limits, table

PAGE = Path(__file__).parents[2] / "docs" / "en" / "serving.md"


def test_every_limit_is_explained_and_on_the_page():
    assert list(MEANINGS) == [field.name for field in fields(Limits)]
    assert table(Limits()) in PAGE.read_text(encoding="utf-8")


def test_options_have_the_defaults_of_the_limits():
    command = get_command(app).commands["serve"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    limits = asdict(Limits())
    for name, (_, option) in MEANINGS.items():
        if option:
            assert option == f"`--{name}`"
            assert defaults[name] == limits[name]


def test_the_service_has_the_same_defaults():
    assert (Limits().rows, Limits().waiting) == (ROWS, WAITING)
    # What the page says of answers whose length is not asked for.
    assert f"{LONGEST:,}" in MEANINGS["answer_tokens"][0]
    assert Limits().answer_tokens >= LONGEST
