"""How captions of generated scenes are measured: a metric of one's own for `eval.metric`."""

from finesight.evaluate.answered import Case
from finesight.synth.captions import caption_scores


def caption(case: Case) -> dict[str, float]:
    """Whether the caption states what is there, and nothing else: `exact`, and apart."""
    return caption_scores(case.answer, case.truths[0])
