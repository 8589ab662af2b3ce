"""Conversations to encode, made from a seed, and the folder of a small model to encode them for."""

import json
import random
from dataclasses import dataclass
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tiny_model import SPECIAL_TOKENS, create_tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from finesight.encode.renderer import NativeRenderer
from finesight.model_folder import ModelFolder
from finesight.samples.sample import (
    BoxPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    ToolCallPart,
    VideoPart,
)

WORDS = (
    *("a cat sits on the table, and it's 42 years old.", "What is written here?", "DON'T", "x"),
    *("请描述这张图片。", "图中有三只猫!", "日本語のテキスト", "русский текст"),
    *("naïve café e\u0301", "\\frac { a } { b } = 3 . 1 4", "😀 smile", " leading space", "\ttab"),
    *("line\nbreak", "two\n\nbreaks\r\n", "...\n", "\n", "  \n  ", "1234567890", "{'a': [1, 2]}"),
    *("trailing space ", "<b>bold</b> <|not a token|>"),
)


@dataclass(frozen=True)
class ImageSet:
    """A folder of images and frames with their sizes, by name."""

    folder: Path
    sizes: dict[str, tuple[int, int]]
    videos: list[tuple[str, ...]]


def make_images(folder: Path, seed: int = 0) -> ImageSet:
    """Write forty images of all shapes and pixel formats, and twelve videos of 1 to 9 frames."""
    rng = np.random.default_rng(seed)
    sizes: dict[str, tuple[int, int]] = {}
    for number in range(40):
        height, width = (int(side) for side in rng.integers(4, 220, 2))
        mode = ("RGB", "L", "RGBA", "P")[number % 4]
        pixels = rng.integers(0, 256, (height, width, 4), dtype=np.uint8)
        image = Image.fromarray(pixels).convert(mode)
        name = f"{number}.{'jpg' if mode == 'RGB' else 'png'}"
        image.save(folder / name)
        sizes[name] = (height, width)
    videos = []
    for number in range(12):
        height, width = (int(side) for side in rng.integers(20, 120, 2))
        frames = tuple(f"v{number}-{frame}.png" for frame in range(1 + number % 9))
        for frame in frames:
            pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / frame)
            sizes[frame] = (height, width)
        videos.append(frames)
    return ImageSet(folder, sizes, videos)


def make_conversation(number: int, images: ImageSet, *, videos: bool = False) -> LocatedSample:
    """Make conversation `number`: 1 to 4 rounds with images in user turns and boxes in answers."""
    chance = random.Random(number)
    messages, shown = [], list[str]()
    if chance.random() < 0.4:
        messages.append(Message(role="system", content=(_random_text(chance),)))
    for _ in range(chance.randint(1, 4)):
        question = _random_question(chance, images, shown, videos)
        messages.append(Message(role="user", content=question))
        messages.append(Message(role="assistant", content=_random_answer(chance, images, shown)))
    sample = Sample(id=f"conversation {number}", messages=tuple(messages))
    return LocatedSample(sample, images.folder)


def _random_text(chance: random.Random) -> TextPart:
    return TextPart(text="".join(chance.choices(WORDS, k=chance.randint(1, 4))))


def _random_question(
    chance: random.Random, images: ImageSet, shown: list[str], videos: bool
) -> tuple[TextPart | ImagePart | VideoPart, ...]:
    parts: list[TextPart | ImagePart | VideoPart] = []
    for _ in range(chance.randint(1, 4)):
        drawn = chance.random()
        if drawn < 0.4:
            stills = [name for name in images.sizes if not name.startswith("v")]
            shown.append(chance.choice(stills))
            parts.append(ImagePart(image=shown[-1]))
        elif videos and drawn < 0.7:
            fps = chance.choice((0.3, 0.7, 1.0, 2.0, 3.0, 7.0, 24.0, 29.97))
            parts.append(VideoPart(frames=chance.choice(images.videos), fps=fps))
        else:
            parts.append(_random_text(chance))
    return tuple(parts)


