"""Results of commands as sentences of the page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from finesight.app.jobs import Job
from finesight.evaluate.score_format import format_score
from finesight.metric_components import get_score
from finesight.report.i18n import translate
from finesight.report.metric_rows import format_metric_name
from finesight.report.summary import format_duration, join_words

Result = Mapping[str, Any]


def describe_result(job: Job, result: Result) -> list[str]:
    """Return the translated sentences of the result of a command; none for other commands.

    Args:
        result: Data of the command, which another version may have written.
    """
    describe = _DESCRIPTIONS.get(job.arguments[0])
    sentences: list[str] = []
    if describe is None or not result:
        return sentences
    with contextlib.suppress(AttributeError, LookupError, TypeError, ValueError):
        for sentence in describe(result):
            # Names of files may have bytes that are no text.
            sentences.append(sentence.encode(errors="replace").decode())
    return sentences


def list_commands(job: Job, result: Result) -> dict[str, str]:
    """Return the serving commands that a command has printed, by program."""
    commands: dict[str, str] = {}
    if job.arguments[0] == "export":
        for name, key in (("vLLM", "vllm"), ("SGLang", "sglang")):
            command = result.get(key)
            if isinstance(command, str) and command:
                commands[name] = command.encode(errors="replace").decode()
    return commands


def _describe_import(result: Result) -> Iterator[str]:
    train, *validation = result["output_files"]
    num_validation = sum(one["num_samples"] for one in validation)
    yield translate(
        "{:,} samples for training and {:,} for validation are ready.",
        train["num_samples"],
        num_validation,
    )
    if num_skipped := sum(result["skipped_rows"].values()):
        yield translate("{:,} rows are invalid and were skipped. Details list them.", num_skipped)


def _describe_check(result: Result) -> Iterator[str]:
    counts = dict.fromkeys(("error", "warning"), 0)
    for issue in result["issues"].values():
        if issue["severity"] in counts:
            counts[issue["severity"]] += issue["count"]
    yield translate(
        "{:,} samples with {:,} images were checked.", result["num_samples"], result["num_images"]
    )
    if counts["error"]:
        yield translate("Errors that would stop a training: {:,}.", counts["error"])
    if counts["warning"]:
        yield translate("Warnings: {:,}.", counts["warning"])
    if not any(counts.values()):
        yield translate("Nothing is wrong with them.")


def _describe_plan(result: Result) -> Iterator[str]:
    chosen = result["chosen"]
    target = result["target"]
    memory_gb = target["memory_bytes"] / 1e9
    needed_gb = chosen["total_bytes"] / 1e9
    if chosen["fits"]:
        text = "The training fits: it needs about {:.1f} GB of the {:.0f} GB of {}."
    else:
        text = "The training does not fit: it needs about {:.1f} GB, and there are {:.0f} GB in {}."
    name = target["name"]
    if target["is_measured"]:
        name = translate("this machine")
    yield translate(text, needed_gb, memory_gb, name)
    total_s = result["startup_s"] + chosen["run_s"]
    evaluation = result["evaluation"]
    yield translate(
        "It takes about {}, of which about {} are for evaluations.",
        format_duration(total_s),
        format_duration(evaluation["total_s"]),
    )
    if result["token_stats"]["num_skipped"]:
        yield translate("{:,} samples are skipped.", result["token_stats"]["num_skipped"])
    if result["warnings"] and evaluation["num_cut_answers"]:
        yield translate(
            "Warning: {:,} of {:,} validation answers are longer than the recipe allows and would"
            " be cut off. Allow {:,} tokens (eval.max_new_tokens).",
            evaluation["num_cut_answers"],
            evaluation["num_samples"],
            evaluation["max_answer_tokens"],
        )
    elif result["warnings"]:
        yield translate("Details have warnings.")


def _describe_evaluation(result: Result) -> Iterator[str]:
    name = result["primary_metric"]
    num_samples = result["num_samples"]
    yield translate(
        "{} of {:,} answers: {}.",
        format_metric_name(name),
        num_samples,
        format_score(result["scores"][name], num_samples),
    )
    if explanation := get_score(name).description:
        yield f"{format_metric_name(name)}: {translate(explanation)}"


def _describe_guard(result: Result) -> Iterator[str]:
    failed = [one["group"] for one in result["groups"] if one["problems"]]
    if failed:
        yield translate("The run answers worse than the base model in: {}.", join_words(failed))
    else:
        yield translate("The run has forgotten nothing of what was asked.")


def _describe_search(result: Result) -> Iterator[str]:
    num_trials = len(result["trials"])
    if result["choice"]:
        yield translate("{:,} trials found better settings, which are a new recipe.", num_trials)
    else:
        yield translate("{:,} trials found nothing better than the recipe.", num_trials)


def _describe_merge(result: Result) -> Iterator[str]:
    yield translate("The merged model is in the folder {}.", result["folder"])


def _describe_export(result: Result) -> Iterator[str]:
    if "num_calibration_samples" in result:
        yield translate("The model in 4 bits is in the folder {}.", result["folder"])
    elif "request" in result:
        yield translate("Copy the command of the program that serves the model.")


_DESCRIPTIONS: Mapping[str, Callable[[Result], Iterator[str]]] = {
    "import": _describe_import,
    "check": _describe_check,
    "plan": _describe_plan,
    "eval": _describe_evaluation,
    "guard": _describe_guard,
    "search": _describe_search,
    "merge": _describe_merge,
    "export": _describe_export,
}
"""Function that describes the result, by command."""
