"""Samples drawn at random go out in any format and come back the same, or are refused."""

import random
from pathlib import Path

import pytest
from image_fixtures import write_gray_image

from finesight.errors import UserError
from finesight.ingest.exporter import export_dataset
from finesight.ingest.import_source import ImportOptions
from finesight.ingest.importer import import_dataset
from finesight.samples.image_file import read_image_size
from finesight.samples.sample import (
    BoxPart,
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    read_samples,
    validate_sample,
)

SIZES = {"a.png": (40, 20), "b.png": (1000, 500), "c.png": (333, 777)}
ORDINARY = ("What is it? ", "the door", "yes\n", "0.5, ")
TREACHEROUS = (
    *("<image>", "<bbox>", "<ref-object>", "<ref>", "</ref>", "<box>", "<img>x</img>", "bbox_2d"),
    *("[", "]", "{", '"', "```json\n", "```", "Picture 1: ", "a.png", "\n", "\u2028", "<|im_end|>"),
)
FORMATS = ("samples", "ms-swift", "llama-factory", "openai", "conversations", "llava")
"""Those that need no options to be read, and move no box to a grid."""

SAMPLES = 40


def words(draw: random.Random) -> str:
    pools = [TREACHEROUS if draw.random() < 0.2 else ORDINARY for _ in range(draw.randint(1, 3))]
    return "".join(draw.choice(pool) for pool in pools)


def box(draw: random.Random, names: list[str]) -> BoxPart:
    image = draw.randrange(len(names))
    width, height = SIZES[names[image]]
    x1, y1 = draw.randrange(width - 1), round(draw.uniform(0, height - 2), 3)
    x2, y2 = draw.randint(x1 + 1, width), round(draw.uniform(y1 + 1, height), 3)
    label = draw.choice((None, "door", words(draw)))
    return BoxPart(image=image, label=label, xyxy=(x1, y1, x2, y2))


def turn(draw: random.Random, names: list[str], *, answer: bool) -> tuple[ContentPart, ...]:
    parts: list[ContentPart] = []
    for _ in range(draw.randint(1, 3)):
        if answer and names and draw.random() < 0.5:
            parts.append(box(draw, names))
        elif not answer and draw.random() < 0.5:
            names.append(draw.choice(list(SIZES)))
            parts.append(ImagePart(image=names[-1]))
        elif not parts or not isinstance(parts[-1], TextPart):
            parts.append(TextPart(text=words(draw)))
    if not answer and not any(isinstance(part, TextPart) for part in parts):
        parts.append(TextPart(text="What?"))
    return tuple(parts)


def sample(seed: str) -> Sample:
    draw, names = random.Random(seed), list[str]()
    messages = [Message(role="system", content="Be brief.")] if draw.random() < 0.2 else []
    for _ in range(draw.choice((1, 1, 2))):
        messages.append(Message(role="user", content=turn(draw, names, answer=False)))
        messages.append(Message(role="assistant", content=turn(draw, names, answer=True)))
    return Sample(id=seed, messages=tuple(messages))


def roundtrip(one: Sample, folder: Path, name: str, out: Path) -> Sample | None:
    """The sample after an export and an import; None if the format cannot hold it."""
    try:
        export_dataset([LocatedSample(one, folder)], out / "there", name, copy_images=False)
    except UserError:
        return None
    (source,) = (path for path in (out / "there").iterdir() if path.stem == "data")
    import_dataset(source, out / "back", ImportOptions(format=name))
    (back,) = read_samples(out / "back" / "data.jsonl")
    names = {(height, width): name for name, (width, height) in SIZES.items()}
    return back.map_paths(lambda path: names[read_image_size(out / "back" / path)])


def is_usable(one: Sample) -> bool:
    """Whether it keeps the rules, and asks something: an import wants words in a question."""
    try:
        validate_sample(one, "")
    except UserError:
        return False
    first = next(message for message in one.messages if message.role == "user")
    return any(isinstance(part, TextPart) and part.text.strip() for part in first.content)


@pytest.mark.parametrize("name", FORMATS)
def test_random_samples_roundtrip_or_are_rejected(tmp_path, name):
    for image, (width, height) in SIZES.items():
        write_gray_image(tmp_path / image, width, height)
    drawn = [one for one in (sample(f"{name}-{n}") for n in range(SAMPLES)) if is_usable(one)]
    backs = [roundtrip(one, tmp_path, name, tmp_path / one.id) for one in drawn]
    supported = [(one, back) for one, back in zip(drawn, backs, strict=True) if back is not None]
    assert [back for _, back in supported] == [one for one, _ in supported]
    assert len(supported) >= len(drawn) / 4
