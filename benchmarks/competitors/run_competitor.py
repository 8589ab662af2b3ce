"""Run a competitor in its own process: `python -m competitors.run_competitor MODULE JOB`.

Missing packages are reported as results; other errors end the process.
"""

from __future__ import annotations

import importlib
import sys

from competitors.job import MissingPackageError, package_versions, read_job, write_results

REQUIRED_PACKAGES = {
    "tutorial_trainer": ("transformers", "peft", "accelerate", "datasets"),
    "hf_trainer": ("transformers", "peft", "accelerate"),
    "trl_trainer": ("trl", "transformers", "peft", "accelerate", "datasets"),
    "ms_swift_trainer": ("ms-swift", "transformers", "peft", "trl"),
    "llama_factory_trainer": ("llamafactory", "transformers", "peft", "trl", "datasets"),
    "unsloth_trainer": ("unsloth", "unsloth_zoo", "transformers", "peft", "trl"),
}
"""Required packages of each script, by distribution name."""


def main() -> None:
    """Check the packages, record their versions, and train."""
    name = sys.argv.pop(1)
    job = read_job()
    try:
        found = package_versions(*REQUIRED_PACKAGES[name])
    except MissingPackageError as missing:
        write_results(job, {"missing": str(missing)})
        raise SystemExit(str(missing)) from missing
    write_results(job, {"versions": found})
    importlib.import_module(f"competitors.{name}").main()


if __name__ == "__main__":
    main()
