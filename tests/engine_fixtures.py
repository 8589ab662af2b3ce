"""Generated images and questions, answers token by token, and a slow reference."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from image_fixtures import make_sample as make_sample
from image_fixtures import write_noise_image as write_noise_image
from numpy.typing import NDArray
from tiny_model import TinyFamily, create_tiny_model
from torch import Tensor

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import pack
from finesight.encode.renderer import NativeRenderer
from finesight.encode.tokenization import EncodedSample
from finesight.errors import UserError
from finesight.infer import request
from finesight.infer.block_manager import append_tokens, hash_images
from finesight.infer.engine import CPU_BLOCK_SIZE, Engine
from finesight.infer.kv_cache import KVCache
from finesight.infer.model_runner import ModelRunner
from finesight.infer.scheduler import PromptState
from finesight.infer.structured_output import build_bitmask
from finesight.model.attention import PackedAttention, Segments
from finesight.model.linear import FusedLinear, LoraConfig, LoraLinear
from finesight.model.lora.multi import detach_adapter, install_lora_routing
from finesight.model.vlm import VisionLanguageModel
from finesight.model.weights_io import load_model
from finesight.model_folder import ModelFolder
from finesight.samples.sample import LocatedSample


def make_mixed_questions(folder: Path) -> list[LocatedSample]:
    """Make questions of different lengths with no, one and two images of several sizes."""
    for seed, (name, size) in enumerate({"a": (84, 56), "b": (56, 140), "c": (112, 112)}.items()):
        write_noise_image(folder / f"{name}.png", *size, seed)
    questions = {
        "one": ("a.png", "What is in the picture?"),
        "text": ("Why?",),
        "two": ("b.png", "and then", "c.png", "which is larger?"),
        "tall": ("b.png", "Read it."),
        "again": ("c.png", "Where is the text? Answer with a box, please, and say why."),
        "words": ("Tell me about the weather in three lines of plain text.",),
    }
    return [make_sample(name, folder, *content) for name, content in questions.items()]


def make_random_model(
    folder: Path, family: TinyFamily, seed: int = 0
) -> tuple[VisionLanguageModel, NativeRenderer]:
    """Load a tiny model of random fp32 weights, written to a folder."""
    if family == "qwen":
        pytest.importorskip("tiktoken")
    tiny = ModelFolder(create_tiny_model(folder / "tiny", family, seed))
    return load_model(tiny, torch.float32, torch.device("cpu")).eval(), NativeRenderer(tiny)


def encode_mixed_questions(renderer: NativeRenderer, folder: Path) -> list[EncodedSample]:
    return [renderer.encode_prompt(question) for question in make_mixed_questions(folder)]


def pack_mixed_questions(model_folder: ModelFolder, folder: Path) -> PackedBatch:
    """Pack the questions, every token asked for its logits."""
    batch = pack(encode_mixed_questions(NativeRenderer(model_folder), folder))
    every_T = torch.arange(len(batch.ids_T))
    return replace(batch, logit_indices_L=every_T, labels_L=batch.ids_T)


@torch.no_grad()
def compute_logits(model: VisionLanguageModel, batch: PackedBatch) -> Tensor:
    """Compute the logits of a pack in evaluation mode."""
    return model.eval().compute_logits(model(batch))


class ForcedTokens(request.DecodingConstraint):
    """A constraint that allows one token after another, whatever the model would say."""

    def __init__(self, tokens: Sequence[int], vocab_size: int) -> None:
        self._tokens, self._num_words = list(tokens), -(-vocab_size // 32)
        self.accepted: list[int] = []

    def compute_bitmask(self) -> NDArray[np.int32]:
        # A card asks once more after the last token, before it knows that it was the last one.
        token = self._tokens[min(len(self.accepted), len(self._tokens) - 1)]
        return build_bitmask([token], self._num_words)

    def accept_token(self, token: int) -> None:
        self.accepted.append(token)


@dataclass
class RequestEvents:
    """What an engine has told of a request."""

    tokens: list[request.GeneratedToken] = field(default_factory=list)
    finish_reason: request.FinishReason | None = None
    error: UserError | None = None
    num_cached_tokens: int = 0

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    def add_event(self, event: request.EngineEvent) -> None:
        """Nothing may come after the end."""
        assert self.finish_reason is None, f"{event} after the end"
        assert self.error is None, f"{event} after an error"
        if event.token is not None:
            self.tokens.append(event.token)
        self.finish_reason, self.error = event.finish_reason, event.error
        self.num_cached_tokens = event.num_cached_tokens


def step_engine(engine: Engine, events_by_ticket: dict[int, RequestEvents]) -> None:
    """Run a step, and note what the engine tells, by ticket."""
    for event in engine.step():
        events_by_ticket.setdefault(event.request_id, RequestEvents()).add_event(event)


def run_engine(
    engine: Engine, events_by_ticket: dict[int, RequestEvents] | None = None
) -> dict[int, RequestEvents]:
    """Step until the engine has nothing to do, and note what it tells, by ticket."""
    events_by_ticket = {} if events_by_ticket is None else events_by_ticket
    while engine.has_work:
        step_engine(engine, events_by_ticket)
    return events_by_ticket


def list_allowed(constraint: request.DecodingConstraint) -> list[int]:
    """The tokens that may come next."""
    bits = np.unpackbits(constraint.compute_bitmask().view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


@dataclass
class Generated:
    """An answer's tokens and the logits [V] behind each."""

    tokens: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


