import contextlib

import pytest
import torch

from finesight.model.cuda_graph_cache import CudaGraphCache

CARD = torch.device("cuda")


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
