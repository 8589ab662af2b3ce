"""Convert the settings that all programs share: those of the transformers Trainer."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, count, islice, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from finesight.convert.external_config import (
    PARTS,
    UNKNOWN_COUNT,
    ConversionNote,
    ExternalConfig,
    FamilySettings,
    detect_family,
    is_empty,
    map_objective_methods,
)
from finesight.convert.launcher_config import (
    load_config_value,
    read_accelerate_sharding,
    read_deepspeed_sharding,
    read_fsdp_sharding,
)
from finesight.convert.registered_data import Reading
from finesight.errors import UserError, escape_unprintable, format_count
from finesight.files.storage import temporary_folder
from finesight.ingest.import_source import (
    NUM_PREVIEW_ROWS,
    ImportOptions,
    open_unvalidated,
)
from finesight.ingest.mapping import parse_mapping
from finesight.ingest.mapping_format import build_mapping_format
from finesight.metric_components import METRICS
from finesight.objective_components import DEFAULT_OBJECTIVE, OBJECTIVES, ObjectiveComponent
from finesight.optimizer_components import DEFAULT_OPTIMIZER
from finesight.samples.sample import Sample
from finesight.settings.recipe import invert_groups, load_trainer_settings
from finesight.settings.recipe_template import detect_task

NOTE_UNKNOWN_PROCESSES = " (number of GPUs unknown: multiply by it)"

_DEEPSPEED_SCHEDULES = {
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
}
_EMBEDDING_MODULES = {"embed_tokens", "lm_head", "all-embedding", "wte"}


class DatasetSource(NamedTuple):
    """File, folder or hub address for an import, number of rows, and name of a dataset.

    Attributes:
        reading: How an import reads its keys, if it does not detect them.
    """

    name: str
    limit: int | None = None
    title: str | None = None
    reading: Reading = Reading()


class RecipeDraft:
    """Recipe under construction: notes, imports of its data, and keys that its objective uses.

    `mappings` has the contents of mapping files, by the index of their import.
    """

    def __init__(self) -> None:
        self.settings: dict[str, object] = {}
        self.notes: list[ConversionNote] = []
        self.imports: list[Mapping[str, object]] = []
        self.mappings: dict[int, Mapping[str, Any]] = {}
        self.used_keys: set[str] = set()
        self._comments: dict[str, str] = {}

    def set(self, name: str, value: object, comment: str = "") -> None:
        """Set a setting by its dotted name, with an optional YAML comment on its line."""
        self.settings[name] = value
        if comment:
            self._comments[name] = "  # " + " ".join(escape_unprintable(comment).split())

    def note(self, key: str, value: object, text: str, *, differs: bool = False) -> None:
        """Add a note about the conversion of a setting, or about an effect that differs."""
        self.notes.append(ConversionNote("differs" if differs else "note", key, str(value), text))

    def to_yaml(self, title: str) -> str:
        """Format the recipe as YAML with one line per setting, in the order of the settings."""
        tree: dict[str, Any] = {}
        for name, value in self.settings.items():
            *groups, last = name.split(".")
            section = tree
            for group in groups:
                section = section.setdefault(group, {})
            text = yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=2**30)
            section[last] = text.strip()[1:-1] + self._comments.get(name, "")
        return "\n".join([f"# {escape_unprintable(title)}", *_format_section(tree), ""])


def _format_section(section: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _format_section(value, indent + "  ")
        else:
            yield f"{indent}{name}: {value}"


class TrainerConverter:
    """Conversion of a configuration to a recipe. Subclasses convert the settings of one program."""

    def __init__(self, config: ExternalConfig) -> None:
        self.config = config
        self.draft = RecipeDraft()
        self.objective: str | None = None
        self.is_native = True
        self.hub = "hf"

    def fill_recipe(self) -> None:
        """Fill the recipe draft from the configuration."""
        raise NotImplementedError

    @property
    def objective_rules(self) -> Mapping[str, Any]:
        """Rules for settings of the training method (`trainers.yaml` of its objective)."""
        objective = map_objective_methods().get(self.config.method or "", DEFAULT_OBJECTIVE)
        rules: Mapping[str, Any] = load_trainer_settings()["objective_rules"].get(objective, {})
        return rules

    def copy_setting(self, name: str, key: str) -> None:
        """Copy a numeric setting into the recipe, and comment on a default value."""
        self.draft.set(name, self.config.get_float(key), self.config.default_comment(key))

    def require_method(self, key: str, supported: Iterable[str], value: str | None = None) -> str:
        """Return the value of a setting that selects the training method, or the given `value`.

        Raises UserError for a value that is not supported.
        """
        name = value or self.config.get_str(key) or ""
        if name in supported:
            return name
        reasons = invert_groups(load_trainer_settings()["methods"])
        raise UserError(
            f"{key} is {name}: {reasons.get(name, 'not supported by finesight')}",
            where=self.config.where,
            expected=f"one of {', '.join(supported)}",
            remedy=f"set {key} to one of these in a copy of the file, and convert the copy",
        )

    def set_objective(self, key: str, name: str) -> None:
        """Set the objective, or keep what it shares with SFT. Raises UserError without any."""
        methods_of_losses = load_trainer_settings()["losses"]
        losses = (self.config.get_str("pref_loss") or "", *self.config.get_list("loss_type"))
        # LLaMA-Factory, and recorded runs of ms-swift, name some objectives by their loss.
        for loss in losses:
            if name in methods_of_losses.get(loss, "").split():
                name = loss
                self.draft.used_keys.add("loss_type")
        self.config = replace(self.config, method=name)
        objective = map_objective_methods().get(name, DEFAULT_OBJECTIVE)
        if objective != DEFAULT_OBJECTIVE:
            self.draft.set("train.objective", objective)
            component = OBJECTIVES[objective]
            if component.first_recipe.has_rewards:
                self._set_rewards()
            self._set_objective_settings(component)
            for setting in component.model_settings:
                self._set_teacher(f"train.{objective}.{setting}")
            return
        reason = invert_groups(load_trainer_settings()["objectives"]).get(name)
        if reason is None:
            self.require_method(key, ("sft",), name)
            return
        self.objective = name
        text = (
            "is not supported: the recipe is a supervised fine-tuning with the same model, adapter"
            " and schedule; import data with answers, and set train.learning_rate"
        )
        self.draft.note(key, name, f"{reason} {text}", differs=True)

    def _set_rewards(self) -> None:
        """Set the rewards of the same meaning, and note functions to write."""
        expression = self.config.unresolved.get("reward_funcs", "")  # names of a Python script
        names = [*self.config.get_list("reward_funcs"), *re.findall(r"[A-Za-z_][\w.]*", expression)]
        weights = self.config.get_list("reward_weights")
        known, rewards = load_trainer_settings()["rewards"], list[Mapping[str, object]]()
        for path, text in zip_longest(names, weights[: len(names)], fillvalue="1"):
            name, weight = path.rpartition(".")[2], 0.0
            with suppress(ValueError):
                weight = float(text)
            if name in known and weight > 0:
                rewards.append({**known[name], "weight": weight})
                continue
            item = f"{{name: rewards.py:{name}, weight: {text}}}"
            note = f"write a function with a positive weight, and add it to rewards: {item}"
            self.draft.note("reward_funcs", path, note, differs=True)
        comment = "replace it by your own: no reward function has an equal in finesight"
        self.draft.set("rewards", rewards or [{"name": "exact"}], "" if rewards else comment)

    def _set_objective_settings(self, component: ObjectiveComponent[Any]) -> None:
        """Copy the settings of the section of an objective that the program has, too."""
        config, draft, content = self.config, self.draft, load_trainer_settings()
        objective, section = component.name, component.settings
        rules = self.objective_rules
        accepted: dict[str, object] = {}
        for name in section.model_fields:
            renamed = content["renamed"].get(f"train.{objective}.{name}", "")
            keys = rules.get("names", {}).get(name, f"{renamed} {name}").split()
            if not keys:
                continue
            key = next(filter(config.has, keys), keys[-1])
            switch, disabled = rules.get("switches", {}).get(name, ("", None))
            is_disabled = (config.get_str(switch) or "").lower() == "false"
            value = disabled if is_disabled else config.get_value(key)
            if name == "loss_type" and isinstance(value, list) and len(value) == 1:
                value = value[0]
            values = rules.get("values", {}).get(name, {})
            value = values.get(str(value).lower(), value)
            if is_empty(value):
                continue
            draft.used_keys |= {*keys}
            try:
                given = section.model_validate(accepted | {name: value}, strict=False)
            except ValidationError as error:
                text = f"is not supported, the default is used: {error.errors()[0]['msg']}"
                draft.note(key, value, text, differs=True)
                continue
            accepted[name] = value
            comment = config.default_comment(key, switch)
            draft.set(f"train.{objective}.{name}", dict(given)[name], comment)
        added = component.complete_converted(section.model_validate(accepted, strict=False))
        for name, value in added.items():
            draft.settings.setdefault(f"train.{objective}.{name}", value)

    def reset_changed_references(self) -> None:
        """Remove settings that compare with the base model, for a run that changes it."""
        objective = self.draft.settings.get("train.objective")
        for name, text in self.objective_rules.get("reset", {}).items():
            value = self.draft.settings.pop(f"train.{objective}.{name}", None)
            if value:
                self.draft.note(name, value, text, differs=True)

    def _set_teacher(self, name: str) -> None:
        """Set the teacher of a distillation, which a script may load by itself."""
        if teacher := self.draft.settings.get(name):
            self.draft.set(name, self._add_hub(str(teacher), "teacher_model_revision"))
            return
        self.draft.set(name, "TEACHER")
        text = "replace TEACHER in the recipe by the teacher, a larger model of the same family"
        given = self.config.unresolved.get("teacher_model", "not set")
        self.draft.note("teacher_model", given, text, differs=True)

    def _add_hub(self, model: str, revision_key: str) -> str:
        """Return the name of a model with its hub and revision. A path remains."""
        if _is_path(model):
            return model
        revision = self.config.get_str(revision_key)
        model = model if revision in (None, "main") else f"{model}@{revision}"
        return f"modelscope:{model}" if self.hub == "modelscope" else model

    def set_model(self, model: str, hints: tuple[str | None, ...], adapters: str) -> FamilySettings:
        """Set base model and adapter, and return the model family, which `hints` may name.

        `adapters` is the setting of adapters to continue from.
        """
        family = detect_family(model, hints, self.config.where)
        self.is_native = family.name != "other"
        text = "runs on the transformers backend: pip install 'finesight[hf]'"
        is_internvl = "internvl" in model.lower() and not model.lower().endswith("-hf")
        if is_internvl and not self.is_native and not _is_path(model):
            model, text = f"{model}-hf", f"the repository for transformers; {text}"
        model = self._add_hub(model, "model_revision")
        if _is_path(model) and not os.path.exists(os.path.expanduser(model)):
            missing = "does not exist here: set `model` to its folder or to its name on a hub"
            self.draft.note("model", model, missing)
        if not self.is_native:
            self.draft.note("model", model, text)
        self.draft.set("model", model)
        for adapter in self.config.get_list(adapters)[:1]:
            self.draft.set("adapter", adapter)
        return family

    def set_data_files(
        self,
        sources: Sequence[DatasetSource],
        eval_sources: Sequence[DatasetSource],
        split: Mapping[str, object],
    ) -> None:
        """Set data files and arguments of their imports, with those of a validation `split`."""
        files: dict[str, list[str]] = {"data.train": [], "data.eval": []}
        used, comment = set[str](), "import data with answers"
        for name, datasets in (("data.train", sources), ("data.eval", eval_sources)):
            for source in datasets:
                stem = f"samples/{_folder_name(source)}"
                numbered = (f"{stem}-{suffix}" for suffix in count(2))
                folder = next(one for one in chain([stem], numbered) if one not in used)
                used.add(folder)
                if self.objective is None:
                    comment = "from the imports that the conversion has printed"
                    limit = {} if source.limit is None else {"limit": source.limit}
                    question = self._find_question(source)
                    arguments = {"source": source.name, "out": folder, **limit, **split}
                    if source.reading.columns:
                        arguments["columns"] = source.reading.columns
                    if source.reading.mapping is not None:
                        self.draft.mappings[len(self.draft.imports)] = source.reading.mapping
                    self.draft.imports.append(arguments | question)
                files[name].append(f"{folder}/{'train' if split else 'data'}.jsonl")
                files["data.eval"] += [f"{folder}/eval.jsonl"] if split else []
        for name, paths in files.items():
            if paths:
                value = paths[0] if len(paths) == 1 else paths
                self.draft.set(name, value, comment * (name == "data.train"))
        if files["data.eval"]:
            self._set_metric(sources[0])

    def _find_question(self, source: DatasetSource) -> dict[str, object]:
        """Return the argument of an import with the question of a script.

        Data with questions of their own keep these.
        """
        prompt = self.config.get_str("prompt")
        if prompt is None:
            return {}
        text = "asked in code for each sample: add --prompt to the import if the data have no"
        given: dict[str, object] = {}
        if not _load_preview(source) and _load_preview(source, prompt):
            text = "asked in code for each sample; the data have no"
            given = {"prompt": prompt}
        self.draft.note("prompt", prompt, f"{text} question", differs=not given)
        return given

    def _set_metric(self, source: DatasetSource) -> None:
        """Set `eval.metric` by the answers in a file, and the interval of evaluations."""
        samples = _load_preview(source)
        task = detect_task(samples) if samples else None
        if task is None or self.objective is not None:
            tasks = ", ".join(METRICS)
            text = f"set by the answers, which {source.name} does not show here: one of {tasks}"
            self.draft.note("eval.metric", "none", text)
            return
        self.draft.set("eval.metric", task.metric, f"by the answers in {source.name}")
        self.draft.set("eval.max_new_tokens", task.max_new_tokens)
        for key in ("eval_steps", "eval_strategy", "evaluation_strategy"):
            if self.config.has(key):
                value = self.config.get_str(key)
                self.draft.note(key, value, f"evaluation by generation, metric {task.metric}")
        if interval := self.config.get_float("eval_steps"):
            self.draft.set("eval.every", int(interval) if interval >= 1 else interval)

    def set_trainer_settings(self, num_visible: int = 0, default_accumulation: int = 1) -> None:
        """Set schedule, optimizer, parallelism and batch size."""
        self._set_schedule()
        self._set_optimizer()
        self._set_parallelism()
        self._set_batch_size(num_visible, default_accumulation)

    def _set_schedule(self) -> None:
        config, draft = self.config, self.draft
        steps = config.get_int("max_steps")
        if steps is not None and steps > 0:
            draft.set("train.steps", steps)
            if config.has("num_train_epochs") and not config.is_recorded:
                draft.note("max_steps", steps, "replaces num_train_epochs, as in transformers")
        else:
            self.copy_setting("train.epochs", "num_train_epochs")
        scheduler = self._translate("lr_scheduler_type", "linear", "train.lr_schedule", "cosine")
        warmup_keys = ("warmup_ratio", "warmup_steps")
        if scheduler == "constant":
            comment = "`constant` has no warmup in transformers" * config.has(*warmup_keys)
            draft.set("train.warmup", 0, comment)
            return
        ratio, warmup_steps = (config.get_float(key) or 0.0 for key in warmup_keys)
        # transformers interprets warmup_steps below 1 as a ratio.
        warmup = math.ceil(warmup_steps) if warmup_steps >= 1 else warmup_steps or ratio or 0
        draft.set("train.warmup", warmup, config.default_comment(*warmup_keys))

    def _translate(self, key: str, default: str, name: str, substitute: str) -> str:
        """Set a recipe setting by a table of names, and return the name in the other program."""
        given = self.config.get_str(key) or default
        table = "lr_schedules" if key == "lr_scheduler_type" else "optimizers"
        names = invert_groups(load_trainer_settings()[table])
        if given not in names:
            supported = ", ".join(dict.fromkeys(names.values()))
            text = f"supported: {supported}; {substitute} is set: choose the most similar one"
            self.draft.note(key, given, text, differs=True)
        self.draft.set(name, names.get(given, substitute), self.config.default_comment(key))
        return given

    def _set_optimizer(self) -> None:
        config, draft = self.config, self.draft
        self._translate("optim", "adamw_torch", "train.optimizer", DEFAULT_OPTIMIZER)
        self.copy_setting("train.weight_decay", "weight_decay")
        betas = [config.get_float("adam_beta1"), config.get_float("adam_beta2")]
        draft.set("train.betas", betas, config.default_comment("adam_beta1", "adam_beta2"))
        draft.set("train.max_grad_norm", config.get_float("max_grad_norm") or None)
        draft.set("train.seed", config.get_int("seed"), "the order of the samples still differs")

    def count_gpus(self, num_visible: int) -> tuple[int, str]:
        """Return the number of processes (default: `num_visible`, or 1), and a note if unknown."""
        config = self.config
        if recorded := config.get_int("global_world_size"):
            return max(1, recorded), ""
        if config.get_str("NPROC_PER_NODE") == UNKNOWN_COUNT:
            return 1, NOTE_UNKNOWN_PROCESSES
        num_gpus = config.get_int("NPROC_PER_NODE") or num_visible
        note = " (one process)" if config.program == "ms-swift" else NOTE_UNKNOWN_PROCESSES
        return max(1, num_gpus) * (config.get_int("NNODES") or 1), "" if num_gpus else note

    def _set_batch_size(self, num_visible: int, default_accumulation: int) -> None:
        """Set `train.batch_size`, the number of samples per optimizer step over all GPUs."""
        key, accumulation = "per_device_train_batch_size", default_accumulation
        if self.config.has("gradient_accumulation_steps"):
            accumulation = self.config.get_int("gradient_accumulation_steps") or 0
        (num_gpus, suffix), per_device = self.count_gpus(num_visible), self.config.get_int(key) or 0
        total = per_device * accumulation * num_gpus
        gpus = f"{format_count(num_gpus, 'GPU')}{suffix}"
        steps = format_count(accumulation, "accumulation step")
        description = f"{per_device} per device x {steps} x {gpus}"
        setting = self.objective_rules.get("responses")
        if setting is not None:
            objective = str(self.draft.settings["train.objective"])
            name = f"train.{objective}.{setting}"
            default = dict(OBJECTIVES[objective].settings())[setting]
            responses = int(str(self.draft.settings.get(name, default)))
            total = max(1, total // responses)
            description += f" / {responses} responses"
        self.draft.set("train.batch_size", total, description)
        self.draft.note("batch", total, description)

    def _set_parallelism(self) -> None:
        """Set `train.parallel` from the setting of DeepSpeed or FSDP, else from the launcher."""
        config, draft = self.config, self.draft
        origin = Path(config.where)
        deepspeed = config.get_value("deepspeed")
        if is_empty(deepspeed):
            deepspeed = config.launcher.get("deepspeed_config_file")
        fsdp = config.get_value("fsdp")
        if not is_empty(deepspeed) and deepspeed is not False:
            key, given = "deepspeed", deepspeed
            content = load_config_value(deepspeed, origin)
            sharding = read_deepspeed_sharding(content)
            if isinstance(content, Mapping):
                self._set_deepspeed_schedule(content)
                self._report_deepspeed_optimizer(content)
        elif not is_empty(fsdp):
            key, given = "fsdp", fsdp
            details = load_config_value(config.get_value("fsdp_config"), origin)
            sharding = read_fsdp_sharding(fsdp, details)
            if sharding is None:
                return
        elif config.launcher:
            key, given = "accelerate_config", config.launcher.get("distributed_type", "")
            sharding = read_accelerate_sharding(config.launcher)
        else:
            return
        if sharding is None:
            text = "set train.parallel, if it shards the model or the optimizer"
            draft.note(key, given, text, differs=True)
        elif sharding.mode != "ddp" or key != "accelerate_config":
            draft.set("train.parallel", sharding.mode, sharding.source)

    def _set_deepspeed_schedule(self, content: Mapping[str, object]) -> None:
        """Set the schedule of a DeepSpeed configuration, which replaces that of the Trainer."""
        scheduler = content.get("scheduler")
        name = str(scheduler.get("type")) if isinstance(scheduler, Mapping) else ""
        if name in _DEEPSPEED_SCHEDULES:
            schedule = _DEEPSPEED_SCHEDULES[name]
            self.draft.set("train.lr_schedule", schedule, f"{name} of DeepSpeed")
            text = f"replaces lr_scheduler_type: a linear warmup, then {schedule}"
            self.draft.note("deepspeed scheduler", name, text, differs=True)
        elif name:
            text = "is not supported: lr_scheduler_type is used instead"
            self.draft.note("deepspeed scheduler", name, text, differs=True)

    def _report_deepspeed_optimizer(self, content: Mapping[str, object]) -> None:
        """Report an optimizer of a DeepSpeed configuration, which replaces that of the Trainer."""
        optimizer = content.get("optimizer")
        if isinstance(optimizer, Mapping) and optimizer.get("type") not in ("AdamW", "Adam"):
            text = "replaces optim: set train.optimizer to the most similar one"
            self.draft.note("deepspeed optimizer", optimizer.get("type"), text, differs=True)

    def get_launcher_precision(self) -> str:
        """Return the mixed precision of accelerate, which applies if the Trainer has none."""
        precision = str(self.config.launcher.get("mixed_precision")).lower()
        if precision in ("bf16", "fp16"):
            return precision
        if precision == "fp8":
            text = "tune.quantize.fp8 computes products of frozen weights in FP8"
            self.draft.note("mixed_precision", precision, text, differs=True)
        return "auto"

    def set_output_dir(self, default: str) -> None:
        """Set the output folder: a new one if a run recorded the configuration."""
        output_dir = self.config.get_str("output_dir") or default
        if self.config.is_recorded:
            output_dir = f"runs/{Path(output_dir).name or 'converted'}"
        self.draft.set("output_dir", output_dir, self.config.default_comment("output_dir"))

    def set_parts(self, parts: Iterable[str], mode: str) -> None:
        """Set `tune` of the given parts to `lora` or `full`, and freeze the others.

        In ms-swift and LLaMA-Factory, embeddings and output head belong to the language model.
        """
        for part in PARTS:
            self.draft.set(f"tune.{part}", mode if part in parts else "frozen")
        if mode == "full" and "language" in parts:
            self.draft.set("tune.embeddings", "full", "part of the language model there")

    def set_lora_targets(
        self, family: FamilySettings, parts: set[str], key: str, targets: tuple[str, ...]
    ) -> None:
        """Set LoRA on the layers that a list of names matches; parts without one are frozen.

        A name ends with the name of a layer, as in PEFT, or is contained in it (LLaMA-Factory).
        """
        is_contained = self.config.program == "LLaMA-Factory"
        matched: dict[str, set[str]] = {part: set() for part in PARTS}
        for target in targets:
            found = False
            for part, layers in family.layers.items():
                for layer in layers:
                    if f".{target}".endswith(f".{layer}") or (is_contained and target in layer):
                        matched[part].add(layer)
                        found = True
            if not found or "." in target:
                text = "all layers with this last name component have adapters in finesight"
                text = text if found else f"no linear layer of {family.name} has this name: ignored"
                self.draft.note(key, target, text, differs=True)
        if not any(matched.values()):
            text = "no listed layer exists: all linear layers of the language model have adapters"
            self.draft.note(key, ", ".join(targets), text)
            self.set_parts(parts & {"language"}, "lora")
            return
        self.set_parts({part for part in parts if matched[part]}, "lora")
        used_parts = [part for part in ("language", "vision", "merger") if part in parts]
        used_layers = dict.fromkeys(layer for part in used_parts for layer in sorted(matched[part]))
        if used_layers:
            self.draft.set("tune.lora.target_modules", list(used_layers))

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
            draft.note(full_modules_key, ", ".join(others), text, differs=True)
        rank = config.get_int("lora_rank") or 0
        draft.set("tune.lora.rank", rank, config.default_comment("lora_rank"))
        comment = config.default_comment("lora_alpha")
        if config.get_bool("use_rslora"):
            comment = f"{alpha:g} / sqrt(rank) there (use_rslora)"
            alpha *= math.sqrt(max(rank, 1))
        draft.set("tune.lora.alpha", alpha, comment)
        self.copy_setting("tune.lora.dropout", "lora_dropout")

    def set_quantization(self, parts: Iterable[str], key: str, bits: str | None) -> None:
        """Set NF4 quantization of the parts, and report a difference for another format.

        `key` is the setting of the number of bits.
        """
        if not bits:
            return
        method, quant_type = map(self.config.get_str, ("quant_method", "bnb_4bit_quant_type"))
        is_double = self.config.get_bool("bnb_4bit_use_double_quant")
        parts = [part for part in parts if self.draft.settings.get(f"tune.{part}") != "full"]
        text = "tune.quantize.nf4 is NF4 with double quantization; other weights remain in 16 bits"
        what = f"{bits} by {method}, {quant_type}, double quantization {is_double}".lower()
        if self.is_native and parts and bits == "4" and method in (None, "bnb", "bitsandbytes"):
            self.draft.set("tune.quantize.nf4", parts)
            if quant_type in (None, "nf4") and is_double:
                return
        self.draft.note(key, what, text, differs=True)


def _load_preview(source: DatasetSource, prompt: str | None = None) -> list[Sample]:
    """Load the first samples of a file, none if it cannot be read here."""
    columns = source.reading.columns
    options = ImportOptions(on_invalid_row="skip", prompt=prompt, columns=columns)
    try:
        if source.reading.mapping is not None:
            mapping = parse_mapping(source.reading.mapping, source.name)
            options = replace(options, mapping=build_mapping_format(mapping, source.name))
        with temporary_folder("convert") as folder:
            rows = islice(open_unvalidated(Path(source.name), options, folder), NUM_PREVIEW_ROWS)
            return [sample for row in rows for sample in row.samples]
    except UserError:
        return []


def _is_path(name: str) -> bool:
    """Return whether a model is in a folder instead of a hub."""
    return os.path.exists(os.path.expanduser(name)) or name.startswith(("/", ".", "~"))


def _folder_name(source: DatasetSource) -> str:
    """Return the folder name of a dataset, from its title, file or hub name."""
    is_hub = source.name.startswith(("hf:", "modelscope:"))
    path = Path(source.name.split(":")[1] if is_hub else source.name)
    stem = path.stem
    if stem in ("data", "train", "dataset"):  # These names do not identify a dataset.
        stem = path.parent.name or stem
    return re.sub(r"[^\w.-]+", "-", source.title or stem).strip("-.") or "data"
