"""Padding of packed batches."""

from dataclasses import replace

import numpy as np
import torch

from finesight.encode.batch import PAD_MULTIPLE, pad_batch
from finesight.encode.packing import pack
from finesight.encode.tokenization import EncodedSample, TokenizedSample


def test_padding_of_even_text_and_odd_patch_counts():
    ids_T = np.full(PAD_MULTIPLE + 1, 3, dtype=np.int32)
    position_ids_3T = np.tile(np.arange(len(ids_T), dtype=np.int32), (3, 1))
    tokenized = TokenizedSample("a", ids_T, ids_T > 0, position_ids_3T, ())
    batch = pack([EncodedSample(tokenized, np.empty((0, 588), dtype=np.uint8))])
    even = pad_batch(batch, 2)
    assert (even.lengths, even.grid_thw) == ((PAD_MULTIPLE, PAD_MULTIPLE), ())
    assert even.logit_indices_L.tolist() == batch.logit_indices_L.tolist()
    patches_ND = torch.zeros((63, 12), dtype=torch.uint8)
    odd = pad_batch(replace(batch, patches_ND=patches_ND, grid_thw=((1, 9, 7),)), 3)
    assert sum(t * h * w for t, h, w in odd.grid_thw) == len(odd.patches_ND) == 576
    assert len(odd.visual_indices_M) == (576 - 63) // 9
    assert len(odd.ids_T) % PAD_MULTIPLE == 0
