"""The extras of the package: what each would give, and which of them are installed."""

from __future__ import annotations

import re
from collections.abc import Mapping

from packaging.requirements import Requirement

from finesight.doctor.findings import Finding, fine, hint
from finesight.doctor.packages import SELF, Packages

GIVES: Mapping[str, str] = {
    "hub": "Parquet files, as hubs keep data sets",
    "objects": "data in object storage (s3://, gs://)",
    "latex": "formulas drawn in reports, and compared as drawings",
    "hf": "families without native code, through transformers",
    "quant": "Q-LoRA: frozen weights in four bits",
    "serve": "the API that OpenAI's clients speak",
    "track": "figures of runs in SwanLab and TensorBoard",
    "wandb": "the same in Weights & Biases",
    "mlflow": "the same in MLflow",
    "trackio": "the same in Trackio",
    "qwen-vl": "the tokenizer of the first Qwen-VL",
    "synth": "formulas and more fonts in generated tasks",
    "web": "the page to talk with a model in a browser",
}
"""Those for users: what each is for, in a few words."""


def missing(packages: Packages) -> dict[str, list[str]]:
    """What every extra still lacks, by its name; an empty list for one that is whole. Extras that
    the installed metadata do not know are left out."""
    own = packages.found.get(SELF, ())[:1]
    known = {name for one in own for name in one.extras}
    lacking: dict[str, list[str]] = {name: [] for name in GIVES if name in known}
    for text in (text for one in own for text in one.requires):
        requirement = Requirement(text)
        for name in re.findall(r"extra == ['\"]([^'\"]+)", str(requirement.marker or "")):
            if name in lacking and packages.version(requirement.name) is None:
                lacking[name].append(requirement.name)
    return lacking


def install_extra(packages: Packages, *names: str) -> str:
    """The command that installs extras."""
    return packages.install(f"{SELF}[{','.join(names)}]")


def judge(packages: Packages) -> list[Finding]:
    """A line for each extra; one for metadata that are older than the code."""
    lacking = missing(packages)
    found = []
    for name, absent in lacking.items():
        if not absent:
            found.append(fine("extra", f"[{name}] {GIVES[name]}"))
            continue
        found.append(
            hint(
                "extra-missing",
                f"[{name}] is not installed: {GIVES[name]}",
                why=f"it lacks {', '.join(absent)}; needed for that alone",
                remedy=install_extra(packages, name),
            )
        )
    unknown = [name for name in GIVES if name not in lacking]
    if unknown and SELF in packages.found:
        found.append(
            hint(
                "metadata-old",
                f"finesight's installed metadata do not know {', '.join(unknown)}",
                why="older than its code: versions are compared with what it required then",
                remedy=packages.install("--no-deps", "-e", "."),
            )
        )
    return found
