"""Check language, statements, imports and habits of the project against bounds.

`python tools/house.py` prints all measures and exits with 1 if one is out of bounds. It measures
what no tool measures: ruff checks complexity and line lengths of Python, mypy types, import-linter
the order of packages. The size of packages is reported and has no bound. tests/test_style.py tests
the measures themselves. Modules are parsed, not imported.
"""

from __future__ import annotations

import gc
import io
import sys
import tokenize
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from code_measures import measure_code
from language_measures import measure_glossary, measure_language
from source_modules import PACKAGE, CodeMeasure, SourceModule, read_modules
from statement_measures import measure_statements

ROOT = Path(__file__).resolve().parents[1]
COUNTED_TOKENS = {tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING}


def measure_project(root: Path) -> list[CodeMeasure]:
    """Compute all measures of the project at `root`."""
    source = read_modules(root, "src")
    tests = read_modules(root, "tests")
    everything = [*source, *tests]
    for folder in ("tools", "benchmarks"):
        everything += read_modules(root, folder)
    others = [*read_modules(root, "pretraining"), *read_modules(root, "examples")]
    return [
        *measure_statements(source),
        *measure_code(root, source, tests, everything),
        *measure_language(root, source),
        *measure_glossary(root, [*everything, *others]),
    ]


def iter_sizes(source: Sequence[SourceModule]) -> Iterator[str]:
    """Yield the number of tokens of each package, for the record."""
    sizes: Counter[str] = Counter()
    for module in source:
        text = "\n".join(module.lines) + "\n"
        tokens = tokenize.generate_tokens(io.StringIO(text).readline)
        name = module.path.relative_to(Path("src") / PACKAGE).parts[0]
        sizes[name.removesuffix(".py")] += sum(token.type in COUNTED_TOKENS for token in tokens)
    yield f"{sum(sizes.values()):,} tokens in all"
    for name, count in sizes.most_common():
        yield f"{name}: {count:,} tokens"


def main() -> int:
    """Print all measures and the violations of those out of bounds."""
    gc.disable()  # syntax trees stay until the end, and searching them for garbage takes long
    measures = measure_project(ROOT)
    for one in measures:
        print(one)
        if not one.is_met:
            for location in one.violations:
                print(f"      {location}")
    if "--sizes" in sys.argv:
        print(*iter_sizes(read_modules(ROOT, "src")), sep="\n")
    return 0 if all(one.is_met for one in measures) else 1


if __name__ == "__main__":
    sys.exit(main())
