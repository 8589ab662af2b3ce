"""A merge with its proof: nothing appears that does not answer as the trained model does."""

from __future__ import annotations

import gc
import math
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finesight.config import Device, Precision
from finesight.data.jsonl import Located
from finesight.encode.encoded import Encoded
from finesight.encode.rendering import Rendering, renderer_of
from finesight.errors import UserError
from finesight.export import parity as compare
from finesight.export.card import Told, write_card
from finesight.export.files import complete, dropped_sampling, missing
from finesight.export.parity import Parity, Said
from finesight.export.questions import drawn, encoded, held_out
from finesight.export.space import check_space
from finesight.hub import ModelFolder
from finesight.infer.load import Parts, find_parts, resolve_device
from finesight.model.adapter import install_adapter
from finesight.model.geometry import Settings
from finesight.model.lora import adapters
from finesight.model.merge import (
    SHARD_BYTES,
    kept_precision,
    merge_into,
    refuse_foreign,
    round_to,
    thaw,
    write_merged,
)
from finesight.model.network import VisionLanguageModel, build
from finesight.model.parts import Part
from finesight.model.weights import DTYPES, hub_tensors, load_model
from finesight.storage import refuse_existing, write_folder

SAMPLES = 4
"""Questions that are compared, unless told otherwise."""

SPARE = 2 * 10**9
"""Bytes of memory beside the weights: activations, the cache, and the program itself."""

BESIDE = 64 * 2**20
"""Bytes on the disk beside weights and copied files: index, card, digests."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Proved:
    """A merged folder: how many layers changed, how many were in four bits, the precision of its
    weights, what was compared, what it lacks for other programs, and sampling settings of the base
    that were left out."""

    folder: Path
    layers: int
    thawed: int
    precision: str
    parity: Parity
    missing: tuple[str, ...]
    left_out: dict[str, Any]


def merge(
    source: str,
    parts: Parts,
    out: Path,
    *,
    precision: Precision = "auto",
    device: Device = "auto",
    samples: int = SAMPLES,
    shard_bytes: float = SHARD_BYTES,
    say: Say = print,
) -> Proved:
    """Merge `parts`, which `find_parts` found for `source`, into the new folder `out`, and compare
    the folder with them on `samples` questions with pictures: held-out ones of the run where they
    are in reach, else drawn ones.

    Raises UserError for an existing `out`, too little room on the disk, a foreign family, an
    adapter that does not fit, and a folder that is not the trained model: `out` then does not
    exist, nor after an interruption.
    """
    base = parts.folder
    refuse_foreign(base)
    refuse_existing(out)
    kept, least = kept_precision(base, precision)
    numbers = _numbers(base)
    beside = sum(path.stat().st_size for path in base.path.iterdir() if _is_small(path))
    check_space(out, numbers * DTYPES[kept].itemsize + beside + BESIDE)
    machine = _machine(device, numbers, least)
    with tempfile.TemporaryDirectory() as temporary, write_folder(out) as folder:
        asked = _ask(source, parts, samples, Path(temporary))
        trained = _as_trained(parts, asked, machine, say)
        written = _write(parts, asked, machine, folder, DTYPES[kept], shard_bytes)
        complete(folder, base.family, asked.renderer.end_ids)
        result = _compare(asked, machine, written, trained, folder, kept)
        compare.refuse_unlike(result, compare.BOUNDS[machine.dtype])
        lacking = tuple(missing(ModelFolder(folder)))
        left_out = dropped_sampling(base)
        told = Told(Path(source), parts, out.name, kept, written.thawed, result, lacking, left_out)
        write_card(folder, told)
    return Proved(out, written.layers, written.thawed, kept, result, lacking, left_out)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is compared on: `kind` says where the questions come from."""

    kind: str
    located: list[Located]
    prompts: list[Encoded]
    renderer: Rendering

    @property
    def names(self) -> list[str]:
        return [prompt.outline.id for prompt in self.prompts]


@dataclass(frozen=True, slots=True)
class _Machine:
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class _Written:
    """What the models before the disk said: the adapter on its base, the base alone, the sum, and
    the sum rounded (None where nothing is)."""

    layers: int
    thawed: int
    inside: Said
    plain: tuple[Tensor, ...]
    summed: tuple[Tensor, ...]
    rounded: tuple[Tensor, ...] | None


def _ask(source: str, parts: Parts, samples: int, folder: Path) -> _Asked:
    renderer = _renderer(parts.folder, parts)
    pairs, kind = encoded(renderer, held_out(source, samples)), "held-out pictures"
    if not pairs:
        pairs, kind = encoded(renderer, drawn(folder, samples)), "drawn pictures"
    if pairs:
        located, prompts = zip(*pairs, strict=True)
        return _Asked(kind, list(located), list(prompts), renderer)
    raise UserError(
        f"none of {samples} drawn pictures can be asked about",
        where=str(parts.folder.path),
        expected="a model that takes pictures of 200 pixels each way and a short question",
        remedy="check the picture rule of the run's manifest",
    )


def _renderer(folder: ModelFolder, parts: Parts) -> Rendering:
    manifest = parts.manifest
    return renderer_of(
        folder,
        manifest.picture if manifest else None,
        manifest.system if manifest else None,
    )


