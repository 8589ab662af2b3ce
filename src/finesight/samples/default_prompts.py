"""Default questions about the class of an image, and the answer about absent objects."""

from __future__ import annotations

import re

MAX_PROMPT_CLASSES = 20
"""Maximum number of classes that the default question about the class of an image lists."""

NO_OBJECTS_ANSWER = "none"
"""Answer about an image that shows none of the objects that the question names."""

CLASS_INSTRUCTION = "Answer with the class only."
"""End of the default question about the class of an image."""


def build_class_prompt(num_classes: int) -> str:
    """Build the template of the default question about the class of an image.

    It lists the classes, `{labels}`, if there are at most `MAX_PROMPT_CLASSES`.
    """
    question = "Which class does the image show?"
    if 0 < num_classes <= MAX_PROMPT_CLASSES:
        question = "Which of these classes does the image show: {labels}?"
    return f"{question} {CLASS_INSTRUCTION}"


def escape_placeholders(text: str) -> str:
    """Return a text of the data, such as class names, as a part of a prompt."""
    return re.sub(r"\{labels?\}", r"{\g<0>}", text)
