"""How quickly one row, and a few, are multiplied with matrices in few bits, beside bf16.

    python benchmarks/few_bits.py OUT.json [--only nf4,int4] [--processes 12]

The layers are those of Qwen2-VL-2B, Qwen2.5-VL-3B and Qwen2.5-VL-7B, random numbers in them. A
measurement is a CUDA graph of one product with each of many matrices, so many that the cache holds
few of them; of 20 replays the median. `gbs` is 10^9 bytes of the matrices a second, `error` the
largest difference from the product in fp64 with the matrix in full, by the largest output. Every
way that a kernel can be cut is tried at 1 and at 8 rows; other numbers of rows take the best.
Without a card each kernel is run once, on small matrices, for the errors alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from finesight.model.frozen import FrozenMatrix
from finesight.model.int4 import Int4Matrix, RoundedInt4Matrix
from finesight.model.kernels import row as row_kernels
from finesight.model.kernels import tile as tile_kernels
from finesight.model.kernels.row import Plan
from finesight.model.nf4 import Nf4Matrix, bitsandbytes
from finesight.model.rowwise import Fp8Matrix, Int8Matrix, RowwiseMatrix
from finesight.model.words import WordMatrix

KINDS = {"nf4": Nf4Matrix, "int4": RoundedInt4Matrix, "int8": Int8Matrix, "fp8": Fp8Matrix}
SHAPES = {
    "7B q o": (3584, 3584),
    "7B k v": (512, 3584),
    "7B gate up": (18944, 3584),
    "7B down": (3584, 18944),
    "7B head": (152064, 3584),
    "3B q o": (2048, 2048),
    "3B gate up": (11008, 2048),
    "3B down": (2048, 11008),
    "2B q o": (1536, 1536),
    "2B gate up": (8960, 1536),
    "2B down": (1536, 8960),
}
SMALL = {"small": (72, 256), "uneven": (40, 384)}
WIDE = ("7B q o", "7B gate up", "7B down")
"""Of which 16 rows and more are measured."""

ROWS = [
    *(Plan(outputs, 32, 1) for outputs in (2, 4, 8)),
    *(Plan(outputs, 64, 2) for outputs in (2, 4)),
    *(Plan(outputs, 128, 4) for outputs in (1, 2, 4)),
]
TILES = [Plan(16, 1, 4), Plan(16, 2, 4), Plan(16, 1, 8), Plan(32, 1, 4), Plan(32, 1, 8)]
BYTES = 200_000_000
"""Of the matrices of a graph, at least, where MOST are enough for it."""
MOST = 128


class Way(NamedTuple):
    """A kernel, and how it is cut."""

    kernel: str
    plan: Plan


def product(matrix: FrozenMatrix, x_RI: Tensor, way: Way) -> Tensor:
    """x W^T by that kernel."""
    tiled = way.kernel == "tiles"
    if isinstance(matrix, WordMatrix) and not tiled:
        return matrix.rows(x_RI, None)
    if isinstance(matrix, Nf4Matrix):
        return tile_kernels.nf4_tiles(x_RI, *matrix._parts(), None, way.plan)
    if isinstance(matrix, Int4Matrix):
        parts = matrix.codes, matrix.scales_OG, matrix.zeros_OG
        return tile_kernels.int4_tiles(x_RI, *parts, None, matrix.group, way.plan)
    assert isinstance(matrix, RowwiseMatrix), f"a {type(matrix).__name__}"
    call = tile_kernels.byte_tiles if tiled else row_kernels.byte_rows
    return call(x_RI, matrix.codes_OI, matrix.scales_O, None, way.plan)


def ways(kind: str) -> Iterator[Way]:
    """All that are tried; a row of words is cut in one way."""
    words = issubclass(KINDS[kind], WordMatrix)
    yield from (Way("rows", plan) for plan in (ROWS[:1] if words else ROWS))
    yield from (Way("tiles", plan) for plan in TILES)


def microseconds(work: Sequence[Callable[[], object]]) -> float:
    """Of one of them: all recorded as a CUDA graph, the median of 20 replays."""
    work[0]()
    torch.cuda.synchronize()
    # Not by torch.cuda.graph: it gives all cached memory back first, which takes longer than this.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for one in work:
            one()
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    times = []
    for number in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if number >= 3:
            times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times) / len(work)


def filled(kind: str, values_OI: Tensor) -> FrozenMatrix:
    """A matrix of these numbers where they lie."""
    matrix: FrozenMatrix = KINDS[kind](*values_OI.shape).to(values_OI.device)
    piece, *_ = matrix.pieces()
    piece.fill(values_OI)
    return matrix


class Bench:
    """One kind of matrix of one shape, and its copies."""

    def __init__(self, name: str, kind: str, values_OI: Tensor) -> None:
        self.name, self.kind = name, kind
        self.matrix = filled(kind, values_OI)
        self.bytes = sum(buffer.nbytes for buffer in self.matrix.buffers())
        self._dense = self.matrix.dense(torch.float32)
        self._copies: list[FrozenMatrix] = []
        if values_OI.is_cuda:
            number = max(2, min(MOST, -(-BYTES // self.bytes)))
            self._copies = [self.matrix, *(copy.deepcopy(self.matrix) for _ in range(number - 1))]

    def measured(self, rows: int, way: Way | None, call: Callable[..., Tensor]) -> dict[str, Any]:
        """One line of the results."""
        dtype = torch.bfloat16 if self._dense.is_cuda else torch.float16
        generator = torch.Generator(self._dense.device).manual_seed(rows)
        shape, device = (rows, self.matrix.inputs), self._dense.device
        x_RI = torch.randn(shape, generator=generator, device=device).to(dtype)
        line: dict[str, Any] = {"layer": self.name, "kind": self.kind, "rows": rows}
        line |= {"way": "other"} if way is None else {"way": way.kernel, "plan": list(way.plan)}
        try:
            expected_RO = x_RI.float() @ self._dense.T
            off_RO = call(self.matrix, x_RI).float() - expected_RO
            line["error"] = float(off_RO.abs().max() / expected_RO.abs().max())
            if self._copies:
                work = [partial(call, one, x_RI) for one in self._copies]
                line["us"] = round(microseconds(work), 2)
                line["gbs"] = round(self.bytes / line["us"] / 1e3, 1)
        except Exception as error:  # a way that the card has no room for
            line["failed"] = f"{type(error).__name__}: {error}"[:300]
        return line

    def by(self, rows: int, way: Way) -> dict[str, Any]:
        """A kernel of ours."""
        return self.measured(rows, way, lambda matrix, x_RI: product(matrix, x_RI, way))


def best(lines: Sequence[dict[str, Any]], kernel: str) -> list[Way]:
    """The quickest of a kernel's ways; none where all failed."""
    own = [line for line in lines if line["way"] == kernel and "failed" not in line]
    own.sort(key=lambda line: line.get("us", 0.0))
    return [Way(kernel, Plan(*line["plan"])) for line in own[:1]]


