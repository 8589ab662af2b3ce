"""Caption metric for generated scenes, used as a custom `eval.metric`."""

from synthetic_tasks.captions import score_caption

from finesight.evaluate.eval_case import EvalCase


def caption(case: EvalCase) -> dict[str, float]:
    """Score a caption: `exact` (all facts and no others) and separate scores."""
    return score_caption(case.answer, case.references[0])
