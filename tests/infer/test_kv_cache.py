from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from finesight.encode.tokenization import EncodedSample, TokenizedSample, VisualSpan
from finesight.infer import block_manager, kv_cache, paged_attention
from finesight.infer.paged_attention import PrefillChunk
from finesight.model.config import LinearAttentionConfig

LAYERS, HEADS, KEY_HEADS, WIDTH = 2, 4, 2, 8
CPU = torch.device("cpu")
SIZE = SimpleNamespace(
    num_layers=LAYERS,
    num_full_attention_layers=LAYERS,
    num_heads=HEADS,
    num_kv_heads=KEY_HEADS,
    head_dim=WIDTH,
    linear_attention=None,
)

HYBRID = SimpleNamespace(
    num_layers=LAYERS,
    num_full_attention_layers=1,
    num_kv_heads=KEY_HEADS,
    head_dim=WIDTH,
    linear_attention=LinearAttentionConfig(
        full_attention_layers=(1,),
        num_key_heads=1,
        num_value_heads=2,
        key_head_dim=4,
        value_head_dim=6,
        conv_kernel_size=4,
    ),
)


def _cache(
    num_seqs: int, blocks: int, block_size: int, device: torch.device = CPU, **kind
) -> kv_cache.KVCache:
    kind = {"dtype": torch.float32} | kind
    return kv_cache.KVCache(
        SIZE, num_blocks=blocks, block_size=block_size, max_num_seqs=num_seqs, device=device, **kind
    )


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def _scatter_blocks(
    lengths: tuple[int, ...], block_size: int, more: int = 0
) -> tuple[list[list[int]], int]:
    """Return blocks in random order for sequences of these lengths, and the block count."""
    needed = [-(-(length + more) // block_size) for length in lengths]
    free = (np.random.default_rng(1).permutation(sum(needed)) + 1).tolist()
    return [[free.pop() for _ in range(number)] for number in needed], sum(needed) + 1


def _start(cache: kv_cache.KVCache, blocks: list[list[int]], lengths: tuple[int, ...]) -> None:
    for row, (own, length) in enumerate(zip(blocks, lengths, strict=True)):
        cache.block_table_RB[row, : len(own)] = torch.tensor(own, dtype=torch.int32)
        cache.seq_lens_R[row] = cache.prompt_lens_R[row] = length
        cache.active_R[row] = 1


def _reference_attention(q_HD: Tensor, k_MKD: Tensor, v_MKD: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, head by head, in fp64."""
    group = len(q_HD) // k_MKD.shape[1]
    found = []
    for head, q_D in enumerate(q_HD.double()):
        weights = (k_MKD[:, head // group].double() @ q_D / q_D.shape[0] ** 0.5).softmax(0)
        found.append(weights @ v_MKD[:, head // group].double())
    return torch.stack(found)


_HEADS = ((0, HEADS), (1, KEY_HEADS), (2, KEY_HEADS))


@pytest.mark.parametrize("stale", [0.0, 3.0, float("nan"), float("inf")])
def test_decode_attends_only_to_its_sequence(stale):
    """Check that values of an earlier sequence in its blocks have no effect, even infinities."""
    lengths, block_size = (3, 5, 8), 4
    blocks, num_blocks = _scatter_blocks(lengths, block_size, more=2)
    cache = _cache(4, num_blocks, block_size)
    cache.keys_LPSKD.fill_(stale)
    cache.values_LPSKD.fill_(stale)
    _start(cache, blocks, lengths)
    k, v = ([_random(n + 2, KEY_HEADS, WIDTH, seed=s) for n in lengths] for s in (1, 2))
    for own, length, k_TKD, v_TKD in zip(blocks, lengths, k, v, strict=True):
        chunk = PrefillChunk(own, 0, length, length)
        slots = torch.from_numpy(chunk.compute_slot_mapping(block_size, 0))
        cache.write(0, slots, k_TKD[:length], v_TKD[:length])
    for step in (1, 2):
        attention = paged_attention.DecodeAttention(cache, len(lengths), max(lengths) + step)
        q_RHD = _random(len(lengths), HEADS, WIDTH, seed=step)
        now = [
            torch.stack([x[n + step - 1] for x, n in zip(xs, lengths, strict=True)])
            for xs in (k, v)
        ]
        found = attention(0, q_RHD, *now)
        assert cache.seq_lens_R.tolist() == [n + step for n in lengths] + [0]
        assert attention.context_lengths_T.tolist() == list(lengths)
        for row, length in enumerate(lengths):
            own = (x[row][: length + step] for x in (k, v))
            wanted = _reference_attention(q_RHD[row], *own)
            torch.testing.assert_close(found[row].double(), wanted, atol=1e-5, rtol=1e-5)


def test_inactive_slot_does_not_advance_and_writes_to_block_0():
    cache = _cache(2, 4, 4)
    _start(cache, [[2]], (3,))
    paged_attention.DecodeAttention(cache, 2, 4)(
        1, *(_random(2, heads, WIDTH) for _, heads in _HEADS)
    )
    assert cache.seq_lens_R.tolist() == [4, 0]
    written = cache.flatten_layer(1)[0].flatten(1).any(1).nonzero().flatten()
    assert written.tolist() == [0, 11]


def test_bytes_of_the_cache():
    cache = _cache(1, 3, 4, dtype=torch.bfloat16)
    taken = cache.keys_LPSKD.nbytes + cache.values_LPSKD.nbytes
    assert kv_cache.get_kv_bytes_per_token(SIZE, torch.bfloat16) * 12 == taken
    assert kv_cache.get_linear_state_bytes(SIZE, torch.bfloat16, 3) == 0
    for max_num_seqs in (1, 3):
        states = kv_cache.LinearStateCache(HYBRID, max_num_seqs, torch.bfloat16, CPU)
        size = kv_cache.get_linear_state_bytes(HYBRID, torch.bfloat16, max_num_seqs)
        assert size == sum(state.nbytes for state in states.get_layer(0))


@pytest.mark.gpu
@pytest.mark.parametrize("stale", [0.0, float("nan")])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"),
    [(12, 2, 128), (4, 4, 64), (5, 1, 40), (28, 4, 128), (7, 1, 80)],
)
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)]
)
def test_paged_kernel_matches_reference(stale, block_size, heads, key_heads, width, dtype, bound):
    """Check lengths around block sizes, for one sequence and many, with many, few and no splits."""
    from finesight.model.kernels.decoding import paged_attention

    card = torch.device("cuda")
    for lengths in (
        (1,),
        (block_size,),
        (block_size + 1,),
        (40 * block_size + 3,),
        (1, 7, block_size, 3 * block_size - 1) * 64,
    ):
        blocks, number = _scatter_blocks(lengths, block_size)
        shape = number, block_size, key_heads, width
        keys, values = (torch.full(shape, stale, dtype=dtype, device=card) for _ in range(2))
        table = torch.zeros(len(lengths), number, dtype=torch.int32)
        own = [_random(2, n, key_heads, width, seed=r) for r, n in enumerate(lengths)]
        for row, (mine, length) in enumerate(zip(blocks, lengths, strict=True)):
            table[row, : len(mine)] = torch.tensor(mine, dtype=torch.int32)
            at = torch.from_numpy(
                PrefillChunk(mine, 0, length, length).compute_slot_mapping(block_size, 0)
            ).to(card)
            for store, x in zip((keys, values), own[row], strict=True):
                store.flatten(0, 1).index_copy_(0, at, x.to(card, dtype))
        q_RHD = _random(len(lengths), heads, width).to(card, dtype)
        lengths_R = torch.tensor(lengths, device=card)
        found = paged_attention(q_RHD, keys, values, table.to(card), lengths_R).double().cpu()
        for row in {0, len(lengths) // 2, len(lengths) - 1}:
            k, v = (x.to(dtype) for x in own[row])
            wanted = _reference_attention(q_RHD[row].cpu(), k, v)
            assert (found[row] - wanted).abs().max() <= bound * max(1.0, wanted.abs().max())


BLOCK_SIZE = 4


def test_prefix_blocks_are_evicted_last():
    manager, keys = block_manager.BlockManager(4), [n.to_bytes(2, "big") for n in range(3)]
    first = manager.allocate(3)
    manager.cache_blocks(keys, first)
    manager.release(first)
    assert manager.allocate(1) == [first[2]]
    assert manager.acquire_cached(keys) == first[:2]
    with pytest.raises(AssertionError, match="1 blocks requested, 0 free"):
        manager.allocate(1)


def _prompt(
    tokens: int = 18, num_images: tuple[tuple[int, int], ...] = ((3, 6), (9, 13))
) -> EncodedSample:
    """Make images of one row of patches each, one token for a patch of one pixel."""
    spans = tuple(
        VisualSpan("image", start, stop, (1, 1, stop - start), (), (14, 14), (1, stop - start))
        for start, stop in num_images
    )
    count = sum(stop - start for start, stop in num_images)
    patches = np.arange(count * 3, dtype=np.uint8).reshape(count, 3)
    positions = np.tile(np.arange(tokens, dtype=np.int32), (3, 1))
    ids = np.arange(tokens, dtype=np.int32)
    return EncodedSample(
        TokenizedSample("s", ids, np.zeros(tokens, dtype=bool), positions, spans), patches
    )


def _keys(prompt: EncodedSample, cache_salt: str = "") -> list[block_manager.BlockHash]:
    return block_manager.compute_block_hashes(
        prompt.tokenized, block_manager.hash_images(prompt), BLOCK_SIZE, cache_salt
    )


def _num_shared_blocks(one: EncodedSample, other: EncodedSample) -> int:
    equal = [mine == theirs for mine, theirs in zip(_keys(one), _keys(other), strict=False)]
    assert equal == sorted(equal, reverse=True), "alike after a difference"
    return sum(equal)


def test_prompts_share_blocks_up_to_first_difference():
    assert [len(_keys(_prompt(tokens, ()))) for tokens in (3, 4, 7, 8)] == [0, 1, 1, 2]
    prompt = _prompt()
    assert _num_shared_blocks(prompt, _prompt()) == 4
    assert _keys(prompt, "0 ")[0] not in (_keys(prompt, "1 ")[0], _keys(prompt)[0])
    for at in range(16):
        for name, index in (("ids_T", at), ("position_ids_3T", (at % 3, at))):
            values = getattr(prompt.tokenized, name).copy()
            values[index] = 99
            changed = replace(prompt.tokenized, **{name: values})
            assert (
                _num_shared_blocks(prompt, replace(prompt, tokenized=changed)) == at // BLOCK_SIZE
            )


def test_changed_image_changes_the_block_hash():
    # Two images across blocks, and one within a block.
    prompts = _prompt(18, ((3, 6), (9, 13))), _prompt(18, ((5, 7),))
    for which, patch, num_shared in ((0, 0, 0), (0, 2, 0), (0, 3, 2), (0, 6, 2), (1, 0, 1)):
        prompt = prompts[which]
        patches = prompt.patches_ND.copy()
        patches[patch, 1] ^= 1
        assert _num_shared_blocks(prompt, replace(prompt, patches_ND=patches)) == num_shared
    prompt = _prompt(12, ((2, 6),))
    (span,) = prompt.tokenized.spans
    square = replace(span, grid_thw=(1, 2, 2), resized_size=(2, 2))
    reshaped = replace(prompt, tokenized=replace(prompt.tokenized, spans=(square,)))
    assert _num_shared_blocks(prompt, reshaped) == 0
