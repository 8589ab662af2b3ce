from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from typer.main import get_command

from finesight.cli.app import app
from finesight.infer.inference_service import (
    DEFAULT_MAX_NEW_TOKENS,
    DEFAULT_MAX_NUM_SEQS,
    DEFAULT_MAX_WAITING,
)
from finesight.serve.api_schema import ServerLimits

PAGE = Path(__file__).parents[2] / "docs" / "en" / "serving.md"


def test_every_limit_is_documented():
    assert all(limit.metadata["description"] for limit in fields(ServerLimits))
    assert ServerLimits().to_markdown() in PAGE.read_text(encoding="utf-8")


def test_option_defaults_match_limits():
    command = get_command(app).commands["serve"]
    defaults = {parameter.name: parameter.default for parameter in command.params}
    limits = {limit.name: limit for limit in fields(ServerLimits) if limit.metadata["option"]}
    for name, limit in limits.items():
        assert limit.metadata["option"] == f"`--{name.replace('_', '-')}`"
        assert defaults[name] == limit.default


def test_service_defaults_match_limits():
    limits = ServerLimits()
    assert limits.max_num_seqs == DEFAULT_MAX_NUM_SEQS
    assert limits.max_waiting == DEFAULT_MAX_WAITING
    # The documented default length of answers.
    assert f"{DEFAULT_MAX_NEW_TOKENS:,}" in limits.to_markdown()
    assert limits.max_completion_tokens >= DEFAULT_MAX_NEW_TOKENS
