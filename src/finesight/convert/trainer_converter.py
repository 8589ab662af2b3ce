"""Convert the settings that ms-swift and LLaMA-Factory share: those of the transformers Trainer."""

from __future__ import annotations

import math
import os
import re
import shlex
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from finesight.bounded_files import parse_json, read_json
from finesight.convert.config_loader import UNKNOWN_COUNT
from finesight.convert.external_config import ConversionNote, ExternalConfig
from finesight.convert.model_detection import PARTS, FamilySettings, detect_family
from finesight.errors import UserError, escape_unprintable
from finesight.recipe import load_trainer_settings

SettingValue = str | bool | int | float | None | list[object] | dict[str, object]

NOTE_UNKNOWN_PROCESSES = " (number of GPUs unknown: multiply by it)"

_TRACKERS = ("swanlab", "tensorboard", "wandb", "mlflow", "trackio")
_EMBEDDING_MODULES = {"embed_tokens", "lm_head", "all-embedding", "wte"}
_GENERIC_NAMES = ("data", "train", "dataset")
"""File names that do not identify a dataset, so that the name of their folder is used."""


@dataclass(frozen=True)
class DatasetSource:
    """Dataset of the other program, as a source for `finesight import`.

    Attributes:
        name: File, folder or hub address.
        limit: Number of rows from the start; None for all.
        title: Name of the dataset in the other program, if it differs from the file name.
    """

    name: str
    limit: int | None = None
    title: str | None = None

    def folder_name(self) -> str:
        """Return the folder name for the samples, from title, file or hub name."""
        name = self.name
        if name.startswith(("hf:", "modelscope:")):
            name = name.split(":")[1]
        path = Path(name)
        stem = path.stem if path.stem not in _GENERIC_NAMES else path.parent.name or path.stem
        return re.sub(r"[^\w.-]+", "-", self.title or stem).strip("-.") or "data"


class RecipeDraft:
    """Recipe under construction, with notes for the user and commands that import its data."""

    def __init__(self) -> None:
        self.settings: dict[str, SettingValue] = {}
        self.notes: list[ConversionNote] = []
        self.import_commands: list[str] = []
        self._comments: dict[str, str] = {}

    def set(self, name: str, value: SettingValue, comment: str = "") -> None:
        """Set a setting by its dotted name, with an optional YAML comment on its line."""
        self.settings[name] = value
        if comment:
            self._comments[name] = " ".join(escape_unprintable(comment).split())

    def add_difference(self, key: str, value: object, text: str) -> None:
        """Add a note about a setting whose effect differs in finesight, with a recommendation."""
        self.notes.append(ConversionNote("differs", key, str(value), text))

    def add_note(self, key: str, value: object, text: str) -> None:
        """Add a note about how a setting was converted."""
        self.notes.append(ConversionNote("note", key, str(value), text))

    def to_yaml(self, title: str) -> str:
        """Format the recipe as YAML with one line per setting.

        Sections and settings have the order in which they were set first.
        """
        position_by_prefix: dict[str, int] = {}
        paths: dict[str, list[int]] = {}
        for name in self.settings:
            prefixes = [name[: match.start()] for match in re.finditer(r"\.|$", name)]
            for prefix in prefixes:
                position_by_prefix.setdefault(prefix, len(position_by_prefix))
            paths[name] = [position_by_prefix[prefix] for prefix in prefixes]
        lines, section = [f"# {escape_unprintable(title)}"], list[str]()
        for name in sorted(paths, key=paths.__getitem__):
            *groups, last = name.split(".")
            for depth, group in enumerate(groups):
                if groups[: depth + 1] != section[: depth + 1]:
                    lines.append(f"{'  ' * depth}{group}:")
            section = groups
            value = yaml.safe_dump(
                [self.settings[name]], default_flow_style=True, allow_unicode=True, width=1 << 30
            )
            comment = f"  # {self._comments[name]}" if name in self._comments else ""
            lines.append(f"{'  ' * len(groups)}{last}: {value.strip()[1:-1]}{comment}")
        return "\n".join(lines) + "\n"


