"""Decoder configuration for tests of single layers."""

from finesight.model.config import DecoderConfig

SMALL_DECODER = DecoderConfig(
    vocab_size=64,
    hidden_size=192,
    intermediate_size=640,
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=32,
    use_qk_norm=False,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_axes=(0,) * 16,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
)
"""One layer with grouped-query attention."""
