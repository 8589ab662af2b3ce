"""Small runs of benchmarks."""

import re
from pathlib import Path

import gpu_recommendation
from rich.console import Console

from finesight.plan.run_plan import plan_run
from finesight.progress import ProgressConsole

ROOT = Path(__file__).resolve().parents[1]


def test_gpu_recommendation_table(tmp_path: Path) -> None:
    data = gpu_recommendation.write_dataset(tmp_path, 84)
    console = ProgressConsole(Console(quiet=True))
    rows = []
    for method in gpu_recommendation.TUNING_METHODS[:2]:
        recipe = gpu_recommendation.make_recipe("finesight-tiny", data, 84, method)
        row = gpu_recommendation.make_row(plan_run(recipe, "T4", console), method)
        rows.append({"model": "tiny", "side": 84, **row})
    lora, everything = rows
    assert lora["memory_gb"] < everything["memory_gb"]
    assert gpu_recommendation.format_cell([{**lora, "fits": False}, everything]).startswith("all: ")
    assert gpu_recommendation.format_cell([{**lora, "fits": False}]) == "no"
    (line,) = gpu_recommendation.format_table(rows, 84, ("LoRA",))[2:]
    assert line.startswith("| T4, 16 GB | LoRA: ")


def test_results_name_existing_benchmarks():
    """A reader repeats a measurement with the command in its file."""
    results = (ROOT / "benchmarks" / "results").glob("*.json*")
    named = {
        name for file in results for name in re.findall(r"benchmarks/\w+\.py", file.read_text())
    }
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


def test_imported_names_of_the_package_exist():
    """Also those within functions, and in scripts for other processes."""
    statement = re.compile(r"from finesight(?:\.[\w.]+)? import (?:\([^)]*\)|.+)")
    for file in (ROOT / "benchmarks").glob("*.py"):
        for line in statement.findall(file.read_text()):
            exec(line, {})  # raises ImportError
