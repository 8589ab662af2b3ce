"""Fingerprint of a frozen vision encoder, and its offloading to the CPU."""

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

from finesight.model.attention import has_amx_bf16
from finesight.model.hf_backend import AnyModel
from finesight.model.vlm import VisionLanguageModel

ENCODER_VERSION = 5
"""Version of the encoder computation and preprocessing; increase it when features change."""

_NUM_HASH_THREADS = 8


def fingerprint_encoder(
    vision_encoder: nn.Module, settings: Mapping[str, Any], device: torch.device
) -> str:
    """Return a SHA-256 of everything that determines the features of an image.

    It covers the weights, model settings, library versions and device. Cached features of another
    fingerprint are not used.

    Args:
        vision_encoder: Vision encoder of the model.
        settings: Content of `config.json` and of the preprocessor configuration.
        device: Device that runs the encoder.
    """
    tensors = {**dict(vision_encoder.named_parameters()), **dict(vision_encoder.named_buffers())}
    with ThreadPoolExecutor(_NUM_HASH_THREADS) as pool:
        digests = list(pool.map(_digest, tensors.values()))
    environment = {
        "version": ENCODER_VERSION,
        "torch": torch.__version__,
        "pillow": PIL.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()} threads",
        "tiles": device.type != "cuda" and has_amx_bf16(),
        "products": torch.get_float32_matmul_precision(),
    }
    weights = [
        (name, str(tensor.dtype), list(tensor.shape), digest)
        for (name, tensor), digest in zip(tensors.items(), digests, strict=True)
    ]
    payload = json.dumps([environment, settings, weights], sort_keys=True, default=str)
    return hashlib.sha256(payload.encode()).hexdigest()


def _digest(tensor: Tensor) -> str:
    # A copy, because storage exported to numpy cannot be resized.
    copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    bits = copy.view(-1).view(torch.uint8)
    return hashlib.sha256(bits.numpy().data).hexdigest()


def should_offload(device: torch.device) -> bool:
    """Return whether to offload an unused vision encoder: only on a GPU."""
    return device.type == "cuda"


class EncoderOffloader:
    """Offloader of the weights of a frozen vision encoder to the CPU.

    The storage of the weights is resized to zero and later refilled, so all tensors that share it
    stay valid. Tensors shared with the rest of the model, and models of the transformers backend,
    stay on the device.
    """

    def __init__(self, model: AnyModel) -> None:
        self._model = model
        self._cpu_copies: list[tuple[torch.UntypedStorage, Tensor]] = []
        self.is_offloaded = False

    def _list_storages(self) -> list[torch.UntypedStorage]:
        """Return the storages that only tensors of the vision encoder use."""
        model = self._model
        encoder_tensors = (
            list(_iter_tensors(model.visual)) if isinstance(model, VisionLanguageModel) else []
        )
        encoder_tensor_ids = {id(tensor) for tensor in encoder_tensors}
        shared_addresses = {
            _data_ptr(tensor)
            for tensor in _iter_tensors(model)
            if id(tensor) not in encoder_tensor_ids
        }
        storages = {_data_ptr(tensor): tensor.untyped_storage() for tensor in encoder_tensors}
        return [storage for address, storage in storages.items() if address not in shared_addresses]

    @contextmanager
    def offload(self) -> Iterator[None]:
        """Keep the encoder weights on the CPU within the context.

        The encoder can be used only inside a nested `reload` context.
        """
        self._move_to_cpu()
        try:
            yield
        finally:
            self._move_to_gpu()

    @contextmanager
    def reload(self) -> Iterator[None]:
        """Keep the encoder weights on the device within the context."""
        was_offloaded = self.is_offloaded
        self._move_to_gpu()
        try:
            yield
        finally:
            if was_offloaded:
                self._move_to_cpu()

    def _move_to_cpu(self) -> None:
        if self.is_offloaded:
            return
        storages = self._list_storages()
        copied_ids = {_storage_id(storage) for storage, _ in self._cpu_copies}
        if copied_ids != {_storage_id(storage) for storage in storages}:
            # Otherwise reuse the copy: frozen weights do not change.
            self._cpu_copies = [(one, _as_bytes(one).to("cpu", copy=True)) for one in storages]
        for storage, _ in self._cpu_copies:
            storage.resize_(0)
        self.is_offloaded = True

    def _move_to_gpu(self) -> None:
        if self.is_offloaded:
            for storage, cpu_copy in self._cpu_copies:
                storage.resize_(len(cpu_copy))
                _as_bytes(storage).copy_(cpu_copy)
            self.is_offloaded = False


def _iter_tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _data_ptr(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storage_id(storage: torch.UntypedStorage) -> int:
    """Return the identity of a storage, which does not change when the storage is resized."""
    return int(storage._cdata)


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
