"""Measure training of Qwen3.5 beside transformers and peft in one call.

    python benchmarks/qwen3_5.py CONFIGS --out FILE [--only "NAME;..."] [--steps 12]

CONFIGS contains folders with the configuration of Qwen3.5-4B, Qwen3.5-9B and Qwen3.5-27B; weights
are random. A step is LoRA of rank 64 on every linear layer of the decoder with dropout 0.05, in
bf16. A sample has 123 tokens with an image of 288 x 288 pixels (324 patches, 81 tokens), of which
18 are supervised, or is one text. Rows of transformers use padded batches of the same samples and
its fastest settings that fit: SDPA attention, fused AdamW. `gb` is the peak allocated memory in GB
(10^9 bytes). Each row runs in its own process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ladder import DEVICE, TrainedModel, make_batch, time_steps
from peer_metrics import report_header

from finesight.encode.batch import PackedBatch
from finesight.encode.packing import pack
from finesight.encode.tokenization import EncodedSample, TokenizedSample

MODEL_4B, MODEL_9B, MODEL_27B = "Qwen3.5-4B", "Qwen3.5-9B", "Qwen3.5-27B"
GRID_THW = 1, 18, 18
ANSWER_TOKENS, SAMPLE_TOKENS = 18, 123
CASES: dict[str, dict[str, Any]] = {
    "4B, batch 64": {"batch": 64},
    "4B, batch 64, shared prefix": {"batch": 64, "share_prefix": True},
    "4B, batch 64, vision cache": {"batch": 64, "vision_cache": True},
    "4B, batch 16": {"batch": 16},
    "4B, 8192 tokens": {"text_tokens": 8192},
    "4B, 32768 tokens": {"text_tokens": 32768, "activation_checkpointing": True},
    "9B, batch 64": {"model": MODEL_9B, "batch": 64},
    "27B NF4, 1024 tokens": {"model": MODEL_27B, "text_tokens": 1024, "nf4": True},
    "transformers 4B, batch 16": {"peer": True, "batch": 16},
    "transformers 4B, batch 64": {"peer": True, "batch": 64},
    "transformers 4B, batch 64, checkpointing": {
        "peer": True,
        "batch": 64,
        "activation_checkpointing": True,
    },
    "transformers 4B, 8192 tokens": {
        "peer": True,
        "text_tokens": 8192,
        "activation_checkpointing": True,
    },
}


def make_text_batch(num_tokens: int) -> PackedBatch:
    """Pack one random text with all tokens supervised."""
    positions = torch.arange(num_tokens, dtype=torch.int32).numpy()
    ids = torch.randint(1000, 90000, (num_tokens,), dtype=torch.int32).numpy()
    text = TokenizedSample(
        id="text",
        ids_T=ids,
        loss_mask_T=positions > 0,
        position_ids_3T=torch.arange(num_tokens, dtype=torch.int32).expand(3, -1).numpy(),
        spans=(),
    )
    return pack([EncodedSample(text, np.zeros((0, 0), np.uint8))]).to(DEVICE)


def measure_finesight(case: dict[str, Any], config: Path, steps: int) -> dict[str, Any]:
    """Measure steps of finesight."""
    trained = TrainedModel(config, use_fp8=False, use_nf4=case.get("nf4", False))
    torch.cuda.empty_cache()
    trained.model.activation_checkpointing = float(case.get("activation_checkpointing", False))
    if "text_tokens" in case:
        batch = make_text_batch(case["text_tokens"])
    else:
        channels = trained.model.visual.patch_embed.proj.in_features // 2
        batch = make_batch(
            case["batch"],
            channels,
            share_prefix=case.get("share_prefix", False),
            grid_thw=GRID_THW,
            answer_tokens=(ANSWER_TOKENS, ANSWER_TOKENS),
        )
    features = trained.encode_images(batch) if case.get("vision_cache") else None
    torch.cuda.reset_peak_memory_stats()
    seconds = time_steps(lambda: trained.step(batch, features), steps)
    return describe_step(case, seconds)


def describe_step(case: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the throughput and peak memory of a step."""
    size = case.get("text_tokens") or case["batch"]
    unit = "tokens_per_s" if "text_tokens" in case else "samples_per_s"
    gb = torch.cuda.max_memory_allocated() / 1e9
    return {unit: round(size / seconds, 1), "ms": round(1e3 * seconds, 1), "gb": round(gb, 2)}


def measure_peer(case: dict[str, Any], config: Path, steps: int) -> dict[str, Any]:
    """Measure steps of transformers with peft."""
    import peft
    import transformers

    settings = transformers.AutoConfig.from_pretrained(config)
    torch.set_default_dtype(torch.bfloat16)
    with DEVICE:
        model = transformers.AutoModelForImageTextToText.from_config(
            settings, attn_implementation="sdpa"
        )
    torch.set_default_dtype(torch.float32)
    lora = peft.LoraConfig(
        r=64, lora_alpha=16, lora_dropout=0.05, target_modules=r".*language_model\.layers.*_proj.*"
    )
    model = peft.get_peft_model(model, lora).train()
    if case.get("activation_checkpointing"):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-4, fused=True)
    inputs = make_peer_inputs(case, settings)

    def step() -> None:
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    torch.cuda.reset_peak_memory_stats()
    seconds = time_steps(step, steps, num_warmup=3)
    return describe_step(case, seconds) | {
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def make_peer_inputs(case: dict[str, Any], settings: Any) -> dict[str, torch.Tensor]:
    """Return a padded batch of samples with the lengths of finesight's."""
    batch_size, length = case.get("batch", 1), case.get("text_tokens", SAMPLE_TOKENS)
    ids = torch.randint(1000, 90000, (batch_size, length))
    labels = ids.clone()
    inputs = {}
    if "batch" in case:
        labels[:, :-ANSWER_TOKENS] = -100
        ids[:, 15:96] = settings.image_token_id
        patch = settings.vision_config.patch_size**2 * 3 * 2
        num_patches = batch_size * GRID_THW[1] * GRID_THW[2]
        inputs = {
            "pixel_values": torch.randn(num_patches, patch, dtype=torch.bfloat16, device=DEVICE),
            "image_grid_thw": torch.tensor([GRID_THW] * batch_size, device=DEVICE),
            "mm_token_type_ids": (ids == settings.image_token_id).int().to(DEVICE),
        }
    return inputs | {
        "input_ids": ids.to(DEVICE),
        "attention_mask": torch.ones_like(ids, device=DEVICE),
        "labels": labels.to(DEVICE),
    }


def main() -> None:
    """Run the cases, each in a process; write and print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", type=lambda text: text.split(";"), default=list(CASES))
    parser.add_argument("--steps", type=int, default=12)
    options = parser.parse_args()
    if options.out is None:
        (name,) = options.only
        case = CASES[name]
        config = options.configs / case.get("model", MODEL_4B)
        measure = measure_peer if case.get("peer") else measure_finesight
        print(json.dumps(measure(case, config, options.steps)))
        return
    report: dict[str, Any] = report_header("qwen3_5.py", options.configs) | {"results": []}
    for name in options.only:
        command = [sys.executable, __file__, str(options.configs), "--only", name]
        completed = subprocess.run(
            [*command, "--steps", str(options.steps)], capture_output=True, text=True
        )
        if completed.returncode:
            found = {"failed": (completed.stderr.strip().splitlines() or [""])[-1][:200]}
        else:
            found = json.loads(completed.stdout.splitlines()[-1])
        report["results"].append({"case": name} | found)
        print(json.dumps(report["results"][-1]), flush=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
