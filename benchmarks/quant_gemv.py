"""Measure products of one or a few rows with quantized matrices, compared to bf16.

    python benchmarks/quant_gemv.py OUT.json [--only nf4,int4] [--processes 12]

Layer shapes are those of Qwen2-VL-2B, Qwen2.5-VL-3B and Qwen2.5-VL-7B, with random weights. A
measurement is the median of 20 replays of a CUDA graph with one product per matrix, with more
matrices than fit in the cache. `gbs` is GB/s of matrix bytes, `error` the maximum difference from
the fp64 product relative to the largest output. Every kernel configuration is measured with 1 and 8
rows; other row counts use the fastest one. Without a GPU, each kernel runs once on small matrices
to compute the errors.
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

from finesight.model.kernels import quant_gemm as quant_gemm_kernels
from finesight.model.kernels import quant_gemv as quant_gemv_kernels
from finesight.model.kernels.quant_gemv import MatmulTiling
from finesight.model.quant.base import Packed4BitMatrix, QuantizedMatrix
from finesight.model.quant.fp8 import Fp8Matrix
from finesight.model.quant.int4 import Int4Matrix, RtnInt4Matrix
from finesight.model.quant.int8 import Int8Matrix, RowwiseMatrix
from finesight.model.quant.nf4 import Nf4Matrix, import_bitsandbytes

MATRIX_FORMATS = {"nf4": Nf4Matrix, "int4": RtnInt4Matrix, "int8": Int8Matrix, "fp8": Fp8Matrix}
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
SMALL_SHAPES = {"small": (72, 256), "uneven": (40, 384)}
BATCHED_LAYERS = ("7B q o", "7B gate up", "7B down")
"""Layers measured with 16 rows or more."""

ROW_TILINGS = [
    *(MatmulTiling(outputs, 32, 1) for outputs in (2, 4, 8)),
    *(MatmulTiling(outputs, 64, 2) for outputs in (2, 4)),
    *(MatmulTiling(outputs, 128, 4) for outputs in (1, 2, 4)),
]
TILE_TILINGS = [
    MatmulTiling(16, 1, 4),
    MatmulTiling(16, 2, 4),
    MatmulTiling(16, 1, 8),
    MatmulTiling(32, 1, 4),
    MatmulTiling(32, 1, 8),
]
MIN_TOTAL_BYTES = 200_000_000
"""Minimum bytes of the matrices in a graph, up to the maximum number of matrices."""
MAX_COPIES = 128


class KernelConfig(NamedTuple):
    """A kernel and its block configuration."""

    kernel: str
    tiling: MatmulTiling


def matmul(matrix: QuantizedMatrix, x_RI: Tensor, config: KernelConfig) -> Tensor:
    """Compute x W^T with a kernel."""
    is_tiled = config.kernel == "tiles"
    if isinstance(matrix, Packed4BitMatrix) and not is_tiled:
        return matrix.gemv(x_RI, None)
    kernels, options = quant_gemm_kernels, (None, matrix.out_features, config.tiling)
    if isinstance(matrix, Nf4Matrix):
        *scales, codebooks = matrix._kernel_args()
        weights = *scales, *codebooks
        return kernels.gemm(kernels.nf4_gemm_kernel, x_RI, weights, *options, shuffled=True)
    if isinstance(matrix, Int4Matrix):
        parts, group_size = (matrix.codes, matrix.scales_OG, matrix.zeros_OG), matrix.group_size
        return kernels.gemm(kernels.int4_gemm_kernel, x_RI, parts, *options, group_size=group_size)
    assert isinstance(matrix, RowwiseMatrix), f"a {type(matrix).__name__}"
    operands = matrix.codes_OI, matrix.scales_O
    if is_tiled:
        return kernels.gemm(kernels.rowwise_gemm_kernel, x_RI, operands, *options)
    return quant_gemv_kernels.rowwise_gemv(x_RI, *operands, None, config.tiling)


def kernel_configs(weight_format: str) -> Iterator[KernelConfig]:
    """Return the tried configurations; GEMV over packed words has one."""
    is_packed = issubclass(MATRIX_FORMATS[weight_format], Packed4BitMatrix)
    yield from (
        KernelConfig("rows", plan) for plan in (ROW_TILINGS[:1] if is_packed else ROW_TILINGS)
    )
    yield from (KernelConfig("tiles", plan) for plan in TILE_TILINGS)


def time_graph_us(calls: Sequence[Callable[[], object]]) -> float:
    """Return the median time per call of a CUDA graph with all calls, over 20 replays."""
    calls[0]()
    torch.cuda.synchronize()
    # torch.cuda.graph would first free all cached memory, which takes longer.
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin()
        for one in calls:
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
    return statistics.median(times) / len(calls)


def build_matrix(weight_format: str, values_OI: Tensor) -> QuantizedMatrix:
    """Quantize a matrix on its device."""
    matrix: QuantizedMatrix = MATRIX_FORMATS[weight_format](*values_OI.shape).to(values_OI.device)
    part, *_ = matrix.tensor_specs()
    part.load(values_OI)
    return matrix


class GemvBenchmark:
    """A weight format and shape, with copies of the matrix."""

    def __init__(self, name: str, weight_format: str, values_OI: Tensor) -> None:
        self.name, self.weight_format = name, weight_format
        self.matrix = build_matrix(weight_format, values_OI)
        self.num_bytes = sum(buffer.nbytes for buffer in self.matrix.buffers())
        self._dense_weight = self.matrix.dequantize(torch.float32)
        self._copies: list[QuantizedMatrix] = []
        if values_OI.is_cuda:
            number = max(2, min(MAX_COPIES, -(-MIN_TOTAL_BYTES // self.num_bytes)))
            self._copies = [self.matrix, *(copy.deepcopy(self.matrix) for _ in range(number - 1))]

    def measure(
        self, rows: int, config: KernelConfig | None, call: Callable[..., Tensor]
    ) -> dict[str, Any]:
        """Measure one configuration and return its row."""
        dtype = torch.bfloat16 if self._dense_weight.is_cuda else torch.float16
        generator = torch.Generator(self._dense_weight.device).manual_seed(rows)
        shape, device = (rows, self.matrix.in_features), self._dense_weight.device
        x_RI = torch.randn(shape, generator=generator, device=device).to(dtype)
        line: dict[str, Any] = {"layer": self.name, "kind": self.weight_format, "rows": rows}
        line |= (
            {"way": "other"}
            if config is None
            else {"way": config.kernel, "plan": list(config.tiling)}
        )
        try:
            expected_RO = x_RI.float() @ self._dense_weight.T
            error_RO = call(self.matrix, x_RI).float() - expected_RO
            line["error"] = float(error_RO.abs().max() / expected_RO.abs().max())
            if self._copies:
                calls = [partial(call, one, x_RI) for one in self._copies]
                line["us"] = round(time_graph_us(calls), 2)
                line["gbs"] = round(self.num_bytes / line["us"] / 1e3, 1)
        except Exception as error:  # the GPU does not support this configuration
            line["failed"] = f"{type(error).__name__}: {error}"[:300]
        return line

    def measure_kernel(self, rows: int, config: KernelConfig) -> dict[str, Any]:
        """Measure a kernel of finesight."""
        return self.measure(rows, config, lambda matrix, x_RI: matmul(matrix, x_RI, config))


def fastest_config(results: Sequence[dict[str, Any]], kernel: str) -> list[KernelConfig]:
    """Return the fastest configuration of a kernel, or None if all failed."""
    own = [line for line in results if line["way"] == kernel and "failed" not in line]
    own.sort(key=lambda line: line.get("us", 0.0))
    return [KernelConfig(kernel, MatmulTiling(*line["plan"])) for line in own[:1]]


def benchmark_format(bench: GemvBenchmark) -> Iterator[dict[str, Any]]:
    """Run all measurements of one format and shape."""
    single_row = [bench.measure_kernel(1, way) for way in kernel_configs(bench.weight_format)]
    yield from single_row
    batched = [
        bench.measure_kernel(8, way)
        for way in kernel_configs(bench.weight_format)
        if way.kernel == "tiles"
    ]
    yield from batched
    tile = fastest_config(batched, "tiles")
    for rows in (2, 4):
        yield from (
            bench.measure_kernel(rows, way) for way in (*fastest_config(single_row, "rows"), *tile)
        )
    for rows in (16, 32, 64) if bench.name in (*BATCHED_LAYERS, *SMALL_SHAPES) else ():
        plans = [way.tiling for way in tile] if rows == 16 else TILE_TILINGS
        yield from (bench.measure_kernel(rows, KernelConfig("tiles", plan)) for plan in plans)
    if bench._copies and bench.name in BATCHED_LAYERS:
        for rows in (1, 8, 64):
            yield {
                **bench.measure(
                    rows, None, lambda m, x_RI: F.linear(x_RI, m.dequantize(x_RI.dtype))
                ),
                "way": "made in full",
            }
        if isinstance(bench.matrix, Nf4Matrix):
            functional = import_bitsandbytes("benchmark")
            for rows in (1, 8):
                yield {
                    **bench.measure(
                        rows,
                        None,
                        lambda m, x_RI: functional.matmul_4bit(
                            x_RI,
                            m.codes,
                            m._quant_state((m.out_features, m.in_features), x_RI.dtype),
                        ),
                    ),
                    "way": "bitsandbytes",
                }


def benchmark_bf16(name: str, values_OI: Tensor) -> Iterator[dict[str, Any]]:
    """Measure F.linear in bf16."""
    number = max(2, min(MAX_COPIES, -(-MIN_TOTAL_BYTES // (2 * values_OI.numel()))))
    copies = [values_OI.bfloat16().clone() for _ in range(number)]
    for rows in (1, 2, 4, 8, *((16, 32, 64) if name in BATCHED_LAYERS else ())):
        x_RI = torch.randn(rows, values_OI.shape[1], device="cuda", dtype=torch.bfloat16)
        us = time_graph_us([partial(F.linear, x_RI, one) for one in copies])
        line = {"layer": name, "kind": "bf16", "rows": rows, "way": "F.linear", "us": round(us, 2)}
        yield line | {"gbs": round(2 * values_OI.numel() / us / 1e3, 1)}


def compile_kernels(jobs: Sequence[tuple[str, KernelConfig, int]]) -> None:
    """Compile kernels into the disk cache of Triton for later processes."""
    for kind, way, rows in jobs:
        matrix = build_matrix(kind, torch.randn(64, 1024, device="cuda"))
        x_RI = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
        try:
            matmul(matrix, x_RI, way)
        except Exception as error:
            print(f"not compiled: {kind} {way} {rows}: {error}"[:200], flush=True)


def compile_all(weight_formats: Sequence[str], processes: int) -> None:
    """Compile all kernels in parallel."""
    jobs = [(kind, way, 1) for kind in weight_formats for way in kernel_configs(kind)]
    padded = [
        (kind, KernelConfig("tiles", plan), 64) for kind in weight_formats for plan in TILE_TILINGS
    ]
    jobs += [*padded, *((kind, way, 32) for kind, way, _ in padded)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        pool.map(compile_kernels, [jobs[at::processes] for at in range(processes)])


def to_json_table(report: dict[str, Any]) -> str:
    """Format the report as JSON with one compact row per measurement (several thousand)."""
    results = report["lines"]
    rest = {name: value for name, value in report.items() if name != "lines"}
    columns = list(dict.fromkeys(name for line in results for name in line))
    rows = [json.dumps([line.get(name) for name in columns]) for line in results]
    head = json.dumps(rest | {"columns": columns, "lines": []}).removesuffix("]}")
    return f"{head}\n" + ",\n".join(rows) + "\n]}\n"


def format_table(results: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Format the fastest configuration of each format, compared to bf16."""
    for layer in dict.fromkeys(line["layer"] for line in results):
        for rows in sorted({line["rows"] for line in results if line["layer"] == layer}):
            group = [one for one in results if one["layer"] == layer and one["rows"] == rows]
            bf16_us = [one["us"] for one in group if one["kind"] == "bf16"]
            for kind, way in dict.fromkeys((one["kind"], one["way"]) for one in group):
                timed = [o for o in group if (o["kind"], o["way"]) == (kind, way) and "us" in o]
                if timed:
                    one = min(timed, key=lambda line: line["us"])
                    yield (
                        f"{layer:11} {rows:3} {kind:5} {way:13} {one['us']:9.2f} us"
                        f" {one['gbs']:7.0f} GB/s {bf16_us[0] / one['us'] if bf16_us else 0:6.2f} x"
                        f" {one.get('plan', '')} {one.get('error', 0.0):.1e}"
                    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default=",".join(MATRIX_FORMATS))
    parser.add_argument("--processes", type=int, default=12)
    options = parser.parse_args(argv)
    began, kinds, lines = time.perf_counter(), options.only.split(","), []
    has_cuda = torch.cuda.is_available()
    if has_cuda:
        compile_all(kinds, options.processes)
        print(f"compiled after {time.perf_counter() - began:.0f} s", flush=True)
    for name, shape in (SHAPES if has_cuda else SMALL_SHAPES).items():
        values_OI = torch.randn(shape, device="cuda" if has_cuda else "cpu") * 0.02
        if has_cuda:
            lines += benchmark_bf16(name, values_OI)
        for kind in kinds:
            lines += benchmark_format(GemvBenchmark(name, kind, values_OI))
            if has_cuda:
                torch.cuda.empty_cache()
        report = {
            "torch": torch.__version__,
            "card": torch.cuda.get_device_name() if has_cuda else "none",
            "seconds": round(time.perf_counter() - began, 1),
            "lines": lines,
        }
        options.out.write_text(to_json_table(report), encoding="utf-8")
    print("\n".join(format_table(lines)))
    for line in lines:
        if "failed" in line or line.get("error", 0.0) > 0.02:
            print(f"WRONG {line}")
    print(f"{len(lines)} measurements in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
