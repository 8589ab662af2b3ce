from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

from typer.main import get_command

from finesight.cli.app import app
from finesight.infer.inference_service import (
    DEFAULT_MAX_NEW_TOKENS,
    DEFAULT_MAX_NUM_SEQS,
    DEFAULT_MAX_WAITING,
)
from finesight.serve.server_limits import LIMIT_DESCRIPTIONS, ServerLimits, format_limits_table

PAGE = Path(__file__).parents[2] / "docs" / "en" / "serving.md"


def test_every_limit_is_documented():
    assert list(LIMIT_DESCRIPTIONS) == [field.name for field in fields(ServerLimits)]
    assert format_limits_table(ServerLimits()) in PAGE.read_text(encoding="utf-8")


def test_option_defaults_match_limits():
    command = get_command(app).commands["serve"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    limits = asdict(ServerLimits())
    for name, (_, option) in LIMIT_DESCRIPTIONS.items():
        if option:
            assert option == f"`--{name.replace('_', '-')}`"
            assert defaults[name] == limits[name]


def test_service_defaults_match_limits():
    assert (ServerLimits().max_num_seqs, ServerLimits().max_waiting) == (
        DEFAULT_MAX_NUM_SEQS,
        DEFAULT_MAX_WAITING,
    )
    # The documented default length of answers.
    assert f"{DEFAULT_MAX_NEW_TOKENS:,}" in LIMIT_DESCRIPTIONS["max_completion_tokens"][0]
    assert ServerLimits().max_completion_tokens >= DEFAULT_MAX_NEW_TOKENS
