"""What a task gives, as a sample."""

from __future__ import annotations

import random

from PIL import Image
from synthetic_tasks.synthetic_sample import SyntheticSample, make_box_part
from synthetic_tasks.tasks import SyntheticTask, generate_sample

from finesight.samples.sample import BoxPart, ImagePart, TextPart, validate_sample


def test_generated_answer_becomes_a_sample():
    box = make_box_part("cat", (1, 2, 3, 4))
    drawn = SyntheticSample(
        Image.new("RGB", (8, 8)), ("Where is ", box, "?"), (box,), "find", {"note": 1}
    )
    made = drawn.to_sample("a-1", "images/1.png")
    validate_sample(made, "here")
    requested, output = made.messages
    assert requested.content == (
        ImagePart(image="images/1.png"),
        TextPart(text="Where is "),
        BoxPart(label="cat", xyxy=(1, 2, 3, 4)),
        TextPart(text="?"),
    )
    assert output.content == (box,)
    assert made.meta == {"kind": "find", "note": 1}


def test_extra_questions_use_the_same_image():
    drawn = generate_sample(SyntheticTask("receipt", "built-in"), 1, 3)
    more = drawn.add_questions(5, random.Random(0))
    answers = [drawn.answer, *(turn.answer for turn in more.extra_turns)]
    assert len(answers) > 2, answers
    assert len(set(answers)) == len(answers), answers
    assert more.image is drawn.image
    made = more.to_sample("b", "images/2.png")
    validate_sample(made, "here")
    assert [message.role for message in made.messages] == ["user", "assistant"] * len(answers)
    assert sum(isinstance(part, ImagePart) for part in made.iter_parts()) == 1
    assert drawn.add_questions(5, random.Random(0)).extra_turns == more.extra_turns
    assert drawn.add_questions(0, random.Random(0)).extra_turns == ()


def test_image_with_one_question_is_unchanged():
    drawn = generate_sample(SyntheticTask("letters", "built-in"), 1, 3)
    assert drawn.add_questions(4, random.Random(0)).extra_turns == ()
