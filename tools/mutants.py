"""Measure the strength of the tests by mutants: small seeded faults in the source code.

    python tools/mutants.py list --out mutants.json
    python tools/mutants.py trace --out coverage.json -- -m "not slow and not fuzz" -n 16
    python tools/mutants.py run mutants.json coverage.json --out result.json --workers 14

`list` draws mutants from `src/`, spread by lines of code. `trace` runs the tests and records the
functions that each of them executes (Python 3.12 or newer). `run` applies one mutant at a time
to a copy of the sources, and runs the tests that execute the changed function, most specific first.
A mutant is killed if a test fails. Compare the results of two versions of the tests with the same
`mutants.json`: a mutant is found again by its file and the text around it.

Not measured: kernels, which only GPUs execute, and tests in processes of their own.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "finesight"
EXCLUDED = ("model/kernels/", "train/optim/adamw/kernels.py")
MAX_TEST_SECONDS = 90.0
"""Recorded duration of the tests that run for one mutant, at most."""
TEST_OVERHEAD_S = 0.05
"""Added to the recorded duration of a test, for its fixtures."""

COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is",
}  # fmt: skip
OPERATORS = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*", ast.Div: "*"}


# Mutants


def find_mutants(path: Path) -> list[dict[str, Any]]:
    """Return all mutants of a file: a position, the text there, and its replacement."""
    text = path.read_text(encoding="utf-8")
    lines, tree = text.splitlines(keepends=True), ast.parse(text)
    annotations = {id(part) for node in ast.walk(tree) for part in _annotation_nodes(node)}
    found = []
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in _body_nodes(function):
            if id(node) in annotations or not isinstance(node, ast.expr | ast.stmt):
                continue
            new = _replacement(node)
            if new is None or node.lineno != node.end_lineno:
                continue
            line = lines[node.lineno - 1].encode()
            old = line[node.col_offset : node.end_col_offset].decode()
            found.append(
                {
                    "file": path.relative_to(ROOT).as_posix(),
                    "function": function.name,
                    "line": node.lineno,
                    "column": node.col_offset,
                    "context": line.decode().strip(),
                    "old": old,
                    "new": new,
                }
            )
    return found


def _body_nodes(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.AST]:
    """Yield the nodes of a function, without those of nested functions."""
    nested = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    waiting: list[ast.AST] = [node for node in function.body if not isinstance(node, nested)]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [one for one in ast.iter_child_nodes(node) if not isinstance(one, nested)]


def _annotation_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield annotations and raised errors, whose texts no test should repeat."""
    for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
        if isinstance(part, ast.AST):
            yield from ast.walk(part)
    if isinstance(node, ast.Raise):
        yield from ast.walk(node)


def _replacement(node: ast.AST) -> str | None:
    """Return the source text that replaces an expression or statement."""
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            sign = COMPARISONS.get(type(operator))
            return sign and f"({ast.unparse(left)} {sign} {ast.unparse(right)})"
        case ast.BinOp(left=left, op=operator, right=right) if type(operator) in OPERATORS:
            if any(isinstance(side, ast.Constant | ast.JoinedStr) and _is_text(side)
                   for side in (left, right)):  # fmt: skip
                return None
            sign = OPERATORS[type(operator)]
            return f"({ast.unparse(left)} {sign} {ast.unparse(right)})"
        case ast.BoolOp(op=operator, values=values):
            word = " or " if isinstance(operator, ast.And) else " and "
            return "(" + word.join(f"({ast.unparse(value)})" for value in values) + ")"
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return f"({ast.unparse(operand)})"
        case ast.Constant(value=bool() as value):
            return str(not value)
        case ast.Constant(value=int() | float() as value):
            return str(value + 1)
        case ast.Expr(value=ast.Call()) | ast.AugAssign():
            return "pass"
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            return "return None"
        case ast.Continue():
            return "break"
        case ast.IfExp(test=test, body=body, orelse=other):
            parts = ast.unparse(other), ast.unparse(test), ast.unparse(body)
            return "({} if {} else {})".format(*parts)
    return None


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def draw_mutants(number: int, seed: int) -> list[dict[str, Any]]:
    """Draw mutants whose number per file follows the lines of the file."""
    rng = random.Random(seed)
    files = [
        path
        for path in sorted(SOURCE.rglob("*.py"))
        if not path.relative_to(SOURCE).as_posix().startswith(EXCLUDED)
    ]
    lines = [len(path.read_text(encoding="utf-8").splitlines()) for path in files]
    drawn: list[dict[str, Any]] = []
    candidates = {path: find_mutants(path) for path in files}
    while len(drawn) < number:
        mutants = candidates[rng.choices(files, lines)[0]]
        if mutants:
            drawn.append(mutants.pop(rng.randrange(len(mutants))))
    return drawn


