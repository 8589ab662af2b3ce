"""A contestant's process: `python -m contestants.started MODULE JOB`.

What is missing is told as such; everything else that goes wrong speaks for itself.
"""

from __future__ import annotations

import importlib
import sys

from contestants.job import NotInstalled, tell, told, versions

NEEDS = {
    "as_tutorial": ("transformers", "peft", "accelerate", "datasets"),
    "with_trainer": ("transformers", "peft", "accelerate"),
    "with_trl": ("trl", "transformers", "peft", "accelerate", "datasets"),
    "with_ms_swift": ("ms-swift", "transformers", "peft", "trl"),
    "with_llama_factory": ("llamafactory", "transformers", "peft", "trl", "datasets"),
    "with_unsloth": ("unsloth", "unsloth_zoo", "transformers", "peft", "trl"),
}
"""The packages of each, by the names that they are installed by."""


def main() -> None:
    """Look for the packages, note their versions, and train."""
    name = sys.argv.pop(1)
    job = told()
    try:
        found = versions(*NEEDS[name])
    except NotInstalled as missing:
        tell(job, {"missing": str(missing)})
        raise SystemExit(str(missing)) from missing
    tell(job, {"versions": found})
    importlib.import_module(f"contestants.{name}").main()


if __name__ == "__main__":
    main()
