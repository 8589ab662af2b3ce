"""What a task gives, as a sample."""

from __future__ import annotations

import random

from PIL import Image

from finesight.data.rules import check_sample
from finesight.data.sample import BoxPart, ImagePart, TextPart
from finesight.synth.drawn import Drawn, boxed
from finesight.synth.tasks import Task, sample


def test_a_drawn_answer_becomes_a_sample():
    box = boxed("cat", (1, 2, 3, 4))
    drawn = Drawn(Image.new("RGB", (8, 8)), ("Where is ", box, "?"), (box,), "find", {"note": 1})
    made = drawn.as_sample("a-1", "pictures/1.png")
    check_sample(made, "here")
    asked, said = made.messages
    assert asked.content == (
        ImagePart(image="pictures/1.png"),
        TextPart(text="Where is "),
        BoxPart(label="cat", xyxy=(1, 2, 3, 4)),
        TextPart(text="?"),
    )
    assert said.content == (box,)
    assert made.meta == {"kind": "find", "note": 1}


def test_further_questions_are_asked_about_the_same_picture():
    drawn = sample(Task("receipt", "built-in"), 1, 3)
    more = drawn.with_more(5, random.Random(0))
    answers = [drawn.answer, *(turn.answer for turn in more.further)]
    assert len(answers) > 2, answers
    assert len(set(answers)) == len(answers), answers
    assert more.picture is drawn.picture
    made = more.as_sample("b", "pictures/2.png")
    check_sample(made, "here")
    assert [message.role for message in made.messages] == ["user", "assistant"] * len(answers)
    assert sum(isinstance(part, ImagePart) for part in made.parts()) == 1
    assert drawn.with_more(5, random.Random(0)).further == more.further
    assert drawn.with_more(0, random.Random(0)).further == ()


def test_a_picture_with_one_question_stays_so():
    drawn = sample(Task("letters", "built-in"), 1, 3)
    assert drawn.with_more(4, random.Random(0)).further == ()
