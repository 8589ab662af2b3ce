"""Tune published weights on public datasets, on a machine with network and GPU.

    python benchmarks/real_weights.py --work DIR [--only TASK/MODEL ...] [--out FILE]
        [--model NAME] [--limit N] [--set KEY=VALUE ...] [--table]

A row is a task with a model, such as `receipts/Qwen3-VL-4B-Instruct`. Without --only, all rows run
that have the status "not run". Each row runs in its own process:

1. import the dataset of the task, and DocVQA, from the Hugging Face hub (HF_ENDPOINT, HF_HOME)
2. check the data
3. train with LoRA, and evaluate all validation samples before and after training
4. `finesight guard` with questions of DocVQA: what the model has forgotten

FILE, by default `results/real_weights.json`, has all rows, and is written after each one. Scores
have 95 % intervals; peak memory is that of training; minutes are those of the step `train` with
both evaluations. --table writes and prints the rows without running any.

For a trial, --model replaces the models, such as finesight-tiny, --limit the number of training
samples (and of validation samples: a quarter), and --set settings of all recipes. Its rows have the
status "trial", and its default FILE is DIR/trial.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import yaml

from finesight.api import UserError, check_data, guard, import_data, train
from finesight.errors import suggest_name
from finesight.evaluate.metric_difference import MetricDifference
from finesight.files.bounded_files import read_json_object
from finesight.files.storage import write_file
from finesight.report.run_reader import read_run

BENCHMARKS_DIR = Path(__file__).resolve().parent
RESULTS = BENCHMARKS_DIR / "results" / "real_weights.json"
MODELS = ("Qwen/Qwen2.5-VL-3B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3.5-4B")
FIELDS = "entities.company,entities.date,entities.address,entities.total"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Splits of a hub dataset, and their columns.

    Attributes:
        eval_split: Split of the validation samples; None for the last rows of the training split.
        import_options: Options of `import`.
    """

    repository: str
    train_split: str
    eval_split: str | None
    num_train: int
    num_eval: int
    import_options: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Task:
    """A task: data, recipe, and published scores to compare with.

    Attributes:
        recipe: Settings besides model, data and output folder.
        target: Published result, with its source.
        target_by_model: Published results of one model.
    """

    dataset: Dataset
    recipe: dict[str, Any]
    target: str
    target_by_model: dict[str, str] = field(default_factory=dict)


DOCVQA = Dataset(
    "lmms-lab/DocVQA",
    "DocVQA/validation",
    None,
    50,  # unused rows, which share no image with the questions
    500,
    {"columns": {"image": "image", "question": "question", "answer": "answers"}}
    | {"prompt": "Answer with words of the document."},
)


def make_supervised_recipe(
    metric: str, max_pixels: int, epochs: int, max_new_tokens: int
) -> dict[str, Any]:
    """Return the recipe of a supervised task: LoRA of rank 32, evaluated before and after."""
    return {
        "image": {"max_pixels": max_pixels},
        "tune": {"language": "lora", "lora": {"rank": 32, "alpha": 32, "dropout": 0.05}},
        "train": {"epochs": epochs, "batch_size": 16, "learning_rate": 1e-4},
        "eval": {"metric": metric, "every": 0, "max_new_tokens": max_new_tokens},
    }


TASKS = {
    "handwriting": Task(
        Dataset(
            "linxy/LaTeX_OCR",
            "human_handwrite/train",
            "human_handwrite/test",
            1200,
            70,
            {"columns": {"image": "image", "answer": "text"}}
            | {"prompt": "Write the formula as LaTeX."},
        ),
        make_supervised_recipe("latex", max_pixels=401_408, epochs=3, max_new_tokens=256),
        "no score; 7B with LoRA in 10 minutes on two A100 (guide of ms-swift)",
    ),
    "grounding": Task(
        Dataset(
            "jrzhang/TextVQA_GT_bbox",
            "train",
            None,
            3000,
            300,
            {"columns": {"image": "image", "question": "question", "box": "bbox"}}
            | {"box_format": "xywh", "prompt": "Give its bounding box."},
        ),
        make_supervised_recipe("grounding", max_pixels=802_816, epochs=2, max_new_tokens=64),
        "none found",
    ),
    "receipts": Task(
        Dataset(
            "jsdnrs/ICDAR2019-SROIE",
            "train",
            "test",
            626,
            361,
            {"columns": {"image": "image", "fields": FIELDS}}
            | {"prompt": "Return company, date, address and total of the receipt as JSON."},
        ),
        make_supervised_recipe("json", max_pixels=1_003_520, epochs=3, max_new_tokens=256),
        "no score; CORD-v2 with QLoRA: close to GPT-4o (quickscale, 2025)",
    ),
    "geometry": Task(
        Dataset(
            "hiyouga/geometry3k",
            "train",
            "test",
            2101,
            601,
            {"columns": {"image": "images", "question": "problem", "answer": "answer"}}
            | {"prompt": "Reason step by step, then write the final answer as \\boxed{ANSWER}."},
        ),
        {
            "image": {"max_pixels": 802_816},
            "tune": {"language": "lora", "lora": {"rank": 16, "alpha": 32, "dropout": 0.0}},
            "train": {
                "objective": "grpo",
                "steps": 200,
                "batch_size": 16,
                "learning_rate": 1e-5,
                "grpo": {"num_generations": 8, "max_completion_length": 1024},
            },
            "rewards": [
                {"name": "math", "weight": 0.9},
                {"name": "format", "pattern": r".*\\boxed\{.+\}.*", "weight": 0.1},
            ],
            "eval": {
                "metric": f"{BENCHMARKS_DIR / 'math_answer.py'}:correct",
                "every": 0,
                "max_new_tokens": 1024,
            },
        },
        "none found",
        {
            MODELS[0]: "0.24 to 0.38, all weights tuned (baselines of EasyR1)",
            MODELS[1]: "no score; script with LoRA (EasyR1)",
        },
    ),
}


