"""Caption metric for generated scenes, used as a custom `eval.metric`."""

from finesight.evaluate.eval_case import EvalCase
from finesight.synth.captions import score_caption


def caption(case: EvalCase) -> dict[str, float]:
    """Score a caption: `exact` (all facts and no others) and separate scores."""
    return score_caption(case.answer, case.references[0])
