"""First guesses: commands, options and values of other programs, with the right ones.

Each table maps the right words to the guesses, separated by spaces. Words in capitals stand for
values, and `{}` for the value of the option. A test executes all of them.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

MIN_SIMILARITY = 0.7
"""Minimum similarity (difflib ratio) of a word that is proposed."""

COMMANDS = {
    "train RECIPE": "sft finetune fine-tune ft fit run trainer tune training pt lora qlora",
    "train RUN --resume": "resume continue",
    "init DATA": "new create setup start configure config wizard",
    "quickstart": "example tutorial hello try",
    "import DATA OUT": "prepare preprocess dataset ingest prepare-data import-data load split",
    "check DATA": "validate lint verify check-data data-check",
    "label RUN IMAGE --prompt TEXT": "annotate annotation labeling labelling tag",
    "sample RUN DATA OUT --reward NAME": "best-of best-of-n rejection-sampling rft rollout",
    "data export DATA OUT --to FORMAT": "export-data convert-data data-export",
    "show RECIPE": "view inspect preview tokenize tokens encode",
    "plan RECIPE": "estimate memory vram dry-run dryrun profile",
    "search RECIPE": "sweep hpo hyperopt optuna grid-search optimize autotune",
    "launch RECIPE": "submit cluster distributed accelerate deepspeed",
    "convert FILE NEW": "migrate translate",
    "predict RUN IMAGE --prompt TEXT": "infer inference generate answer ask caption ocr describe"
    " vqa run-inference batch-predict",
    "eval RUN": "evaluate eval-model evaluation test benchmark score metrics metric",
    "report RUN": "log logs status plot curves visualize results summary monitor",
    "compare RUN RUN2": "diff comparison",
    "doctor": "env info diagnose debug check-env system health",
    "studio": "ui gui webui web-ui app board dashboard llamaboard gradio",
    "web RUN": "demo playground webchat chat-ui",
    "chat RUN": "repl interactive chatbot",
    "serve RUN": "deploy api server api-server host serving",
    "merge RUN OUT": "merge-lora merge_lora merge-adapter fuse merge-and-unload",
    "export RUN": "vllm sglang export-vllm",
    "export MODEL OUT --converter FILE": "gguf llama.cpp ollama convert-gguf export-gguf",
    "export RUN OUT --quantize w4a16": "quantize quantise quant quantization awq gptq autoround",
    "export RUN hf:OWNER/NAME": "push upload publish push-to-hub",
    "download MODEL": "pull fetch get clone",
    "--version": "version v",
    "--help": "help list ls",
}

OPTIONS: Mapping[str, Mapping[str, str]] = {
    "": {
        "--out {}": "--output --output-dir --output-file --outdir --save --save-dir --save-path -o",
        "--max-new-tokens {}": "--max-tokens --max-length --max-new-token --max-completion-tokens",
        "--device cuda": "--gpu --cuda --use-gpu",
        "--device cpu": "--cpu --no-cuda --no-gpu",
        "--gpus {}": "--gpu --device --devices --num-gpus",
        "--precision bf16": "--bf16 --bfloat16",
        "--precision fp16": "--fp16 --half --float16",
        "--precision {}": "--dtype --torch-dtype",
        "--weight-format nf4": "--load-in-4bit --4bit --nf4 --qlora",
        "--weight-format int8": "--load-in-8bit --8bit --int8",
        "--weight-format {}": "--quant --quantize --quantization",
        "--data {}": "--dataset --input-file --file --samples --eval-data --test",
        "--limit {}": "--num-samples --max-samples --num-examples -n",
        "--batch-size {}": "--bs --per-device-eval-batch-size --eval-batch-size -b",
        "--prompt {}": "--question --query --instruction --text -p",
        "--metric {}": "--task --metrics",
        "--task {}": "--metric --type",
        "--resume": "--continue",
        "--port {}": "-p",
        "--host {}": "--address --ip --bind",
        "--adapter {}": "--lora --lora-modules --lora-path",
        "--reward {}": "--rewards --reward-fn --reward-funcs",
        "--best-of {}": "--num-generations --num-return-sequences -n",
        "--yes": "-y --no-input --defaults",
        "--force": "-f",
        "--json": "--as-json --output-json",
    },
    "overrides": {
        "data.train={}": "--data --dataset --train --train-file --train-data --dataset-path",
        "data.eval={}": "--eval-data --eval-file --val --validation --val-data --eval-dataset",
        "output_dir={}": "--out --output --output-folder --outdir --save-dir --run-dir -o",
        "train.batch_size={}": "--bs -b",
        "train.epochs={}": "--epoch --n-epochs -e",
        "adapter={}": "--adapter --resume-adapter",
    },
    "train": {
        "env CUDA_VISIBLE_DEVICES={} finesight train RECIPE": "--gpu --gpu-id --gpu-ids --devices",
        "torchrun --nproc-per-node {} -m finesight train RECIPE": "--gpus --num-gpus --n-gpu"
        " --nproc --nproc-per-node --world-size",
    },
    "export": {
        "finesight export RUN OUT --quantize w4a16": "--bits --quant",
        "finesight export RUN hf:OWNER/NAME": "--hub --push --repo --push-to-hub --upload",
        "finesight merge RUN OUT": "--merge --merge-lora",
        "--gpus {}": "--data-parallel-size --dp --replicas",
    },
    "import": {
        "--train-fraction 0.9": "--split --test-size --val-size --eval-fraction --val-fraction",
        "--map image={}": "--image-column --image-col --image-key",
        "--map answer={}": "--text-column --text-col --answer-column --caption-column",
        "--map question={}": "--question-column --prompt-column",
    },
    "predict": {
        "--out {}": "--csv --save-csv",
        "finesight chat RUN --temperature {}": "--temperature --top-p --top-k",
    },
    "serve": {
        "--key-file FILE": "--api-key --key --token",
        "finesight export RUN --gpus {}": "--data-parallel-size --dp --replicas --workers --gpus"
        " --num-gpus",
        "finesight export RUN": "--tensor-parallel-size --tp --pipeline-parallel-size",
    },
}
"""Options by command. The first table belongs to all commands that have the right option, and
`overrides` to those that accept settings of a recipe."""

USELESS_OPTIONS = "--verbose --debug --quiet -v -q --trust-remote-code --use-fast"

ARGUMENTS = {
    "recipe": "--recipe --config --config-file --yaml -c --cfg",
    "run_or_model": "--model --run --checkpoint --ckpt --run-dir --model-path -m"
    " --model-name-or-path",
    "run": "--run --model --run-dir -m",
    "runs": "--run --runs",
    "source": "--source --input --model --run --data --dataset -i --path --repo",
    "sources": "--source --input --data --dataset --images --image --recipe -i --path",
    "samples": "--input --data --samples --dataset -i",
    "data": "--data --dataset --input --source -i --path",
    "images": "--image --images --img --input --file -i",
    "out": "--out --output --output-dir --outdir --save --save-dir -o --to --target",
}
"""Options for arguments that are written without an option, by their name."""

EXPORT_FORMAT_OPTIONS = "--format --to --type --target --engine -f --output-format"
"""Options of `export` for what OUT and other options select."""

EXPORT_TARGETS = {
    "finesight export MODEL OUT --converter FILE": "gguf llama-cpp llama.cpp ollama",
    "finesight export RUN": "vllm sglang",
    "finesight export RUN OUT --quantize w4a16": "awq gptq w4a16 int4 4bit",
    "finesight export RUN hf:OWNER/NAME": "hf huggingface hub modelscope",
    "finesight merge RUN OUT": "merged safetensors transformers pytorch peft",
}
"""Programs and formats, as an option of `export`, the value of one, or in place of a path."""

VALUES = {
    "device": {"cuda": "gpu cuda:0 0 nvidia", "cpu": "none mps"},
    "precision": {
        "bf16": "bfloat16 torch.bfloat16",
        "fp16": "float16 half torch.float16",
        "fp32": "float32 float full torch.float32",
    },
    "weight_format": {"nf4": "4bit 4 bnb qlora", "int8": "8bit 8", "int4": "gptq awq"},
    "language": {"zh": "cn chinese zh-cn", "en": "english"},
}
"""Values by parameter."""

FUNCTIONS = {
    "train": "finetune fine_tune sft fit",
    "predict": "infer inference generate ask",
    "evaluate": "eval eval_model test score",
    "check_data": "check validate check_dataset",
    "import_data": "load_data prepare load_dataset import_dataset",
    "export_data": "save_data export_dataset",
    "merge": "merge_adapter merge_and_unload merge_lora",
    "export": "quantize push push_to_hub upload deploy",
    "load_model": "load from_pretrained get_model",
    "download": "pull fetch snapshot_download",
    "plan": "estimate dry_run",
    "search": "sweep tune",
    "quickstart": "demo example",
    "read_samples": "load_samples read_data",
}
"""Names in `finesight.api`."""


@cache
def _invert(name: str) -> dict[str, str]:
    """Map each guess of a table to the right words."""
    tables = {"commands": COMMANDS, "targets": EXPORT_TARGETS, "functions": FUNCTIONS}
    return {guess: right for right, guesses in tables[name].items() for guess in guesses.split()}


def suggest_command(name: str, commands: Collection[str]) -> str:
    """Return the remedy for an unknown command; empty without a similar one.

    Args:
        commands: Names of all commands.
    """
    # Commands that are correct do not need the settings.
    from finesight.objective_components import OBJECTIVES
    from finesight.satellites import find_satellite
    from finesight.tracker_components import TRACKERS

    guesses: dict[str, str] = {}
    launchers = find_satellite("finesight.launch.launcher_component:LAUNCHERS")
    if launchers is not None:
        guesses |= dict.fromkeys((one.name for one in launchers.list_built_in()), "launch RECIPE")
    for objective in OBJECTIVES.list_available():
        guesses[objective.name] = f"train RECIPE train.objective={objective.name}"
        guesses |= dict.fromkeys(objective.guesses.split(), objective.command)
    for tracker in TRACKERS.list_built_in():
        guesses |= dict.fromkeys(tracker.guesses.split(), "report RUN")
    guesses |= _invert("commands")
    normal = name.lower().replace("_", "-").lstrip("-")
    if normal in guesses:
        return f"use finesight {guesses[normal]}"
    similar = _find_similar(normal, commands)
    if similar:
        return f"did you mean finesight {similar}?"
    similar = _find_similar(normal, guesses)
    if similar:
        return f"use finesight {guesses[similar]}"
    return ""


@dataclass(frozen=True, slots=True)
class OptionGuess:
    """The right words for an unknown option.

    Attributes:
        kind: Another option, a setting as KEY=VALUE, an argument without an option, a complete
            command, or nothing instead of the option.
        words: The right words. For an argument: its name, and its value if one is given.
    """

    kind: Literal["option", "setting", "argument", "command", "nothing"]
    words: tuple[str, ...] = ()

    def format(self, option: str) -> str:
        """Return the remedy for the unknown option on the command line."""
        if self.kind == "nothing":
            return "remove it"
        if self.kind == "argument":
            return f"write {shlex.quote(self.words[-1])} without {option}"
        return f"use {shlex.join(self.words)}"


def find_option(
    command: str, option: str, value: str, options: Collection[str], arguments: Collection[str]
) -> OptionGuess | None:
    """Find the right words for an unknown option of a command; None without similar ones.

    Args:
        value: Value that follows the option; empty without one.
        options: Options of the command.
        arguments: Names of the arguments that are written without an option.
    """
    normal = option if len(option) == 2 else option.lower().replace("_", "-")
    if normal in USELESS_OPTIONS.split():
        return OptionGuess("nothing")
    if command == "export":
        target = normal.lstrip("-")
        if normal in EXPORT_FORMAT_OPTIONS.split():
            target = value
        export_command = suggest_target(target)
        if export_command:
            return OptionGuess("command", tuple(export_command.split()))
    for text in _find_words(command, normal, options, arguments):
        words = tuple(word.format(value or "VALUE") for word in text.split())
        if words[0].startswith("--"):
            return OptionGuess("option", words)
        if "=" in words[0]:
            return OptionGuess("setting", words)
        return OptionGuess("command", words)
    for argument, guesses in ARGUMENTS.items():
        if argument in arguments and normal in guesses.split():
            return OptionGuess("argument", (argument, value or argument.upper()))
    names = {one.lstrip("-"): one for one in options}
    similar = _find_similar(normal.lstrip("-"), names)
    if not similar:
        return None
    return OptionGuess("option", (names[similar], *filter(None, [value])))


def _find_words(
    command: str, option: str, options: Collection[str], arguments: Collection[str]
) -> Iterator[str]:
    """Yield the right words for an option: of the command first, then those of all commands."""
    tables = [OPTIONS.get(command, {})]
    if "overrides" in arguments:
        tables.append(OPTIONS["overrides"])
    for table in tables:
        yield from (words for words, guesses in table.items() if option in guesses.split())
    for words, guesses in OPTIONS[""].items():
        if option in guesses.split() and words.partition(" ")[0] in options:
            yield words


def suggest_value(parameter: str, value: object, choices: Sequence[str]) -> str:
    """Return the right value of a parameter with choices; empty without a similar one."""
    text = str(value).lower()
    for right, guesses in VALUES.get(parameter, {}).items():
        if text in guesses.split() and right in choices:
            return right
    return _find_similar(text, choices)


def suggest_target(name: str) -> str:
    """Return the right command for a program or format of `export`; empty if it is unknown."""
    return _invert("targets").get(name.lower(), "")


def suggest_function(name: str, functions: Collection[str]) -> str:
    """Return the probable name in `finesight.api`; empty without a similar one."""
    guesses = _invert("functions")
    if name in guesses:
        return guesses[name]
    return _find_similar(name, functions)


def _find_similar(text: str, names: Collection[str]) -> str:
    """Return the most similar name; empty without one."""
    similar = difflib.get_close_matches(text, names, n=1, cutoff=MIN_SIMILARITY)
    return "".join(similar)
