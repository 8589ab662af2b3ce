"""Load the configuration of a training with another program from a file or script."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from finesight.convert.external_config import (
    ConversionNote,
    ExternalConfig,
    SourceProgram,
    build_external_config,
)
from finesight.convert.python_config import read_python_config
from finesight.convert.shell_command import (
    TrainingCommand,
    find_training_command,
    parse_options,
    read_launcher,
)
from finesight.convert.source_file import (
    CONFIG_SUFFIXES,
    build_source_error,
    find_file,
    load_settings_file,
    parse_settings_file,
    read_source,
)
from finesight.errors import Remedy, Step

_MS_SWIFT_KEYS = {"dataset", "tuner_type", "train_type", "sft_type", "swift_version", "ENV"}
"""Settings that, together with a model, identify a configuration of ms-swift."""

_LLAMA_FACTORY_KEYS = {
    "stage",
    "finetuning_type",
    "template",
    "dataset",
    "dataset_dir",
    "cutoff_len",
    "do_train",
    "export_dir",
    "lora_target",
    "image_max_pixels",
}
"""Settings that identify a configuration of LLaMA-Factory; others name only Trainer settings."""

_TRL_KEYS = {
    "dataset_name",
    "datasets",
    "use_peft",
    "lora_r",
    "lora_target_modules",
    "reward_funcs",
    "num_generations",
    "beta",
    "lmbda",
    "teacher_model_name_or_path",
}
"""Settings that identify a configuration of TRL; others are those of the transformers Trainer."""

_ACCELERATE_KEYS = {"distributed_type", "compute_environment"}
_DEEPSPEED_KEYS = {"zero_optimization", "train_micro_batch_size_per_gpu"}


def load_external_config(path: Path) -> ExternalConfig:
    """Load a training configuration from YAML, JSON, or a shell script, which is not executed.

    Raises UserError for an unreadable file and for one without a training configuration.
    """
    if path.suffix in (".py", ".ipynb"):
        return read_python_config(read_source(path), path, {})
    if path.suffix not in CONFIG_SUFFIXES:
        return _load_shell_config(path)
    content = parse_settings_file(path)
    if path.suffix == ".json" and isinstance(content, list) and content:
        purpose = "import it with your prompt, then write or convert a recipe"
        step = Step("import", {"source": str(path), "out": "OUT"}, purpose)
        raise build_source_error(path, "is a list, such as the rows of a dataset", step)
    return _identify_config(load_settings_file(path), path)


def _identify_config(content: dict[str, object], path: Path) -> ExternalConfig:
    """Return the configuration of the program whose settings a file has."""
    keys = content.keys()
    if isinstance(content.get("data"), dict) and "model" in keys and "output_dir" in keys:
        step = Step("train", {"recipe": str(path)})
        raise build_source_error(path, "is a finesight recipe already", step)
    if "model_name_or_path" in keys and keys & _LLAMA_FACTORY_KEYS:
        return build_external_config("LLaMA-Factory", content, path, {})
    if "model_name_or_path" in keys:
        program: SourceProgram = "TRL" if keys & _TRL_KEYS else "Transformers"
        return build_external_config(program, content, path, {})
    if keys & {"model", "model_id_or_path"} and keys & _MS_SWIFT_KEYS:
        return build_external_config("ms-swift", content, path, {})
    what = f"is not a known configuration: {', '.join(list(content)[:6])}"
    remedy: Remedy = "use the file that started the training"
    for owner, known in (("accelerate", _ACCELERATE_KEYS), ("DeepSpeed", _DEEPSPEED_KEYS)):
        if keys & known:
            what = f"is a configuration of {owner}, which names no model"
            remedy = (
                "convert the shell script with the command that uses this file, or save this"
                " command in a file ending in .sh and convert that file"
            )
    raise build_source_error(path, what, remedy)


def _load_shell_config(path: Path) -> ExternalConfig:
    """Build the configuration from the only training command of a shell script."""
    training = find_training_command(read_source(path), path)
    words = training.launcher
    if "trl" in words:  # It forwards the options of accelerate.
        words = ["accelerate", *training.arguments]
    launcher = read_launcher(words, training.origin)
    content = _read_command_settings(training)
    file = find_file(training.script, training.origin) if training.script else None
    if file is not None and training.program in (None, "TRL"):
        config = read_python_config(read_source(file), file, content)
    else:
        program = training.program or "Transformers"
        config = build_external_config(program, content, path, {})
        if training.program is None:
            text = "does not exist here: settings of its own, and their defaults, are unknown"
            note = ConversionNote("differs", training.script, "", text)
            config = replace(config, notes=(note,))
    environment = {**config.environment, **training.environment, **launcher.environment}
    return replace(config, environment=environment, launcher=launcher.settings)


def _read_command_settings(training: TrainingCommand) -> dict[str, object]:
    """Return the settings of a command and of its configuration file."""
    arguments = list(training.arguments)
    content: dict[str, object] = {}
    if arguments and arguments[0].endswith(CONFIG_SUFFIXES):
        content = _load_named_file(arguments.pop(0), training.origin)
        # LLaMA-Factory accepts name=value after a file.
        while arguments and "=" in arguments[0] and arguments[0][0] != "-":
            key, _, value = arguments.pop(0).partition("=")
            content[key] = value
    options = parse_options(arguments)
    file = str(options.get("config", ""))
    if training.program in ("TRL", None) and file.endswith(CONFIG_SUFFIXES):
        del options["config"]
        content = _load_named_file(file, training.origin)
    content |= options
    if training.program == "ms-swift" and training.name == "rlhf":
        content.setdefault("rlhf_type", "dpo")
    elif training.name not in ("", "sft", "train"):
        content = {"stage": training.name, **content}
    return content


def _load_named_file(name: str, origin: Path) -> dict[str, object]:
    return load_settings_file(find_file(name, origin) or origin.parent / name)