def _random_answer(
    chance: random.Random, images: ImageSet, shown: list[str]
) -> tuple[TextPart | BoxPart, ...]:
    # An answer that starts with white space and a line break is the one case in which the
    # reference merges tokens across the prompt's end; it has a test of its own.
    parts: list[TextPart | BoxPart] = [TextPart(text=chance.choice(("Yes", "图", "x = ", "{")))]
    for _ in range(chance.randint(0, 3)):
        if shown and chance.random() < 0.6:
            image = chance.randrange(len(shown))
            height, width = images.sizes[shown[image]]
            x1, y1 = chance.uniform(0, width - 1), chance.uniform(0, height - 1)
            corners = (x1, y1, chance.uniform(x1 + 0.5, width), chance.uniform(y1 + 0.5, height))
            label = chance.choice((None, "cat", '猫 "quoted"', "a\\b", "two words"))
            parts.append(BoxPart(image=image, label=label, xyxy=corners))
        else:
            parts.append(_random_text(chance))
    return tuple(parts)


def make_folder(folder: Path, family: str) -> Path:
    """Write a model folder without weights, with a tokenizer trained on WORDS."""
    if family == "qwen":
        return create_tiny_model(folder / "tiny", "qwen")
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = (
        r"'s|'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    frame = ("system\n", "user\n", "assistant\n", "\n\n", '{"bbox_2d": [1, 2, 3, 4], "label": "')
    tokenizer.train_from_iterator([*WORDS, *frame] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    patch = 16 if family.startswith("qwen3_vl") else 14
    config = {
        "model_type": family,
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "vision_config": {"patch_size": patch, "spatial_merge_size": 2, "tokens_per_second": 2},
    }
    (folder / "config.json").write_text(json.dumps(config))
    preprocessor = {"min_pixels": 3136, "max_pixels": 50176, "patch_size": patch}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def make_text_sample(*turns: str, system: str | None = None) -> LocatedSample:
    """Make a sample of alternating user and assistant texts."""
    roles = zip(cycle(("user", "assistant")), turns)
    texts = [("system", system)] if system is not None else []
    messages = [
        Message(role=role, content=(TextPart(text=text),)) for role, text in [*texts, *roles]
    ]
    return LocatedSample(Sample(id="chat", messages=tuple(messages)), Path())


def decode_supervised(renderer: NativeRenderer, located_sample: LocatedSample) -> str:
    tokenized = renderer.tokenize(located_sample)
    ids = tokenized.ids_T[tokenized.loss_mask_T]
    return renderer.tokenizer.decode(ids, skip_special_tokens=False)


def get_text(message: Message) -> str:
    return "".join(part.text for part in message.content if isinstance(part, TextPart))


@cache
def compile_template(text: str) -> Any:
    jinja2 = pytest.importorskip("jinja2")
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = pytest.fail
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(text)


def render_published(
    folder: ModelFolder, messages: list[Message], *, inline_reasoning: bool, **kwargs: Any
) -> str:
    """Render messages by the published chat template of a model."""
    turns: list[dict[str, Any]] = []
    for message in messages:
        content: list[dict[str, Any]] = [
            {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": "image"}
            for part in message.content
            if not isinstance(part, ToolCallPart)
        ]
        turns.append({"role": message.role, "content": content})
        calls = [part for part in message.content if isinstance(part, ToolCallPart)]
        if calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
            turns[-1] |= {"content": get_text(message), "tool_calls": functions}
        if message.role == "assistant" and not inline_reasoning:
            before, tag, turns[-1]["content"] = get_text(message).rpartition("</think>")
            if tag:
                turns[-1]["reasoning_content"] = before.partition("<think>")[2]
    text: str = compile_template(folder.chat_template).render(messages=turns, **kwargs)
    return text
