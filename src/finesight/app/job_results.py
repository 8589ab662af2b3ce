"""Results of commands as sentences of the page."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from finesight.app.jobs import Job
from finesight.evaluate.score_format import format_score
from finesight.metric_components import find_score
from finesight.report.i18n import translate
from finesight.report.metric_rows import format_metric_name
from finesight.report.summary import format_duration, join_words

Result = Mapping[str, Any]

SERVING_PROGRAMS = {
    "vLLM": ("vllm", "vllm serve "),
    "SGLang": ("sglang", "python -m sglang"),
}
"""Key of the command in the result of an export, and its start, by program."""


def describe_result(job: Job, result: Result) -> list[str]:
    """Return the translated sentences of the result of a command; none for other commands.

    Args:
        result: Data of the command, which another version may have written.
    """
    describe = _DESCRIPTIONS.get(job.arguments[0])
    sentences: list[str] = []
    if describe is None or not result:
        return sentences
    with contextlib.suppress(ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        for sentence in describe(result):
            # Names of files may have bytes that are no text.
            sentences.append(sentence.encode(errors="replace").decode())
    return sentences


def list_commands(job: Job, result: Result) -> dict[str, str]:
    """Return the serving commands that a command has printed, by program."""
    commands: dict[str, str] = {}
    if job.arguments[0] == "export":
        for name, (key, start) in SERVING_PROGRAMS.items():
            command = result.get(key)
            # Another person may have written the text, which is copied to a terminal.
            if isinstance(command, str) and command.startswith(start) and command.isprintable():
                commands[name] = command
    return commands


def explain_metric(name: str) -> str:
    """Return the translated explanation of a metric; empty for an unknown or custom one."""
    score = find_score(name)
    if score is None:
        return ""
    title = translate(score.title)
    scale = translate("Lower is better.")
    if not score.lower_is_better:
        scale = translate("From 0 to {:g}; higher is better.", score.maximum)
    if not score.description:
        return translate("{}: {}", title, scale)
    return translate("{}: {}. {}", title, translate(score.description), scale)


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
    name = target["name"]
    if target["is_measured"]:
        name = translate("this machine")
    if target["num_gpus"] > 1:
        name = translate("each of {} {}", target["num_gpus"], target["name"])
    if chosen["fits"]:
        text = "The training fits: it needs about {:.1f} GB of the {:.0f} GB of {}."
        yield translate(text, needed_gb, memory_gb, name)
    else:
        if chosen["exceeds_host_memory"]:
            yield translate(
                "The training does not fit: it needs about {:.1f} GB of memory outside of the GPU,"
                " and this machine has {:.1f} GB.",
                chosen["host_bytes"] / 1e9,
                chosen["host_memory_bytes"] / 1e9,
            )
        else:
            yield translate(
                "The training does not fit: it needs about {:.2f} GB, and may use {:.2f} GB, 90 %"
                " of the memory of {}.",
                needed_gb,
                chosen["usable_bytes"] / 1e9,
                name,
            )
        hints = [translate(hint) for hint in result["memory_hints"]]
        yield translate("Try one of these: {}.", translate(", ").join(hints))
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
    if explanation := explain_metric(name):
        yield explanation


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
