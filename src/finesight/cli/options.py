"""Arguments and options that commands share, each said once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

RunOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RUN_OR_MODEL", help="A run folder, a model or adapter folder, or a hub name."
    ),
]

Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]

Precision = Annotated[
    Literal["auto", "bf16", "fp16", "fp32"],
    typer.Option(help="auto: bf16 on recent cards, fp16 on older ones, fp32 on a CPU."),
]
