"""A frozen tower whose pictures are all known: what it computes as one digest, and its weights off
the card while nobody needs them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import PIL
import torch
from torch import Tensor, nn

from finesight.model.any_family import AnyModel
from finesight.model.attention import has_tiles
from finesight.model.network import VisionLanguageModel

VERSION = 5
"""To be raised when towers, or what they are fed of a picture, come to be computed otherwise."""

_THREADS = 8


def fingerprint(tower: nn.Module, settings: Mapping[str, Any], device: torch.device) -> str:
    """SHA-256 of all that decides a tower's features beside the pictures: every bit of its weights,
    the `settings` of its model (what config.json and the preprocessor say), and what computes."""
    tensors = {**dict(tower.named_parameters()), **dict(tower.named_buffers())}
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = list(pool.map(_digest, tensors.values()))
    computing = {
        "version": VERSION,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads",
        "tiles": device.type != "cuda" and has_tiles(),
        "products": torch.get_float32_matmul_precision(),
    }
    weights = [
        (name, str(tensor.dtype), list(tensor.shape), found)
        for (name, tensor), found in zip(tensors.items(), digests, strict=True)
    ]
    whole = json.dumps([computing, settings, weights], sort_keys=True, default=str)
    return hashlib.sha256(whole.encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    # A copy, as memory that numpy has seen can no longer be given up.
    copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    bits = copy.view(-1).view(torch.uint8)
    return hashlib.sha256(bits.numpy().data).hexdigest()


def leaves(device: torch.device) -> bool:
    """Whether a tower that nobody needs should leave the device: a GPU, whose memory is scarce."""
    return device.type == "cuda"


class OffCard:
    """Brings the weights of a model's tower to the CPU and back. They must not change in between.

    The memory beneath them is given up and filled again, so that every tensor that shares it,
    wherever it is kept, means the same weights as before. What the rest of the model uses as well
    stays, and so does all of a model without native code.
    """

    def __init__(self, model: AnyModel) -> None:
        self._model = model
        self._kept: list[tuple[torch.UntypedStorage, Tensor]] = []
        self.is_away = False

    def _storages(self) -> list[torch.UntypedStorage]:
        """Those of the tower alone, as it lies now."""
        model = self._model
        own = list(_tensors(model.visual)) if isinstance(model, VisionLanguageModel) else []
        places = {id(tensor) for tensor in own}
        others = {_place(tensor) for tensor in _tensors(model) if id(tensor) not in places}
        storages = {_place(tensor): tensor.untyped_storage() for tensor in own}
        return [storage for place, storage in storages.items() if place not in others]

    @contextmanager
    def away(self) -> Iterator[None]:
        """Within the block the tower cannot compute, but within `back`."""
        self._leave()
        try:
            yield
        finally:
            self._return()

    @contextmanager
    def back(self) -> Iterator[None]:
        """Within the block the tower can compute."""
        was_away = self.is_away
        self._return()
        try:
            yield
        finally:
            if was_away:
                self._leave()

    def _leave(self) -> None:
        if self.is_away:
            return
        storages = self._storages()
        known = {_address(storage) for storage, _ in self._kept}
        if known != {_address(storage) for storage in storages}:
            # Else copied once: what is frozen is the same whenever it leaves.
            self._kept = [(one, _bytes(one).to("cpu", copy=True)) for one in storages]
        for storage, _ in self._kept:
            storage.resize_(0)
        self.is_away = True

    def _return(self) -> None:
        if self.is_away:
            for storage, kept in self._kept:
                storage.resize_(len(kept))
                _bytes(storage).copy_(kept)
            self.is_away = False


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _address(storage: torch.UntypedStorage) -> int:
    """Of the storage itself, wherever its memory is."""
    return int(storage._cdata)


def _bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
