"""Match of a pattern or a JSON schema, in worker processes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any

from finesight.errors import UserError
from finesight.evaluate.eval_case import EvalCase
from finesight.evaluate.reward import Reward
from finesight.evaluate.reward_workers import RewardWorkers
from finesight.evaluate.rewards.format import Settings
from finesight.evaluate.score_function import RewardError, describe_case
from finesight.files.bounded_files import parse_json
from finesight.files.pattern_matcher import MAX_PATTERN_CPU_S
from finesight.files.worker_pool import JobOutput

SCHEMA_CPU_S = 5.0
"""Maximum seconds of CPU time with a schema, for a response."""


class FormatReward(Reward[Settings]):
    """1 if the pattern matches the complete answer, or the schema describes it."""

    def __init__(self, settings: Settings, workers: RewardWorkers) -> None:
        super().__init__(settings, workers)
        self.matcher = workers.matcher
        if settings.json_schema is not None:
            self.pool = workers.open_pool(dict)

    def score(self, case: EvalCase) -> float:
        if self.settings.pattern is not None:
            return self._match_pattern(self.settings.pattern, case)
        assert self.settings.json_schema is not None, "neither pattern nor schema"
        return self._match_schema(self.settings.json_schema, case)

    def _match_pattern(self, pattern: str, case: EvalCase) -> float:
        self.matcher.budget_s = MAX_PATTERN_CPU_S
        with _name_case("pattern", case):
            answer = [case.answer.strip()]
            (groups,) = self.matcher.match(pattern, answer, is_full=True, flags=re.DOTALL)
        return float(groups is not None)

    def _match_schema(self, schema: Mapping[str, Any], case: EvalCase) -> float:
        with _name_case("json_schema", case), self.pool.borrow_worker() as worker:
            reply = worker.call(_validate, schema, case.answer, max_cpu_s=SCHEMA_CPU_S)
        return float(reply.value)


@contextlib.contextmanager
def _name_case(option: str, case: EvalCase) -> Iterator[None]:
    """Add the option of the reward `format` and the sample to an error."""
    try:
        yield
    except UserError as error:
        raise RewardError(
            f"reward format: {error.what} ({describe_case(case)})",
            where=f"rewards, {option}",
            expected=error.expected,
            remedy=f"correct {option}, then start again with --resume",
        ) from error


def _validate(state: dict[str, Any], schema: Mapping[str, Any], answer: str) -> JobOutput:
    """Compare an answer with a JSON schema in a worker process.

    Patterns of a schema may take exponential time, and its references may be endless.
    """
    if "validator" not in state:
        state["validator"] = _build_validator(schema)
    try:
        value = parse_json(answer)
    except ValueError:
        return JobOutput(False)
    try:
        return JobOutput(bool(state["validator"].is_valid(value)))
    except import_module("referencing.exceptions").Unresolvable as error:
        expected = "references that are defined in the schema"
        raise UserError(str(error), expected=expected) from error
    except (re.error, OverflowError, RecursionError) as error:
        raise _build_schema_error(f"{type(error).__name__}: {error}") from error


def _build_validator(schema: Mapping[str, Any]) -> Any:
    """Return the validator of a JSON schema. References to other documents are an error."""
    package = import_module("jsonschema")
    try:
        validator = package.validators.validator_for(schema, package.Draft202012Validator)
        validator.check_schema(schema)
        # Without a registry, the package would download the documents.
        return validator(schema, registry=import_module("referencing").Registry())
    except package.SchemaError as error:
        raise _build_schema_error(f"{error.message:.500} at {error.json_path}") from error
    except (re.error, OverflowError, RecursionError) as error:
        raise _build_schema_error(f"{type(error).__name__}: {error}") from error


def _build_schema_error(what: str) -> UserError:
    return UserError(what, expected="a valid JSON schema with finite references")
