"""Labelling session: samples, task and labels of a folder, with suggestions of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finesight.data.sample import BoxPart
from finesight.infer.model_loader import InferenceModel
from finesight.label.label_ranking import rank_labels
from finesight.label.label_store import LabelItem, LabelStore
from finesight.label.label_task import (
    AnswerKind,
    LabelTask,
    detect_task,
    get_text,
    read_items,
    read_run_examples,
)
from finesight.label.suggestion import suggest_labels

SUGGESTIONS_PER_WRITE = 64
"""Number of suggestions after which they are saved, so that an interruption loses no more."""


@dataclass(slots=True)
class LabelSession:
    """Open labels of a folder.

    Attributes:
        model: Run or model of the suggestions, as given by the user.
        review: Whether existing answers are reviewed, instead of new ones created.
    """

    model: str
    task: LabelTask
    store: LabelStore
    review: bool

    def add_suggestions(
        self,
        inference_model: InferenceModel,
        *,
        max_new_tokens: int,
        batch_size: int,
        on_progress: Callable[[int], None] | None = None,
    ) -> dict[str, str]:
        """Suggest answers to the open samples that have none from this model.

        Returns:
            The reason for each sample without a suggestion, by ID: an unreadable image.
        """
        reasons: dict[str, str] = {}
        pending = self.store.list_unsuggested(self.model)
        for start in range(0, len(pending), SUGGESTIONS_PER_WRITE):
            chunk = pending[start : start + SUGGESTIONS_PER_WRITE]
            options: dict[str, Any] = {
                "max_new_tokens": max_new_tokens,
                "batch_size": batch_size,
                "on_progress": on_progress,
            }
            if self.review:
                ranked, failed = rank_labels(inference_model, chunk, **options)
                scored = [(one.suggestion, one.score) for one in ranked]
            else:
                suggestions, failed = suggest_labels(inference_model, chunk, **options)
                scored = [(suggestion, None) for suggestion in suggestions]
            self.store.add_suggestions(scored, self.model)
            reasons |= failed
        self.store.exclude(reasons)
        return reasons

    def complete_task(self) -> None:
        """Use boxes in suggestions for the kind and the choices, if the task has no examples."""
        contents = [item.proposal for item in self.store.items]
        labels = Counter(
            part.label for content in contents for part in content if isinstance(part, BoxPart)
        )
        if self.task.kind == "text" and labels:
            self.task = replace(self.task, kind="boxes")
        if self.task.kind == "boxes" and not self.task.choices:
            choices = tuple(label for label, _ in labels.most_common() if label)
            self.task = replace(self.task, choices=choices)

    def describe_item(self, item: LabelItem) -> dict[str, Any]:
        """Return the values of an item as JSON data."""
        suggestion, content = item.suggestion, item.proposal
        return {
            "id": item.sample.sample.id,
            "decision": item.decision.event if item.decision else "open",
            "confidence": suggestion.confidence if suggestion else None,
            "score": suggestion.score if suggestion else None,
            "answer": describe_answer(content),
            "suggestion": describe_answer(suggestion.content) if suggestion else None,
            "parts": [
                {"path": list(part.path), "confidence": part.confidence}
                for part in (suggestion.parts if suggestion else ())
            ],
            "history": [
                {"time": entry.time.isoformat(), "event": entry.event, "model": entry.model}
                for entry in item.history
            ],
        }


def open_session(
    folder: Path,
    run_or_model: str,
    sources: Sequence[Path],
    *,
    prompt: str | None = None,
    kind: AnswerKind | None = None,
    choices: Sequence[str] = (),
    review: bool = False,
) -> LabelSession:
    """Read the samples of a session and open its folder.

    Prompt, kind and choices that are not given come from the training data of the run, or else from
    the answers of the samples.
    """
    examples = read_run_examples(run_or_model)
    if prompt is None:
        prompt = detect_task(examples).prompt
    samples = read_items(sources, prompt)
    if not examples:
        examples = [one for one in samples if one.sample.messages[-1].role == "assistant"]
    task = detect_task(examples, prompt=prompt, kind=kind, choices=choices)
    return LabelSession(run_or_model, task, LabelStore(folder, samples, review=review), review)


def describe_answer(content: Sequence[Any]) -> dict[str, Any]:
    """Return the text and the boxes of an answer as JSON data."""
    boxes = [part for part in content if isinstance(part, BoxPart)]
    return {
        "text": get_text(content),
        "boxes": [box.model_dump(mode="json", exclude={"type"}) for box in boxes],
    }