def of_kind(bench: Bench) -> Iterator[dict[str, Any]]:
    """All measurements of one kind and shape."""
    alone = [bench.by(1, way) for way in ways(bench.kind)]
    yield from alone
    few = [bench.by(8, way) for way in ways(bench.kind) if way.kernel == "tiles"]
    yield from few
    tile = best(few, "tiles")
    for rows in (2, 4):
        yield from (bench.by(rows, way) for way in (*best(alone, "rows"), *tile))
    for rows in (16, 32, 64) if bench.name in (*WIDE, *SMALL) else ():
        plans = [way.plan for way in tile] if rows == 16 else TILES
        yield from (bench.by(rows, Way("tiles", plan)) for plan in plans)
    if bench._copies and bench.name in WIDE:
        for rows in (1, 8, 64):
            yield {
                **bench.measured(rows, None, lambda m, x_RI: F.linear(x_RI, m.dense(x_RI.dtype))),
                "way": "made in full",
            }
        if isinstance(bench.matrix, Nf4Matrix):
            functional = bitsandbytes("benchmark")
            for rows in (1, 8):
                yield {
                    **bench.measured(
                        rows,
                        None,
                        lambda m, x_RI: functional.matmul_4bit(
                            x_RI, m.codes, m._state((m.outputs, m.inputs), x_RI.dtype)
                        ),
                    ),
                    "way": "bitsandbytes",
                }


