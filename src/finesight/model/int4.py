"""Frozen weights in whole numbers of four bits: published so, by GPTQ (Frantar et al. 2022,
arXiv:2210.17323) in the layout of AutoGPTQ, or rounded to them while they are loaded.

Shapes: O outputs, I inputs of one layer, G groups of inputs that share a scale and a zero.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finesight.errors import UserError
from finesight.hub import ModelFolder
from finesight.model.frozen import KERNELS, FrozenWeight, Piece
from finesight.model.linear import GroupedLinear
from finesight.model.lora import hub_name
from finesight.model.words import Norm, WordMatrix, Words

if KERNELS:
    from finesight.model.kernels import int4 as int4_kernels
    from finesight.model.kernels import tile as tile_kernels
    from finesight.model.kernels import word as word_kernels

ROUNDED_GROUP = 64
"""Inputs that share a scale and a zero where they are rounded here."""

FAST_GROUPS = (32, 64, 128)

AT_ONCE = 1 << 22
"""Numbers that are made at once in fp32, where there is no kernel that needs no room for them."""

PLACES = 8
"""Numbers of four bits in a whole number of 32."""


class Int4Matrix(WordMatrix):
    """A frozen matrix [O, I] in about 4.19 bits a number: scale (code - zero), code and zero from 0
    to 15.

    Columns are sorted by their group; `order_I` says where each belongs. A byte of `codes`
    [O, I / 2] holds one of the first half in its low bits, one of the second in its high ones.
    """

    codes: Tensor
    scales_OG: Tensor
    zeros_OG: Tensor
    order_I: Tensor

    def __init__(self, outputs: int, inputs: int, *, group: int, where: str) -> None:
        super().__init__(outputs, inputs)
        self.group, self.where = group, where
        self._groups = -(-inputs // group)
        self._in_order = True
        self._taken: dict[str, Tensor] = {}
        self.register_buffer("codes", torch.empty(outputs, inputs // 2, dtype=torch.uint8))
        shape = outputs, self._groups
        self.register_buffer("scales_OG", torch.empty(shape, dtype=torch.float16))
        self.register_buffer("zeros_OG", torch.empty(shape, dtype=torch.uint8))
        self.register_buffer("order_I", torch.empty(inputs, dtype=torch.int32))

    def pieces(self) -> tuple[Piece, ...]:
        """The four tensors of AutoGPTQ."""
        shapes = {
            "qweight": (self.inputs // PLACES, self.outputs),
            "qzeros": (self._groups, self.outputs // PLACES),
            "scales": (self._groups, self.outputs),
            "g_idx": (self.inputs,),
        }
        return tuple(
            Piece(name, shape, ("F16",) if name == "scales" else ("I32",), partial(self.take, name))
            for name, shape in shapes.items()
        )

    @torch.no_grad()
    def take(self, name: str, values: Tensor) -> None:
        """One of the four; with the last of them the matrix is there. Raises UserError for groups
        of other sizes than the configuration says."""
        self._taken[name] = values.to(self.device)
        if len(self._taken) == len(self.pieces()):
            taken, self._taken = self._taken, {}
            self._sort(taken["g_idx"])
            self.scales_OG.copy_(taken["scales"].T)
            # A zero is stored less one; that of 0 as 15.
            self.zeros_OG.copy_(_codes(taken["qzeros"].T).add_(1).bitwise_and_(15))
            codes_IO = _codes(taken["qweight"])
            if not self._in_order:
                codes_IO = codes_IO.index_select(0, self.order_I)
            low, high = codes_IO.chunk(2)
            self.codes.copy_(high.bitwise_left_shift_(4).bitwise_or_(low).T)

    def _sort(self, group_I: Tensor) -> None:
        sorted_I, order_I = torch.sort(group_I, stable=True)
        places_I = torch.arange(self.inputs, device=group_I.device)
        if not torch.equal(sorted_I.long(), places_I // self.group):
            raise UserError(
                f"g_idx of a layer has groups of other sizes than {self.group}",
                where=self.where,
                expected=f"{self._groups} groups of {self.group} inputs each",
                remedy="take the config.json that was published with the weights",
            )
        self.order_I.copy_(order_I)
        self._in_order = torch.equal(order_I, places_I)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix [O, I], made anew, each number rounded once."""
        parts = self.scales_OG, self.zeros_OG, self.order_I, self.group
        if self._has_kernels():
            return int4_kernels.unpacked(self.codes, *parts, dtype)
        w_OI = torch.empty(self.outputs, self.inputs, dtype=dtype, device=self.device)
        rows = max(1, AT_ONCE // self.inputs)
        for some in (slice(at, at + rows) for at in range(0, self.outputs, rows)):
            codes = self.codes[some]
            values = torch.cat([codes & 15, codes >> 4], dim=1).float()
            values -= self._spread(self.zeros_OG[some])
            values *= self._spread(self.scales_OG[some])
            w_OI[some].index_copy_(1, self.order_I.long(), values.to(dtype))
        return w_OI

    def _spread(self, values: Tensor) -> Tensor:
        """What groups share, for each of their inputs."""
        return values.repeat_interleave(self.group, dim=1)[:, : self.inputs]

    def fits(self) -> bool:
        """Whether each half of a row is whole groups, of a power of two inputs."""
        whole = self.group in FAST_GROUPS and self.inputs % (2 * self.group) == 0
        return self._has_kernels() and whole

    @property
    def in_order(self) -> bool:
        """Whether the columns were not sorted."""
        return self._in_order

    def lay_out(self, x_1I: Tensor, norm: Norm | None) -> Words:
        """`WordMatrix`: four inputs of the first half beside four of the second."""
        if not self._in_order and norm is not None:
            x_1I, norm = F.rms_norm(x_1I, norm.weight_I.shape, *norm), None
        return word_kernels.laid_out(self._sorted(x_1I), norm, self.group)

    def row(self, x: Words, y_O: Tensor, bias_O: Tensor | None, added_O: Tensor | None) -> None:
        """x W^T + bias + added into `y_O`."""
        parts = self.codes, self.scales_OG, self.zeros_OG, self.group
        word_kernels.int4_row(x, *parts, y_O, bias_O, added_O)

    def tiles(self, x_RI: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias by tensor cores."""
        parts = self.codes, self.scales_OG, self.zeros_OG
        plan = tile_kernels.plan(self.outputs, len(x_RI))
        return tile_kernels.int4_tiles(self._sorted(x_RI), *parts, bias, self.group, plan)

    def _sorted(self, x_RI: Tensor) -> Tensor:
        return x_RI if self._in_order else x_RI.index_select(1, self.order_I)

    def _has_kernels(self) -> bool:
        return KERNELS and self.codes.is_cuda


class RoundedInt4Matrix(Int4Matrix):
    """A frozen matrix [O, I] whose numbers are rounded to four bits here, in about 4.38 bits each.

    The 16 codes of a group reach from its smallest number to its largest, zero among them: no
    number is off by more than half a scale, but for what a scale in fp16 is off by.
    """

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__(outputs, inputs, group=ROUNDED_GROUP, where="--weights")

    def pieces(self) -> tuple[Piece, ...]:
        """The dense matrix."""
        return self._whole(self.fill)

    @torch.no_grad()
    def fill(self, values_OI: Tensor) -> None:
        """Quantise a matrix, on the device where the bits will lie."""
        self._check_whole(values_OI)
        self.order_I.copy_(torch.arange(self.inputs))
        rows = max(1, AT_ONCE // self.inputs)
        for some in (slice(at, at + rows) for at in range(0, self.outputs, rows)):
            w_RI = values_OI[some].to(self.device).float()
            w_RGE = F.pad(w_RI, (0, -self.inputs % self.group)).view(len(w_RI), -1, self.group)
            least, largest = w_RGE.amin(2).clamp(max=0), w_RGE.amax(2).clamp(min=0)
            # At least the smallest number of fp16: nothing is divided by zero.
            scales = ((largest - least) / 15).half().clamp(min=2**-24)
            zeros = (-least / scales.float()).round().clamp(0, 15)
            codes = (w_RGE / scales.float()[..., None]).round() + zeros[..., None]
            low, high = codes.clamp(0, 15).byte().flatten(1)[:, : self.inputs].chunk(2, 1)
            self.codes[some] = low | (high << 4)
            self.scales_OG[some], self.zeros_OG[some] = scales, zeros.byte()


def _codes(packed: Tensor) -> Tensor:
    """int32 [A, B] of eight numbers each to uint8 [8 A, B]; the first has the lowest bits."""
    rows, columns = packed.shape
    codes = torch.empty(rows, PLACES, columns, dtype=torch.uint8, device=packed.device)
    for place in range(PLACES):
        codes[:, place] = (packed >> (4 * place)) & 15
    return codes.flatten(0, 1)


def published_group(folder: ModelFolder) -> int | None:
    """How many inputs share a scale, -1 for all; None for a model that is not quantised. Raises
    UserError for what is quantised otherwise than by GPTQ in four bits."""
    found = folder.config.get("quantization_config")
    if found is None:
        return None
    settings = found if isinstance(found, dict) else {}
    group = settings.get("group_size")
    wanted = {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq"}
    given = {"checkpoint_format": "gptq", **settings}
    whole = isinstance(group, int) and not isinstance(group, bool) and (group > 0 or group == -1)
    if not whole or any(given.get(key) != value for key, value in wanted.items()):
        shown = {key: given.get(key) for key in (*wanted, "group_size")}
        raise UserError(
            f"quantised weights: quantization_config says {shown}",
            where=str(folder.path / "config.json"),
            expected="weights in bf16, fp16 or fp32, or four bits by GPTQ (quant_method gptq,"
            " bits 4, checkpoint_format gptq, group_size -1 or a number of inputs)",
            remedy="take the same model without quantisation: tune.nf4=[language] in a recipe"
            " quantises it while it is loaded",
        )
    assert isinstance(group, int)
    return group


def keep_in_int4(model: nn.Module, layers: Collection[str], group: int, where: str) -> None:
    """Make room for four bits in these layers of a model without numbers. Raises UserError for one
    that shares its input with others that are not quantised, and for one that is to be in few bits
    of another kind."""
    for path, module in list(model.named_modules()):
        if not isinstance(module, GroupedLinear):
            continue
        names = [hub_name(path, output) for output in module.outputs]
        quantised = [name for name in names if name in layers]
        if not quantised:
            continue
        if isinstance(module.weight, FrozenWeight):
            raise UserError(
                f"{quantised[0]} is to be quantised, and is in four bits by GPTQ already",
                where="tune.nf4, tune.fp8 or --weights",
                expected="layers that are not quantised",
                remedy="leave that part out of nf4 and fp8, or --weights out, or take the model"
                " without quantisation",
            )
        sizes = (module.inputs, *module.outputs.values())
        if quantised != names or any(size % PLACES for size in sizes):
            raise UserError(
                f"of the layers {', '.join(names)}, {', '.join(quantised)} are quantised,"
                f" their sizes being {sizes}",
                where=where,
                expected=f"all of them or none, and sizes that are multiples of {PLACES}",
                remedy="take a model whose linear layers of one input are quantised alike",
            )
        size = module.inputs if group == -1 else group
        with torch.device("meta"):
            module.freeze_as(partial(Int4Matrix, group=size, where=path))
