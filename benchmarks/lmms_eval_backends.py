"""Compare two ways to evaluate a model of finesight with lmms-eval, on a CPU or GPU.

    pip install -e '.[serve]' ./examples/lmms_eval
    python benchmarks/lmms_eval_backends.py --work DIR --out FILE [--model MODEL] [--limit N]

The plug-in `examples/lmms_eval` loads the model in the process of lmms-eval. The backend
`async_openai` of lmms-eval sends the questions to `finesight serve`. Both answer a generated task:
the groups of the built-in suite of `finesight guard`. The score is the share of exact answers;
boxes have no score. The script prints and writes the scores with standard errors, and the number of
equal answers. It exits with 1 if any differs.

lmms-eval 0.7.3 needs filelock 3, av 15 and wandb 0.25, so install it into an environment of its
own, without `constraints.txt` and the extras `video` and `wandb`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from serve_load import run_server

from finesight.evaluate.regression_guard import BUILT_IN_SUITE
from finesight.samples.sample import join_text, read_samples

GROUPS = ("reading", "counting", "chat", "boxes")
PACKAGES = ("lmms_eval", "finesight", "torch", "transformers", "openai", "filelock", "av", "wandb")
TASK = """task: finesight_words
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: generate_until
doc_to_visual: !function words.open_images
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
process_results: !function words.score
generation_kwargs: {max_new_tokens: 32, temperature: 0, do_sample: false}
metric_list:
- {metric: reading, aggregation: mean, higher_is_better: true}
- {metric: counting, aggregation: mean, higher_is_better: true}
- {metric: chat, aggregation: mean, higher_is_better: true}
"""
FUNCTIONS = '''"""Functions of the task finesight_words."""

from PIL import Image


def open_images(document):
    return [Image.open(file).convert("RGB") for file in document["images"]]


def score(document, results):
    if document["group"] == "boxes":
        return {}
    return {document["group"]: float(results[0].strip() == document["answer"])}
'''


def write_task(folder: Path) -> None:
    """Write the task, its functions and its questions."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for group in GROUPS:
        for sample in read_samples(BUILT_IN_SUITE.parent / f"{group}.jsonl"):
            *images, question = sample.messages[0].content
            row = {"images": [str(BUILT_IN_SUITE.parent / one.image) for one in images]}
            row |= {"group": group, "question": question.text}
            lines.append(json.dumps(row | {"answer": join_text(sample.messages[1].content)}))
    questions = folder / "questions.jsonl"
    questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / "words.py").write_text(FUNCTIONS, encoding="utf-8")
    task = TASK.replace("QUESTIONS", json.dumps(str(questions)))
    (folder / "finesight_words.yaml").write_text(task, encoding="utf-8")


def run_lmms_eval(work: Path, name: str, model_args: str, limit: int | None) -> dict[str, Any]:
    """Run lmms-eval with a model; return the seconds, the score and the answers by document."""
    out = work / name
    command = [sys.executable, "-m", "lmms_eval", "--model", name, "--model_args", model_args]
    command += ["--tasks", "finesight_words", "--include_path", str(work / "task")]
    command += ["--batch_size", "16", "--log_samples", "--output_path", str(out)]
    command += ["--limit", str(limit)] if limit else []
    variables = {"HF_HOME": str(work / "hf"), "HF_HUB_OFFLINE": "1", "OPENAI_API_KEY": "none"}
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=sys.stderr, env=os.environ | variables)
    seconds = round(time.perf_counter() - start, 1)
    (results,) = out.rglob("*_results.json")
    (samples,) = out.rglob("*_samples_*.jsonl")
    answers = {}
    for line in samples.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answers[row["doc_id"]] = row["filtered_resps"]
    scores = json.loads(results.read_text(encoding="utf-8"))["results"]["finesight_words"]
    names = [f"{group}{suffix}" for group in GROUPS for suffix in ("", "_stderr")]
    numbers = {name: scores[f"{name},none"] for name in names if f"{name},none" in scores}
    return {"seconds": seconds, "scores": numbers, "answers": answers}


def main() -> int:
    """Run both ways, write the comparison, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="finesight-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    work = options.work.resolve()
    write_task(work / "task")
    model_args = f"model={options.model}"
    plugin = run_lmms_eval(work, "finesight", model_args, options.limit)
    with run_server(options.model, options.device) as (_, port, name):
        model_args = f"model={name},base_url=http://127.0.0.1:{port}/v1,num_cpus=8"
        served = run_lmms_eval(work, "async_openai", model_args, options.limit)
    answers = plugin.pop("answers"), served.pop("answers")
    num_equal = sum(answers[0][key] == answers[1].get(key) for key in answers[0])
    cuda = torch.cuda.is_available()
    report: dict[str, Any] = {
        "command": "python benchmarks/lmms_eval_backends.py --work DIR --out FILE",
        "model": options.model,
        "machine": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in PACKAGES},
        "num_samples": len(answers[0]),
        "num_equal_answers": num_equal,
        "finesight": plugin,
        "async_openai": served,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    is_equal = len(answers[0]) == num_equal and plugin["scores"] == served["scores"]
    return 0 if is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
