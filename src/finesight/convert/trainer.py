"""What both programs take from transformers: the optimisation, the precision, saving, trackers."""

from __future__ import annotations

import math
from pathlib import Path

from finesight.bounded_files import parse_json, read_json
from finesight.convert.draft import Draft, Value
from finesight.convert.given import Given
from finesight.convert.shell import is_open
from finesight.errors import UserError

_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
_OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "paged_adamw": "adamw",
    "paged_adamw_32bit": "adamw",
    "adamw_8bit": "adamw8bit",
    "adamw_bnb_8bit": "adamw8bit",
    "paged_adamw_8bit": "adamw8bit",
}
_SAVED = "checkpoints are written four times in the run here, and after the last step"
_TRACKERS = ("swanlab", "tensorboard", "wandb", "mlflow", "trackio")
_COUNTS = ("NPROC_PER_NODE", "NNODES")
UNTOLD = " (the file does not say how many: for N, set N times as much)"
_NO_TRACKER = ("none", "all", "[]")


def start(given: Given, draft: Draft, model: str, hub: tuple[str, str], adapters: str) -> None:
    """The model that the run starts from, of a `hub`, with a comment, where it is no folder, and
    the adapter that the key `adapters` lists."""
    revision = given.text("model_revision")
    local = Path(model).expanduser().exists() or model.startswith(("/", ".", "~"))
    named = model if local or revision in (None, "main") else f"{model}@{revision}"
    name, comment = hub
    if name == "modelscope" and not local:
        draft.set("model", f"modelscope:{named}", comment)
    else:
        draft.set("model", named)
    first, *others = given.words(adapters) or (None,)
    if first is not None:
        draft.set("adapter", first)
    for other in others:
        draft.differs(adapters, other, "only one adapter can be gone on from: merge the others")


def schedule(given: Given, draft: Draft) -> None:
    """How long, how fast and by which curve."""
    steps = given.count("max_steps")
    if steps is not None and steps > 0:
        draft.set("train.steps", steps)
        if given.has("num_train_epochs") and not given.finished:
            draft.note("max_steps", steps, "holds over num_train_epochs, as it did there")
    else:
        epochs = given.number("num_train_epochs")
        draft.set("train.epochs", epochs, given.default("num_train_epochs"))
    kind = given.text("lr_scheduler_type") or "linear"
    if kind not in _SCHEDULES:
        draft.differs(
            "lr_scheduler_type",
            kind,
            "cosine, linear and constant are the curves here; cosine is set: choose another if"
            " another is nearer",
        )
    draft.set("train.schedule", _SCHEDULES.get(kind, "cosine"), given.default("lr_scheduler_type"))
    draft.set("train.warmup", _warmup(given, kind), _warmup_comment(given, kind))


def _warmup(given: Given, kind: str) -> Value:
    if kind == "constant":
        return 0
    steps, ratio = given.number("warmup_steps") or 0.0, given.number("warmup_ratio") or 0.0
    if min(steps, ratio) < 0 or ratio >= 1:
        raise given.refused(
            "warmup_ratio" if ratio else "warmup_steps", "0 or more, a ratio below 1"
        )
    # transformers reads warmup_steps below 1 as a ratio.
    if steps >= 1:
        return math.ceil(steps)
    share = steps or ratio
    return share or 0


def _warmup_comment(given: Given, kind: str) -> str:
    keys = "warmup_ratio", "warmup_steps"
    if kind == "constant":
        text = "`constant` has no warm-up in transformers, whatever is set"
        return text if given.told(*keys) else ""
    return given.default(*keys)


def optimisation(given: Given, draft: Draft) -> None:
    """The optimiser and its numbers, except for the learning rates."""
    name = given.text("optim") or "adamw_torch"
    if name not in _OPTIMIZERS:
        draft.differs(
            "optim", name, "adamw, adamw8bit and muon are the optimisers here; adamw is set"
        )
    draft.set("train.optimizer", _OPTIMIZERS.get(name, "adamw"))
    draft.set("train.weight_decay", given.number("weight_decay"), given.default("weight_decay"))
    betas: list[object] = [given.number("adam_beta1"), given.number("adam_beta2")]
    draft.set("train.betas", betas, given.default("adam_beta1", "adam_beta2"))
    clip = given.number("max_grad_norm")
    draft.set("train.clip", clip if clip else None)
    seed = given.count("seed")
    draft.set("train.seed", seed, "the order of the samples is another one all the same")
    data_seed = given.count("data_seed")
    draft.set("train.data_seed", seed if data_seed is None else data_seed)
    if given.flag("use_cpu"):
        draft.set("train.device", "cpu")


def processes(given: Given) -> tuple[int | None, str]:
    """How many processes run on all machines, by the variables that both programs have for it, and
    what is told where the script works that out."""
    if any(is_open(given.environment.get(name, "")) for name in _COUNTS):
        return None, UNTOLD
    each, nodes = (given.variable(name) for name in _COUNTS)
    return None if each is None else each * (nodes or 1), ""