def in_full(name: str, values_OI: Tensor) -> Iterator[dict[str, Any]]:
    """F.linear in bf16."""
    number = max(2, min(MOST, -(-BYTES // (2 * values_OI.numel()))))
    copies = [values_OI.bfloat16().clone() for _ in range(number)]
    for rows in (1, 2, 4, 8, *((16, 32, 64) if name in WIDE else ())):
        x_RI = torch.randn(rows, values_OI.shape[1], device="cuda", dtype=torch.bfloat16)
        us = microseconds([partial(F.linear, x_RI, one) for one in copies])
        line = {"layer": name, "kind": "bf16", "rows": rows, "way": "F.linear", "us": round(us, 2)}
        yield line | {"gbs": round(2 * values_OI.numel() / us / 1e3, 1)}


def compiled(jobs: Sequence[tuple[str, Way, int]]) -> None:
    """Compile these for the processes after this one: Triton keeps them on the disk."""
    for kind, way, rows in jobs:
        matrix = filled(kind, torch.randn(64, 1024, device="cuda"))
        x_RI = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        try:
            product(matrix, x_RI, way)
        except Exception as error:
            print(f"not compiled: {kind} {way} {rows}: {error}"[:200], flush=True)


def compile_all(kinds: Sequence[str], processes: int) -> None:
    """All kernels, many at once."""
    jobs = [(kind, way, 1) for kind in kinds for way in ways(kind)]
    padded = [(kind, Way("tiles", plan), 64) for kind in kinds for plan in TILES]
    jobs += [*padded, *((kind, way, 32) for kind, way, _ in padded)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compiled, [jobs[at::processes] for at in range(processes)])


def as_rows(found: dict[str, Any]) -> str:
    """As JSON, with a row for each measurement under the names of its columns: there are some
    thousand of them."""
    lines = found["lines"]
    rest = {name: value for name, value in found.items() if name != "lines"}
    columns = list(dict.fromkeys(name for line in lines for name in line))
    rows = [json.dumps([line.get(name) for name in columns]) for line in lines]
    head = json.dumps(rest | {"columns": columns, "lines": []}).removesuffix("]}")
    return f"{head}\n" + ",\n".join(rows) + "\n]}\n"


def table(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The best of each kind beside bf16, for people."""
    for layer in dict.fromkeys(line["layer"] for line in lines):
        for rows in sorted({line["rows"] for line in lines if line["layer"] == layer}):
            here = [one for one in lines if one["layer"] == layer and one["rows"] == rows]
            plain = [one["us"] for one in here if one["kind"] == "bf16"]
            for kind, way in dict.fromkeys((one["kind"], one["way"]) for one in here):
                timed = [o for o in here if (o["kind"], o["way"]) == (kind, way) and "us" in o]
                if timed:
                    one = min(timed, key=lambda line: line["us"])
                    yield (
                        f"{layer:11} {rows:3} {kind:5} {way:13} {one['us']:9.2f} us"
                        f" {one['gbs']:7.0f} GB/s {plain[0] / one['us'] if plain else 0:6.2f} x"
                        f" {one.get('plan', '')} {one.get('error', 0.0):.1e}"
                    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(KINDS))
    parser.add_argument("--processes", type=int, default=12)
    options = parser.parse_args(arguments)
    began, kinds, lines = time.perf_counter(), options.only.split(","), []
    card = torch.cuda.is_available()
    if card:
        compile_all(kinds, options.processes)
        print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    for name, shape in (SHAPES if card else SMALL).items():
        values_OI = torch.randn(shape, device="cuda" if card else "cpu") * 0.02
        if card:
            lines += in_full(name, values_OI)
        for kind in kinds:
            lines += of_kind(Bench(name, kind, values_OI))
            if card:
                torch.cuda.empty_cache()
        found = {
            "torch": torch.__version__,
            "card": torch.cuda.get_device_name() if card else "none",
            "seconds": round(time.perf_counter() - began, 1),
            "lines": lines,
        }
        options.out.write_text(as_rows(found), encoding="utf-8")
    print("\n".join(table(lines)))
    for line in lines:
        if "failed" in line or line.get("error", 0.0) > 0.02:
            print(f"WRONG {line}")
    print(f"{len(lines)} measurements in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
