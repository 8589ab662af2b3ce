"""Matrices of four bits a number, which one row meets as words of eight numbers each.

Shapes: I inputs, O outputs, R rows, N = I / 8 words of a row, G groups of inputs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finesight.model.frozen import FrozenMatrix


class Norm(NamedTuple):
    """The norm that a row goes through before a product."""

    weight_I: Tensor
    eps: float


class Words(NamedTuple):
    """A row as words meet it: the factors of the k-th numbers of all words in `factors_8N`; their
    sums over each group of inputs, where a number's zero is not a code's."""

    factors_8N: Tensor
    sums_G: Tensor | None


class WordMatrix(FrozenMatrix):
    """A matrix whose kernel for one row wants the row laid out first."""

    @property
    def in_order(self) -> bool:
        """Whether its columns are as they were: a row laid out for it serves others like it."""
        return True

    @abstractmethod
    def lay_out(self, x_1I: Tensor, norm: Norm | None) -> Words:
        """A row [1, I] for `row`, normed where there is a norm."""

    @abstractmethod
    def row(self, x: Words, y_O: Tensor, bias_O: Tensor | None, added_O: Tensor | None) -> None:
        """x W^T + bias + added into `y_O`."""

    def rows(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, row by row."""
        y_RO = x_RI.new_empty(len(x_RI), self.outputs)
        for x_1I, y_O in zip(torch.split(x_RI, 1), y_RO, strict=True):
            self.row(self.lay_out(x_1I, None), y_O, bias, None)
        return y_RO


def laid_out_for(
    matrices: Sequence[WordMatrix], x_1I: Tensor, norm: Norm | None
) -> Iterator[Words]:
    """The row for each matrix of a group: laid out once, unless one has an order of its own."""
    shared = matrices[0].lay_out(x_1I, norm)
    alike = all(matrix.in_order for matrix in matrices)
    yield shared
    for matrix in matrices[1:]:
        yield shared if alike else matrix.lay_out(x_1I, norm)
