"""A long sample shared out: what one process computes, whatever the family and the number."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conversations import make_conversation, make_pictures
from meeting import Meeting
from torch import Tensor

from finesight.config import PixelRange
from finesight.encode.encoded import Encoded
from finesight.encode.pack import PackedBatch, pack
from finesight.encode.rendering import renderer_of
from finesight.encode.slice import Slice
from finesight.hub import ModelFolder
from finesight.model import sequence_parallel
from finesight.model.network import VisionLanguageModel
from finesight.model.sequence_parallel import wanted
from finesight.model.tiny import make_tiny
from finesight.model.weights import load_model
from finesight.train.loss import label_loss

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen"]


@pytest.fixture(scope="module", params=FAMILIES)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp(request.param) / "tiny", request.param)


def long_sample(folder: Path, tiny: Path) -> Encoded:
    """Pictures, a video where the family reads one, and text."""
    pictures = make_pictures(folder)
    found = ModelFolder(tiny)
    videos = found.family != "qwen"
    rule = PixelRange(min_pixels=784, max_pixels=7056) if videos else None
    renderer = renderer_of(found, rule, None)
    return renderer.encode(make_conversation(4, pictures, videos=videos))


def cut(encoded: Encoded, number: int, count: int) -> PackedBatch:
    share = Slice.of(encoded.outline, number, count)
    own = encoded.patches_ND[slice(*share.patches)]
    return share.cut(pack([replace(encoded, patches_ND=own)]))


def learned(
    model: VisionLanguageModel, batch: PackedBatch, known_MKD: Tensor | None = None
) -> list[Tensor]:
    """The loss, and the gradients of all parameters."""
    model = deepcopy(model)
    h_LD = model(batch, known_MKD)
    loss = label_loss(h_LD, model.head_weight, batch.target_L, torch.ones((), device=h_LD.device))
    loss.backward()
    made = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return [loss.detach(), *made]


def assert_same(shares: list[list[Tensor]], whole: list[Tensor]) -> None:
    for ours, theirs in zip(zip(*shares, strict=True), whole, strict=True):
        added = torch.stack(ours).sum(0)
        assert (added - theirs).norm() <= 2e-6 * max(theirs.norm().item(), 1e-3)


@pytest.mark.parametrize("count", [2, 30])
def test_shares_add_up_to_the_whole(
    tiny: Path, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, with pictures looked at in the step and with known ones, activations kept and made
    again."""
    encoded = long_sample(tmp_path, tiny)
    assert len(encoded.outline.spans) > 1
    assert all(Slice.of(encoded.outline, 0, count).features) == (count == 2)
    model = load_model(ModelFolder(tiny), torch.float32, torch.device("cpu")).train()
    batch = pack([encoded])
    whole = learned(model, batch)
    meeting = Meeting(count, monkeypatch)
    for recompute in (0.0, 1.0):
        model.recompute = recompute
        assert_same(meeting.all(lambda n: learned(model, cut(encoded, n, count))), whole)
    with torch.no_grad():
        known_MKD = model.see(batch.patches_ND, batch.grids)

    def of_known(number: int) -> list[Tensor]:
        batch = cut(encoded, number, count)
        assert batch.share is not None
        return learned(model, replace(batch, grids=()), wanted(known_MKD, batch.share))

    assert_same(meeting.all(of_known), learned(model, batch, known_MKD))


def test_every_token_and_frame_has_one_process(tiny: Path, tmp_path: Path) -> None:
    encoded = long_sample(tmp_path, tiny)
    outline = encoded.outline
    for count in (2, 3, 8, 100):
        shares = [Slice.of(outline, number, count) for number in range(count)]
        tokens = [token for share in shares for a, b in share.stretches for token in range(a, b)]
        assert sorted(tokens) == list(range(outline.needed))
        frames = [frame for share in shares for frame in range(*share.patches)]
        assert frames == list(range(outline.patches))
        assert sum(shares[0].features) == sum(span.stop - span.start for span in outline.spans)
        cuts = [cut(encoded, number, count) for number in range(count)]
        assert sum(batch.supervised for batch in cuts) == outline.supervised
        assert sum(batch.samples for batch in cuts) == 1
        wanted = [place for share in shares for a, b in share.wanted for place in range(a, b)]
        assert sorted(wanted) == list(range(sum(shares[0].features)))


def test_work_is_even(tiny: Path, tmp_path: Path) -> None:
    """Of causal attention: pairs of tokens that see each other."""
    outline = long_sample(tmp_path, tiny).outline
    shares = [Slice.of(outline, number, 4) for number in range(4)]
    pairs = [sum(b * (b + 1) - a * (a + 1) for a, b in share.stretches) for share in shares]
    assert max(pairs) <= 1.2 * min(pairs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_kernels_of_a_card_take_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both stretches of a sample in one process, which gathers from itself."""
    monkeypatch.setattr(sequence_parallel, "GATHER", Tensor.copy_)
    monkeypatch.setattr(sequence_parallel, "SCATTER", Tensor.copy_)
    tiny = make_tiny(tmp_path / "tiny")
    encoded = long_sample(tmp_path, tiny)
    device = torch.device("cuda")
    model = load_model(ModelFolder(tiny), torch.bfloat16, device).train()
    whole = learned(model, pack([encoded]).to(device))
    share = learned(model, cut(encoded, 0, 1).to(device))
    for ours, theirs in zip(share, whole, strict=True):
        assert (ours - theirs).norm() <= 0.03 * max(theirs.norm().item(), 1e-3)
