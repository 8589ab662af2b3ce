"""Forms of questions in samples, and new questions of the same form."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finesight.errors import UserError
from finesight.samples.example_question import build_placeholder, shorten_prompt
from finesight.samples.marked_prompt import count_marks, remove_marks, write_marked_prompt
from finesight.samples.prompt_format import (
    DEFAULT_PROMPT_FORMAT,
    PromptFormat,
)
from finesight.samples.question_forms import MAX_PROMPT_CHARS, find_prompt_format
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    VideoPart,
)

IMAGE = None
"""Mark of an image in a question."""


def make_sample(number: int, pieces: Sequence[str | None], system: str = "") -> LocatedSample:
    """Build a sample of one question. `{}` in its texts stands for the number."""
    content: list[ContentPart] = []
    for index, piece in enumerate(pieces):
        if piece is None:
            content.append(ImagePart(image=f"{number}-{index}.png"))
        else:
            content.append(TextPart(text=piece.format(number)))
    messages = [Message(role="user", content=tuple(content))]
    messages.append(Message(role="assistant", content=(TextPart(text="yes"),)))
    if system:
        messages.insert(0, Message(role="system", content=(TextPart(text=system),)))
    return LocatedSample(Sample(id=str(number), messages=tuple(messages)), Path("data"))


def make_samples(*groups: tuple[int, Sequence[str | None]], **options: Any) -> list[LocatedSample]:
    """Build samples from groups of a number and a question."""
    samples = []
    for count, pieces in groups:
        for _ in range(count):
            samples.append(make_sample(len(samples), pieces, **options))
    return samples


FORMS: dict[str, tuple[Sequence[str | None], str]] = {
    "image, text": ([IMAGE, "Q{}?"], "<image>{question}"),
    "text, image": (["Q{}?", IMAGE], "{question}<image>"),
    "line break before the image": (["Q{}?\n", IMAGE], "{question}\n<image>"),
    "line break after the image": ([IMAGE, "\nQ{}?"], "<image>\n{question}"),
    "space at the end": ([IMAGE, "Q{}: "], "<image>{question} "),
    "two images": ([IMAGE, IMAGE, "Q{}?"], "<image>{question}"),
    "numbered images": (
        ["Image 1: ", IMAGE, "\nImage 2: ", IMAGE, "\nQ{}?"],
        "Image 1: <image>\nImage 2: <image>\n{question}",
    ),
    "fixed instruction": (
        [IMAGE, "Q{}?", IMAGE, " Answer briefly."],
        "<image>{question}<image> Answer briefly.",
    ),
    "no image": (["Q{}? "], "{question} "),
}


@pytest.mark.parametrize("name", FORMS)
def test_new_question_has_the_form_of_the_samples(name: str) -> None:
    pieces, template = FORMS[name]
    samples = make_samples((9, pieces), system="Be exact.")
    prompt_format = find_prompt_format(samples)
    (found,) = prompt_format.templates
    num_images = pieces.count(IMAGE)
    assert (found.template, found.share) == (template, 1.0)
    assert found.min_images == found.max_images == num_images
    expected = make_sample(77, pieces, "Be exact.").sample.messages[:2]
    media = [part for part in expected[1].content if isinstance(part, ImagePart)]
    for typed in ("Q77?", " \nQ77?\t"):
        typed = typed.replace("?", ":") if name == "space at the end" else typed
        content = prompt_format.build_content(typed, media)
        question = Message(role="user", content=content)
        assert (*prompt_format.build_system_messages(num_images), question) == expected
    assert prompt_format.describe_difference("Q77?", num_images) == []


TEXT = st.text("ab?", min_size=1, max_size=3)
SPACE = st.sampled_from(["", " ", "\n", "\n\n"])


@given(
    st.lists(TEXT, min_size=2, max_size=6, unique=True),
    st.tuples(SPACE, SPACE, SPACE),
    st.integers(0, 3),
    st.integers(0, 3),
)
def test_question_without_white_space_gives_its_sample(
    texts: list[str], spaces: tuple[str, str, str], num_before: int, num_after: int
) -> None:
    """Also images on both sides of the text; at least two texts differ."""
    samples = [
        make_sample(n, [*[IMAGE] * num_before, spaces[0] + text + spaces[1], *[IMAGE] * num_after])
        for n, text in enumerate(texts)
    ]
    prompt_format = find_prompt_format(samples)
    for text, located in zip(texts, samples, strict=True):
        content = located.sample.messages[0].content
        media = [part for part in content if isinstance(part, ImagePart)]
        assert prompt_format.build_content(text, media) == content
        # A marked prompt has its own form, also for a model without a recorded one.
        marked = write_marked_prompt(content)
        assert DEFAULT_PROMPT_FORMAT.build_content(marked, media) == content


def test_prompts_have_their_own_form_and_exact_text() -> None:
    samples = make_samples((20, [IMAGE, "Caption: "]), (9, ["OCR:", IMAGE]))
    prompt_format = find_prompt_format(samples)
    assert prompt_format.prompts == ("<image>Caption: ", "OCR:<image>")
    image = ImagePart(image="a.png")
    ocr, caption = TextPart(text="OCR:"), TextPart(text="Caption: ")
    for typed, content in {
        "OCR:": (ocr, image),
        " OCR: ": (ocr, image),
        "OCR:<image>": (ocr, image),
        "<image>OCR:": (image, ocr),
        "Caption:": (image, caption),
        "Count:": (image, TextPart(text="Count: ")),
    }.items():
        assert prompt_format.build_content(typed, [image]) == content, typed
    (note,) = prompt_format.describe_forms()
    assert "'<image>{question} ' (69%), '{question}<image>' (31%)" in str(note)
    assert prompt_format.describe_difference("Count:", 1) == [note]
    assert prompt_format.describe_difference("OCR:", 1) == []
    assert prompt_format.describe_difference("<image>Count:", 1) == []


def test_number_of_images_selects_the_form() -> None:
    samples = make_samples(
        (6, ["A: ", IMAGE, " B: ", IMAGE, " Q{}"]), (5, [IMAGE, "Q{}"]), (4, ["Hello {} "])
    )
    prompt_format = find_prompt_format(samples)
    images = [ImagePart(image=f"{number}.png") for number in range(3)]
    assert write_marked_prompt(prompt_format.build_content("Q", images[:1])) == "<image>Q"
    assert (
        write_marked_prompt(prompt_format.build_content("Q", images[:2]))
        == "A: <image> B: <image> Q"
    )
    assert write_marked_prompt(prompt_format.build_content("Q", [])) == "Q "
    assert prompt_format.describe_forms() == []
    # A number that no form has: images, then text.
    assert prompt_format.build_content("Q", images) == (*images, TextPart(text="Q"))
    (note,) = map(str, prompt_format.describe_difference("Q", 3))
    assert note == "Number of images: 3, but 1 to 2 in the training questions."
    assert prompt_format.num_images is None


@pytest.mark.parametrize(
    ("groups", "num_images", "words"),
    [
        ([(9, [IMAGE, "Q{}"])], 0, "The training questions have images."),
        ([(9, ["Q{}"])], 1, "The training questions have no images."),
        ([(9, ["See {}: ", IMAGE, " Q{}"])], 1, "write <image> at each position"),
        ([(5, [IMAGE, "Q{}"]), (5, [IMAGE, IMAGE, "Q{}"])], 3, "3, but 1 to 2 in"),
        ([(5, [IMAGE, "Q{}"]), (5, [IMAGE, "Q{}\n"])], 1, r"'<image>{question}\n' (50%)"),
    ],
)
def test_differences_are_described(
    groups: list[tuple[int, list[str | None]]], num_images: int, words: str
) -> None:
    notes = find_prompt_format(make_samples(*groups)).describe_difference("Q", num_images)
    assert words in " ".join(map(str, notes))


@pytest.mark.parametrize(
    ("text", "num_images"),
    [("<image><image>Q<image>", 1), ("<image>Q<image>", 3), ("Q<image>R<image>", 1)],
)
def test_marks_must_match_the_images(text: str, num_images: int) -> None:
    images = [ImagePart(image=f"{number}.png") for number in range(num_images)]
    for prompt_format in (DEFAULT_PROMPT_FORMAT, find_prompt_format(make_samples((9, ["Q{}"])))):
        with pytest.raises(UserError, match=f"{text.count('<image>')} times <image>"):
            prompt_format.build_content(text, images)


def test_mark_may_be_a_word_of_the_text() -> None:
    """Without images, or after a backslash."""
    image = ImagePart(image="a.png")
    word = TextPart(text="What is <image>?")
    literal = r"What is \<image>?"
    assert DEFAULT_PROMPT_FORMAT.build_content("What is <image>?", []) == (word,)
    assert DEFAULT_PROMPT_FORMAT.build_content(literal, [image]) == (image, word)
    samples = make_samples((9, ["What is <image>?", IMAGE]))
    prompt_format = find_prompt_format(samples)
    assert prompt_format.prompts == (r"What is \<image>?<image>",)
    content = samples[0].sample.messages[0].content
    assert prompt_format.build_content(literal, content[1:]) == content


def test_one_mark_stands_for_all_images() -> None:
    images = [ImagePart(image="a.pdf#page=1"), VideoPart(video="b.mp4")]
    content = DEFAULT_PROMPT_FORMAT.build_content("Read <image> aloud", images)
    assert content == (TextPart(text="Read "), *images, TextPart(text=" aloud"))


def test_questions_that_nobody_can_type_are_no_prompts() -> None:
    """Boxes, empty texts, long texts and rare texts."""
    region = TextPart(text="What is in "), BoxPart(xyxy=(1, 2, 3, 4)), TextPart(text="?")
    samples = make_samples(
        (5, [IMAGE, ""]),
        (5, [IMAGE]),
        (5, [IMAGE, "x" * (MAX_PROMPT_CHARS + 1)]),
        (1, [IMAGE, "my secret"]),
    )
    for number in range(5):
        image = ImagePart(image=f"region-{number}.png")
        message = Message(role="user", content=(image, *region))
        samples.append(LocatedSample(Sample(id=f"r{number}", messages=(message,)), Path()))
    prompt_format = find_prompt_format(samples)
    assert prompt_format.prompts == ()
    assert {one.template for one in prompt_format.templates} == {"<image>{question}"}


def test_form_of_a_conversation_is_that_of_its_first_image() -> None:
    samples = []
    for located in make_samples((5, ["Q{}? ", IMAGE])):
        greeting = Message(role="user", content=(TextPart(text="Hello"),))
        answer = Message(role="assistant", content=(TextPart(text="Hello."),))
        messages = (greeting, answer, *located.sample.messages)
        sample = located.sample.model_copy(update={"messages": messages})
        samples.append(LocatedSample(sample, located.folder))
    prompt_format = find_prompt_format(samples)
    assert [one.template for one in prompt_format.templates] == ["{question} <image>"]
    # Later questions without images have no recorded form.
    assert prompt_format.build_content(" And? ", []) == (TextPart(text=" And? "),)


def test_request_content_has_the_order_of_the_samples() -> None:
    prompt_format = find_prompt_format(make_samples((9, ["Q{}?\n", IMAGE])))
    assert prompt_format.build_request_content("What?", ["data:x"]) == [
        {"type": "text", "text": "What?\n"},
        {"type": "image_url", "image_url": {"url": "data:x"}},
    ]


def test_turns_are_arranged_only_if_they_have_images_and_one_text() -> None:
    prompt_format = find_prompt_format(make_samples((9, ["Q{}?\n", IMAGE])))
    image, text = ImagePart(image="a.png"), TextPart(text="Q?")
    arranged = prompt_format.arrange_question(Message(role="user", content=(image, text)))
    assert arranged.content == (TextPart(text="Q?\n"), image)
    for content in ((text,), (image,), (text, image, text), arranged.content):
        message = Message(role="user", content=content)
        assert prompt_format.arrange([message]) == (message,)
        assert DEFAULT_PROMPT_FORMAT.arrange([message]) == (message,)


def test_no_samples_have_no_form() -> None:
    assert find_prompt_format([]) == PromptFormat()


def test_one_prompt_about_several_images_keeps_its_texts() -> None:
    """Its question alone asks it, and other questions get the texts between the images."""
    pieces = ["Image 1: ", IMAGE, "\nImage 2: ", IMAGE, "\nWhat changed?"]
    samples = make_samples((9, pieces))
    prompt_format = find_prompt_format(samples)
    content = samples[0].sample.messages[0].content
    images = [content[1], content[3]]
    assert prompt_format.build_content("What changed?", images) == content
    other = prompt_format.build_content("What is new?", images)
    assert write_marked_prompt(other) == "Image 1: <image>\nImage 2: <image>\nWhat is new?"


def test_system_prompt_belongs_to_its_form() -> None:
    text_only = make_samples((8, ["Hello {}"]))
    with_image = make_samples((6, ["Q{}\n", IMAGE]), system="You see.")
    prompt_format = find_prompt_format([*text_only, *with_image])
    assert prompt_format.build_system_messages(0) == ()
    (message,) = prompt_format.build_system_messages(1)
    assert message.content == (TextPart(text="You see."),)


def test_weights_of_data_files_count() -> None:
    samples = make_samples((8, [IMAGE, "Q{}"]), (4, ["Q{}", IMAGE]))
    prompt_format = find_prompt_format(samples, [1.0] * 8 + [9.0] * 4)
    found = [(one.template, round(one.share, 2)) for one in prompt_format.templates]
    assert found == [("{question}<image>", 0.82), ("<image>{question}", 0.18)]


def test_questions_without_images_have_their_own_forms() -> None:
    samples = make_samples((60, ["Q{}"]), (2, ["a{}", IMAGE, "b{}"]), (38, ["Q{}\n", IMAGE]))
    prompt_format = find_prompt_format(samples)
    image = ImagePart(image="a.png")
    assert prompt_format.build_content("What?", [image]) == (TextPart(text="What?\n"), image)
    assert prompt_format.describe_difference("What?", 1) == []


@pytest.mark.parametrize("number", [1, 9])
def test_long_and_single_texts_are_not_published(number: int) -> None:
    """They may be private, and the manifest is published with the model."""
    secret = "Patient John Doe. " * (1 if number == 1 else 40)
    prompt_format = find_prompt_format(make_samples((number, [secret, IMAGE, "Q{}"])))
    assert "John" not in str(prompt_format)


def test_boxes_of_questions_enter_no_template() -> None:
    samples = []
    for number in range(6):
        box = BoxPart(xyxy=(1, 2, 3, 4 + number))
        texts = TextPart(text="What is in "), box, TextPart(text=" of ")
        content = (*texts, ImagePart(image=f"{number}.png"), TextPart(text=f" q{number}?"))
        message = Message(role="user", content=content)
        samples.append(LocatedSample(Sample(id=str(number), messages=(message,)), Path()))
    prompt_format = find_prompt_format(samples)
    content = prompt_format.build_content("Why?", [ImagePart(image="a.png")])
    assert write_marked_prompt(content) == "<image>Why?"
    (note,) = prompt_format.describe_difference("Why?", 1)
    assert "or boxes" in str(note)


@pytest.mark.parametrize(
    ("groups", "system", "is_known"),
    [
        ([(9, [IMAGE, "R{}"])], "", True),
        ([(9, [IMAGE, "One prompt."])], "", True),
        ([(9, ["R{}", IMAGE])], "", False),
        ([(9, [IMAGE, "R{} "])], "", False),
        ([(9, [IMAGE, IMAGE, "R{}"])], "", False),
        ([(9, ["R{}"])], "", True),
        ([(9, [IMAGE, "R{}"])], "Another.", False),
    ],
)
def test_validation_questions_are_compared(
    groups: list[tuple[int, list[str | None]]], system: str, is_known: bool
) -> None:
    """Also one prompt for all, which has another inferred template, and forms that are unknown."""
    training = find_prompt_format(make_samples((9, [IMAGE, "Q{}"]), system="Be exact."))
    for located in make_samples(*groups, system=system or "Be exact."):
        content = located.sample.messages[1].content
        assert training.can_be_question(content, system or "Be exact.") == is_known


RANDOM_PIECE = st.sampled_from([IMAGE, "a", "b{}", " c ", "\n", "<image>", "{{question}}", "A: "])


@given(st.lists(st.lists(RANDOM_PIECE, min_size=1, max_size=5), min_size=1, max_size=4))
def test_example_question_is_one_of_the_training(groups: list[list[str | None]]) -> None:
    """Or has the placeholder TEXT, and can always be asked."""
    samples = make_samples(*((3, pieces) for pieces in groups))
    prompt_format = find_prompt_format(samples)
    example = build_placeholder(prompt_format)
    images = [ImagePart(image=name) for name in example.images]
    asked = write_marked_prompt(prompt_format.build_content(example.prompt, images))
    known = {write_marked_prompt(one.sample.messages[0].content) for one in samples}
    assert asked in known or "TEXT" in asked
    for located in samples:
        content = located.sample.messages[0].content
        marked = write_marked_prompt(content)
        if not remove_marks(marked).strip() or not count_marks(marked):
            continue  # only marks tell the form of one question from that of the others
        media = [part.image for part in content if isinstance(part, ImagePart)]
        shortest = shorten_prompt(marked, media, prompt_format)
        again = prompt_format.build_content(
            shortest.prompt, [ImagePart(image=name) for name in shortest.images]
        )
        assert write_marked_prompt(again) == marked
