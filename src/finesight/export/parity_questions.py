"""Select the questions about images on which a merged model is compared with its adapter."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from finesight.data.corpus import load_corpus
from finesight.data.image_header import CorruptImageError
from finesight.data.jsonl import LocatedSample
from finesight.data.sample import ImagePart, Message, Sample, TextPart
from finesight.encode.renderer import Renderer
from finesight.encode.tokenized_sample import EncodedSample
from finesight.errors import UserError
from finesight.recipe import load_recipe
from finesight.run_files import RECIPE_FILE
from finesight.synth.scenes import compose_scene

IMAGE_SEED = 20260
"""Random seed of the images that are generated if a run has no validation samples."""

MAX_SCANNED_SAMPLES = 200
"""Maximum number of validation samples that are searched for images."""


def load_validation_samples(source: str, max_samples: int) -> list[LocatedSample]:
    """Load the first validation samples with images of a run.

    Returns an empty list if `source` has no recipe, or if its validation data cannot be read.
    """
    path = Path(source) / RECIPE_FILE
    if not path.is_file():
        return []
    try:
        recipe = load_recipe(path)
        corpus = load_corpus(recipe.data.eval) if recipe.data.eval else ()
        candidates = [corpus[i] for i in range(min(len(corpus), MAX_SCANNED_SAMPLES))]
    except UserError:
        return []
    return [candidate for candidate in candidates if _has_image(candidate)][:max_samples]


def draw_questions(folder: Path, num_questions: int) -> list[LocatedSample]:
    """Save generated images of shapes in a folder, and return one question about each."""
    questions = []
    for index in range(num_questions):
        rng = random.Random(f"scene {IMAGE_SEED} {index}")
        compose_scene(rng, crowded=False).image.save(folder / f"{index}.png")
        parts = (ImagePart(image=f"{index}.png"), TextPart(text="Describe this image."))
        sample = Sample(
            id=f"generated {index}", messages=(Message(role="user", content=parts),), meta={}
        )
        questions.append(LocatedSample(sample, folder))
    return questions


def encode_prompts(
    renderer: Renderer, questions: Sequence[LocatedSample]
) -> list[tuple[LocatedSample, EncodedSample]]:
    """Encode questions as prompts, and omit those that cannot be encoded."""
    encoded_samples = []
    for question in questions:
        try:
            prompt = renderer.load_patches(renderer.tokenize_prompt(question))
        except (CorruptImageError, UserError):
            continue
        encoded_samples.append((question, prompt))
    return encoded_samples


def _has_image(located_sample: LocatedSample) -> bool:
    return any(isinstance(part, ImagePart) for part in located_sample.sample.iter_parts())
