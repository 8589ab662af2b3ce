"""Reference encoding of conversations by the published rules, through transformers."""

import json
import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from finesight.model_folder import ModelFolder
from finesight.samples.sample import BoxPart, ImagePart, LocatedSample, TextPart, VideoPart

DEFAULT_SYSTEM = "You are a helpful assistant."
EMBEDDING_SYSTEM = "<|im_start|>system\nRepresent the user's input.<|im_end|>\n"


@dataclass(frozen=True)
class ExpectedEncoding:
    ids_T: np.ndarray
    loss_mask_T: np.ndarray
    position_ids_3T: np.ndarray
    published_position_ids_3T: np.ndarray
    patches_ND: np.ndarray
    grid_thw: list[tuple[int, int, int]]


@dataclass(frozen=True)
class ProcessedVisual:
    """Process an image or video with the reference processor."""

    kind: str
    original: tuple[int, int]
    resized: tuple[int, int]
    grid: tuple[int, int, int]
    patches: np.ndarray
    seconds: float


class HFChatReference:
    """Chat template, tokenizer, image processor and rope index of one model folder."""

    def __init__(self, folder: ModelFolder) -> None:
        self.folder = folder
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(folder.tokenizer_file)
        )
        given = folder.preprocessor_config
        self.side = given["patch_size"]
        self.newest = folder.family == "qwen3_vl"
        self.processor = Qwen2VLImageProcessorPil(
            min_pixels=given["min_pixels"], max_pixels=given["max_pixels"], patch_size=self.side
        )
        self.ids = {
            name: self.tokenizer.convert_tokens_to_ids(f"<|{name}|>")
            for name in ("im_start", "im_end", "image_pad", "video_pad")
        }

    def encode(self, located_sample: LocatedSample) -> ExpectedEncoding:
        seen = [
            v
            for part in located_sample.sample.iter_parts()
            for v in self._process_visuals(part, located_sample)
        ]
        sizes = [(v.original, v.resized) for v in seen if v.kind == "image"]
        messages = []
        for message in located_sample.sample.messages:
            runs = _group_boxes(message)
            content = [_to_content(run, self.folder.family, sizes) for run in runs]
            messages.append({"role": message.role, "content": content})
        text = self._apply_template(messages)
        if self.newest:
            text = _insert_timestamps(text, located_sample)
        for visual in seen:
            pad = f"<|{visual.kind}_pad|>"
            count = math.prod(visual.grid) // 4
            text = text.replace(pad, f"<|taken {visual.kind}|>" * count, 1)
        for kind in ("image", "video"):
            text = text.replace(f"<|taken {kind}|>", f"<|{kind}_pad|>")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        patches = [visual.patches for visual in seen] or [np.empty((0, 6 * self.side**2))]
        return ExpectedEncoding(
            ids_T=np.array(ids),
            loss_mask_T=self._compute_loss_mask(ids),
            position_ids_3T=self._rope_index(ids, seen),
            published_position_ids_3T=self._published_rope_index(ids, seen),
            patches_ND=np.concatenate(patches),
            grid_thw=[visual.grid for visual in seen],
        )

    def _apply_template(self, messages: list[dict[str, Any]]) -> str:
        expected = render_chat(messages, None if self.newest else DEFAULT_SYSTEM)
        chat = self.folder.chat_template
        if not chat:
            return expected
        text = self.tokenizer.apply_chat_template(messages, chat_template=chat, tokenize=False)
        # The Embedding model's template is Instruct's with a system turn of its own.
        assert str(text).removeprefix(EMBEDDING_SYSTEM if self.newest else "") == expected
        return expected

    def _process_visuals(
        self, part: object, located_sample: LocatedSample
    ) -> list[ProcessedVisual]:
        p = self.side
        if isinstance(part, ImagePart):
            image = Image.open(located_sample.resolve_path(part.image))
            patches, grid = self._process_image(image)
            size = (grid[1] * p, grid[2] * p)
            return [ProcessedVisual("image", image.size[::-1], size, grid, patches, 0.0)]
        if isinstance(part, VideoPart):
            # Without torchvision there is no video processor; the image processor is used.
            frames = [Image.open(located_sample.resolve_path(name)) for name in part.frames]
            frames += frames[-1:] * (len(frames) % 2)
            processed = [self._process_image(frame) for frame in frames]
            stills = np.stack([patches for patches, _ in processed])
            t, (_, h, w) = len(frames) // 2, processed[0][1]
            pairs = stills.reshape(t, 2, h * w, 3, 2, p, p)[:, :, :, :, 0]
            patches = pairs.transpose(0, 2, 3, 1, 4, 5).reshape(t * h * w, 6 * p * p)
            original, size, seconds = frames[0].size[::-1], (h * p, w * p), 2 / part.fps
            parts = np.split(patches, t) if self.newest else [patches]
            grid = (t // len(parts), h, w)
            return [ProcessedVisual("video", original, size, grid, x, seconds) for x in parts]
        return []

    def _process_image(self, image: Image.Image) -> tuple[np.ndarray, tuple[int, int, int]]:
        """Patches before rescaling and normalising: whole numbers from 0 to 255."""
        out = self.processor(
            images=[image], do_rescale=False, do_normalize=False, return_tensors="np"
        )
        t, h, w = (int(number) for number in out["image_grid_thw"][0])
        return out["pixel_values"], (t, h, w)

    def _compute_loss_mask(self, ids: list[int]) -> np.ndarray:
        """From each `<|im_start|>assistant` and newline to the next `<|im_end|>` included."""
        opening = self.tokenizer("assistant\n", add_special_tokens=False)["input_ids"]
        loss_mask = np.zeros(len(ids), dtype=bool)
        inside = False
        for at, token in enumerate(ids):
            head = ids[at - len(opening) - 1 : at]
            inside = inside or head == [self.ids["im_start"], *opening]
            loss_mask[at] = inside
            inside = inside and token != self.ids["im_end"]
        return loss_mask

    def _rope_index(self, ids: list[int], seen: list[ProcessedVisual]) -> np.ndarray:
        """transformers' own positions."""
        kinds = {self.ids["image_pad"]: 1, self.ids["video_pad"]: 2}
        arguments: dict[str, Any] = {
            f"{kind}_grid_thw": torch.tensor([v.grid for v in seen if v.kind == kind])
            for kind in ("image", "video")
            if any(v.kind == kind for v in seen)
        }
        if "video_grid_thw" in arguments and self.folder.family == "qwen2_5_vl":
            seconds = [v.seconds for v in seen if v.kind == "video"]
            arguments["second_per_grid_ts"] = torch.tensor(seconds)
        positions, _ = build_rope_model(self.folder.family).get_rope_index(
            input_ids=torch.tensor([ids]),
            mm_token_type_ids=torch.tensor([[kinds.get(token, 0) for token in ids]]),
            **arguments,
        )
        return positions[:, 0].numpy()

    def _published_rope_index(self, ids: list[int], seen: list[ProcessedVisual]) -> np.ndarray:
        """Compute positions by token; text continues after the largest position of any row."""
        rows: list[tuple[int, int, int]] = []
        left, at, following = list(seen), 0, 0
        while at < len(ids):
            if ids[at] not in (self.ids["image_pad"], self.ids["video_pad"]):
                rows.append((following, following, following))
                at, following = at + 1, following + 1
                continue
            visual = left.pop(0)
            t, h, w = visual.grid[0], visual.grid[1] // 2, visual.grid[2] // 2
            by_time = self.folder.family == "qwen2_5_vl" and visual.kind == "video"
            step = torch.tensor(visual.seconds) if by_time else torch.tensor(0.5)
            for i in range(t):
                moment = int((torch.tensor(i) * step * 2).long())
                rows += [
                    (following + moment, following + j, following + k)
                    for j in range(h)
                    for k in range(w)
                ]
            at += t * h * w
            following = max(max(row) for row in rows) + 1
        return np.array(rows).T


def render_chat(messages: list[dict[str, Any]], system: str | None = DEFAULT_SYSTEM) -> str:
    own = messages[0]["role"] == "system" or system is None
    turns = [] if own else [("system", system)]
    for message in messages:
        pieces = [
            part["text"]
            if part["type"] == "text"
            else f"<|vision_start|><|{part['type']}_pad|><|vision_end|>"
            for part in message["content"]
        ]
        turns.append((message["role"], "".join(pieces)))
    return "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)


def _insert_timestamps(text: str, located_sample: LocatedSample) -> str:
    """Replace each video by its pairs of frames, each with its time in front."""
    for part in located_sample.sample.iter_parts():
        if isinstance(part, VideoPart):
            moments = [number / part.fps for number in range(len(part.frames))]
            moments += moments[-1:] * (len(moments) % 2)
            pairs = zip(moments[::2], moments[1::2], strict=True)
            one = "<|vision_start|><|video taken|><|vision_end|>"
            many = "".join(f"<{(a + b) / 2:.1f} seconds>{one}" for a, b in pairs)
            text = text.replace("<|vision_start|><|video_pad|><|vision_end|>", many, 1)
    return text.replace("<|video taken|>", "<|video_pad|>")


@cache
def build_rope_model(family: str) -> Any:
    """A model of the family without numbers in its weights, for its rule of positions."""
    vision = {"depth": 1, "spatial_merge_size": 2}
    text = {"hidden_size": 64, "num_hidden_layers": 1, "vocab_size": 128}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    model, config = {
        "qwen2_vl": (transformers.Qwen2VLModel, transformers.Qwen2VLConfig),
        "qwen2_5_vl": (transformers.Qwen2_5_VLModel, transformers.Qwen2_5_VLConfig),
        "qwen3_vl": (transformers.Qwen3VLModel, transformers.Qwen3VLConfig),
    }[family]
    if family == "qwen2_5_vl":
        vision["tokens_per_second"] = 2
    with torch.device("meta"):
        return model(config(text_config=text, vision_config=vision))


def _group_boxes(message: Any) -> list[Any]:
    runs: list[Any] = []
    for part in message.content:
        if isinstance(part, BoxPart) and runs and isinstance(runs[-1], list):
            runs[-1].append(part)
        else:
            runs.append([part] if isinstance(part, BoxPart) else part)
    return runs


def _to_content(run: Any, family: str, sizes: list[Any]) -> dict[str, str]:
    if isinstance(run, TextPart):
        return {"type": "text", "text": run.text}
    if not isinstance(run, list):
        return {"type": run.type}
    if family == "qwen2_vl":
        return {"type": "text", "text": "".join(_format_box_1000(box, sizes) for box in run)}
    if family == "qwen3_vl":
        sizes = [(original, (1000, 1000)) for original, _ in sizes]
    items = ", ".join(_format_box_json(box, sizes) for box in run)
    return {"type": "text", "text": f"[{items}]" if len(run) > 1 else items}


def _format_box_1000(box: BoxPart, sizes: list[Any]) -> str:
    (height, width), _ = sizes[box.image]
    image_size = (Fraction(width), Fraction(height)) * 2
    x1, y1, x2, y2 = (
        math.floor(Fraction(value) * 1000 / side + Fraction(1, 2))
        for value, side in zip(box.xyxy, image_size, strict=True)
    )
    name = "" if box.label is None else f"<|object_ref_start|>{box.label}<|object_ref_end|>"
    return f"{name}<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>"


def _format_box_json(box: BoxPart, sizes: list[Any]) -> str:
    (height, width), (new_height, new_width) = sizes[box.image]
    scales = (Fraction(new_width, width), Fraction(new_height, height)) * 2
    values = ", ".join(
        str(math.floor(Fraction(value) * scale + Fraction(1, 2)))
        for value, scale in zip(box.xyxy, scales, strict=True)
    )
    label = "" if box.label is None else f', "label": {json.dumps(box.label, ensure_ascii=False)}'
    return f'{{"bbox_2d": [{values}]{label}}}'
