"""Remedies for samples that an objective cannot train on."""

from __future__ import annotations

from finesight.objective_components import SampleKind

_LABELED = "set train.objective=kto, or sft without those of the label false"

UNPAIRED: dict[SampleKind, str] = {
    "label none": "add the rejected answer or, for kto, `label`, or set train.objective=sft"
}
"""Samples without a rejected answer and a label."""

UNDESIRABLE: dict[SampleKind, str] = {"label false": _LABELED}
"""Samples whose answer is undesirable."""

LABELED: dict[SampleKind, str] = {"label true": _LABELED, "label false": _LABELED}
"""Samples whose answer has a label."""

PAIRS: dict[SampleKind, str] = {
    "pair": "set train.objective=dpo to train on pairs, or sft for the chosen answers only"
}
"""Samples with a rejected answer."""