class TrainerConverter(ABC):
    """Conversion of a configuration to a recipe.

    Subclasses convert the settings of one program and implement `fill_recipe`.
    """

    def __init__(self, config: ExternalConfig) -> None:
        self.config = config
        self.draft = RecipeDraft()

    @abstractmethod
    def fill_recipe(self) -> None:
        """Fill the recipe draft.

        Raises UserError for an unsupported training method or model.
        """

    def copy_setting(self, name: str, key: str) -> None:
        """Set a recipe setting to the number of a setting, with a comment for a default value."""
        self.draft.set(name, self.config.get_float(key), self.config.default_comment(key))

    def require_method(self, key: str, supported: Iterable[str], reasons: Mapping[str, str]) -> str:
        """Return the value of a setting that selects the training method.

        Args:
            key: Setting with the method.
            supported: Supported values.
            reasons: Reasons why other values are not supported, for messages.

        Raises UserError for a value that is not supported.
        """
        name = self.config.get_str(key) or ""
        if name in supported:
            return name
        raise UserError(
            f"{key} is {name}: {reasons.get(name, 'not supported by finesight')}",
            where=self.config.where,
            expected=f"one of {', '.join(supported)}",
            remedy="use the other program for this training, or choose a supported method",
        )

    def set_model(
        self, model: str, hints: tuple[str | None, ...], hub: str, hub_comment: str, adapters: str
    ) -> FamilySettings:
        """Set base model and adapter, and return the model family.

        Args:
            model: Folder or hub name of the base model.
            hints: Settings that name the model type or the template.
            hub: Hub of the model, `hf` or `modelscope`.
            hub_comment: Comment for the recipe if the model is on ModelScope.
            adapters: Name of the setting that lists adapters to continue from.
        """
        family = detect_family(model, hints, self.config.where)
        revision = self.config.get_str("model_revision")
        is_local = os.path.exists(os.path.expanduser(model)) or model.startswith(("/", ".", "~"))
        model_name = model if is_local or revision in (None, "main") else f"{model}@{revision}"
        if hub == "modelscope" and not is_local:
            self.draft.set("model", f"modelscope:{model_name}", hub_comment)
        else:
            self.draft.set("model", model_name)
        first_adapter, *other_adapters = self.config.get_list(adapters) or (None,)
        if first_adapter is not None:
            self.draft.set("adapter", first_adapter)
        for adapter in other_adapters:
            text = "only one adapter can be trained further: merge the others"
            self.draft.add_difference(adapters, adapter, text)
        return family

    def set_data_files(
        self,
        sources: Iterable[DatasetSource],
        eval_sources: Iterable[DatasetSource],
        split_options: tuple[str, ...],
    ) -> None:
        """Set `data.train` and `data.eval`, and add the commands that import them.

        Without `split_options` of the import, `eval_sources` are the validation datasets.
        """
        used: set[str] = set()

        def add_imports(
            name: str, file_name: str, datasets: Iterable[DatasetSource], comment: str = ""
        ) -> list[str]:
            folders = []
            for source in datasets:
                stem = folder = source.folder_name()
                suffix = 2
                while folder in used:
                    folder, suffix = f"{stem}-{suffix}", suffix + 1
                used.add(folder)
                folders.append(f"samples/{folder}")
                limit = () if source.limit is None else ("--limit", str(source.limit))
                words = ["finesight", "import", source.name, folders[-1], *limit]
                options = split_options if name == "data.train" else ()
                self.draft.import_commands.append(shlex.join([*words, *options]))
            set_files(name, folders, file_name, comment)
            return folders

        def set_files(name: str, folders: list[str], file_name: str, comment: str = "") -> None:
            files: list[object] = [f"{folder}/{file_name}" for folder in folders]
            if files:
                self.draft.set(name, str(files[0]) if len(files) == 1 else files, comment)

        train_file = "train.jsonl" if split_options else "data.jsonl"
        comment = "from the commands printed by `finesight convert`"
        folders = add_imports("data.train", train_file, sources, comment)
        if split_options:
            set_files("data.eval", folders, "eval.jsonl")
        else:
            add_imports("data.eval", "data.jsonl", eval_sources)

    def set_trainer_settings(self) -> None:
        """Set schedule, optimizer, checkpoints, parallelism and trackers."""
        self._set_schedule()
        self._set_optimizer()
        self._set_checkpointing()
        self._set_parallelism()
        self._set_trackers()

    def _set_schedule(self) -> None:
        config, draft = self.config, self.draft
        steps = config.get_int("max_steps")
        if steps is not None and steps > 0:
            draft.set("train.steps", steps)
            if config.has("num_train_epochs") and not config.is_recorded:
                draft.add_note("max_steps", steps, "replaces num_train_epochs, as in transformers")
        else:
            self.copy_setting("train.epochs", "num_train_epochs")
        scheduler = config.get_str("lr_scheduler_type") or "linear"
        lr_schedules = load_trainer_settings()["lr_schedules"]
        if scheduler not in lr_schedules:
            text = (
                "supported schedules: cosine, linear, constant; cosine is set: choose the"
                " most similar one"
            )
            draft.add_difference("lr_scheduler_type", scheduler, text)
        schedule = lr_schedules.get(scheduler, "cosine")
        draft.set("train.lr_schedule", schedule, config.default_comment("lr_scheduler_type"))
        warmup_keys = ("warmup_ratio", "warmup_steps")
        if scheduler == "constant":
            comment = "`constant` has no warmup in transformers" * config.has(*warmup_keys)
            draft.set("train.warmup", 0, comment)
            return
        ratio, warmup_steps = (config.get_float(key) or 0.0 for key in warmup_keys)
        if min(warmup_steps, ratio) < 0 or ratio >= 1:
            key = "warmup_ratio" if ratio else "warmup_steps"
            raise config.build_error(key, "0 or more, a ratio below 1")
        # transformers interprets warmup_steps below 1 as a ratio.
        warmup = math.ceil(warmup_steps) if warmup_steps >= 1 else warmup_steps or ratio or 0
        draft.set("train.warmup", warmup, config.default_comment(*warmup_keys))

    def _set_optimizer(self) -> None:
        config, draft = self.config, self.draft
        name = config.get_str("optim") or "adamw_torch"
        optimizers = load_trainer_settings()["optimizers"]
        if name not in optimizers:
            text = "supported optimizers: adamw, adamw_8bit, muon; adamw is set"
            draft.add_difference("optim", name, text)
        draft.set("train.optimizer", optimizers.get(name, "adamw"))
        self.copy_setting("train.weight_decay", "weight_decay")
        betas: list[object] = [config.get_float("adam_beta1"), config.get_float("adam_beta2")]
        draft.set("train.betas", betas, config.default_comment("adam_beta1", "adam_beta2"))
        draft.set("train.max_grad_norm", config.get_float("max_grad_norm") or None)
        seed, data_seed = config.get_int("seed"), config.get_int("data_seed")
        draft.set("train.seed", seed, "the order of the samples still differs")
        draft.set("train.data_seed", seed if data_seed is None else data_seed)
        if config.get_bool("use_cpu"):
            draft.set("train.device", "cpu")

    def count_processes(self) -> tuple[int | None, str]:
        """Return the number of GPUs, NPROC_PER_NODE x NNODES, and a note if a launcher sets it.

        The number is None if NPROC_PER_NODE is not set, or if a launcher determines it.
        """
        if self.config.environment.get("NPROC_PER_NODE") == UNKNOWN_COUNT:
            return None, NOTE_UNKNOWN_PROCESSES
        procs_per_node = self.config.get_env_int("NPROC_PER_NODE")
        num_nodes = self.config.get_env_int("NNODES") or 1
        return None if procs_per_node is None else procs_per_node * num_nodes, ""

    def set_batch_size(self, accumulation: int, num_gpus: int, comment_suffix: str) -> None:
        """Set `train.batch_size`, the number of samples per optimizer step over all GPUs."""
        key = "per_device_train_batch_size"
        per_device = self.config.get_int(key) or 0
        factors = (per_device, accumulation, num_gpus)
        if min(factors) < 1 or max(factors) > 10**9:
            raise self.config.build_error(key, "an integer above 0")
        description = (
            f"{per_device} per device x {accumulation} accumulation steps x {num_gpus}"
            f" GPU{'' if num_gpus == 1 else 's'}{comment_suffix}"
        )
        self.draft.set("train.batch_size", math.prod(factors), description)
        self.draft.add_note("batch", math.prod(factors), description)

    def _set_checkpointing(self) -> None:
        strategy, steps = self.config.get_str("save_strategy"), self.config.get_float("save_steps")
        epochs = self.draft.settings.get("train.epochs")
        if strategy == "steps" and steps is not None and steps > 0:
            self.draft.set("train.save_every", steps if steps < 1 else math.ceil(steps))
        elif strategy == "epoch" and isinstance(epochs, float) and epochs > 1:
            self.draft.set("train.save_every", round(1 / epochs, 6), "once per epoch")
        else:
            text = "finesight saves four checkpoints per run and the final one"
            self.draft.add_note("save_strategy", strategy, text)
        max_checkpoints = self.config.get_int("save_total_limit")
        if max_checkpoints is not None and max_checkpoints > 0:
            self.draft.set("train.keep_checkpoints", max_checkpoints)

    def _set_parallelism(self) -> None:
        deepspeed, fsdp = self.config.get_value("deepspeed"), self.config.get_str("fsdp")
        if deepspeed:
            stage, offload = _read_deepspeed_stage(deepspeed)
            if stage is None:
                text = "unknown stage: set train.parallel"
                self.draft.add_difference("deepspeed", deepspeed, text)
                return
            mode = "ddp" if stage == 0 else "zero2" if stage < 3 else "fsdp"
            mode = "fsdp_offload" if offload and stage else mode
            comment = f"DeepSpeed stage {stage}{', offload' * offload}"
            self.draft.set("train.parallel", mode, comment)
        elif fsdp and fsdp.lower() not in ("false", "[]"):
            mode = "fsdp_offload" if "offload" in fsdp else "fsdp"
            self.draft.set("train.parallel", mode, f"fsdp: {fsdp}")

    def _set_trackers(self) -> None:
        """Set the experiment trackers of `report_to`, and SwanLab with `use_swanlab`."""
        names = [name for item in self.config.get_list("report_to") for name in item.split()]
        for name in names:
            if name not in (*_TRACKERS, "none", "all", "[]"):
                text = f"supported trackers: {', '.join(_TRACKERS)}"
                self.draft.add_difference("report_to", name, text)
        if self.config.get_bool("use_swanlab"):
            names.append("swanlab")
        project = self.config.get_str("swanlab_project")
        items: list[object] = [
            {"kind": name, "project": project} if project and name == "swanlab" else name
            for name in dict.fromkeys(names)
            if name in _TRACKERS
        ]
        if items:
            self.draft.set("track", items, self.config.default_comment("report_to", "use_swanlab"))

    def set_output_dir(self, default: str) -> None:
        """Set the output folder: a new one if a run recorded the configuration."""
        output_dir = self.config.get_str("output_dir")
        if self.config.is_recorded and output_dir:
            comment = f"new folder: {output_dir} contains the run of {self.config.program}"
            name = Path(output_dir).name or "converted"
            self.draft.set("output_dir", f"runs/{name}", comment)
            return
        comment = self.config.default_comment("output_dir")
        self.draft.set("output_dir", output_dir or default, comment)

    def set_parts(self, parts: Iterable[str], mode: str) -> None:
        """Set `tune` of the given parts to `lora` or `full`, and freeze the others.

        In ms-swift and LLaMA-Factory, embeddings and output head belong to the language model.
        """
        for part in PARTS:
            self.draft.set(f"tune.{part}", mode if part in parts else "frozen")
        if mode == "full" and "language" in parts:
            self.draft.set("tune.embeddings", "full", "part of the language model there")

    def set_lora_targets(
        self,
        family: FamilySettings,
        parts: set[str],
        key: str,
        targets: tuple[str, ...],
        match_suffix: bool,
    ) -> None:
        """Set LoRA on the layers that a list of names matches; parts without one are frozen.

        A name must end with the name of a layer (`match_suffix`, ms-swift) or be contained in it
        (LLaMA-Factory).
        """
        matched: dict[str, set[str]] = {part: set() for part in PARTS}
        unmatched, dotted = list[str](), list[str]()
        for target in targets:
            found = False
            for part, layers in family.layers.items():
                for layer in layers:
                    if f".{target}".endswith(f".{layer}") if match_suffix else target in layer:
                        matched[part].add(layer)
                        found = True
            if not found:
                unmatched.append(target)
            elif "." in target:
                dotted.append(target)
        if unmatched:
            text = f"no linear layer of {family.name} has this name: ignored"
            self.draft.add_difference(key, ", ".join(unmatched), text)
        if dotted:
            text = "all layers with this last name component have adapters in finesight"
            self.draft.add_difference(key, ", ".join(dotted), text)
        if not any(matched.values()):
            text = "no layers remain, so all linear layers of the language model have adapters"
            self.draft.add_note(key, ", ".join(targets), text)
            self.set_parts(parts & {"language"}, "lora")
            return
        used_parts = [part for part in ("language", "vision", "merger") if part in parts]
        used_layers = dict.fromkeys(layer for part in used_parts for layer in sorted(matched[part]))
        self.set_parts({part for part in parts if matched[part]}, "lora")
        if used_layers:
            self.draft.set("tune.lora.target_modules", list[object](used_layers))

    def set_lora_config(self, alpha: float, full_modules_key: str) -> None:
        """Set rank, alpha and dropout of LoRA, and modules that are trained in full.

        Rank-stabilized LoRA (Kalajdzievski 2023) scales by alpha / sqrt(rank) instead of alpha /
        rank. It is converted to LoRA with alpha * sqrt(rank).
        """
        config, draft = self.config, self.draft
        names = [name for item in config.get_list(full_modules_key) for name in item.split()]
        if _EMBEDDING_MODULES.intersection(names):
            comment = f"{full_modules_key}: embeddings and head are trained together"
            draft.set("tune.embeddings", "full", comment)
        if others := [name for name in names if name not in _EMBEDDING_MODULES]:
            text = "remain frozen: only whole parts can be trained without adapters"
            draft.add_difference(full_modules_key, ", ".join(others), text)
        rank = config.get_int("lora_rank")
        if rank is None or rank < 1:
            raise config.build_error("lora_rank", "an integer above 0")
        draft.set("tune.lora.rank", rank, config.default_comment("lora_rank"))
        if config.get_bool("use_rslora"):
            comment = f"{alpha:g} / sqrt(rank) there (use_rslora)"
            draft.set("tune.lora.alpha", alpha * math.sqrt(rank), comment)
        else:
            draft.set("tune.lora.alpha", alpha, config.default_comment("lora_alpha"))
        self.copy_setting("tune.lora.dropout", "lora_dropout")

    def set_quantization(
        self, parts: Iterable[str], method_key: str, bits_key: str, type_key: str, double_key: str
    ) -> None:
        """Set NF4 quantization of the parts, and report a difference for another format.

        The keys are the settings of method, number of bits, 4-bit format and double quantization.
        """
        config = self.config
        method, bits = config.get_str(method_key), config.get_str(bits_key)
        if bits == "4" and method in (None, "bnb", "bitsandbytes"):
            self.draft.set("tune.quantize.nf4", list[object](parts))
            quant_type, is_double = config.get_str(type_key), config.get_bool(double_key)
            if quant_type not in (None, "nf4") or not is_double:
                what = f"{quant_type or 'nf4'}{'' if is_double else ' without double quantization'}"
                text = "4-bit weights use NF4 with double quantization in finesight"
                self.draft.add_difference("quantization", what, text)
        elif bits or (method and config.program == "ms-swift"):
            text = "weights remain in 16 bits: tune.quantize.nf4 supports 4 bits"
            if bits:
                self.draft.add_difference(bits_key, f"{bits} by {method or 'bnb'}", text)
            else:
                self.draft.add_difference(method_key, method, text)


def _read_deepspeed_stage(deepspeed: object) -> tuple[int | None, bool]:
    """Return the ZeRO stage of a DeepSpeed configuration, and whether it offloads to the CPU.

    Args:
        deepspeed: Content of the configuration, its file, or a name such as `zero2_offload`.
    """
    name, content = str(deepspeed), deepspeed
    if isinstance(deepspeed, str) and (name.endswith(".json") or name.startswith("{")):
        try:
            content = parse_json(name) if name.startswith("{") else read_json(Path(name))
        except (UserError, ValueError):
            content = None
    if isinstance(content, dict):
        zero_config = content.get("zero_optimization")
        settings = zero_config if isinstance(zero_config, dict) else {}
        stage = settings.get("stage", 0)
        offload = any(
            isinstance(value, dict) and value.get("device", "cpu") != "none"
            for key, value in settings.items()
            if "offload" in str(key)
        )
        return (stage, offload) if stage in (0, 1, 2, 3) else (None, False)
    match = re.search(r"z(?:ero)?([0-3])", re.sub("[_-]", "", Path(name).name.lower()))
    return (int(match[1]) if match else None), "offload" in name.lower()
