"""Paged KV cache and states of linear attention: tensors, and their sizes.

Shapes: L layers, P blocks, S tokens per block, R sequences of the decoding batch, B blocks of one
sequence, T tokens of a packed batch, M cached positions of a sequence, H query heads, K key and
value heads, G = H / K query heads per key head, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from finesight.model.config import DecoderConfig
from finesight.model.gated_delta_net import DeltaNetState


class KVCache:
    """Paged KV cache of all sequences (Kwon et al. 2023, PagedAttention).

    All state is on the device, so that decoding steps need no synchronization. Memory is
    zero-initialized: a masked entry has weight 0, but 0 times NaN is NaN.

    Attributes:
        active_R: 1 for a decoding sequence, 0 for an unused row, which writes to block 0.
        state_slots_R: Slot of each sequence in `linear_states`; 0 for an unused row.
        matches_training: Whether decoder layers and attention round as in training.
    """

    def __init__(
        self,
        decoder_config: DecoderConfig,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        dtype: torch.dtype,
        device: torch.device,
        matches_training: bool = False,
        num_snapshots: int = 0,
    ) -> None:
        self.matches_training = matches_training
        heads = decoder_config.num_kv_heads, decoder_config.head_dim
        shape = decoder_config.num_full_attention_layers, num_blocks, block_size, *heads
        self.keys_LPSKD = torch.zeros(shape, dtype=dtype, device=device)
        self.values_LPSKD = torch.zeros(shape, dtype=dtype, device=device)
        self.block_table_RB = torch.zeros(
            max_num_seqs, num_blocks, dtype=torch.int32, device=device
        )
        self.seq_lens_R, self.prompt_lens_R, self.active_R, self.state_slots_R = (
            torch.zeros(max_num_seqs, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.linear_states = (
            LinearStateCache(decoder_config, max_num_seqs, dtype, device, num_snapshots)
            if decoder_config.linear_attention is not None
            else None
        )

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.keys_LPSKD.shape[2]

    @property
    def device(self) -> torch.device:
        return self.keys_LPSKD.device

    def write(self, layer_index: int, slot_mapping_T: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> None:
        """Write the keys and values of new tokens to the cache of one layer.

        `slot_mapping_T` is the cache slot of each token: block id * S + offset in the block.
        """
        for x_XKD, new_TKD in zip(self.flatten_layer(layer_index), (k_TKD, v_TKD), strict=True):
            x_XKD.index_copy_(0, slot_mapping_T, new_TKD)

    def flatten_layer(self, layer_index: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values of a layer as views [P x S, K, D]."""
        keys_PSKD, values_PSKD = self.keys_LPSKD[layer_index], self.values_LPSKD[layer_index]
        return keys_PSKD.flatten(0, 1), values_PSKD.flatten(0, 1)


class LinearStateCache:
    """States of the linear attention layers of all sequences.

    Each sequence has a slot from its first prefill step to its end. Slot 0 is reserved for unused
    rows of the decoding batch. The last slots are snapshots of prompts.
    """

    def __init__(
        self,
        decoder_config: DecoderConfig,
        max_num_seqs: int,
        dtype: torch.dtype,
        device: torch.device,
        num_snapshots: int = 0,
    ) -> None:
        config = decoder_config.linear_attention
        assert config is not None, "a decoder without linear attention"
        num_layers = decoder_config.num_layers - decoder_config.num_full_attention_layers
        shape = num_layers, max_num_seqs + num_snapshots + 1
        conv_shape = (config.conv_kernel_size - 1, config.conv_size)
        delta_shape = (config.num_value_heads, config.key_head_dim, config.value_head_dim)
        self._conv_LSWN = torch.zeros(*shape, *conv_shape, dtype=dtype, device=device)
        wide_dtype = torch.promote_types(dtype, torch.float32)
        self._delta_LSHDV = torch.zeros(*shape, *delta_shape, dtype=wide_dtype, device=device)

    @property
    def num_bytes(self) -> int:
        return self._conv_LSWN.nbytes + self._delta_LSHDV.nbytes

    def get_layer(self, layer_index: int) -> DeltaNetState:
        """Return the states of all slots of a layer, to be updated in place."""
        return DeltaNetState(self._conv_LSWN[layer_index], self._delta_LSHDV[layer_index])

    def reset(self, slots_S: Tensor) -> None:
        """Set the states of new sequences to zero."""
        self._conv_LSWN[:, slots_S] = 0
        self._delta_LSHDV[:, slots_S] = 0

    def copy(self, source: int, target: int) -> None:
        """Copy the states of one slot to another, in all layers."""
        for x_LSX in (self._conv_LSWN, self._delta_LSHDV):
            x_LSX[:, target] = x_LSX[:, source]

    def read(self, layer_index: int, slots_S: Tensor) -> DeltaNetState:
        return DeltaNetState(*(x.index_select(0, slots_S) for x in self.get_layer(layer_index)))

    def write(self, layer_index: int, slots_S: Tensor, state: DeltaNetState) -> None:
        self._conv_LSWN[layer_index].index_copy_(0, slots_S, state.conv_SWN)
        self._delta_LSHDV[layer_index].index_copy_(0, slots_S, state.delta_SHDV)


def get_linear_state_bytes(
    decoder_config: DecoderConfig, dtype: torch.dtype, max_num_seqs: int
) -> int:
    """Return the size of `LinearStateCache` in bytes, with the reserved slot."""
    if decoder_config.linear_attention is None:
        return 0
    states = LinearStateCache(decoder_config, max_num_seqs, dtype, torch.device("meta"))
    return states.num_bytes


def get_kv_bytes_per_token(decoder_config: DecoderConfig, dtype: torch.dtype) -> int:
    """Return the KV-cache size of one token in bytes, over all layers."""
    num_elements = decoder_config.num_kv_heads * decoder_config.head_dim
    return 2 * decoder_config.num_full_attention_layers * num_elements * dtype.itemsize
