"""From a run, a model folder, an adapter or a hub name to something that answers."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import ValidationError

from finesight.bounded_files import read_bytes
from finesight.config import Device, Precision, Weights
from finesight.encode.rendering import Rendering, renderer_of
from finesight.errors import UserError
from finesight.hub import ModelFolder, locate, named
from finesight.manifest import MANIFEST, Manifest
from finesight.model.adapter import CONFIG as ADAPTER_CONFIG
from finesight.model.adapter import install_adapter
from finesight.model.any_family import AnyModel, load_any
from finesight.model.bank import Bank
from finesight.model.network import VisionLanguageModel
from finesight.model.parts import Part
from finesight.model.peft_config import PeftSettings, read_settings
from finesight.model.weights import DTYPES


@dataclass(frozen=True, slots=True)
class Answerer:
    """A model in evaluation mode, and the renderer that it was trained with. `adapters` are those
    that a question may choose between, by name; None stands for the model without any."""

    model: AnyModel
    renderer: Rendering
    adapters: Mapping[str, int | None]


@dataclass(frozen=True, slots=True)
class Parts:
    """What has to be loaded: weights from `folder`, those of the parts `nf4` and `fp8` in few bits,
    then `adapter` on them; `manifest` is that of the run they come from."""

    folder: ModelFolder
    adapter: Path | None
    manifest: Manifest | None
    nf4: tuple[Part, ...] = ()
    fp8: tuple[Part, ...] = ()

    @property
    def quantised(self) -> str:
        """Which parts' weights the run had in few bits, in words; nothing where it had none."""
        kinds = ((self.nf4, "NF4"), (self.fp8, "FP8"))
        return " and ".join(f"{' and '.join(parts)} in {few}" for parts, few in kinds if parts)


def load_answerer(
    run_or_model: str,
    device: Device = "auto",
    precision: Precision = "auto",
    weights: Weights = "auto",
) -> Answerer:
    """Load what `finesight predict` and `finesight eval` speak to.

    `run_or_model` is a run folder (its manifest fixes picture sizes, system prompt and base), a
    model folder in the hub's layout (a merged one has its run's manifest), a folder with a PEFT
    adapter that names its base, or a hub name. `precision` auto is bf16 on cards that compute in
    it, fp16 on older ones, fp32 on CPU. `weights` auto is as they are stored, or for a run as it
    was trained; another kind is made while they are loaded. Raises UserError for what is missing,
    half-written, or not the base that the run started from.
    """
    parts = find_parts(run_or_model)
    model, renderer = _load_base(parts, device, precision, weights)
    if parts.adapter is not None:
        install_adapter(model, parts.adapter, base=parts.folder)
    model.eval()
    return Answerer(model, renderer, {_name(run_or_model): None})


def _load_base(
    parts: Parts, device: Device, precision: Precision, weights: Weights
) -> tuple[AnyModel, Rendering]:
    where = resolve_device(device)
    manifest = parts.manifest
    # The renderer first: it reads small files, and refuses a wrong family before any weights.
    renderer = renderer_of(
        parts.folder,
        manifest.picture if manifest else None,
        manifest.system if manifest else None,
    )
    dtype = resolve_precision(precision, where)
    model = load_any(parts.folder, dtype, where, parts.nf4, weights, parts.fp8)
    return model, renderer


BASE = "base"
"""What questions call the model without an adapter."""


def load_choice(
    run_or_model: str,
    more: Sequence[str] = (),
    device: Device = "auto",
    precision: Precision = "auto",
    weights: Weights = "auto",
) -> Answerer:
    """As `load_answerer`, for questions that choose: the tuned model by its folder's name, then
    `more` runs or adapters of the same base by theirs, then `base`.

    Raises UserError also for `more` that has another base, or a name that is there already.
    """
    parts = find_parts(run_or_model)
    if parts.adapter is None and not more:
        return load_answerer(run_or_model, device, precision, weights)
    model, renderer = _load_base(parts, device, precision, weights)
    bank, adapters = Bank(model), 0
    names: dict[str, int | None] = {}
    for source in (run_or_model, *more):
        own = find_parts(source)
        _check_beside(source, own, parts, names)
        if own.adapter is None:
            names[_name(source)] = None
            continue
        install_adapter(model, own.adapter, base=parts.folder)
        bank.take()
        names[_name(source)] = adapters
        adapters += 1
    assert isinstance(model, VisionLanguageModel), f"adapters on a {type(model).__name__}"
    model.readers = bank.install()
    model.eval()
    return Answerer(model, renderer, names if parts.adapter is None else names | {BASE: None})


def _check_beside(source: str, own: Parts, first: Parts, names: Mapping[str, int | None]) -> None:
    """Whether it can be answered from beside the first."""
    if own.folder.path.resolve() != first.folder.path.resolve():
        raise UserError(
            f"{source} is of the model {own.folder.path}",
            where="adapters",
            expected=f"adapters of {first.folder.path}, the first one's base",
            remedy="start another server for it",
        )
    if _name(source) in names or (own.adapter is None and names):
        raise UserError(
            f"{source} would be called {_name(source)}, as another one is",
            where="adapters",
            expected="each once, by a name of its own",
            remedy="rename its folder",
        )
    if own.manifest is not None and first.manifest is not None:
        for key in ("picture", "system"):
            mine, other = (str(m.model_dump()[key]) for m in (own.manifest, first.manifest))
            if mine != other:
                raise UserError(
                    f"{source} was trained with {key} {mine}",
                    where="adapters",
                    expected=f"{other}, as the first one was: questions are read one way for all",
                    remedy="start another server for it",
                )


