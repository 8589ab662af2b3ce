"""Two measurements of the same samples, side by side."""

from __future__ import annotations

from finesight.evaluate.score import LOWER_IS_BETTER, Scores


def compare(before: Scores, after: Scores, headline: str | None = None) -> str:
    """A table with a line for each score of `before`: its value then and now, the difference, and
    whether that is better. The score named `headline` is marked."""
    rows = [("score", "before", "after", "difference", "")]
    for name, old in before.items():
        new = after[name]
        gain = old - new if name in LOWER_IS_BETTER else new - old
        verdict = "better" if gain > 0 else "worse" if gain < 0 else "same"
        mark = "*" if name == headline else ""
        rows.append((name + mark, f"{old:.4f}", f"{new:.4f}", f"{new - old:+.4f}", verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for row in rows:
        figures = "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3))
        lines.append(f"{row[0]:<{widths[0]}}  {figures}  {row[4]}".rstrip())
    return "\n".join(lines)
