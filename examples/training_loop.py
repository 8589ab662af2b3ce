"""Fine-tune a vision-language model with a training loop of your own.

The loop does what `finesight.train` does, without evaluations, checkpoints and report. It takes
less than a minute on two CPU cores and needs no network: `python examples/training_loop.py`. To
start again, delete the folder `dots-adapter`.
"""

import math
import random

from PIL import Image, ImageDraw

import finesight

NUM_SAMPLES = 160
NUM_TEST_SAMPLES = 40
BATCH_SIZE = 8
EPOCHS = 2
PEAK_LEARNING_RATE = 2e-3
NUM_WARMUP_STEPS = 4

QUESTION = "How many dots?"
MAX_DOTS = 4


def draw_dots(count: int, seed: int) -> Image.Image:
    """Draw black dots in the cells of a grid."""
    image = Image.new("RGB", (112, 112), "white")
    draw = ImageDraw.Draw(image)
    for cell in random.Random(seed).sample(range(9), count):
        center = (18 + 38 * (cell % 3), 18 + 38 * (cell // 3))
        draw.circle(center, 12, fill="black")
    return image


def make_samples(first_seed: int, count: int) -> list[finesight.Sample]:
    samples = []
    for seed in range(first_seed, first_seed + count):
        dots = 1 + seed % MAX_DOTS
        image = draw_dots(dots, seed)
        samples.append(finesight.Sample(image=image, question=QUESTION, answer=str(dots)))
    return samples


def get_learning_rate(step: int, num_steps: int) -> float:
    """Return the learning rate of a step: linear warmup, then cosine decay."""
    if step < NUM_WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / NUM_WARMUP_STEPS
    progress = (step - NUM_WARMUP_STEPS) / (num_steps - NUM_WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (1 + math.cos(math.pi * progress)) / 2


def measure_accuracy(client: finesight.TrainingClient, samples: list[finesight.Sample]) -> float:
    """Return the share of samples whose generated answer is correct."""
    num_correct = 0
    for group in client.sample(samples, max_new_tokens=4, temperature=0.0):
        (case,) = group.cases
        num_correct += case.answer == case.references[0]
    return num_correct / len(samples)


# LoRA adapters on all parts, because the practice model has never seen dots.
tune = {"vision": "lora", "merger": "lora", "language": "lora"}
client = finesight.TrainingClient("finesight-tiny", tune=tune, seed=0)
test_samples = make_samples(NUM_SAMPLES, NUM_TEST_SAMPLES)
print(f"accuracy before: {measure_accuracy(client, test_samples):.2f}")

# Worker processes read, tokenize and pack the samples of the next steps.
batches = client.load_batches(make_samples(0, NUM_SAMPLES), BATCH_SIZE, epochs=EPOCHS)
for step, batch in enumerate(batches):
    loss = client.forward_backward(batch)  # mean cross entropy of the answer tokens
    grad_norm = client.optim_step(get_learning_rate(step, len(batches)))
    if step % 10 == 9:
        # Reading a value waits for the device.
        print(f"step {step + 1}/{len(batches)}  loss {loss:.4f}  gradient norm {grad_norm:.2f}")

print(f"accuracy after: {measure_accuracy(client, test_samples):.2f}")
print(f"adapter: {client.save('dots-adapter')}")
