"""A merged finesight-tiny answers as its adapter does, in transformers too, or is not there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from oracle import CPU
from PIL import Image
from tuned import tuned

from finesight.config import Device, Precision, Tune
from finesight.digests import verify_folder
from finesight.errors import UserError
from finesight.export import merging
from finesight.export.files import missing
from finesight.export.merging import Proved, merge
from finesight.hub import TINY, TINY_FOLDER, ModelFolder
from finesight.infer.load import find_parts, load_answerer
from finesight.infer.predict import predict, questions
from finesight.manifest import Manifest
from finesight.model.adapter import WEIGHTS, write_adapter
from finesight.model.weights import load_model

PARTS = {"language": "lora", "vision": "lora", "merger": "lora"}
TUNE: dict[str, Any] = PARTS | {"lora": {"rank": 4, "alpha": 4}}
PROMPT = "Describe the picture."


class Run(NamedTuple):
    """A run with an adapter on the language model, the tower and the merger of finesight-tiny."""

    folder: Path
    picture: Path

    def merge(self, out: Path, **how: Any) -> Proved:
        said: list[str] = []
        how = {"samples": 3, "device": "cpu", "say": said.append} | how
        return merge(str(self.folder), find_parts(str(self.folder)), out, **how)

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yaml"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("made")
    base = ModelFolder(TINY_FOLDER)
    model = tuned(load_model(base, torch.float32, CPU), TUNE)
    adapter = folder / "run" / "adapter"
    adapter.mkdir(parents=True)
    write_adapter(adapter, model, base=TINY, base_fingerprint=base.fingerprint())
    # Half of it: enough to change answers, not to make them noise.
    from safetensors.torch import load_file, save_file

    tensors = {key: 0.5 * tensor for key, tensor in load_file(adapter / WEIGHTS).items()}
    save_file(tensors, adapter / WEIGHTS)
    manifest = Manifest(
        family="qwen2_vl",
        base=str(TINY_FOLDER),
        base_fingerprint=base.fingerprint(),
        picture={"min_pixels": 3136, "max_pixels": 50176},
        system="You are a helpful assistant.",
        end_token="<|im_end|>",
        tune=Tune.model_validate(TUNE),
        versions={},
    )
    (folder / "run" / "manifest.json").write_text(manifest.model_dump_json())
    picture = folder / "picture.png"
    Image.linear_gradient("L").convert("RGB").resize((120, 90)).save(picture)
    return Run(folder / "run", picture)


@pytest.fixture
def run(made: Run, tmp_path: Path) -> Run:
    """A copy for the test alone."""
    shutil.copytree(made.folder, tmp_path / "run")
    return Run(tmp_path / "run", made.picture)


@pytest.fixture(scope="module")
def merged(made: Run, tmp_path_factory: pytest.TempPathFactory) -> Proved:
    return made.merge(tmp_path_factory.mktemp("merged") / "tiny", precision="fp32")


def answer(source: Path, picture: Path) -> str:
    """What `finesight predict` says in fp32."""
    answerer = load_answerer(str(source), "cpu", "fp32")
    asked = questions([picture], PROMPT)
    told = predict(answerer.model, answerer.renderer, asked, max_new_tokens=24, batch=1)
    return told[0].raw


def test_in_fp32_nothing_differs_but_the_order_of_additions(merged: Proved) -> None:
    verify_folder(merged.folder)
    parity = merged.parity
    assert (parity.prompts, parity.equal, parity.partings) == (3, 3, ())
    assert (parity.computed, parity.stored, parity.rounded) == ("fp32", "fp32", None)
    assert parity.adapter > 1e-2, "an adapter that changes nothing proves nothing"
    assert parity.summed <= 1e-5
    assert parity.reloaded <= 1e-6


def test_a_merged_model_answers_as_its_run(merged: Proved, made: Run) -> None:
    said = answer(merged.folder, made.picture)
    assert said == answer(made.folder, made.picture)
    assert said != answer(TINY_FOLDER, made.picture)


def test_transformers_loads_a_merged_folder_and_says_the_same_tokens(
    merged: Proved, made: Run
) -> None:
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        merged.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged.folder)
    pictures = Qwen2VLImageProcessorPil.from_pretrained(merged.folder)
    seen = pictures(images=[Image.open(made.picture)], return_tensors="pt")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}],
        add_generation_prompt=True,
        tokenize=False,
        chat_template=ModelFolder(merged.folder).chat_template,
    )
    count = int(seen["image_grid_thw"].prod()) // 4
    text = text.replace("<|image_pad|>", "<|image_pad|>" * count)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kinds = (ids == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    # No word of how to generate: the folder's own settings are greedy, and end with the turn.
    with torch.no_grad():
        told = model.eval().generate(
            input_ids=ids, mm_token_type_ids=kinds, **seen, max_new_tokens=24
        )
    said = tokenizer.decode(told[0, ids.shape[1] :], skip_special_tokens=False)
    assert said == answer(merged.folder, made.picture)


def test_in_16_bits_what_rounding_changes_is_measured(made: Run, tmp_path: Path) -> None:
    proved = made.merge(tmp_path / "merged")
    parity = proved.parity
    assert (proved.precision, parity.computed) == ("bf16", "fp32")
    assert parity.rounded is not None
    assert 1e-6 < parity.rounded < parity.adapter
    assert parity.summed <= 1e-5
    assert parity.reloaded <= 1e-6, "the file holds the rounded sum, to the last bit"
    assert parity.equal + len(parity.partings) == 3
    assert all(parting.tie for parting in parity.partings)


@pytest.mark.parametrize("how", [{"samples": 1}, {"precision": "fp16"}, {"shard_bytes": 3e6}])
def test_options(made: Run, tmp_path: Path, how: dict[str, Any]) -> None:
    proved = made.merge(tmp_path / "merged", **how)
    assert proved.parity.prompts == how.get("samples", 3)
    assert proved.precision == how.get("precision", "bf16")
    files = ModelFolder(proved.folder).weight_files()
    largest = max(file.stat().st_size for file in files)
    if "shard_bytes" in how:
        index = json.loads((proved.folder / "model.safetensors.index.json").read_text())
        assert len(files) > 3
        assert largest < 3.1e6
        assert set(index["weight_map"].values()) == {file.name for file in files}
    else:
        assert len(files) == 1


def test_held_out_samples_of_the_run_are_asked(run: Run, tmp_path: Path) -> None:
    shutil.copy(run.picture, tmp_path / "p.png")
    lines = []
    for i in range(5):
        content = [{"type": "text", "text": f"{i}?"}]
        if i != 1:
            content.insert(0, {"type": "image", "image": "p.png"})
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"id": f"s{i}", "messages": turns}) + "\n")
    (tmp_path / "eval.jsonl").write_text("".join(lines))
    data = {"train": str(tmp_path / "eval.jsonl"), "eval": str(tmp_path / "eval.jsonl")}
    recipe = {"model": TINY, "data": data, "tune": TUNE, "output": str(run.folder)}
    run.recipe.write_text(yaml.safe_dump(recipe))
    proved = run.merge(tmp_path / "merged")
    assert (proved.parity.questions, proved.parity.prompts) == ("held-out pictures", 3)
    assert "held-out pictures" in (proved.folder / "README.md").read_text()
    for file in proved.folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), f"{file.name} tells where data lay"

    (tmp_path / "eval.jsonl").unlink()
    again = run.merge(tmp_path / "again")
    assert again.parity.questions == "drawn pictures"


def test_the_card_says_what_was_measured(run: Run, tmp_path: Path) -> None:
    run.recipe.write_text(
        yaml.safe_dump({"model": TINY, "data": {"train": "/secret/place/train.jsonl"}})
    )
    measured = {"step": 9, "held_out_loss": 1.25, "headline": "exact"}
    result = {
        "run": "x",
        "steps": 9,
        "before": measured | {"scores": {"exact": 0.25}},
        "after": measured
        | {"scores": {"exact": 0.875}, "intervals": {"exact": [0.75, 1.0]}, "held_out_loss": 0.5},
    }
    (run.folder / "result.json").write_text(json.dumps(result))
    start = {"step": 0, "started": "now", "data": {"train": {"samples": 1234}}}
    (run.folder / "metrics.jsonl").write_text(json.dumps(start) + "\n")
    asked = ["Read it."] * 3 + ["Read\nthat."] * 2 + ["a", "a", "b", "c"]
    (run.folder / "predictions").mkdir()
    lines = "".join(json.dumps({"prompt": one}) + "\n" for one in asked)
    (run.folder / "predictions" / "after.jsonl").write_text(lines + "damaged\n")
    card = (run.merge(tmp_path / "merged").folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "image-text-to-text"
    for said in (
        "# merged",
        "finesight-tiny (family qwen2_vl)",
        "1,234 samples to learn from",
        "> Read it.\n\n> Read\n> that.\n\n> a\n\nAnd 2 others like these.",
        "| exact | 0.2500 | 0.8750 | 0.7500 to 1.0000 |",
        "| held_out_loss | 1.2500 | 0.5000 | - |",
        "finesight serve merged",
        "train: train.jsonl",
        "Merged equals trained",
        "vllm serve merged",
        "sglang.launch_server --model-path merged",
        "(apache-2.0)",
    ):
        assert said in card
    assert "/secret" not in card


def test_generation_settings_of_the_base_that_damage_boxes_are_left_out(
    run: Run, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY_FOLDER, base)
    (base / "sha256.json").unlink()
    settings = json.loads((base / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 1.05, "top_p": 0.001, "do_sample": True, "eos_token_id": 7}
    (base / "generation_config.json").write_text(json.dumps(settings))
    proved = merge(
        str(run.folder),
        find_parts(str(run.folder), str(base)),
        tmp_path / "merged",
        samples=1,
        device="cpu",
    )
    assert proved.left_out == {"repetition_penalty": 1.05, "top_p": 0.001}
    written = json.loads((proved.folder / "generation_config.json").read_text())
    assert (written["repetition_penalty"], written["top_k"]) == (1.0, 1)
    assert "top_p" not in written
    ends = load_answerer(str(proved.folder), "cpu").renderer.end_ids
    assert written["eos_token_id"] == [*ends, 7]
    assert "repetition_penalty" in (proved.folder / "README.md").read_text()


def test_a_merged_folder_misses_nothing(merged: Proved) -> None:
    assert merged.missing == ()
    assert missing(ModelFolder(merged.folder)) == []
    config = json.loads((merged.folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert len({path.stat().st_mode for path in merged.folder.iterdir()}) == 1, "who may read it"


def test_what_a_folder_lacks_is_named(tmp_path: Path) -> None:
    shutil.copytree(TINY_FOLDER, tmp_path / "model")
    for name in ("tokenizer_config.json", "chat_template.json", "preprocessor_config.json"):
        (tmp_path / "model" / name).unlink()
    found = missing(ModelFolder(tmp_path / "model"))
    assert [lack.split()[0] for lack in found] == [
        "tokenizer_config.json",
        "preprocessor_config.json",
        "a",
    ]


def nothing_left(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if "merged" in path.name]


def test_weights_beyond_fp16_are_refused_and_nothing_is_left(run: Run, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = run.folder / "adapter" / WEIGHTS
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("o_proj.lora_B.weight"))
    tensors[name] = torch.full_like(tensors[name], 1e7)
    save_file(tensors, file)
    with pytest.raises(
        UserError, match=r"o_proj.weight reaches \d.*\n.*the largest of torch.float16"
    ):
        run.merge(tmp_path / "merged", precision="fp16")
    assert nothing_left(tmp_path)


def test_a_folder_that_was_written_wrongly_is_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of finesight as users have met them elsewhere: settings that came out as others."""

    def damaged(folder: Path, *arguments: Any) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 10000.0}))

    monkeypatch.setattr(merging, "complete", damaged)
    with pytest.raises(UserError, match="writing the folder and reading it again changes"):
        run.merge(tmp_path / "merged")
    assert nothing_left(tmp_path)


