"""Hypothesis strategies of boxes in images."""

from hypothesis import strategies as st

from finesight.samples.frames import ImageSizes
from finesight.samples.sample import BoxPart


@st.composite
def image_boxes(
    draw: st.DrawFn, factor: int, labels: tuple[str | None, ...], max_multiple: int = 40
) -> tuple[BoxPart, ImageSizes]:
    """Draw boxes in images whose resized sides are multiples of a factor."""
    original_size = draw(st.tuples(*[st.integers(1, 3000)] * 2))
    multiples = draw(st.tuples(*[st.integers(1, max_multiple)] * 2))
    height, width = original_size
    xs, ys = (sorted(draw(st.tuples(*[st.floats(0, side)] * 2))) for side in (width, height))
    resized_size = multiples[0] * factor, multiples[1] * factor
    label = draw(st.sampled_from(labels))
    box = BoxPart(label=label, xyxy=(xs[0], ys[0], xs[1], ys[1]))
    return box, ImageSizes(original_size, resized_size)
