"""Demonstrations of tools: conversations for fine-tuning whose results an environment returns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from finesight.evaluate.environment import Environment, ResultBlock
from finesight.evaluate.episode import derive_environment_seed
from finesight.evaluate.eval_case import get_reference_answer
from finesight.infer.prediction import box_to_dict
from finesight.samples.frames import FRAME_1000, ImageSize
from finesight.samples.sample import (
    ContentPart,
    ImagePart,
    LocatedSample,
    Message,
    Sample,
    TextPart,
    join_text,
    write_samples,
)
from finesight.synth.tool_task import ToolTask


def write_demonstrations(
    folder: Path,
    tasks: Iterable[ToolTask],
    environment: Environment,
    frame: ImageSize = FRAME_1000,
) -> Path:
    """Write the conversations of tasks with their calls as `demonstrations.jsonl`.

    Images that tools return are written to the folder `results`.

    Args:
        folder: Folder of the images of the tasks.
        frame: Height and width of the coordinate frame of the calls.

    Returns:
        The path of the file.

    Raises:
        EpisodeError: The environment fails.
        ValueError: A call is a mistake, or the environment gives no reward for it.
    """
    (folder / "results").mkdir(exist_ok=True)
    path = folder / "demonstrations.jsonl"
    write_samples(path, [demonstrate(folder, task, environment, frame) for task in tasks])
    return path


def demonstrate(folder: Path, task: ToolTask, environment: Environment, frame: ImageSize) -> Sample:
    """Return the conversation of a task, with the results of its calls."""
    sample = task.sample
    question, answer = sample.messages
    located = LocatedSample(sample, folder)
    images = []
    for part in question.content:
        if isinstance(part, ImagePart):
            images.append(located.resolve_path(part.image))
    texts, boxes = get_reference_answer(sample)
    row = {
        "id": sample.id,
        "prompt": join_text(question.content),
        "references": list(texts),
        "boxes": [box_to_dict(box) for box in boxes],
        "frames": [frame] * len(images),
        "meta": sample.meta,
        "seed": derive_environment_seed(sample.id),
    }
    messages = [question]
    session = environment.start_episode(row, images)
    try:
        for number, call in enumerate(task.calls):
            result = session.call_tool(call.name, call.arguments)
            if result.is_mistake:
                raise ValueError(f"{sample.id}: {call.name}: {result.blocks[0]}")
            content = save_result(result.blocks, folder, f"results/{sample.id}-{number}")
            messages.append(Message(role="assistant", content=(call,)))
            messages.append(Message(role="tool", content=content))
        reward = session.get_reward()
    finally:
        session.close()
    if reward is not None and reward <= 0:
        raise ValueError(f"{sample.id}: the calls have the reward {reward:g}")
    messages.append(answer)
    changes = {"tools": tuple(environment.tools), "messages": tuple(messages)}
    return sample.model_copy(update=changes)


def save_result(blocks: Sequence[ResultBlock], folder: Path, name: str) -> tuple[ContentPart, ...]:
    """Save the images of a tool result, and return it as content of a sample."""
    content: list[ContentPart] = []
    for number, block in enumerate(blocks):
        if isinstance(block, str):
            content.append(TextPart(text=block))
        else:
            image = f"{name}-{number}.png"
            block.save(folder / image)
            content.append(ImagePart(image=image))
    return tuple(content)
