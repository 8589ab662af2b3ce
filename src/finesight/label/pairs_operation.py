"""`finesight pairs`: preference pairs from graded responses or labels."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from finesight.errors import UserError, format_count
from finesight.files.bounded_files import read_json_object
from finesight.operations.next_steps import build_init_step
from finesight.operations.operation import Outcome, Parameter, StrPath
from finesight.operations.responses import (
    build_pair,
    find_response_files,
    grade_responses,
    list_answers,
    read_responses,
    write_answers,
)

if TYPE_CHECKING:
    from finesight.operations.responses import Responses, Row, Verdicts


def pairs(
    source: StrPath,
    out: StrPath,
    data: StrPath | None = None,
    labels: Annotated[bool, Parameter(option="--labels")] = False,
    min_score: float = 1.0,
) -> Outcome[Mapping[str, int]]:
    """Write preference pairs from responses with scores, or from corrections of suggestions.

    SOURCE is a folder of `finesight sample`, a run (its sampled responses if it trained on these,
    else its validation answers), a file of `finesight eval --out` or a folder of `finesight label`.

    The chosen answer is the best response with at least --min-score, else the answer of the sample,
    and the rejected one the worst response below it. A correction is chosen over its suggestion.

    Example: finesight pairs best pairs.jsonl --data receipts/train.jsonl

    Args:
        source: Folder or file of responses or labels.
        out: File to create.
        data: Samples of the responses. Default: those of the recipe of a run, or of the labels.
        labels: Write one sample per response, with the label true or false instead of pairs.
        min_score: Lowest score of a correct response.
    """
    from finesight.files.storage import check_new_path
    from finesight.label.label_store import JOURNAL_FILE, read_labels, read_verdicts
    from finesight.samples.corpus import load_corpus
    from finesight.samples.sample import count_ids

    source = Path(source)
    out = Path(out)
    check_new_path(out)
    verdicts: Verdicts
    responses: Responses = {}
    if (source / JOURNAL_FILE).is_file():
        samples = read_labels(source)
        verdicts = {**read_verdicts(source)}
    else:
        file, files, weights = find_response_files(source, data)
        responses = read_responses(file, weights)
        verdicts = grade_responses(responses, min_score)
        samples = [one for one in load_corpus(files).read_samples() if one.sample.id in verdicts]
        count_ids("samples", (one.sample.id for one in samples), data or source)
    rows: list[Row] = []
    num_unused = 0
    for located in samples:
        name = located.sample.id
        good, bad = verdicts.pop(name, ((), ()))
        num_rows = len(rows)
        if labels:
            graded = [(answer, True) for answer in good] + [(answer, False) for answer in bad]
            for n, (answer, label) in enumerate(graded):
                rows.append((located, answer, {"label": label, "id": f"{name}-{n}"}))
        else:
            rows += build_pair(located, (good, bad))
        num_unused += bool(good or bad) and len(rows) == num_rows
    num_written = write_answers(out, rows, out.parent)
    num_unused += len(verdicts) + len(rows) - num_written
    if not num_written:
        contents = list_answers(responses)
        remedy = "sample more responses, or change --min-score"
        problem = f"{num_unused} samples have no better and worse answer"
        if 2 * contents.count(None) > len(contents):
            problem += f": {contents.count(None)} of {len(contents)} responses are truncated"
            remedy = f"sample longer responses, with a larger {_get_length_option(source)}, or"
            remedy += " train the model until it ends its answers"
        raise UserError(
            problem,
            where=str(source),
            expected="answers on both sides of --min-score, and their samples in --data",
            remedy=remedy,
        )
    counts = {"num_written": num_written, "num_unused": num_unused}
    written = format_count(num_written, "label" if labels else "pair")
    lines = [f"{out}: {written}, {num_unused} not used"]
    return Outcome(counts, lines, counts, [build_init_step(out, _find_model(source))])


def _get_length_option(source: Path) -> str:
    """Return the name of the limit of the responses of a source."""
    from finesight.settings.manifest import RECIPE_FILE, RESPONSES_FILE
    from finesight.settings.recipe import load_recipe

    if not (source / RECIPE_FILE).is_file():
        return "--max-new-tokens"
    if not (source / RESPONSES_FILE).is_file():
        return "eval.max_new_tokens"
    sampling = load_recipe(source / RECIPE_FILE).needs.sampling
    section = "train" if sampling is None else sampling.section
    return f"{section}.max_completion_length"


def _find_model(source: Path) -> str | None:
    """Return the run or model whose answers a source contains; None if it is unknown."""
    from finesight.label.label_store import JOURNAL_FILE, read_suggesters
    from finesight.model_folder import check_model_path
    from finesight.settings.manifest import MANIFEST_FILE, SAMPLING_FILE, find_weights

    names: list[str] = []
    if (source / SAMPLING_FILE).is_file():
        record = read_json_object(source / SAMPLING_FILE, remedy="sample the responses again")
        names.append(str(record.get("run_or_model")))
    elif (source / JOURNAL_FILE).is_file():
        names += read_suggesters(source)
    else:
        for folder in (source, *source.parents):
            if (folder / MANIFEST_FILE).is_file() and (weights := find_weights(folder)) is not None:
                names.append(str(weights))
    for name in names:
        # A model may have been moved, and suggestions may be from a server.
        with suppress(UserError):
            check_model_path(name)
            return name
    return None
