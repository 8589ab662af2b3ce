"""Steps in few kernels compute what the layers compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from asking import adapt, adapt_by_request, generate_uncached, mixed_questions

from finesight.encode.encoded import Encoded
from finesight.encode.render import Renderer
from finesight.hub import ModelFolder
from finesight.infer.engine import Engine
from finesight.infer.quick import is_quick
from finesight.infer.request import Request
from finesight.model.network import VisionLanguageModel
from finesight.model.rope import Rotation, rotate
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model

STEPS = 24

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NARROW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


def near(found: torch.Tensor, wanted: torch.Tensor, bound: float) -> bool:
    """Both in fp32, by the length of their difference."""
    found, wanted = found.float(), wanted.float()
    return bool((found - wanted).norm() <= bound * wanted.norm())


def drawn(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, device="cuda").to(dtype)


@NARROW
@pytest.mark.parametrize("inputs", [96, 1536, 5000])
@pytest.mark.parametrize("outputs", [40, 3100, 70000])
def test_a_product_of_one_row_with_all_that_may_be_fused(
    dtype: torch.dtype, inputs: int, outputs: int
) -> None:
    from finesight.infer import quick_kernels

    x_1I, norm_I = drawn(1, inputs, dtype=dtype), drawn(inputs, dtype=dtype)
    w_OI = drawn(outputs, inputs, dtype=dtype) * inputs**-0.5
    bias_O, added_1O = drawn(outputs, dtype=dtype), drawn(1, outputs, dtype=dtype)
    normed = F.rms_norm(x_1I.double(), (inputs,), norm_I.double(), 1e-6)
    wide = w_OI.double()
    found = quick_kernels.product(x_1I, w_OI, norm_I=norm_I, eps=1e-6, bias_O=bias_O)
    assert near(found, F.linear(normed, wide, bias_O.double()), 4e-3)
    found = quick_kernels.product(x_1I, w_OI, added_1O=added_1O)
    assert near(found, F.linear(x_1I.double(), wide) + added_1O.double(), 4e-3)
    gate, up = F.linear(normed, wide).chunk(2, dim=-1)
    found = quick_kernels.product(x_1I, w_OI, norm_I=norm_I, eps=1e-6, gated=True)
    assert near(found, F.silu(gate) * up, 4e-3)
    ups_OS, share_1S = drawn(outputs, 12, dtype=dtype), drawn(1, 12, dtype=dtype)
    low = quick_kernels.product(
        x_1I, w_OI[:12].contiguous(), norm_I=norm_I, eps=1e-6, times_1O=share_1S
    )
    assert near(low, F.linear(normed, wide[:12]) * share_1S, 4e-3)
    update = quick_kernels.Update(low, ups_OS)
    more = F.linear(low.double(), ups_OS.double())
    found = quick_kernels.product(x_1I, w_OI, update=update, added_1O=added_1O)
    assert near(found, F.linear(x_1I.double(), wide) + more + added_1O.double(), 4e-3)
    gate, up = (F.linear(normed, wide) + more).chunk(2, dim=-1)
    found = quick_kernels.product(x_1I, w_OI, norm_I=norm_I, eps=1e-6, update=update, gated=True)
    assert near(found, F.silu(gate) * up, 4e-3)


@NARROW
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("normed", [False, True])
def test_heads_are_turned_on_their_way_into_the_cache(
    dtype: torch.dtype, rows: int, normed: bool
) -> None:
    from finesight.infer import quick_kernels

    heads, key_heads, width = 6, 2, 24
    joint = drawn(rows, (heads + 2 * key_heads) * width, dtype=dtype)
    q_RHD, k_RKD, v_RKD = (
        x.unflatten(1, (-1, width))
        for x in joint.split([heads * width, key_heads * width, key_heads * width], 1)
    )
    angles = drawn(rows, width // 2, dtype=torch.float32)
    for kind in (dtype, torch.float32):
        rotation = Rotation.by(angles, kind)
        norms = (drawn(width, dtype=dtype), drawn(width, dtype=dtype) * 2, 1e-6)
        keys, values = (torch.zeros(3, 16, key_heads, width, dtype=dtype).cuda() for _ in range(2))
        at_R = torch.tensor([3, 20, 47, 16, 1][:rows], device="cuda")
        found = quick_kernels.turn_in(
            q_RHD, k_RKD, v_RKD, norms if normed else None, rotation.cos_T1D, rotation.sin_T1D,
            at_R, keys, values,
        )  # fmt: skip
        q, k = q_RHD, k_RKD
        if normed:
            q, k = (F.rms_norm(x, (width,), norms[n], 1e-6) for n, x in enumerate((q, k)))
        assert near(found, rotate(q, rotation), 2e-3)
        assert near(keys.flatten(0, 1)[at_R], rotate(k, rotation), 2e-3)
        assert torch.equal(values.flatten(0, 1)[at_R], v_RKD)
        assert int(values.flatten(0, 1).any(-1).any(-1).sum()) == rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "heads", "key_heads", "width", "page"),
    [(1, 12, 2, 128, 64), (3, 4, 2, 16, 16), (70, 28, 4, 128, 64), (2, 7, 1, 80, 64)],
)
def test_attention_to_pages_is_attention_to_their_tokens(
    dtype: torch.dtype, rows: int, heads: int, key_heads: int, width: int, page: int
) -> None:
    from finesight.infer import kernels

    pages, blocks = 40, 7
    keys, values = (drawn(pages, page, key_heads, width, dtype=dtype) + n for n in range(2))
    q_RHD = drawn(rows, heads, width, dtype=dtype)
    generator = torch.Generator().manual_seed(rows)
    table = torch.stack([torch.randperm(pages, generator=generator)[:blocks] for _ in range(rows)])
    lengths = torch.randint(1, blocks * page + 1, (rows,), generator=generator)
    found = kernels.attend_pages(q_RHD, keys, values, table.int().cuda(), lengths.cuda())
    for row in range(rows):
        k, v = (x[table[row].cuda()].flatten(0, 1)[: lengths[row]] for x in (keys, values))
        k, v = (x.double().repeat_interleave(heads // key_heads, 1) for x in (k, v))
        scores = torch.einsum("hd,mhd->hm", q_RHD[row].double(), k) / width**0.5
        wanted = torch.einsum("hm,mhd->hd", scores.softmax(-1), v)
        assert near(found[row], wanted, 1e-5 if dtype == torch.float32 else 8e-3)


def said(
    model: VisionLanguageModel, prompts: list[Encoded], rows: int, record: bool = True
) -> list[list[int]]:
    engine = Engine(model, (), rows=rows, tokens=5000, record=record)
    number = None if model.readers is None else 0
    tickets = [
        engine.add(Request(prompt=prompt, max_new_tokens=STEPS, adapter=number))
        for prompt in prompts
    ]
    answers: dict[int, list[int]] = {ticket: [] for ticket in tickets}
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                answers[event.ticket].append(event.token.id)
    assert engine.pages_free == engine.pages_in_all
    return [answers[ticket] for ticket in tickets]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("change", [None, adapt, adapt_by_request])
def test_answers_are_those_of_the_whole_model_run_anew_for_each_token(
    family: str,
    dtype: torch.dtype,
    change: Callable[[VisionLanguageModel], None] | None,
    tmp_path: Path,
) -> None:
    """Equal in fp32; in 16 bits up to a first token that was as good as tied."""
    tiny = ModelFolder(make_tiny(tmp_path / "tiny", family))
    model = load_model(tiny, dtype, torch.device("cuda")).eval()
    if change is not None:
        change(model)
    assert is_quick(model) == (dtype != torch.float32 and family != "qwen")
    prompts = [Renderer(tiny).prompt(question) for question in mixed_questions(tmp_path)]
    wanted = [generate_uncached(model, prompt, STEPS) for prompt in prompts]
    for rows, record in ((6, True), (6, False), (1, True), (3, True)):
        for found, grown in zip(said(model, prompts, rows, record), wanted, strict=True):
            ids, logits = grown.tokens, grown.logits
            if dtype == torch.float32:
                assert found == ids
                continue
            apart = next((n for n, (a, b) in enumerate(zip(found, ids, strict=True)) if a != b), -1)
            if apart >= 0:
                logits_V = logits[apart].float()
                gap = logits_V[ids[apart]] - logits_V[found[apart]]
                bound = 0.05 if dtype == torch.bfloat16 else 0.01
                assert gap <= bound * logits_V.abs().max(), (rows, record, apart)
