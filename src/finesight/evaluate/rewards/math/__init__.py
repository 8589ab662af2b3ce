"""Equality of formulas."""

from __future__ import annotations

from collections.abc import Sequence

from finesight.reward_components import ExtraPackage, RewardComponent, RewardSettings


def list_packages(settings: RewardSettings) -> Sequence[ExtraPackage]:
    """Return the package that parses and compares formulas."""
    return (ExtraPackage("math-verify", extra="latex"),)


COMPONENT = RewardComponent[RewardSettings](
    kind="rewards",
    name="math",
    title="Formulas",
    implementation="finesight.evaluate.rewards.math.score:MathReward",
    packages=list_packages,
    unscored_reason="these references are no formulas",
    position=6,
)
