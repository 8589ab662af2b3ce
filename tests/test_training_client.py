"""Training loops of a Python program: encoding, losses, optimizer steps, sampling and states."""

from collections.abc import Mapping
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
import torch
from PIL import Image
from test_python_api import draw, make_samples
from tiny_model import create_tiny_model
from tiny_task import read_losses

import finesight
from finesight.infer.engine import Engine
from finesight.model_folder import TINY_MODEL
from finesight.operations import training_client
from finesight.samples.memory_samples import open_session_store
from finesight.settings.manifest import load_manifest
from finesight.train.cuda_graphs import CudaGraphRunner

LORA: dict[str, Any] = {"language": "lora", "lora": {"rank": 4, "alpha": 8}}
WITHOUT_DROPOUT = {"language": "lora", "lora": {"rank": 4, "alpha": 8, "dropout": 0.0}}
SETTINGS: dict[str, Any] = {"device": "cpu", "num_workers": 0, "tune": LORA, "seed": 5}


def create_client(model: Any = TINY_MODEL, **settings: Any) -> finesight.TrainingClient:
    return finesight.TrainingClient(model, **SETTINGS | settings)


@pytest.fixture(scope="module")
def shared() -> finesight.TrainingClient:
    """Return a client for tests that do not depend on its weights."""
    return create_client()


