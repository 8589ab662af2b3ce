"""The gated delta rule against its definition, token by token, and against transformers."""

import pytest
import torch
from torch import Tensor

from finesight.model import gated_delta_net
from finesight.model.attention import Segments
from finesight.model.config import LinearAttentionConfig
from finesight.model.fused_ops import norm_rotary, sigmoid_gate
from finesight.model.gated_delta_net import (
    ChunkLayout,
    DeltaNetInputs,
    DeltaNetState,
    chunk_gated_delta_rule,
    forward_packed,
    forward_step,
    forward_with_states,
    gated_rms_norm,
    recurrent_gated_delta_rule,
    update_states,
)
from finesight.model.kernels import gated_delta_net as kernels
from finesight.model.layers import RotaryCosSin, ZeroCenteredRmsNorm, apply_partial_rotary_pos_emb

CPU = torch.device("cpu")


def make_config(key_dim: int, value_dim: int) -> LinearAttentionConfig:
    return LinearAttentionConfig((), 2, 4, key_dim, value_dim, 4)


def make_inputs(num_tokens: int, seed: int, heads: int = 2, dim: int = 8, value_dim: int = 6):
    """Random normalized queries and keys, values, log decays and step sizes in fp64."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = (torch.nn.functional.normalize(draw(num_tokens, heads, dim), dim=-1) for _ in range(2))
    log_decay = -torch.nn.functional.softplus(3 * draw(num_tokens, heads))
    return (
        q * dim**-0.5,
        k,
        draw(num_tokens, heads, value_dim),
        log_decay,
        draw(num_tokens, heads).sigmoid(),
    )


def run_recurrence(inputs: tuple[Tensor, ...], state: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for token in zip(*(x.unsqueeze(1) for x in inputs), strict=True):
        output, state = recurrent_gated_delta_rule(*token, state)
        outputs.append(output)
    return torch.cat(outputs), state


@pytest.mark.parametrize("lengths", [[1], [64], [65], [5, 130, 64, 1, 63, 129]])
@pytest.mark.parametrize("has_state", [False, True])
def test_packed_chunks_equal_the_recurrence_of_each_sequence(lengths, has_state):
    """Outputs, final states and the gradients of all inputs."""
    inputs = [x.requires_grad_() for x in make_inputs(sum(lengths), seed=sum(lengths))]
    state = torch.randn(len(lengths), 2, 8, 6, dtype=torch.float64) * has_state
    state.requires_grad_()
    layout = Segments.from_lengths(lengths, CPU)
    output, final = chunk_gated_delta_rule(*inputs, layout, state if has_state else None)
    pieces = [
        run_recurrence(tuple(part), state[n : n + 1])
        for n, part in enumerate(zip(*(x.split(lengths) for x in inputs), strict=True))
    ]
    expected = torch.cat([piece[0] for piece in pieces])
    expected_final = torch.cat([piece[1] for piece in pieces])
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(final, expected_final, rtol=1e-10, atol=1e-12)
    wanted = [*inputs, state] if has_state else inputs
    weights = torch.randn_like(output), torch.randn_like(final)
    got = torch.autograd.grad((output, final), wanted, weights)
    reference = torch.autograd.grad((expected, expected_final), wanted, weights)
    for gradient, right in zip(got, reference, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-11)


def test_strong_decay_gives_finite_gradients():
    inputs = [x.float() for x in make_inputs(200, seed=1)]
    inputs[3] = inputs[3] * 100
    inputs = [x.requires_grad_() for x in inputs]
    output, _ = chunk_gated_delta_rule(*inputs, Segments.from_lengths([150, 50], CPU))
    for gradient in torch.autograd.grad(output.sum(), inputs):
        assert gradient.isfinite().all()


def test_layout_of_a_graph_has_the_chunks_of_the_actual_lengths():
    """The lengths of a CUDA graph are bounds; its last sequences may be empty."""
    actual, max_lengths = [70, 64, 1, 130, 35], [130] * 8
    cu_seqlens = torch.tensor([0, 70, 134, 135, 265, 300, 300, 300, 300], dtype=torch.int32)
    static = ChunkLayout(tuple(max_lengths), cu_seqlens, 130, 300)
    exact = Segments.from_lengths(actual, CPU)
    assert torch.equal(static.position_T, exact.position_T)
    assert torch.equal(static.sequence_T, exact.sequence_T)
    first, start, end = static.sequence_chunks
    exact_first, exact_start, exact_end = exact.sequence_chunks
    count = sum(-(-length // 64) for length in actual)
    assert len(exact_start) == count
    assert exact_first.tolist() == [0, 2, 3, 4, 7, 8]
    assert first.tolist() == [*exact_first.tolist(), 8, 8, 8]
    assert torch.equal(start[:count], exact_start)
    assert torch.equal(end[:count], exact_end)
    assert torch.all(start[count:] >= end[count:]), "unused chunks are not empty"


@pytest.mark.gpu
@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (32, 64)])
def test_step_kernels_match_the_step_in_pytorch(key_dim, value_dim):
    """Outputs and states of three sequences of seven slots, for two tokens."""
    device, rows, slots = torch.device("cuda"), 3, torch.tensor([5, 1, 6], device="cuda")
    config = make_config(key_dim, value_dim)
    generator = torch.Generator(device).manual_seed(key_dim)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    channels, width = config.conv_size, config.value_size
    weight, a_log, dt_bias = 0.5 * draw(channels, 4), draw(4, dtype=torch.float32), draw(4)
    norm = 1 + 0.1 * draw(value_dim, dtype=torch.float32)
    conv = draw(7, 3, channels)
    delta = draw(7, 4, key_dim, value_dim, dtype=torch.float32)
    state = DeltaNetState(conv[slots], delta[slots])
    untouched = [x[[0, 2, 3, 4]].clone() for x in (conv, delta)]
    for _ in range(2):
        projected = draw(rows, channels + width + 8)
        qkv, z, b, a = projected.split([channels, width, 4, 4], dim=1)
        log_decay = -a_log.exp() * torch.nn.functional.softplus(a.float() + dt_bias.float())
        inputs = DeltaNetInputs(config, qkv, weight, log_decay, b.float().sigmoid())
        o, state = forward_step(inputs, state)
        expected = gated_rms_norm(o, z.unflatten(1, (4, -1)), norm, 1e-6).flatten(1)
        y = kernels.causal_conv_step(qkv, weight, conv, slots, 2, 4, value_dim, 1e-6)
        found = kernels.gated_delta_step(y, a, b, a_log, dt_bias, z, norm, delta, slots, 2, 1e-6)
        error = (found.float() - expected.float()).norm() / expected.float().norm()
        assert error <= 1e-2
        assert torch.equal(conv[slots], state.conv_SWN)
        torch.testing.assert_close(delta[slots], state.delta_SHDV, rtol=1e-2, atol=2e-2)
    for x, before in zip((conv, delta), untouched, strict=True):
        assert torch.equal(x[[0, 2, 3, 4]], before)


@pytest.mark.gpu
@pytest.mark.parametrize(("key_dim", "value_dim"), [(128, 128), (64, 32)])
def test_steps_have_each_bit_of_responses_in_training(key_dim, value_dim):
    """Steps of a changing batch, after states that all responses share."""
    device, lengths, config = torch.device("cuda"), (5, 130, 1, 70), make_config(key_dim, value_dim)
    generator = torch.Generator(device).manual_seed(key_dim)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    num_tokens, channels = sum(lengths), config.conv_size
    qkv, weight = draw(num_tokens, channels).bfloat16(), 0.5 * draw(channels, 4).bfloat16()
    gates = -torch.nn.functional.softplus(draw(num_tokens, 4)), draw(num_tokens, 4).sigmoid()
    inputs = DeltaNetInputs(config, qkv.requires_grad_(), weight, *gates)
    state = DeltaNetState(draw(1, 3, channels).bfloat16(), draw(1, 4, key_dim, value_dim))
    shared = [x.expand(len(lengths), *x.shape[1:]) for x in state]
    layout = Segments.from_lengths(lengths, device)
    expected, final = forward_packed(inputs, layout, *shared, matches_decoding=True)
    chunked, _ = forward_packed(inputs, layout, *shared)
    assert (expected - chunked).norm() <= 1e-2 * chunked.norm()
    found, rows = torch.empty_like(expected), torch.tensor([4, 1, 6, 2], device=device)
    states = DeltaNetState(*(x[0].expand(7, *x.shape[1:]).clone() for x in state))
    for position in range(max(lengths)):
        is_active = layout.lengths_S > position
        tokens = layout.cu_seqlens_S1[:-1][is_active] + position
        found[tokens] = update_states(inputs.select(tokens), states, rows[is_active])
    assert torch.equal(found, expected)
    assert torch.equal(states.delta_SHDV[rows], final)
    assert torch.equal(states.conv_SWN[rows], layout.last_rows(qkv, 3, shared[0]))
    gradients = [torch.autograd.grad(o.sum(), qkv)[0] for o in (expected, chunked)]
    assert (gradients[0] - gradients[1]).norm() <= 1e-2 * gradients[1].norm()


@pytest.mark.gpu
@pytest.mark.parametrize("trains_norm", [False, True])
def test_kernels_of_gated_attention_match_pytorch(trains_norm):
    """Norm, partial rotation and gate of strided heads: outputs and gradients against fp64."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).bfloat16()

    values = {"q_gate": draw(37, 3 * 192), "weight": 0.3 * draw(96)}
    dout = draw(37, 3, 96)
    angles = 10 * draw(37, 12).float()

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = {name: x.detach().to(dtype).requires_grad_() for name, x in values.items()}
        leaves["weight"].requires_grad_(trains_norm)
        norm = ZeroCenteredRmsNorm(96, eps=1e-6)
        norm.weight = torch.nn.Parameter(leaves["weight"], trains_norm)
        x, gate = leaves["q_gate"].unflatten(1, (3, 192)).chunk(2, dim=-1)
        wide = torch.promote_types(dtype, torch.float32)
        rotary = RotaryCosSin.from_angles(angles.to(wide), wide)
        if dtype == torch.float64:
            y = apply_partial_rotary_pos_emb(norm(x), rotary)
        else:
            y = norm_rotary(x, norm.weight, 1e-6, 1.0, rotary.cos_T1D, rotary.sin_T1D)
        out = sigmoid_gate(y, gate)
        out.backward(dout.to(dtype))
        results = {"out": out.detach(), "q_gate": leaves["q_gate"].grad}
        return results | ({"weight": norm.weight.grad} if trains_norm else {})

    found = run(torch.bfloat16)
    for name, expected in run(torch.float64).items():
        assert (found[name].double() - expected).norm() <= 4e-3 * expected.norm(), name


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[1], [64, 63, 65], [5, 130, 1, 700], [4097]])
@pytest.mark.parametrize("has_state", [False, True])
def test_kernels_are_as_exact_as_bf16_operations(lengths, has_state, monkeypatch):
    """Errors of outputs, states and gradients against fp64, next to those of the PyTorch path."""
    device, num_tokens = torch.device("cuda"), sum(lengths)
    generator = torch.Generator(device).manual_seed(num_tokens)
    config = make_config(128, 128)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    values = {
        "qkv": draw(num_tokens, config.conv_size).bfloat16(),
        "weight": (0.5 * draw(config.conv_size, 4)).bfloat16(),
        "log_decay": -torch.nn.functional.softplus(2 * draw(num_tokens, 4)),
        "beta": draw(num_tokens, 4).sigmoid(),
        "z": draw(num_tokens, 4, 128).bfloat16(),
        "norm_weight": 1 + 0.1 * draw(128),
    }
    if has_state:
        values["conv_state"] = draw(len(lengths), 3, config.conv_size).bfloat16()
        values["delta_state"] = draw(len(lengths), 4, 128, 128)
    dout = draw(num_tokens, 4, 128).bfloat16()
    layout = Segments.from_lengths(lengths, device)

    def run(dtype: torch.dtype | None) -> dict[str, Tensor]:
        leaves = {
            name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in values.items()
        }
        state = DeltaNetState(leaves["conv_state"], leaves["delta_state"]) if has_state else None
        inputs = DeltaNetInputs(
            config, leaves["qkv"], leaves["weight"], leaves["log_decay"], leaves["beta"]
        )
        o_THV, final = forward_with_states(inputs, layout, state)
        # The norm would cancel most of the gradient of beta.
        y_THV = gated_rms_norm(o_THV.detach(), leaves["z"], leaves["norm_weight"], 1e-6)
        (o_THV * dout.to(o_THV.dtype)).sum().backward()
        (y_THV * dout.to(y_THV.dtype)).sum().backward()
        results = {name: x.grad for name, x in leaves.items()}
        outputs = {"out": o_THV, "normed": y_THV, "final": final.delta_SHDV}
        return results | {name: x.detach() for name, x in outputs.items()}

    expected, kernels = run(torch.float64), run(None)
    monkeypatch.setattr(gated_delta_net, "has_kernels", lambda _: False)
    eager = run(None)
    for name, value in expected.items():

        def error(x: Tensor, value: Tensor = value) -> float:
            return float((x.double() - value).norm() / value.norm().clamp_min(1e-6))

        assert error(kernels[name]) <= max(1.5 * error(eager[name]), 4e-3), name