def test_other_pictures_than_the_run_saw_are_refused(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damaged(folder: Path, *arguments: Any) -> None:
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text.replace("50176", "12544"))

    monkeypatch.setattr(merging, "complete", damaged)
    with pytest.raises(UserError, match="the merged folder reads drawn 2 as"):
        run.merge(tmp_path / "merged")
    assert nothing_left(tmp_path)


def test_too_little_room_is_said_before_anything_is_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=20_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(
        UserError, match=r"9\d,\d{3},\d{3} bytes are needed and 20,000,000 are free"
    ):
        run.merge(tmp_path / "deep" / "merged")
    assert not (tmp_path / "deep").exists()


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_an_interrupted_merge_leaves_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException]
) -> None:
    def interrupted(*arguments: object) -> None:
        raise stop

    monkeypatch.setattr(merging, "write_card", interrupted)
    with pytest.raises(stop):
        run.merge(tmp_path / "merged")
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_little_memory_is_computed_in_the_type_of_the_weights(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    monkeypatch.setattr(merging, "_free_memory", lambda: 1e9)
    device: Device = "cpu"
    parity = run.merge(tmp_path / "merged", precision=precision, device=device).parity
    assert (parity.computed, parity.rounded) == ("bf16", None)
    assert parity.summed <= 0.1
    assert parity.reloaded <= 1e-6
