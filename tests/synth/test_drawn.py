"""What a task gives, as a sample."""

from __future__ import annotations

from PIL import Image

from finesight.data.rules import check_sample
from finesight.data.sample import BoxPart, ImagePart, TextPart
from finesight.synth.drawn import Drawn, boxed


def test_a_drawn_answer_becomes_a_sample():
    box = boxed("cat", (1, 2, 3, 4))
    drawn = Drawn(Image.new("RGB", (8, 8)), ("Where is ", box, "?"), (box,), "find", {"note": 1})
    sample = drawn.as_sample("a-1", "pictures/1.png")
    check_sample(sample, "here")
    asked, said = sample.messages
    assert asked.content == (
        ImagePart(image="pictures/1.png"),
        TextPart(text="Where is "),
        BoxPart(label="cat", xyxy=(1, 2, 3, 4)),
        TextPart(text="?"),
    )
    assert said.content == (box,)
    assert sample.meta == {"kind": "find", "note": 1}
