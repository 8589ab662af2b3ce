from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from finesight.model import cuda_graph_cache as area
from finesight.model.cuda_graph_cache import CudaGraphCache

CARD = torch.device("cuda")


class FakeGraph:
    """CUDA graph without a GPU, whose capture may also fail at its end."""

    def __init__(self, spoiled: bool) -> None:
        self.open, self._spoiled = False, spoiled

    def capture_begin(self, **_: object) -> None:
        self.open = True

    def capture_end(self) -> None:
        self.open = False
        if self._spoiled:
            raise RuntimeError("the capture is invalid")


@pytest.mark.parametrize("spoiled", [False, True])
def test_capture_error_is_closed_and_raised(monkeypatch, spoiled):
    graph, stream = FakeGraph(spoiled), SimpleNamespace(wait_stream=lambda other: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(area, "_capture_stream", lambda device: stream)
    cleared: list[tuple[object, ...]] = []
    monkeypatch.setattr(area, "_reset_failed_capture", lambda *what: cleared.append(what))
    ids_R = torch.zeros(2, dtype=torch.int64)

    def decode() -> torch.Tensor:
        if graph.open:
            raise torch.OutOfMemoryError("the first error")
        return ids_R

    graphs = CudaGraphCache(CARD)
    assert graphs.run(2, decode) is ids_R
    with pytest.raises(torch.OutOfMemoryError, match="the first error"):
        graphs.run(2, decode)
    assert not graph.open
    assert cleared == ([(CARD, (0, 0))] if spoiled else [])


@pytest.mark.gpu
@pytest.mark.parametrize("output", [True, False])
def test_failed_capture_falls_back_to_eager(output):
    """Who waits for the card in it spoils it, whether or not he hears of that."""
    torch.manual_seed(7)
    expected = [torch.rand(3, device=CARD) for _ in range(3)]
    torch.manual_seed(7)
    drawn = [torch.rand(3, device=CARD)]
    graphs, values = CudaGraphCache(CARD), torch.ones(3, device=CARD)

    def wait() -> torch.Tensor:
        with contextlib.nullcontext() if output else contextlib.suppress(RuntimeError):
            values.sum().item()
        return values * 2

    assert graphs.run(1, wait).tolist() == [2, 2, 2]
    with pytest.raises(RuntimeError):
        graphs.run(1, wait)
    drawn.append(torch.rand(3, device=CARD))
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    # What another stream has used comes back once that is through.
    with torch.cuda.stream(torch.cuda.Stream()):
        lent = torch.empty(1 << 26, dtype=torch.uint8, device=CARD)
    lent.record_stream(torch.cuda.current_stream())
    del lent
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() < before + (1 << 26)
    again = CudaGraphCache(CARD)
    for _ in range(3):
        assert again.run(1, lambda: values * 3).tolist() == [3, 3, 3]
    drawn.append(torch.rand(3, device=CARD))
    assert torch.equal(torch.stack(drawn), torch.stack(expected))


@pytest.mark.gpu
def test_graphs_are_captured_once_per_key():
    """Request keys in any order; each call runs once, eagerly, captured or replayed."""
    total = torch.zeros(8, device=CARD)

    def add(number: int) -> torch.Tensor:
        total[:number] += number
        return total[:number] * 2

    graphs, wanted = CudaGraphCache(CARD), torch.zeros(8)
    for number in (1, 4, 1, 1, 4, 8, 4, 1, 8, 8):
        wanted[:number] += number
        found = graphs.run(number, lambda number=number: add(number))
        assert torch.equal(found.cpu(), 2 * wanted[:number])
    assert torch.equal(total.cpu(), wanted)