def sum_negative(logps_L: torch.Tensor, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return -logps_L.sum()


def read_weights(client: finesight.TrainingClient) -> dict[str, torch.Tensor]:
    parameters = client.model.named_parameters()
    return {name: one.detach().clone() for name, one in parameters if one.requires_grad}


def assert_equal_weights(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_loop_equals_the_command(tmp_path):
    """The losses and the weights are those of `finesight.train`, bit for bit, with dropout."""
    samples = make_samples(7)
    client = create_client()
    losses = []
    batches = client.load_batches(samples, 3, epochs=2)
    assert len(batches) == 5
    for batch in batches:
        losses.append(client.forward_backward(batch).item())
        client.optim_step(1e-3)
    run = tmp_path / "run"
    settings = {"epochs": 2, "batch_size": 3, "learning_rate": 1e-3, "warmup": 0}
    constant = {"lr_schedule": "constant", "output_dir": run}
    finesight.train(TINY_MODEL, samples, **SETTINGS, **settings, **constant)
    assert losses == [loss for _, loss in read_losses(run)]
    assert client.step == 5
    resumed = create_client()
    resumed.load_state(run / "checkpoints" / "step-5")
    assert_equal_weights(read_weights(client), read_weights(resumed))
    assert resumed.step == 5


def test_packs_do_not_change_the_step():
    """Several packs and several calls add up to the gradients of one pack."""
    samples = make_samples(4)
    client = create_client(tune=WITHOUT_DROPOUT)
    small = create_client(tune=WITHOUT_DROPOUT, pack_tokens=40)
    one_pack = client.encode(samples)
    packs = small.encode(samples)
    assert len(one_pack) == 1 < len(packs)
    assert client.forward_backward(one_pack).item() == pytest.approx(
        small.forward_backward(packs).item(), rel=1e-6
    )
    norm = client.optim_step(1e-3).item()
    assert small.optim_step(1e-3).item() == pytest.approx(norm, rel=1e-5)
    for batch in (packs[:1], packs[1:]):
        client.forward_backward(batch, sum_negative)
    small.forward_backward(packs, sum_negative)
    norm = client.optim_step(1e-3).item()
    assert small.optim_step(1e-3).item() == pytest.approx(norm, rel=1e-5)


def test_function_equals_the_cross_entropy():
    """A function has the log-probabilities without dropout, whose rate stays."""
    batch = create_client().encode(make_samples(3))
    num_tokens = sum(one.num_supervised_tokens for one in batch)
    client = create_client(tune=WITHOUT_DROPOUT)
    dropped = create_client()
    results = []
    for one in (client, dropped):
        loss = one.forward_backward(batch, sum_negative).item() / num_tokens
        results.append((loss, one.optim_step(1e-3).item() / num_tokens))
    assert results[0] == results[1]
    for one in (client, dropped):
        one.load_state_of = None
    plain = create_client(tune=WITHOUT_DROPOUT)
    loss = plain.forward_backward(batch).item()
    assert results[0] == pytest.approx((loss, plain.optim_step(1e-3).item()), rel=1e-5)
    dropped_loss = dropped.forward_backward(batch).item()
    assert dropped_loss != pytest.approx(client.forward_backward(batch).item(), rel=1e-4)


def test_policy_loss_of_sampled_responses():
    """Sampled log-probabilities are those of training, and a step favors the better response."""
    client = create_client()
    for batch in client.load_batches(make_samples(6), 3):
        client.forward_backward(batch)
        client.optim_step(1e-3)
    prompts = [make_samples(1)[0], finesight.Sample(image=draw("blue"), question="Which colour?")]
    groups = client.sample(prompts, 4, max_new_tokens=5, temperature=1.5, seed=1)
    again = client.sample(prompts, 4, max_new_tokens=5, temperature=1.5, seed=1, batch_size=2)
    assert [group.texts for group in groups] == [group.texts for group in again]
    assert groups[0].cases[0].references == ("red",)
    assert groups[1].cases[0].references == ()
    assert repr(groups[0]).startswith("<ResponseGroup of 4 responses, the first is '")
    batch = client.encode_responses(groups, [[1.0, -1.0, 0.0, 0.0], [0.0] * 4])
    assert len(batch) == 1
    seen: list[Mapping[str, torch.Tensor]] = []

    def compute_loss(logps_L, inputs):
        seen.append({**inputs, "logps_L": logps_L.detach()})
        ratio_L = (logps_L - inputs["sampled_logps_L"]).exp()
        return -(ratio_L * inputs["advantages_L"]).sum()

    client.forward_backward(batch, compute_loss, temperature=1.5)
    (inputs,) = seen
    difference_L = inputs["logps_L"] - inputs["sampled_logps_L"]
    assert difference_L.abs().max() < 1e-4
    lengths = [len(prediction.tokens) for prediction in groups[0].predictions]
    assert torch.bincount(inputs["response_L"]).tolist() == lengths
    assert inputs["advantages_L"][0] == 1
    assert inputs["advantages_L"][lengths[0]] == -1
    assert {*inputs} == {
        "labels_L", "response_L", "advantages_L", "sampled_logps_L", "logps_L",
    }  # fmt: skip
    first = slice(lengths[0])
    client.optim_step(1e-4)
    client.forward_backward(batch, compute_loss, temperature=1.5)
    change_L = seen[1]["logps_L"] - seen[0]["logps_L"]
    assert change_L[first].sum() > 0


def test_responses_of_each_call_differ_without_seed(tmp_path):
    """A loop whose steps are all left out gets other responses; a loaded state the same ones."""
    client = create_client()
    prompts = make_samples(1)
    options = {"num_responses": 4, "max_new_tokens": 4, "temperature": 3.0}
    first = client.sample(prompts, **options)[0].texts
    state = client.save_state(tmp_path / "state")
    second = client.sample(prompts, **options)[0].texts
    assert second != first
    client.load_state(state)
    assert client.sample(prompts, **options)[0].texts == second
    seeded = [client.sample(prompts, seed=3, **options)[0].texts for _ in range(2)]
    assert seeded[0] == seeded[1]


def test_kept_engine_has_space_for_longer_responses(monkeypatch):
    """An engine that stays for later calls is replaced if it is too small, or after an error."""
    monkeypatch.setattr(training_client, "has_memory_for_engine", lambda device: True)
    client = create_client()
    client.renderer = copy(client.renderer)
    client.renderer.end_ids = (-1,)  # Responses do not end.
    prompts = make_samples(1)
    for max_new_tokens in (2, 300):
        (group,) = client.sample(prompts, max_new_tokens=max_new_tokens)
        assert len(group.predictions[0].tokens) == max_new_tokens

    step = Engine.step

    def interrupt(engine: Engine) -> Any:
        step(engine)
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        client.sample(prompts, max_new_tokens=4)
    monkeypatch.setattr(Engine, "step", step)
    assert len(client.sample(prompts, max_new_tokens=4)[0].predictions) == 1


def test_full_memory_while_sampling_keeps_gradients(monkeypatch):
    """If CUDA graphs are released, so are the gradients that they have written."""
    clients = [create_client() for _ in range(2)]
    batch = clients[0].encode(make_samples(2))
    for client in clients:
        client.forward_backward(batch)
    sampling = clients[1]
    step = Engine.step
    released = []

    def run_out_of_memory(engine: Engine) -> Any:
        monkeypatch.setattr(Engine, "step", step)
        raise torch.OutOfMemoryError

    def release_graphs(runner: CudaGraphRunner) -> bool:
        released.append(runner)
        for parameter in sampling.model.parameters():
            parameter.grad = None
        return True

    monkeypatch.setattr(Engine, "step", run_out_of_memory)
    monkeypatch.setattr(CudaGraphRunner, "release_graphs", release_graphs)
    sampling.sample(make_samples(1), 2, max_new_tokens=2)
    assert len(released) == 1
    norms = [client.optim_step(1e-3).item() for client in clients]
    assert norms[0] == norms[1] > 0


def test_loss_without_gradients():
    """`forward` returns the loss without dropout, and changes neither gradients nor weights."""
    samples = make_samples(3)
    client = create_client()
    exact = create_client(tune=WITHOUT_DROPOUT)
    for one in (client, exact):
        one.forward_backward(one.encode(samples), sum_negative)
        one.optim_step(1e-2)
    batch = client.encode(samples)
    expected = exact.forward_backward(batch).item()
    assert client.forward(batch).item() == pytest.approx(expected, rel=1e-6)
    logps = client.compute_logps(batch)
    assert [len(one) for one in logps] == [one.num_supervised_tokens for one in batch]
    mean = -torch.cat(logps).mean().item()
    assert mean == pytest.approx(expected, rel=1e-5)
    with pytest.raises(finesight.UserError, match="no gradients"):
        client.optim_step(1e-3)
    with torch.no_grad(), pytest.raises(finesight.UserError, match="gradients are disabled"):
        client.forward_backward(batch)


def test_reference_model_of_pairs(shared):
    """Log-probabilities before the training are inputs of the loss function."""
    batch = shared.encode(make_samples(2, rejected="none of them"))
    batch = shared.add_inputs(batch, reference_logps_L=shared.compute_logps(batch))
    differences = []

    def compute_loss(logps_L, inputs):
        differences.append((logps_L - inputs["reference_logps_L"]).abs().max().item())
        return -logps_L.sum()

    shared.forward_backward(batch, compute_loss)
    shared.zero_grad()
    assert len(differences) == 2
    assert max(differences) < 1e-5
    for tensors in ([torch.zeros(1)], [torch.zeros(1)] * 2, [np.zeros(1)] * 2, [None] * 2):
        with pytest.raises(finesight.UserError, match="other_L: ") as caught:
            shared.add_inputs(batch, other_L=tensors)
        assert "one tensor for each pack" in str(caught.value.remedy)
    with pytest.raises(finesight.UserError, match="the name labels_L"):
        shared.add_inputs(batch, labels_L=shared.compute_logps(batch))


def test_later_batches_of_a_resumed_loop():
    samples = make_samples(7)
    client = create_client()
    ids = [[one.sample_ids for one in batch] for batch in client.load_batches(samples, 2, epochs=2)]
    rest = client.load_batches(samples, 2, epochs=2, start=3)
    assert len(rest) == len(ids) - 3
    assert [[one.sample_ids for one in batch] for batch in rest] == ids[3:]
    assert not [*client.load_batches(samples, 2, epochs=2, start=len(ids))]


def test_schedules_may_reach_zero():
    client = create_client()
    before = read_weights(client)
    client.forward_backward(client.encode(make_samples(2)))
    client.optim_step(0)
    assert_equal_weights(before, read_weights(client))
    client.forward_backward(client.encode(make_samples(2)))
    client.optim_step(np.float32(1e-3))
    assert client.step == 2


def test_plain_samples_have_no_response(shared):
    """Padding for 16 bits on a CPU is no response either."""
    names: list[set[str]] = []

    def compute_loss(logps_L, inputs):
        names.append({*inputs})
        return -logps_L.sum()

    client = create_client(precision="bf16")
    client.forward_backward(client.encode(make_samples(1)), compute_loss)
    shared.forward_backward(shared.encode(make_samples(3)), compute_loss)
    shared.zero_grad()
    assert names == [{"labels_L"}] * 2


def test_images_of_encoded_samples_are_removed(shared):
    def count() -> int:
        return sum(1 for _ in open_session_store().folder.rglob("*.png"))

    before = count()
    image = draw("red", 77)
    sample = finesight.Sample(image=image, question="Which colour?", answer="red")
    shared.encode([sample])
    (group,) = shared.sample([sample], max_new_tokens=2)
    assert count() == before
    assert group.predictions[0].images == ()
    assert group.predictions[0].image_size == image.shape[:2]


def test_thinking_mode_of_the_samples_is_saved(tmp_path):
    model = create_tiny_model(tmp_path / "model", "qwen3_5")
    thinking = "<think>\nIt is red.\n</think>\n\nred"
    for answer, expected in ((thinking, True), ("red", False)):
        client = create_client(model)
        next(iter(client.load_batches(make_samples(3, answer=answer), 3)))
        folder = client.save(tmp_path / f"saved {expected}")
        assert load_manifest(folder / "manifest.json").enable_thinking is expected


def test_groups_beyond_the_token_budget_are_split():
    client = create_client(pack_tokens=48)
    groups = client.sample(make_samples(1), 6, max_new_tokens=6)
    advantages = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    batch = client.encode_responses(groups, advantages)
    assert len(batch) > 1
    found: list[float] = []
    for one in batch:
        found += one.loss_inputs["advantages_L"].tolist()
    expected = []
    for prediction, value in zip(groups[0].predictions, advantages[0], strict=True):
        expected += [value] * len(prediction.tokens)
    assert found == expected


def test_preference_loss_of_pairs(shared):
    """The responses of a pair are numbered: 0 is the chosen one."""
    pairs = make_samples(2, rejected="none of them")
    batch = shared.encode(pairs)
    assert len(batch) == 2
    numbers = []

    def compute_loss(logps_L, inputs):
        numbers.append(inputs["response_L"].unique().tolist())
        chosen = logps_L[inputs["response_L"] == 0].sum()
        rejected = logps_L[inputs["response_L"] == 1].sum()
        return -torch.nn.functional.logsigmoid(0.1 * (chosen - rejected))

    shared.forward_backward(batch, compute_loss)
    shared.zero_grad()
    assert numbers == [[0, 1], [0, 1]]
    with pytest.raises(finesight.UserError, match="a rejected answer") as caught:
        shared.forward_backward(batch)
    assert "loss=FUNCTION" in str(caught.value.remedy)


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_saved_weights_answer_like_the_client(tmp_path, mode):
    tune = {**LORA, "language": mode}
    client = create_client(tune=tune)
    for batch in client.load_batches(make_samples(6), 3, epochs=2):
        client.forward_backward(batch)
        client.optim_step(1e-3)
    (group,) = client.sample(make_samples(1), max_new_tokens=5, temperature=0.0)
    folder = client.save(tmp_path / "saved")
    model = finesight.load(folder, device="cpu")
    sample = make_samples(1)[0]
    assert model.generate_batch([sample], max_new_tokens=5)[0].text == group.texts[0]
    with pytest.raises(finesight.UserError, match="exists already"):
        client.save(folder)


def test_loaded_state_continues_bit_for_bit(tmp_path):
    client = create_client()
    batches = [client.encode(make_samples(3)), client.encode(make_samples(5))]
    client.forward_backward(batches[0])
    client.optim_step(1e-3)
    state = client.save_state(tmp_path / "state")
    client.forward_backward(batches[1])  # discarded by load_state
    other = create_client()
    for one in (client, other):
        one.load_state(state)
        assert one.step == 1
    losses = [one.forward_backward(batches[1]).item() for one in (client, other)]
    norms = [one.optim_step(1e-3).item() for one in (client, other)]
    assert losses[0] == losses[1]
    assert norms[0] == norms[1]
    assert_equal_weights(read_weights(client), read_weights(other))
    full = create_client(tune={"language": "full"})
    with pytest.raises(finesight.UserError, match=r"tune\.language is 'full' now"):
        full.load_state(state)
    (state / "trainable.safetensors").write_bytes(b"damaged")
    before = read_weights(other)
    with pytest.raises(finesight.UserError, match="trainable"):
        other.load_state(state)
    assert_equal_weights(before, read_weights(other))


def test_step_without_finite_loss_changes_nothing():
    client = create_client()
    batch = client.encode(make_samples(2))
    before = read_weights(client)
    client.forward_backward(batch, lambda logps_L, inputs: logps_L.sum() * torch.inf)
    client.optim_step(1e-3)
    assert_equal_weights(before, read_weights(client))
    client.forward_backward(batch)
    client.optim_step(1e-3)
    with pytest.raises(AssertionError):
        assert_equal_weights(before, read_weights(client))


def test_model_of_the_transformers_backend(tmp_path):
    """Such a model is trained by the same calls, one sample a pack, but does not sample."""
    model = hf_models.make_llava(tmp_path / "llava")
    client = create_client(model)
    batch = client.encode(make_samples(2))
    assert len(batch) == 2
    pairs = make_samples(1, rejected="b")
    for call in (client.encode, lambda samples: client.load_batches(samples, 1)):
        with pytest.raises(finesight.UserError, match="a pair for a model of the family llava"):
            call(pairs)
    losses = []
    for _ in range(3):
        losses.append(client.forward_backward(batch).item())
        client.optim_step(1e-2)
    assert losses[-1] < losses[0]
    with pytest.raises(finesight.UserError, match="natively implemented"):
        client.sample(make_samples(1))
    assert (client.save(tmp_path / "saved") / "adapter_config.json").exists()


def fail(shared: finesight.TrainingClient, name: str) -> object:
    """Call a method of a client with an invalid argument."""
    batch = shared.encode(make_samples(1))
    pair = finesight.Sample(image=draw("red"), question="Which?", answer="a")
    unanswered = finesight.Sample(image=draw("red"), question="Which?")
    calls = {
        "empty batch": lambda: shared.forward_backward(()),
        "no scalar": lambda: shared.forward_backward(batch, lambda logps_L, inputs: logps_L),
        "no tensor": lambda: shared.forward_backward(batch, lambda logps_L, inputs: 1.0),
        "no gradients": lambda: shared.optim_step(1e-3),
        "learning rate": lambda: shared.optim_step(float("nan")),
        "no answer": lambda: shared.encode([unanswered]),
        "no list": lambda: shared.encode(pair),
        "batch size": lambda: shared.load_batches([pair], 0),
        "epochs": lambda: shared.load_batches([pair], 1, epochs=-1),
        "count": lambda: shared.sample([pair], 0),
        "temperature": lambda: shared.sample([pair], temperature=-1.0),
        "advantages": lambda: shared.encode_responses(
            shared.sample([pair], 2, max_new_tokens=1), [[1.0]]
        ),
        "flat advantages": lambda: shared.encode_responses(
            shared.sample([pair], 2, max_new_tokens=1), [1.0, -1.0]
        ),
        "not finite": lambda: shared.encode_responses(
            shared.sample([pair], 2, max_new_tokens=1), [[float("nan"), 0.0]]
        ),
        "detached": lambda: shared.forward_backward(
            batch, lambda logps_L, _: logps_L.detach().sum()
        ),
        "samples": lambda: shared.forward_backward([pair]),
        "pack": lambda: shared.forward_backward(batch[0]),
        "loss name": lambda: shared.forward_backward(batch, "dpo"),
        "zero temperature": lambda: shared.forward_backward(batch, sum_negative, temperature=0),
        "no loss": lambda: shared.forward_backward(batch, temperature=0.5),
        "rate as text": lambda: shared.optim_step("1e-3"),
        "start": lambda: shared.load_batches([pair], 1, start=2),
        "wrong answer": lambda: shared.encode([replace(pair, label=False)]),
        "both modes": lambda: create_client(tune={"language": "lora", "merger": "full"}),
        "unused": lambda: create_client(vision_cache="never"),
        "objective section": lambda: create_client(grpo={"num_generations": 4}),
        "setting": lambda: create_client(learning_rates=1e-3),
        "schedule": lambda: create_client(learning_rate=1e-3),
        "nested setting": lambda: create_client(train={"epochs": 2}),
        "data": lambda: create_client(data={"train": "a.jsonl"}),
        "model": lambda: create_client("missing-model"),
        "type": lambda: create_client(3),
        "state": lambda: shared.load_state("missing-state"),
    }
    return calls[name]()


@pytest.mark.parametrize(
    ("name", "where", "remedy"),
    [
        ("empty batch", "forward_backward", "leave out the step"),
        ("no scalar", "loss", "sum over the tokens"),
        ("no tensor", "loss", "sum over the tokens"),
        ("no gradients", "optim_step", "client.forward_backward(batch)"),
        ("learning rate", "optim_step", "client.optim_step(1e-4)"),
        ("no answer", "sample", "answer"),
        ("no list", "samples", "finesight.Sample("),
        ("batch size", "batch_size", ""),
        ("epochs", "epochs", ""),
        ("count", "num_responses", "correct"),
        ("temperature", "temperature", ""),
        ("advantages", "encode_responses", "one number for each response"),
        ("flat advantages", "encode_responses", "one number for each response"),
        ("not finite", "encode_responses", "add a small number"),
        ("detached", "loss", "without detach"),
        ("samples", "forward_backward", "client.encode(samples)"),
        ("pack", "forward_backward", "client.encode(samples)"),
        ("loss name", "forward_backward", "lambda logps_L, inputs"),
        ("zero temperature", "forward_backward", "lambda logps_L, inputs"),
        ("no loss", "forward_backward", "loss=FUNCTION"),
        ("rate as text", "optim_step", "client.optim_step(1e-4)"),
        ("start", "load_batches", "start or epochs"),
        ("wrong answer", "samples[0]", "finesight.train"),
        ("both modes", "tune", "one mode"),
        ("unused", "TrainingClient", "remove it"),
        ("objective section", "TrainingClient", "remove it"),
        ("setting", "", "learning_rate"),
        ("schedule", "TrainingClient", "optim_step"),
        ("nested setting", "TrainingClient", "load_batches"),
        ("data", "TrainingClient", "samples"),
        ("model", "", ""),
        ("type", "model", "pass a name or a path"),
        ("state", "missing-state", "check the path"),
    ],
)
def test_errors_name_the_call(shared, name, where, remedy):
    with pytest.raises(finesight.UserError) as caught:
        fail(shared, name)
    error = caught.value
    assert where in f"{error.where} {error.what}"
    assert remedy in str(error.remedy)
    assert "--" not in str(error.remedy)


def test_failed_loss_discards_gradients():
    """An error in a function leaves no gradients of the packs before."""
    client = create_client()
    batch = client.encode(make_samples(2))

    def fail_in_function(logps_L, inputs):
        raise KeyError("advantages")

    client.forward_backward(batch)
    with pytest.raises(KeyError):
        client.forward_backward(batch, fail_in_function)
    with pytest.raises(finesight.UserError, match="no gradients"):
        client.optim_step(1e-3)


def test_several_processes_are_rejected(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(finesight.UserError, match="one process") as caught:
        create_client()
    assert "finesight.train" in str(caught.value.remedy)
    monkeypatch.setenv("WORLD_SIZE", "several")
    assert create_client().step == 0


def test_client_of_a_run_trains_its_adapter_further(tmp_path):
    client = create_client()
    client.forward_backward(client.encode(make_samples(3)))
    client.optim_step(1e-2)
    saved: Path = client.save(tmp_path / "adapter")
    further = create_client(saved)
    assert_equal_weights(read_weights(client), read_weights(further))
    image = Image.fromarray(np.asarray(draw("red")))
    sample = finesight.Sample(image=image, question="Which colour?", answer="red")
    assert further.forward_backward(further.encode([sample])).isfinite()
    assert repr(further).endswith("on cpu, step 0>")


@pytest.mark.gpu
def test_loop_on_a_gpu(tmp_path):
    """Losses are those of the command, also with CUDA graphs and losses without gradients."""
    samples = make_samples(12)
    settings = {**SETTINGS, "device": "cuda", "precision": "bf16"}
    run = tmp_path / "run"
    plan = {"epochs": 6, "batch_size": 3, "learning_rate": 1e-3, "warmup": 0}
    fixed = {"lr_schedule": "constant", "vision_cache": "never", "output_dir": run}
    finesight.train(TINY_MODEL, samples, **settings, **plan, **fixed)
    client = create_client(**settings)
    losses = []
    for batch in client.load_batches(samples, 3, epochs=6):
        losses.append(client.forward_backward(batch).item())
        assert client.forward(batch).isfinite()
        client.optim_step(1e-3)
    assert losses == [loss for _, loss in read_losses(run)]
    # From the first call of `sample` on, the kernels are those that match decoding.
    for max_new_tokens in (2, 8):
        (group,) = client.sample(samples[:1], 4, max_new_tokens=max_new_tokens)
        batch = client.encode_responses([group], [[1.0, -1.0, 0.5, 0.0]])
        (logps_L,) = client.compute_logps(batch)
        difference_L = logps_L - batch[0].loss_inputs["sampled_logps_L"]
        assert difference_L.abs().max() < 1e-2
        client.forward_backward(batch, sum_negative)
        client.optim_step(1e-3)