def _loaded(
    folder: ModelFolder,
    adapter: Path | None,
    machine: _Machine,
    nf4: Collection[Part] = (),
    fp8: Collection[Part] = (),
) -> VisionLanguageModel:
    model = load_model(folder, machine.dtype, machine.device, nf4, fp8=fp8)
    if adapter is not None:
        install_adapter(model, adapter, base=folder)
    return model.eval()


def _as_trained(parts: Parts, asked: _Asked, machine: _Machine, say: Say) -> Said | None:
    """What the run's own model said, its base in few bits; None where it is in none, or cannot be
    here."""
    if not parts.quantised:
        return None
    try:
        model = _loaded(parts.folder, parts.adapter, machine, parts.nf4, parts.fp8)
    except UserError as error:
        say(f"not compared with {parts.quantised}: {error.what}")
        return None
    answers = compare.answered(model, asked.prompts, asked.renderer.end_ids)
    return Said(answers, compare.weighed(model, asked.prompts, answers))


def _write(
    parts: Parts,
    asked: _Asked,
    machine: _Machine,
    folder: Path,
    kept: torch.dtype,
    shard_bytes: float,
) -> _Written:
    model = _loaded(parts.folder, parts.adapter, machine)
    prompts = asked.prompts
    answers = compare.answered(model, prompts, asked.renderer.end_ids)
    inside = Said(answers, compare.weighed(model, prompts, answers))
    _take_off(model)
    plain = compare.weighed(model, prompts, answers)
    thawed = thaw(model)
    if parts.adapter is not None:
        # For the sum in fp32, whatever was computed in.
        install_adapter(model, parts.adapter, base=parts.folder, dtype=torch.float32)
    layers = merge_into(model)
    summed = compare.weighed(model, prompts, answers)
    rounded = None
    if kept != machine.dtype:
        round_to(model, kept)
        rounded = compare.weighed(model, prompts, answers)
    write_merged(model, parts.folder, folder, kept, parts.manifest, shard_bytes)
    return _Written(layers, thawed, inside, plain, summed, rounded)


def _take_off(model: VisionLanguageModel) -> None:
    for _, group, _ in list(adapters(model)):
        group.adapter = None


def _compare(
    asked: _Asked,
    machine: _Machine,
    written: _Written,
    trained: Said | None,
    folder: Path,
    kept: str,
) -> Parity:
    found = find_parts(str(folder))
    renderer = _renderer(found.folder, found)
    prompts = [prompt for _, prompt in encoded(renderer, asked.located)]
    compare.same_prompts(prompts, asked.prompts)
    # The model that was written is gone by now: never are two in memory.
    gc.collect()
    model = _loaded(found.folder, None, machine)
    inside = written.inside
    answers = compare.answered(model, prompts, renderer.end_ids)
    after = Said(answers, compare.weighed(model, prompts, inside.answers))
    equal, partings = compare.partings(inside, after, asked.names)
    last = written.summed if written.rounded is None else written.rounded
    largest = compare.largest(inside.logits)

    def changed(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
        return compare.difference(found, expected) / largest

    made = written.layers or written.thawed
    against = None
    if trained is not None:
        theirs = compare.weighed(model, prompts, trained.answers)
        same = sum(a == b for a, b in zip(answers, trained.answers, strict=True))
        against = changed(theirs, trained.logits), same / len(answers)
    return Parity(
        questions=asked.kind,
        prompts=len(prompts),
        tokens=sum(map(len, inside.answers)),
        computed=_name(machine.dtype),
        stored=kept,
        adapter=changed(inside.logits, written.plain) if written.layers else None,
        summed=changed(written.summed, inside.logits) if made else None,
        rounded=None if written.rounded is None else changed(written.rounded, written.summed),
        reloaded=changed(after.logits, last),
        equal=equal,
        partings=partings,
        as_trained=against,
    )


def _name(dtype: torch.dtype) -> str:
    return next(name for name, one in DTYPES.items() if one == dtype)


def _is_small(path: Path) -> bool:
    return path.is_file() and path.suffix not in (".safetensors", ".bin")


def _numbers(base: ModelFolder) -> int:
    config = Settings(base.config, str(base.path / "config.json"))
    pixels = Settings(base.preprocessor, str(base.path / "preprocessor_config.json"))
    model = build(config, pixels, torch.float32, torch.device("meta"))
    return sum(tensor.numbers for tensor in hub_tensors(model))


def _machine(asked: Device, numbers: int, least: torch.dtype) -> _Machine:
    """In fp32 wherever there is room for it, on the card first; else on the CPU in `least`."""
    device = resolve_device(asked)
    needed = numbers * torch.float32.itemsize + SPARE
    if device.type == "cuda" and (asked == "cuda" or torch.cuda.mem_get_info(device)[0] > needed):
        return _Machine(device, torch.float32)
    roomy = needed <= _free_memory()
    return _Machine(torch.device("cpu"), torch.float32 if roomy else least)


def _free_memory() -> float:
    """Bytes that the system could give, without bound where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return math.inf
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024.0 * int(found[0]) if found else math.inf