def install_adapters(model: VisionLanguageModel) -> None:
    """Adapters as one trains them, on every layer of the decoder: the same ones each time."""
    generator = torch.Generator().manual_seed(0)
    model.requires_grad_(False)
    for path, group in list(model.named_modules()):
        if isinstance(group, FusedLinear) and path.startswith("model.layers"):
            layers = dict.fromkeys(group.output_sizes, LoraConfig(4, 4.0))
            group.adapter = LoraLinear(group, layers, 0.0, model.lm_head_weight.dtype)
            for parameter in group.adapter.parameters():
                drawn = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.data = drawn.to(parameter)
    model.eval()


def install_request_adapters(model: VisionLanguageModel) -> None:
    """The same, as one of those that are chosen for each question; it is for the next pass."""
    install_adapters(model)
    model.lora_routing = install_lora_routing(model, [detach_adapter(model)])
    assert model.lora_routing is not None
    model.lora_routing.set_mask(model.lora_routing.build_mask(0))


@torch.inference_mode()
def generate_cached(
    model: VisionLanguageModel,
    prompts: Sequence[EncodedSample],
    steps: int,
    *,
    chunk: int | None = None,
    drop_after: int | None = None,
    forced_tokens: Sequence[Sequence[int]] | None = None,
) -> list[Generated]:
    """Answer all requests in one batch with the KV cache, and with the given adapters.

    Prompts are prefilled in chunks. After `drop_after` steps every second sequence is removed.
    """
    needed = [-(-(prompt.tokenized.num_tokens + steps) // CPU_BLOCK_SIZE) for prompt in prompts]
    weight = model.model.embed_tokens.weight
    cache = KVCache(
        model.config.decoder,
        num_blocks=sum(needed) + 1,
        block_size=CPU_BLOCK_SIZE,
        max_num_seqs=len(prompts),
        dtype=weight.dtype,
        device=weight.device,
    )
    model_runner = ModelRunner(model, cache)
    # Blocks of a sequence are scattered.
    free = (np.random.default_rng(0).permutation(sum(needed)) + 1).tolist()
    adapter = None if model.lora_routing is None else 0
    requests = []
    for slot, prompt, number in zip(range(len(prompts), 0, -1), prompts, needed, strict=True):
        blocks = [free.pop() for _ in range(number)]
        state = PromptState(prompt, blocks, adapter, hash_images(prompt), state_slot=slot)
        requests.append(state)
    found = [Generated() for _ in prompts]

    def append_token(index: int, logits_V: Tensor) -> Tensor:
        answer = found[index]
        token = int(logits_V.argmax())
        if forced_tokens is not None:
            token = forced_tokens[index][len(answer.tokens)]
        answer.tokens.append(token)
        answer.logits.append(logits_V.clone())
        return torch.tensor([token], device=logits_V.device)

    owner: list[int] = []
    while unread := [n for n, p in enumerate(requests) if p.num_computed_tokens < p.num_tokens]:
        unfinished = [requests[n] for n in unread]
        limits = [p.num_computed_tokens + (chunk or p.num_tokens) for p in unfinished]
        stops = [min(p.num_tokens, end) for p, end in zip(unfinished, limits, strict=True)]
        logits_RV = model_runner.prefill(unfinished, stops)
        done = [n for n in unread if requests[n].num_computed_tokens == requests[n].num_tokens]
        for who, logits_V in zip(done, () if logits_RV is None else logits_RV, strict=True):
            model_runner.start_sequence(len(owner), requests[who], append_token(who, logits_V))
            owner.append(who)
    for step in range(1, steps):
        if step - 1 == drop_after:
            for row in reversed(range(0, len(owner), 2)):
                last = owner.pop()
                model_runner.remove_sequence(row, len(owner))
                if row < len(owner):
                    owner[row] = last
        longest = max(requests[who].num_tokens for who in owner) + step
        logits_RV = model_runner.decode(len(owner), longest)
        for row, who in enumerate(owner):
            model_runner.ids_R[row : row + 1] = append_token(who, logits_RV[row])
    return found


@torch.no_grad()
def generate_uncached(model: VisionLanguageModel, prompt: EncodedSample, steps: int) -> Generated:
    """The most probable tokens, the whole sequence run anew for each."""
    generated = Generated()
    for _ in range(steps):
        extended = replace(prompt, tokenized=append_tokens(prompt.tokenized, generated.tokens))
        batch = pack([extended]).to(model.lm_head_weight.device)
        segments = Segments.from_lengths(batch.lengths, batch.ids_T.device)
        h_TD = model.forward_hidden(batch, PackedAttention(segments))
        generated.logits.append(model.compute_logits(model.apply_final_norm(h_TD[-1:]))[0])
        generated.tokens.append(int(generated.logits[-1].argmax()))
    return generated


def make_request(
    prompt: EncodedSample, tokens: int = 9, adapter: int | None = None
) -> request.GenerationRequest:
    """A greedy request for so many tokens."""
    return request.GenerationRequest(prompt=prompt, max_new_tokens=tokens, adapter_index=adapter)


def run_requests(
    engine: Engine, *prompts: EncodedSample, tokens: int = 9, adapter: int | None = None
) -> list[RequestEvents]:
    """What the engine tells of these prompts, asked all at once."""
    tickets = [engine.add_request(make_request(prompt, tokens, adapter)) for prompt in prompts]
    events_by_ticket = run_engine(engine)
    return [events_by_ticket[ticket] for ticket in tickets]


def answer_alone(
    model: VisionLanguageModel,
    requests: Sequence[request.GenerationRequest],
    end_ids: Sequence[int] = (),
) -> list[RequestEvents]:
    """What a new engine tells of each request."""
    answers = []
    for one in requests:
        engine = Engine(model, tuple(end_ids), max_num_seqs=1, num_cache_tokens=1 << 14)
        ticket = engine.add_request(one)
        answers.append(run_engine(engine)[ticket])
    return answers


def run_alone(
    model: VisionLanguageModel, prompt: EncodedSample, tokens: int = 9, end_ids: Sequence[int] = ()
) -> RequestEvents:
    return answer_alone(model, [make_request(prompt, tokens)], end_ids)[0]


class EncoderCall(NamedTuple):
    """Sizes of a vision-encoder pass."""

    num_images: int
    num_patches: int
    patch_width: int


def record_encoder_calls(
    model: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> list[EncoderCall]:
    """Return the passes of the vision encoder from now on."""
    calls: list[EncoderCall] = []
    encode_images = model.encode_images

    def record(patches_ND: Tensor, grids: Sequence[tuple[int, int, int]]) -> Tensor:
        calls.append(EncoderCall(len(grids), *patches_ND.shape))
        return encode_images(patches_ND, grids)

    monkeypatch.setattr(model, "encode_images", record)
    return calls