def batch(given: Given, draft: Draft, accumulation: int, gpus: int, told: str) -> None:
    """Samples of one step over all GPUs."""
    each = given.count("per_device_train_batch_size")
    if each is None or min(each, accumulation, gpus) < 1 or max(each, accumulation, gpus) > 10**9:
        raise given.refused("per_device_train_batch_size", "a whole number above 0")
    product = f"{each} on each device x {accumulation} accumulated x {gpus} {_gpus(gpus)}{told}"
    draft.set("train.batch", each * accumulation * gpus, product)
    draft.note("batch", each * accumulation * gpus, product)


def _gpus(count: int) -> str:
    return "GPU" if count == 1 else "GPUs"


def saving(given: Given, draft: Draft) -> None:
    """When checkpoints are written, and how many stay."""
    strategy, steps = given.text("save_strategy"), given.number("save_steps")
    if strategy == "steps" and steps is not None and steps > 0:
        draft.set("train.save_every", steps if steps < 1 else math.ceil(steps))
    elif strategy == "epoch" and (epochs := draft.settings.get("train.epochs")):
        share = 1 / float(str(epochs))
        if 0 < share < 1:
            draft.set("train.save_every", round(share, 6), "once in each epoch")
        else:
            draft.note("save_strategy", strategy, _SAVED)
    else:
        draft.note("save_strategy", strategy, _SAVED)
    limit = given.count("save_total_limit")
    if limit is not None and limit > 0:
        draft.set("train.keep", limit)


def sharing(given: Given, draft: Draft) -> None:
    """What several processes share out."""
    deepspeed, fsdp = given.value("deepspeed"), given.text("fsdp")
    if deepspeed:
        stage, offload = _stage(deepspeed)
        if stage is None:
            draft.differs(
                "deepspeed", deepspeed, "its stage is not known: set train.parallel yourself"
            )
            return
        how = "ddp" if stage == 0 else "zero2" if stage < 3 else "fsdp"
        if offload and stage:
            how = "fsdp_offload"
        draft.set("train.parallel", how, f"DeepSpeed's stage {stage}{', offloaded' * offload}")
    elif fsdp and fsdp.lower() not in ("false", "[]"):
        draft.set(
            "train.parallel", "fsdp_offload" if "offload" in fsdp else "fsdp", f"fsdp: {fsdp}"
        )


def _stage(deepspeed: object) -> tuple[int | None, bool]:
    """The stage of a DeepSpeed configuration, by its content or its name, and whether the CPU's
    memory takes a part."""
    name = str(deepspeed)
    content: object = deepspeed
    if isinstance(deepspeed, str) and (name.endswith(".json") or name.startswith("{")):
        try:
            content = parse_json(name) if name.startswith("{") else read_json(Path(name))
        except (UserError, ValueError):
            content = None
    if isinstance(content, dict):
        zero = content.get("zero_optimization")
        stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
        offload = isinstance(zero, dict) and any(
            "offload" in str(key) and _to_cpu(zero[key]) for key in zero
        )
        return (stage, offload) if stage in (0, 1, 2, 3) else (None, False)
    plain = Path(name).name.lower().replace("_", "").replace("-", "")
    found = [stage for stage in range(4) if f"zero{stage}" in plain or f"z{stage}" in plain]
    return (found[0] if found else None), "offload" in plain


def _to_cpu(offload: object) -> bool:
    return isinstance(offload, dict) and offload.get("device", "cpu") != "none"


def trackers(given: Given, draft: Draft, project: str | None) -> None:
    """Where figures go."""
    names = [name for word in given.words("report_to") for name in word.split()]
    known = [name for name in dict.fromkeys(names) if name in _TRACKERS]
    for name in names:
        if name not in (*_TRACKERS, *_NO_TRACKER):
            draft.differs("report_to", name, f"trackers here: {', '.join(_TRACKERS)}")
    if known:
        items: list[object] = [
            {"kind": name, "project": project} if project and name == "swanlab" else name
            for name in known
        ]
        draft.set("track", items, given.default("report_to"))


def output(given: Given, draft: Draft, otherwise: str) -> None:
    """The run's folder."""
    told = given.text("output_dir")
    if given.finished and told:
        comment = f"a new one: {told} holds the run of {given.program}"
        draft.set("output", f"runs/{Path(told).name or 'converted'}", comment)
        return
    draft.set("output", told or otherwise, given.default("output_dir"))


def require_method(given: Given, key: str, known: dict[str, str], reasons: dict[str, str]) -> str:
    """The method of training by its name here. Raises UserError for one that finesight has not."""
    name = given.text(key) or ""
    if name in known:
        return known[name]
    raise UserError(
        f"{key} is {name}: {reasons.get(name, 'a method that finesight does not have')}",
        where=given.where,
        expected=f"one of {', '.join(known)}",
        remedy="stay with the other program for this training, or choose one of these",
    )