def _name(run_or_model: str) -> str:
    """What questions call it: its folder's name, without the hub's owner."""
    return Path(run_or_model).name or Path(run_or_model).resolve().name


def cpu_precision() -> Literal["bf16", "fp32"]:
    """What a CPU trains in most quickly: bf16 where it multiplies it, which others only imitate."""
    able = torch.cpu.get_capabilities()
    return "bf16" if any(able.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")) else "fp32"


def resolve_device(device: Device) -> torch.device:
    """`auto` is CUDA where there is a card. Raises UserError when cuda is asked for in vain."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device is {device}, and torch {torch.__version__} finds no CUDA device",
            where="device",
            expected="a card and a torch build that sees it (torch.cuda.is_available())",
            remedy="choose the device cpu or auto, or install torch for your driver",
        )
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def resolve_precision(precision: Precision, device: torch.device) -> torch.dtype:
    """The type to compute in: `auto` is bf16 from compute capability 8.0 on, fp16 below, fp32 on
    a CPU."""
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def _read_manifest(path: Path) -> Manifest:
    remedy = "restore the manifest of the run, or train again"
    try:
        return Manifest.model_validate_json(
            read_bytes(path, expected="the manifest of a run", remedy=remedy)
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(
            f"{key} is {first['input']!r:.80}",
            where=str(path),
            expected=first["msg"],
            remedy=remedy,
        ) from error


def find_parts(run_or_model: str, base: str | None = None) -> Parts:
    """What a run, an adapter or a model is made of; nothing is loaded yet.

    `base` says where the base of a run or of an adapter is now, if not where it was. Raises
    UserError for what is missing, half-written or no base of the run, and for a `base` that is
    not needed.
    """
    # os.path's functions stand what cannot be a path: a home of nobody, a name too long.
    path = named(run_or_model)
    manifest = _read_manifest(path / MANIFEST) if os.path.isfile(path / MANIFEST) else None
    if manifest is not None and not (path / "config.json").is_file():
        return _parts_of_run(path, manifest, base)
    if os.path.isfile(path / ADAPTER_CONFIG):
        # What is not supported of an adapter is told before any weights are read.
        settings = read_settings(path / ADAPTER_CONFIG)
        return Parts(locate(base or _base_of(settings, path)), path, None)
    _refuse_base(base, run_or_model, "is a model of its own")
    return Parts(locate(run_or_model), None, manifest)


def _refuse_base(base: str | None, source: str, why: str) -> None:
    if base is not None:
        raise UserError(
            f"{source} {why}, it takes no base {base}",
            where="base",
            expected="a base only for an adapter, or a run with nothing but an adapter",
            remedy="leave base out",
        )


def _parts_of_run(run: Path, manifest: Manifest, base: str | None) -> Parts:
    model = run / "model" if manifest.tune.uses("full") else None
    adapter = run / "adapter" if manifest.tune.uses("lora") else None
    missing = [f"{part.name}/" for part in (model, adapter) if part and not part.is_dir()]
    if missing:
        raise UserError(
            f"{run.name} has no {' and no '.join(missing)}: it has not come to its end",
            where=str(run),
            expected="a finished run",
            remedy=f"go on with it: finesight train {run / 'recipe.yaml'} --resume",
        )
    if model is not None:
        _refuse_base(base, str(run), "holds its own whole model in model/")
        folder = ModelFolder(model)
    else:
        folder = locate(base or manifest.base)
        _check_base(manifest, folder, run)
    if folder.family != manifest.family:
        raise UserError(
            f"{folder.path} is of the family {folder.family}",
            where=str(run / MANIFEST),
            expected=f"the family {manifest.family}, which the run trained",
            remedy="restore the model that the run started from",
        )
    tune = manifest.tune
    return Parts(folder, adapter, manifest, tune.nf4 or (), tune.fp8 or ())


def _check_base(manifest: Manifest, folder: ModelFolder, run: Path) -> None:
    found = folder.fingerprint()
    if found != manifest.base_fingerprint:
        raise UserError(
            f"the base {folder.path} has the fingerprint {found}",
            where=str(run / MANIFEST),
            expected=f"{manifest.base_fingerprint}, the model that the run started from",
            remedy="restore that version of the model; an adapter fits no other",
        )


def _base_of(settings: PeftSettings, adapter: Path) -> str:
    base = settings.base_model_name_or_path
    if not base:
        raise UserError(
            f"base_model_name_or_path is {base!r}",
            where=str(adapter / ADAPTER_CONFIG),
            expected="the folder or hub name of the model that the adapter belongs to",
            remedy="write it there",
        )
    return base