def apply_mutant(root: Path, mutant: dict[str, Any]) -> int | None:
    """Change a file below `root`. Return the changed line, or None if its text is gone.

    Code that moved within its file is found by the text of its line.
    """
    path = root / mutant["file"]
    if not path.exists():
        return None
    lines = path.read_bytes().splitlines(keepends=True)
    old = mutant["old"].encode()
    matching = [
        number
        for number, line in enumerate(lines, 1)
        if line.decode().strip() == mutant["context"] and old in line
    ]
    if not matching:
        return None
    number = min(matching, key=lambda number: abs(number - mutant["line"]))
    line = lines[number - 1]
    column = mutant["column"] if number == mutant["line"] else line.find(old)
    if line[column : column + len(old)] != old:
        column = line.find(old)
    lines[number - 1] = line[:column] + mutant["new"].encode() + line[column + len(old) :]
    path.write_bytes(b"".join(lines))
    return number


# Trace: a pytest plugin


class FunctionTracer:
    """Record the functions of the package that each test executes.

    Functions that run while fixtures are set up count for all tests of the file.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._ids = folder, {}  # type: tuple[Path, dict[str, int]]
        self._executed: set[int] = set()
        self._setup: dict[str, set[int]] = defaultdict(set)
        self._tests: dict[str, tuple[float, list[int]]] = {}
        self._prefix = str(SOURCE) + os.sep
        monitoring = sys.monitoring
        monitoring.use_tool_id(monitoring.COVERAGE_ID, "mutants")
        monitoring.register_callback(
            monitoring.COVERAGE_ID, monitoring.events.PY_START, self._on_start
        )
        monitoring.set_events(monitoring.COVERAGE_ID, monitoring.events.PY_START)

    def _on_start(self, code: CodeType, offset: int) -> object:
        if code.co_filename.startswith(self._prefix):
            name = f"{code.co_filename[len(self._prefix) :]}:{code.co_firstlineno}"
            self._executed.add(self._ids.setdefault(name, len(self._ids)))
        return sys.monitoring.DISABLE

    def pytest_runtest_logstart(self) -> None:
        self._executed = set()
        sys.monitoring.restart_events()

    def pytest_runtest_logreport(self, report: Any) -> None:
        file = report.nodeid.partition("::")[0]
        if report.when == "setup":
            self._setup[file] |= self._executed
            self._executed = set()
            sys.monitoring.restart_events()
        elif report.when == "call" and report.passed:
            self._tests[report.nodeid] = (report.duration, sorted(self._executed))

    def pytest_sessionfinish(self) -> None:
        record = {
            "functions": list(self._ids),
            "setup": {file: sorted(ids) for file, ids in self._setup.items()},
            "tests": self._tests,
        }
        (self._folder / f"{os.getpid()}.json").write_text(json.dumps(record))


def pytest_configure(config: Any) -> None:
    """Start the tracer in each worker of pytest-xdist, or in pytest without workers."""
    folder = os.environ.get("MUTANTS_TRACE")
    is_worker = hasattr(config, "workerinput")
    if folder and (is_worker or not config.getoption("numprocesses", None)):
        config.pluginmanager.register(FunctionTracer(Path(folder)))


def trace_tests(arguments: list[str]) -> dict[str, list[str]]:
    """Run pytest and return the tests that execute each function, most specific first."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"MUTANTS_TRACE": folder}
        paths = [str(ROOT / "tools"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        command = [sys.executable, "-m", "pytest", "-p", "mutants", *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
        records = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    durations: dict[str, float] = {}
    functions: dict[str, set[str]] = defaultdict(set)
    for record in records:
        for test, (duration, ids) in record["tests"].items():
            durations[test] = duration
            for one in {*ids, *record["setup"].get(test.partition("::")[0], ())}:
                functions[record["functions"][one]].add(test)
    breadth = Counter(test for tests in functions.values() for test in tests)
    coverage = {}
    for name, tests in sorted(functions.items()):
        most_specific = sorted(tests, key=lambda test: (breadth[test], test))
        ends = accumulate(durations[test] + TEST_OVERHEAD_S for test in most_specific)
        coverage[name] = [
            test for test, end in zip(most_specific, ends, strict=True) if end <= MAX_TEST_SECONDS
        ]
    return coverage


# Run


def select_tests(coverage: dict[str, list[str]], mutant: dict[str, Any], line: int) -> list[str]:
    """Return the tests that execute the function of a mutant."""
    text = (ROOT / mutant["file"]).read_text(encoding="utf-8")
    starts = [
        min([node.lineno, *(one.lineno for one in node.decorator_list)])
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.lineno <= line <= (node.end_lineno or node.lineno)
    ]
    file = Path(mutant["file"]).relative_to("src/finesight").as_posix()
    return coverage.get(f"{file}:{max(starts)}", []) if starts else []


def run_mutant(coverage: dict[str, list[str]], mutant: dict[str, Any]) -> dict[str, Any]:
    """Run the tests of one mutant in a copy of the project."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "project"
        ignored = shutil.ignore_patterns(".git", ".venv", ".whl", "*.safetensors")
        shutil.copytree(ROOT, root, ignore=ignored, symlinks=True)
        for weights in SOURCE.rglob("*.safetensors"):
            (root / weights.relative_to(ROOT)).symlink_to(weights)
        line = apply_mutant(root, mutant)
        if line is None:
            return mutant | {"outcome": "gone", "tests": 0}
        tests = select_tests(coverage, mutant, line)
        if not tests:
            return mutant | {"outcome": "not executed", "tests": 0}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        paths = [str(root / "src"), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        arguments = root / "selected_tests.txt"
        arguments.write_text("\n".join(tests))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command += ["-n", "0", "-m", "", f"@{arguments}"]
        try:
            run = subprocess.run(
                command, cwd=root, env=environment, capture_output=True, text=True,
                timeout=4 * MAX_TEST_SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return mutant | {"outcome": "killed", "tests": len(tests), "by": "timeout"}
    failed = [one for one in run.stdout.splitlines() if one.startswith(("FAILED", "ERROR"))]
    outcome = {0: "survived", 1: "killed"}.get(run.returncode, f"pytest exit {run.returncode}")
    return mutant | {"outcome": outcome, "tests": len(tests), "by": (failed or [""])[0][:200]}


def run_mutants(mutants: list[Any], coverage: dict[str, list[str]], workers: int) -> list[Any]:
    """Run all mutants in parallel and print their outcomes."""
    with ThreadPoolExecutor(workers) as pool:
        results = []
        for result in pool.map(lambda one: run_mutant(coverage, one), mutants):
            results.append(result)
            print(result["outcome"], f"{result['file']}:{result['line']}", result["old"],
                  "->", result["new"], flush=True)  # fmt: skip
    print(dict(Counter(result["outcome"] for result in results)))
    return results


def main() -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list")
    listing.add_argument("--number", type=int, default=150)
    listing.add_argument("--seed", type=int, default=0)
    tracing = commands.add_parser("trace")
    tracing.add_argument("pytest", nargs="*")
    running = commands.add_parser("run")
    running.add_argument("mutants", type=Path)
    running.add_argument("coverage", type=Path)
    running.add_argument("--workers", type=int, default=2)
    for command in (listing, tracing, running):
        command.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "list":
        result: Any = draw_mutants(given.number, given.seed)
    elif given.command == "trace":
        result = trace_tests(given.pytest)
    else:
        mutants = json.loads(given.mutants.read_text())
        result = run_mutants(mutants, json.loads(given.coverage.read_text()), given.workers)
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
