"""Encode prompts with untrusted images in worker processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from finesight.data.sample import LocatedSample
from finesight.encode.family import ThinkingOptions
from finesight.encode.renderer import Renderer
from finesight.encode.tokenization import EncodedSample, TokenizedSample, VisualSpan
from finesight.errors import UserError
from finesight.worker_pool import JobOutput, WorkerLostError, WorkerPool

MAX_PROMPT_CPU_S = 20.0
"""CPU seconds to tokenize a prompt and to decode all of its images."""


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Encodes prompts in worker processes, with limits on time and memory.

    Attributes:
        pool: Worker processes of `create_image_pool(renderer, encode_prompt)`.
    """

    pool: WorkerPool

    def encode(self, located_sample: LocatedSample, thinking: ThinkingOptions) -> EncodedSample:
        """Tokenize the prompt of a sample and decode its images into patches.

        Raises:
            UserError: The sample is invalid, or exceeds a limit.
        """
        # Lazy import: workers import this module, and need torch for some models only.
        import torch

        try:
            with self.pool.borrow_worker() as worker:
                reply = worker.call(
                    encode_prompt, located_sample, thinking, max_cpu_s=MAX_PROMPT_CPU_S
                )
        except WorkerLostError as error:
            raise UserError("not encoded, because the server stops", where="prompt") from error
        tokenized = unpack_tokenized(reply, located_sample.sample.id)
        patches_ND, *inputs = reply.arrays[2:]
        hf_inputs = {
            name: torch.from_numpy(array.copy())
            for name, array in zip(reply.value["hf_inputs"], inputs, strict=True)
        }
        return EncodedSample(tokenized, patches_ND.view(np.uint8), hf_inputs)


def pack_tokenized(tokenized: TokenizedSample) -> JobOutput:
    """Convert a tokenized prompt with images and videos to the output of a job."""
    spans = [asdict(span) | {"files": [*map(str, span.files)]} for span in tokenized.spans]
    return JobOutput(
        {"spans": spans, "is_thinking": tokenized.is_thinking},
        [tokenized.ids_T, tokenized.position_ids_3T],
    )


def unpack_tokenized(reply: JobOutput, sample_id: str) -> TokenizedSample:
    """Restore a tokenized prompt from the output of a job."""
    ids_T, positions_3T = reply.arrays[:2]
    spans = []
    for values in reply.value["spans"]:
        values = {key: tuple(one) if isinstance(one, list) else one for key, one in values.items()}
        spans.append(VisualSpan(**values | {"files": tuple(map(Path, values["files"]))}))
    return TokenizedSample(
        id=sample_id,
        ids_T=ids_T.view(np.int32),
        loss_mask_T=np.zeros(len(ids_T), dtype=np.bool_),
        position_ids_3T=positions_3T.view(np.int32),
        spans=tuple(spans),
        is_thinking=reply.value["is_thinking"],
    )


def encode_prompt(
    renderer: Renderer, located_sample: LocatedSample, thinking: ThinkingOptions
) -> JobOutput:
    """Tokenize a prompt in a worker process, and decode its images."""
    renderer = renderer.with_thinking(thinking)
    encoded = renderer.load_patches(renderer.tokenize_prompt(located_sample))
    tokenized = pack_tokenized(encoded.tokenized)
    inputs = [tensor.numpy() for tensor in encoded.hf_inputs.values()]
    return JobOutput(
        tokenized.value | {"hf_inputs": list(encoded.hf_inputs)},
        [*tokenized.arrays, encoded.patches_ND, *inputs],
    )
