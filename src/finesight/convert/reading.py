"""Which program a file configures, and the settings in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import yaml

from finesight.bounded_files import parse_json
from finesight.convert import llama_factory_keys, ms_swift_keys
from finesight.convert.given import Given, Program
from finesight.convert.rules import Remark
from finesight.convert.shell import (
    ARGUMENTS,
    BRANCHING,
    NAMELESS,
    UNKNOWN,
    Command,
    commands,
    options,
)
from finesight.errors import UserError, look_beside
from finesight.yaml_text import parsed

LARGEST = 4_000_000
"""Bytes of a configuration; no person writes more."""

_EXPECTED = (
    "LLaMA-Factory's YAML or JSON, a shell script with `swift sft` or `llamafactory-cli train`,"
    " ms-swift's YAML, or the args.json of a run of ms-swift"
)
_DEFAULTS: dict[Program, Mapping[str, object]] = {
    "ms-swift": ms_swift_keys.DEFAULTS,
    "LLaMA-Factory": llama_factory_keys.DEFAULTS,
}
_ALIASES: dict[Program, Mapping[str, str]] = {
    "ms-swift": ms_swift_keys.ALIASES,
    "LLaMA-Factory": llama_factory_keys.ALIASES,
}
_NO_TRAINING = {
    "megatron sft": "training by Megatron, with settings of its own",
    "rlhf": "preference and reinforcement learning (DPO, GRPO, PPO, KTO, ...)",
    "pt": "learning from plain text",
    "sample": "sampling",
    "rollout": "reinforcement learning",
    "infer": "answering, here `finesight predict`",
    "deploy": "serving, here `finesight serve`",
    "app": "a page to talk, here `finesight web`",
    "web-ui": "a page to talk, here `finesight web`",
    "eval": "measuring, here `finesight eval`",
    "export": "merging and handing over, here `finesight merge`",
    "merge-lora": "merging, here `finesight merge`",
    "chat": "a talk, here `finesight chat`",
    "webchat": "a page to talk, here `finesight web`",
    "api": "serving, here `finesight serve`",
}
"""What other commands of both programs do."""
_TRAINING = ("sft", "train")
_PROGRAMS: dict[str, Program] = {
    "swift": "ms-swift",
    "llamafactory-cli": "LLaMA-Factory",
    "lmf": "LLaMA-Factory",
}


def read(path: Path) -> Given:
    """A configuration of either program. Raises UserError for a file that cannot be read, and for
    one that holds none."""
    text = _text(path)
    if path.suffix in (".yaml", ".yml", ".json"):
        return _of_content(_content(text, path), path, {})
    return _of_script(text, path)


def _text(path: Path) -> str:
    try:
        if not path.exists():
            raise UserError(
                "no such file", where=str(path), expected=_EXPECTED, remedy=look_beside(path)
            )
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise UserError(
                "is no file of settings",
                where=str(path),
                expected=f"{_EXPECTED}, up to {LARGEST / 1e6:g} MB",
                remedy="give the file itself",
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start} is not UTF-8 text",
            where=str(path),
            expected=_EXPECTED,
            remedy="save the file as UTF-8",
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read: {error}",
            where=str(path),
            expected=_EXPECTED,
            remedy="check the path and its permissions",
        ) from error


def _content(text: str, path: Path) -> dict[str, object]:
    try:
        content = parse_json(text) if path.suffix == ".json" else parsed(text)
    except (yaml.YAMLError, ValueError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"cannot be read: {line}",
            where=str(path),
            expected=_EXPECTED,
            remedy="correct the file",
        ) from error
    if not isinstance(content, dict) or not content:
        raise _unknown(path, "holds no settings by name")
    return {str(key): value for key, value in content.items()}


def _unknown(path: Path, what: str) -> UserError:
    return UserError(
        what,
        where=str(path),
        expected=_EXPECTED,
        remedy="give the file that the training was started with",
    )


def _of_content(content: dict[str, object], path: Path, environment: Mapping[str, str]) -> Given:
    """The settings of a file; which program's they are shows by how the model is called."""
    if isinstance(content.get("data"), dict) and "model" in content and "output" in content:
        raise UserError(
            "is a recipe already",
            where=str(path),
            expected=_EXPECTED,
            remedy=f"finesight train {path}",
        )
    if "model_name_or_path" in content:
        return _given("LLaMA-Factory", content, path, environment)
    if any(name in content for name in ("model", "model_id_or_path")) and any(
        name in content for name in ms_swift_keys.TELLING
    ):
        return _given("ms-swift", content, path, environment)
    raise _unknown(path, f"is no configuration that is known: {', '.join(list(content)[:6])}")


