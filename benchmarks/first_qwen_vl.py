"""The first Qwen-VL at its true size on one GPU: tuning and answering beside what was published.

    python benchmarks/first_qwen_vl.py CONFIG --work DIR --out FILE [--steps 12] [--tokens 512]
        [--only lora cached,lora,qlora,full,bf16,nf4,nf4 head,int4]

CONFIG is a folder with the configuration and qwen.tiktoken; weights are drawn at random. An
iteration is what the published script's table counts: 8 accumulated samples of --tokens tokens with
a picture each (published, on an A100 with 80 GB: LoRA 23.6 GB and 2.3 s, Q-LoRA 17.2 GB and 4.5 s).
Answering is one answer of 1,790 tokens after a picture: 2,048 in all (published: bf16 22.60 GB and
28.87 tokens a second, Int4 11.82 GB and 37.79). `peak_gb` is the most memory allocated, `step_s`
the median of the steps but the first three. Every variant runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from qlora_memory import in_own_process, machine, trained

SCRIPT = {
    "language": "lora",
    "lora": {
        "rank": 64,
        "alpha": 16,
        "dropout": 0.05,
        "targets": ["c_attn", "attn.c_proj", "w1", "w2"],
    },
}
"""What the published script adapts."""

TRAINED: dict[str, tuple[str, ...]] = {
    "lora": ("train.recompute=true", "train.pack_tokens=2048"),
    "lora cached": ("train.cache=memory", "train.pack_tokens=4096"),
    "lora 512": ("train.recompute=true", "train.pack_tokens=512"),
    "lora 3072": ("train.recompute=true", "train.pack_tokens=3072"),
    "qlora": (
        "tune.nf4=[language, vision, merger]",
        "train.optimizer=adamw8bit",
        "train.recompute=true",
        "train.pack_tokens=2048",
    ),
    "qlora 512": (
        "tune.nf4=[language, vision, merger]",
        "train.recompute=true",
        "train.pack_tokens=512",
    ),
}
FULL = {"language": "full", "merger": "full", "embeddings": "full"}
ANSWERED: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "nf4": ("language", "vision", "merger"),
    "nf4 head": ("language", "vision", "merger", "embeddings"),
    "int4": (),
}
"""The parts in NF4. The model of `int4` is another, whose decoder is in four bits already."""
ANSWER_TOKENS = 1790


def write_data(config: Path, work: Path, tokens: int, number: int = 64) -> Path:
    """Samples of exactly `tokens` tokens with a picture each."""
    from PIL import Image

    from finesight.data.jsonl import Located, write_samples
    from finesight.data.sample import ImagePart, Message, Sample, TextPart
    from finesight.encode.render import Renderer
    from finesight.hub import ModelFolder

    rng, renderer = random.Random(0), Renderer(ModelFolder(config))
    Image.effect_noise((448, 448), 60).convert("RGB").save(work / "noise.png")
    asked = (ImagePart(image="noise.png"), TextPart(text="Describe it."))
    samples = []
    for name in range(number):
        words: list[str] = []
        while True:
            answer = Message(role="assistant", content=(TextPart(text="".join(words) or "a"),))
            messages = (Message(role="user", content=asked), answer)
            sample = Sample(id=str(name), messages=messages)
            missing = tokens - renderer.outline(Located(sample, work)).tokens
            if missing == 0:
                break
            words += [" " + rng.choice("abcdefgh") for _ in range(max(1, missing))]
            if missing < 0:
                words = words[: len(words) // 2]
        samples.append(sample)
    write_samples(work / "data.jsonl", samples)
    return work / "data.jsonl"


def answer(model: Path, nf4: list[str]) -> dict[str, Any]:
    """Speed and memory of one answer."""
    import torch
    from generation_speed import measure

    from finesight.hub import ModelFolder
    from finesight.model.weights import load_model

    device = torch.device("cuda")
    loaded = load_model(ModelFolder(model), torch.bfloat16, device, nf4).eval()
    taken = torch.cuda.memory_allocated() / 1e9
    measure(loaded, 1, 8, recorded=True)
    return {"loaded_gb": round(taken, 2)} | measure(loaded, 1, ANSWER_TOKENS, recorded=True)


def full(config: Path, data: Path, steps: int) -> dict[str, Any]:
    """Steps of all parameters but the tower's, as the published script does them, without files: a
    checkpoint of the whole model takes more room than many a rented disk has."""
    import torch

    from finesight.config import DataFile, Train, Tune
    from finesight.data.sources import load_sources
    from finesight.encode.pack import pack
    from finesight.encode.render import Renderer
    from finesight.hub import ModelFolder
    from finesight.model.lora import stacked
    from finesight.model.parts import apply_tuning, trainable
    from finesight.model.weights import random_model
    from finesight.train.loss import label_loss
    from finesight.train.optimizer import Masters

    folder, device = ModelFolder(config), torch.device("cuda")
    renderer = Renderer(folder)
    encoded = [renderer.encode(s) for s in load_sources((DataFile(path=data),)).read()[:8]]
    model = random_model(folder.config, 0, torch.bfloat16, device, folder.preprocessor)
    apply_tuning(model.train(), Tune.model_validate(FULL), seed=0)
    model.recompute = True
    settings = Train.model_validate({"learning_rate": 1e-5, "optimizer": "adamw8bit"})
    masters = Masters(trainable(model), settings, stacked(model))
    packs = [pack(encoded[at : at + 4]).to(device) for at in (0, 4)]
    share = torch.tensor(1 / sum(one.supervised for one in packs), device=device)
    seconds, losses = [], []
    for _ in range(steps):
        start, loss = time.perf_counter(), 0.0
        for number, one in enumerate(packs):
            if number:
                masters.add_up()
            of_pack = label_loss(model(one), model.head_weight, one.target_L, share)
            of_pack.backward()
            loss += of_pack.item()
        masters.step(1.0, masters.norm())
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        losses.append(round(loss, 4))
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return {"peak_gb": peak, "step_s": round(statistics.median(seconds[3:]), 3), "losses": losses}


def _in_int4(model: Path, folder: Path) -> Path:
    """Written once: a next call finds it."""
    if not folder.exists():
        partly = folder.with_suffix(".part")
        in_own_process(str(model), str(partly), file=Path(__file__).with_name("int4_weights.py"))
        partly.rename(folder)
    return folder


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--only", default="lora cached,lora,qlora,full,bf16,nf4,nf4 head,int4")
    options = parser.parse_args()
    options.batch, options.side, options.pack_tokens = 8, 448, 2048
    options.work.mkdir(parents=True, exist_ok=True)
    here = Path(__file__)
    qlora = here.with_name("qlora_memory.py")
    made = in_own_process("--weights", str(options.config), str(options.work), file=qlora)
    model = Path(made["folder"])
    data = write_data(options.config, options.work, options.tokens)
    results: list[dict[str, Any]] = []
    for name in options.only.split(","):
        found: dict[str, Any] = {"variant": name}
        if name in TRAINED:
            run = options.work / "run"
            found |= trained(model, data, TRAINED[name], run, options, tune=SCRIPT)
        elif name == "full":
            words = ("--full", str(options.config), str(data), str(options.steps))
            found |= in_own_process(*words, file=here)
        else:
            asked = _in_int4(model, options.work / "int4") if name == "int4" else model
            found |= in_own_process("--answer", str(asked), *ANSWERED[name], file=here)
        results.append(found)
        print(json.dumps(found), flush=True)
        head = machine() | {"command": f"first_qwen_vl.py CONFIG --only {options.only!r}"}
        options.out.write_text(json.dumps({**head, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
    import sys

    if sys.argv[1:2] == ["--answer"]:
        print(json.dumps(answer(Path(sys.argv[2]), sys.argv[3:])))
    elif sys.argv[1:2] == ["--full"]:
        print(json.dumps(full(Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))))
    else:
        main()