def make_row(name: str, model: str) -> dict[str, Any]:
    """Return a row that has not run."""
    task = TASKS[name]
    row = {"row": f"{name}/{model.rpartition('/')[2]}", "task": name, "model": model}
    metric = task.recipe["eval"]["metric"].rpartition("/")[2]
    row |= {"dataset": task.dataset.repository, "metric": metric}
    return row | {"target": task.target_by_model.get(model, task.target), "status": "not run"}


def load_rows(file: Path, models: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return all rows by name: those of the file, and others as not run.

    Raises:
        UserError: The file is not a result of this script.
    """
    rows = [make_row(name, model) for name in TASKS for model in models]
    found = {row["row"]: row for row in rows}
    if file.is_file():
        saved = read_json_object(file).get("rows")
        if not isinstance(saved, list):
            raise UserError(
                f"the keys of {file} do not contain rows",
                where="--out",
                expected="a new file, or a result of this script",
                remedy="choose another file",
            )
        found |= {row["row"]: row for row in saved if row["status"] != "not run"}
    return found


def save_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write all rows."""
    content = {"command": "python benchmarks/real_weights.py --work DIR", "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, f"{json.dumps(content, indent=1, ensure_ascii=False)}\n".encode())


def import_splits(dataset: Dataset, folder: Path) -> tuple[Path, Path]:
    """Import training and validation samples once, and return their files."""
    address = f"hf:{dataset.repository}:"
    options = {"on_invalid_row": "skip"} | dataset.import_options
    if dataset.eval_split is None:
        if not folder.exists():
            rows = (0, dataset.num_train + dataset.num_eval)
            source = f"{address}{dataset.train_split}"
            import_data(source, folder, rows=rows, eval_last=dataset.num_eval, **options)
        return folder / "train.jsonl", folder / "eval.jsonl"
    sizes = {dataset.train_split: dataset.num_train, dataset.eval_split: dataset.num_eval}
    for split, size in sizes.items():
        out = folder / Path(split).name
        if not out.exists():
            import_data(f"{address}{split}", out, limit=size, **options)
    first, second = (folder / Path(split).name / "data.jsonl" for split in sizes)
    return first, second


def write_guard_suite(folder: Path, limit: int | None) -> Path:
    """Import DocVQA, and write the suite of its questions."""
    _, questions = import_splits(limit_samples(DOCVQA, limit), folder / "docvqa")
    suite, group = folder / "docvqa.yaml", {"metric": "qa", "max_new_tokens": 64}
    group |= {"data": str(questions.relative_to(folder)), "allowed_drop": 0.02}
    suite.write_text(yaml.safe_dump({"groups": {"docvqa": group}}), encoding="utf-8")
    return suite


def limit_samples(dataset: Dataset, limit: int | None) -> Dataset:
    """Return a dataset with fewer samples."""
    if limit is None:
        return dataset
    return replace(dataset, num_train=limit, num_eval=max(1, limit // 4))


def run_row(
    row: dict[str, Any], work: Path, limit: int | None, overrides: Sequence[str]
) -> dict[str, Any]:
    """Import, check, train, evaluate and guard; return the row with its results.

    The folder of an earlier attempt is removed.
    """
    task, seconds = TASKS[row["task"]], dict[str, float]()

    def measure(name: str, function: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = function()
        seconds[name] = round(time.perf_counter() - start, 1)
        return result

    dataset = limit_samples(task.dataset, limit)
    files = measure("import", lambda: import_splits(dataset, work / row["task"]))
    suite = measure("import_docvqa", lambda: write_guard_suite(work, limit))
    check = measure("check", lambda: check_data(files[0], against=[files[1]]))
    run_dir = work / "runs" / row["row"].replace("/", "-")
    shutil.rmtree(run_dir, ignore_errors=True)
    data = dict(zip(("train", "eval"), map(str, files), strict=True))
    recipe = task.recipe | {"model": row["model"], "data": data, "output_dir": str(run_dir)}
    result = measure("train", lambda: train(recipe, list(overrides)))
    (forgetting,) = measure("guard", lambda: guard(run_dir, suite))
    before, after = result.before.on_all_samples, result.after.on_all_samples
    name = after.primary_metric
    (difference,) = (one for one in result.metric_differences if one.name == name)
    return row | {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": describe_machine(),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("finesight", "torch")},
        "limit": limit,
        "overrides": list(overrides),
        "num_samples": {
            "eval" if one.is_validation else "train": one.num_samples for one in check.sources
        },
        "check_issues": check.issue_counts,
        "score": name,
        "before": describe_score(before, name),
        "after": describe_score(after, name),
        "difference": describe_difference(difference),
        "docvqa": describe_difference(forgetting.difference) | {"problems": forgetting.problems},
        "steps": result.steps,
        "peak_memory_gb": max(
            line["peak_memory_gb"] for line in read_run(run_dir, with_plugins=False).steps
        ),
        "seconds": seconds,
    }


def describe_machine() -> str:
    """Return the name of the GPU, or the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {platform.machine()}, {torch.get_num_threads()} threads"


def describe_score(result: Any, name: str) -> dict[str, Any]:
    """Return a score with its 95 % interval."""
    interval = result.intervals.get(name)
    bounds = [interval.low, interval.high] if interval else None
    return {"value": result.scores[name], "interval": bounds, "num_samples": result.num_samples}


def describe_difference(difference: MetricDifference) -> dict[str, Any]:
    """Return both scores and the 95 % interval of their difference."""
    names = ("before", "after", "low", "high", "verdict", "note")
    return {name: asdict(difference)[name] for name in names}


def format_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Format rows as a Markdown table."""
    lines = [
        "| row | metric | published | before | after | difference | DocVQA | peak GB | minutes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row["row"], f"`{row['metric']}`", row["target"]]
        if row["status"] == "not run":
            cells += ["not run", *["-"] * 5]
        else:
            cells += [f"{row[key]['value']:.3f}" for key in ("before", "after")]
            cells += [format_difference(row[key]) for key in ("difference", "docvqa")]
            cells += [f"{row['peak_memory_gb']:.1f}", f"{row['seconds']['train'] / 60:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def format_difference(difference: dict[str, Any]) -> str:
    """Format a difference with its interval."""
    text = f"{difference['after'] - difference['before']:+.3f}"
    if difference["low"] is None:
        return text
    return f"{text} ({difference['low']:+.3f} to {difference['high']:+.3f})"


def select_rows(rows: dict[str, dict[str, Any]], names: Sequence[str]) -> list[str]:
    """Return the names of the rows to run.

    Raises:
        UserError: There is no such row.
    """
    for name in names:
        if name not in rows:
            raise UserError(
                f"no row {name!r}",
                where="--only",
                expected=f"of {', '.join(rows)}",
                remedy=suggest_name(name, rows, "use one of these rows"),
            )
    return list(names) or [name for name, row in rows.items() if row["status"] == "not run"]


def run(options: argparse.Namespace) -> None:
    """Run the selected rows and print the table."""
    is_trial = bool(options.model or options.set) or options.limit is not None
    if options.work is None and not options.table:
        raise UserError("no folder for data and runs", where="--work", remedy="add --work DIR")
    file = options.out or (options.work / "trial.json" if is_trial else RESULTS)
    rows = load_rows(file, [options.model] if options.model else MODELS)
    for name in [] if options.table else select_rows(rows, options.only):
        # The peak memory is that of a process.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            arguments = (rows[name], options.work.resolve(), options.limit, options.set)
            rows[name] = pool.submit(run_row, *arguments).result()
        rows[name]["status"] = "trial" if is_trial else "done"
        save_rows(file, list(rows.values()))
    save_rows(file, list(rows.values()))
    print("\n".join(format_table(list(rows.values()))))


def main(words: Sequence[str] | None = None) -> int:
    """Parse the options, run the benchmark, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--model")
    parser.add_argument("--limit", type=int, metavar="N")
    parser.add_argument("--set", nargs="+", default=[])
    parser.add_argument("--table", action="store_true")
    try:
        run(parser.parse_args(words))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