def _given(
    program: Program,
    content: Mapping[str, object],
    path: Path,
    environment: Mapping[str, str],
) -> Given:
    aliases = _ALIASES[program]
    values = {aliases.get(key, key): value for key, value in content.items()}
    if program == "ms-swift" and isinstance(inner := values.pop("ENV", None), dict):
        # What is set already holds there, too.
        environment = {str(k): str(v) for k, v in inner.items()} | dict(environment)
    finished = program == "ms-swift" and "swift_version" in values
    return Given(program, str(path), values, _DEFAULTS[program], environment, finished)


def _of_script(text: str, path: Path) -> Given:
    given: Given | None = None
    others: list[str] = []
    aside: list[Remark] = []
    for command in commands(text, str(path)):
        if command.words[0] in BRANCHING:
            told = "conditions and loops are not followed: see whether the values are those meant"
            aside.append(Remark("unknown", command.words[0], " ".join(command.words[1:]), told))
        if command.words[0].startswith("--"):
            told = "not a part of the command: the line before it does not end in a backslash"
            first, *rest = command.words
            aside.append(Remark("unknown", first, " ".join(rest), told))
        program, name, place = _started(command.words)
        if program is None:
            continue
        if given is None and name in _TRAINING:
            given = _of_command(program, command, place, path)
        else:
            others.append(f"{program}'s {name}: {_NO_TRAINING.get(name, 'one more training')}")
    if given is not None:
        told = "only the first training was converted"
        aside += [Remark("unknown", "also in the file", other, told) for other in others]
        return dataclasses.replace(given, aside=tuple(aside))
    if others:
        raise UserError(
            others[0],
            where=str(path),
            expected="fine-tuning on answers: `swift sft` or `llamafactory-cli train`",
            remedy="give the script of such a training",
        )
    raise _unknown(path, "no command of ms-swift or LLaMA-Factory in it")


def _started(words: tuple[str, ...]) -> tuple[Program | None, str, int]:
    """The program that a command starts, the name of what it does, and the place of the words for
    it."""
    for place, word in enumerate(words):
        last, rest = word.rpartition("/")[2], words[place + 1 :]
        name = rest[0].replace("_", "-") if rest else ""
        if last == "megatron" and name in (*_TRAINING, *_NO_TRAINING):
            return "ms-swift", f"megatron {name}", len(words)
        if last in _PROGRAMS and name in (*_TRAINING, *_NO_TRAINING):
            return _PROGRAMS[last], name, place + 2
        if word == "swift.cli.sft" or word.endswith("swift/cli/sft.py"):
            return "ms-swift", "sft", place + 1
        if word.endswith(("src/train.py", "llamafactory/launcher.py")):
            return "LLaMA-Factory", "train", place + 1
    return None, "", len(words)


def _of_command(program: Program, command: Command, place: int, path: Path) -> Given:
    """What the command was told: by a file, if its first word is one, and by its options."""
    rest = tuple(word for word in command.words[place:] if word not in ARGUMENTS)
    content: dict[str, object] = {}
    if rest and rest[0].endswith((".yaml", ".yml", ".json")):
        named = Path(rest[0])
        inner = named if named.exists() else path.parent / named
        content = _content(_text(inner), inner)
        rest = rest[1:]
        # LLaMA-Factory takes name=value behind a file.
        pairs = [word.partition("=") for word in rest if "=" in word and word[0] != "-"]
        content |= {name: value for name, equals, value in pairs if equals}
        rest = tuple(word for word in rest if "=" not in word or word[0] == "-")
    content |= options(rest)
    if not content:
        raise _unknown(path, f"{program}'s command has no settings")
    if any(word in ARGUMENTS for word in command.words[place:]):
        content.setdefault(NAMELESS, ARGUMENTS[0])
    launched = _launched(command.words[:place])
    return _given(program, content, path, {**command.environment, **launched})


def _launched(words: tuple[str, ...]) -> dict[str, str]:
    """How many processes a launcher starts, as the variables that both programs have for it:
    torchrun, deepspeed or accelerate."""
    names = [word.rpartition("/")[2] for word in words]
    told = {key: _first(value) for key, value in options(words).items()}
    if "torchrun" in names or any(name.startswith("torch.distributed.") for name in names):
        each, nodes = told.get("nproc_per_node", "1"), told.get("nnodes", "1")
    elif "deepspeed" in names:
        _, _, listed = told.get("include", "").partition(":")
        one = listed and "@" not in listed
        each = str(len(listed.split(","))) if one else told.get("num_gpus", UNKNOWN)
        nodes = told.get("num_nodes", "1")
    elif "accelerate" in names:
        # Over all machines.
        each, nodes = told.get("num_processes", UNKNOWN), "1"
    else:
        return {}
    counts = {"NPROC_PER_NODE": each, "NNODES": nodes}
    return {name: count if count.isdecimal() else UNKNOWN for name, count in counts.items()}


def _first(value: object) -> str:
    return str(value[0] if isinstance(value, list) else value)
