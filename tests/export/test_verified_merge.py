"""A merged finesight-tiny answers as its adapter does, in transformers too, or is not there."""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
import torch
import yaml
from case_files import load_cases
from gptq_fixtures import GptqConfig, write_quantized_model
from image_fixtures import write_jsonl
from lora_fixtures import save_random_adapter
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_model import TinyFamily, create_tiny_model

from finesight.errors import UserError
from finesight.export import verified_merge
from finesight.export.hf_files import find_missing_files
from finesight.export.model_card import VerifiedMerge
from finesight.export.verified_merge import merge_and_verify
from finesight.family_components import FAMILIES
from finesight.files.storage import verify_folder
from finesight.infer.model_loader import load_inference_model, resolve_model_source
from finesight.infer.prediction import build_question, predict
from finesight.model.lora.peft_io import ADAPTER_WEIGHTS_FILE
from finesight.model_folder import TINY_MODEL_FOLDER, ModelFolder
from finesight.settings.config import Precision, TuneSettings
from finesight.settings.manifest import Manifest, load_manifest

CASES = load_cases("verified_merge")

TUNE: dict[str, Any] = {
    "language": "lora",
    "vision": "lora",
    "merger": "lora",
    "lora": {"rank": 4, "alpha": 4},
}
SMALL_LORA = {"rank": 2, "alpha": 1}
PROMPT = "Describe the picture."


class MergeableRun(NamedTuple):
    """Run with an adapter on all parts of finesight-tiny."""

    folder: Path
    image: Path

    def merge(self, out: Path, base: Path | None = None, **options: Any) -> VerifiedMerge:
        source = resolve_model_source(str(self.folder), str(base) if base else None)
        options = {"num_samples": 1, "device": "cpu"} | options
        return merge_and_verify(str(self.folder), source, out, **options)


@pytest.fixture(scope="module")
def run_template(tmp_path_factory: pytest.TempPathFactory) -> MergeableRun:
    folder = tmp_path_factory.mktemp("made")
    base = ModelFolder(TINY_MODEL_FOLDER)
    adapter = save_random_adapter(base, folder / "run" / "adapter", TUNE)
    # Half of it: enough to change answers, not to make them noise.
    weights = adapter / ADAPTER_WEIGHTS_FILE
    save_file({key: 0.5 * tensor for key, tensor in load_file(weights).items()}, weights)
    manifest = Manifest(
        family="qwen2_vl",
        base_model=str(TINY_MODEL_FOLDER),
        base_fingerprint=base.fingerprint(),
        image_rule={"min_pixels": 3136, "max_pixels": 50176},
        system_prompt="You are a helpful assistant.",
        eos_token="<|im_end|>",
        tune=TuneSettings.model_validate(TUNE),
        versions={},
    )
    (folder / "run" / "manifest.json").write_text(manifest.model_dump_json())
    image = folder / "image.png"
    Image.linear_gradient("L").convert("RGB").resize((120, 90)).save(image)
    return MergeableRun(folder / "run", image)


@pytest.fixture
def run(run_template: MergeableRun, tmp_path: Path) -> MergeableRun:
    """A copy for the test alone."""
    shutil.copytree(run_template.folder, tmp_path / "run")
    return MergeableRun(tmp_path / "run", run_template.image)


@pytest.fixture(scope="module")
def merged(run_template: MergeableRun, tmp_path_factory: pytest.TempPathFactory) -> VerifiedMerge:
    return run_template.merge(
        tmp_path_factory.mktemp("merged") / "tiny",
        precision="fp32",
        num_samples=3,
        max_shard_bytes=6e6,
    )


def run_predict(source: Path, image: Path) -> str:
    """What `finesight predict` says in fp32."""
    answerer = load_inference_model(str(source), "cpu", "fp32")
    requested = [build_question([image], PROMPT, str(image))]
    result = predict(answerer.model, answerer.renderer, requested, max_new_tokens=24, batch_size=1)
    return result[0].raw_text


def test_fp32_merge_is_exact_up_to_rounding(merged: VerifiedMerge) -> None:
    parity = merged.parity
    assert (parity.num_prompts, parity.num_equal, parity.divergences) == (3, 3, ())
    assert (parity.compute_precision, parity.weight_precision) == ("fp32", "fp32")
    assert parity.rounding_change is None
    assert parity.adapter_change > 1e-2, "an adapter that changes nothing proves nothing"
    assert parity.merge_change <= 1e-5
    assert parity.reload_difference <= 1e-6


def test_merged_folder_is_complete(merged: VerifiedMerge) -> None:
    verify_folder(merged.folder)
    assert list(merged.missing_files) == find_missing_files(ModelFolder(merged.folder)) == []
    config = json.loads((merged.folder / "config.json").read_text())
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"]
    assert len({path.stat().st_mode for path in merged.folder.iterdir()}) == 1, "who may read it"
    files = ModelFolder(merged.folder).weight_files()
    assert len(files) > 3
    assert max(file.stat().st_size for file in files) < 6.2e6
    index = json.loads((merged.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    base_model = load_manifest(merged.folder / "manifest.json").base_model
    assert base_model == TINY_MODEL_FOLDER.name, "the manifest contains a path of this machine"


def test_merged_model_answers_like_its_run(merged, run_template):
    output = run_predict(merged.folder, run_template.image)
    assert output == run_predict(run_template.folder, run_template.image)
    assert output != run_predict(TINY_MODEL_FOLDER, run_template.image)


def test_transformers_generates_the_same_tokens(merged, run_template):
    import transformers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        merged.folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged.folder)
    images = Qwen2VLImageProcessorPil.from_pretrained(merged.folder)
    seen = images(images=[Image.open(run_template.image)], return_tensors="pt")
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
        result = model.eval().generate(
            input_ids=ids, mm_token_type_ids=kinds, **seen, max_new_tokens=24
        )
    output = tokenizer.decode(result[0, ids.shape[1] :], skip_special_tokens=False)
    assert output == run_predict(merged.folder, run_template.image)


def test_bf16_rounding_error_is_measured(run_template: MergeableRun, tmp_path: Path) -> None:
    proved = run_template.merge(tmp_path / "merged", num_samples=3)
    parity = proved.parity
    assert (proved.precision, parity.compute_precision) == ("bf16", "fp32")
    assert parity.rounding_change is not None
    assert 1e-6 < parity.rounding_change < parity.adapter_change
    assert parity.merge_change <= 1e-5
    assert parity.reload_difference <= 1e-6, "the file holds the rounded sum, to the last bit"
    assert parity.num_equal + len(parity.divergences) == 3
    assert all(parting.is_tie for parting in parity.divergences)
    assert len(ModelFolder(proved.folder).weight_files()) == 1


def write_run_record(run: Path, data: Path) -> None:
    """Write samples, and the recipe, results and predictions of a finished run."""
    data.parent.mkdir()
    Image.new("RGB", (60, 40)).save(data.with_name("p.png"))
    lines = []
    for i in range(5):
        images = [] if i == 1 else [{"type": "image", "image": "p.png"}]
        content = [*images, {"type": "text", "text": f"{i}?"}]
        turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "yes"}]
        lines.append({"id": f"s{i}", "messages": turns})
    write_jsonl(data, lines)
    recipe = {
        "model": "secret/acme/base",
        "adapter": "C:\\secret\\lora",
        "data": {"train": "/secret/place/train.jsonl", "eval": [{"path": str(data)}]},
        "eval": {"metric": "secret/a.py:score"},
        "output_dir": str(run),
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = {"step": 9, "validation_loss": 1.25, "primary_metric": "exact"}
    after = before | {"validation_loss": 0.5, "intervals": {"exact": [0.75, 1.0]}}
    before, after = before | {"scores": {"exact": 0.25}}, after | {"scores": {"exact": 0.875}}
    result = {"run": "x", "steps": 9, "before": before, "after": after}
    (run / "result.json").write_text(json.dumps(result))
    start = {"step": 0, "started_at": "now", "data": {"train": {"num_samples": 1234}}}
    write_jsonl(run / "metrics.jsonl", [start])
    (run / "predictions").mkdir()
    prompts = ["Read it."] * 3 + ["Read\nthat."] * 2 + ["a", "a", "b", "c"]
    predictions = run / "predictions" / "after.jsonl"
    write_jsonl(predictions, [{"prompt": prompt} for prompt in prompts])
    with predictions.open("a") as file:
        file.write("damaged\n")


def test_model_card_reports_the_measurements(run: MergeableRun, tmp_path: Path) -> None:
    """Validation samples of the run are compared while they exist, and no path is published."""
    data = tmp_path / "secret" / "eval.jsonl"
    write_run_record(run.folder, data)
    proved = run.merge(tmp_path / "merged", num_samples=3)
    assert (proved.parity.origin, proved.parity.num_prompts) == ("validation images", 3)
    for file in proved.folder.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), f"{file.name} tells where data lay"
    card = (proved.folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert (front["license"], front["pipeline_tag"]) == ("apache-2.0", "image-text-to-text")
    for output in (
        "# merged",
        "finesight-tiny (family qwen2_vl)",
        "1,234 training samples",
        "> Read it.\n\n> Read\n> that.\n\n> a\n\nAnd 2 similar ones.",
        "| exact | 0.2500 | 0.8750 | 0.7500 to 1.0000 |",
        "| validation_loss | 1.2500 | 0.5000 | - |",
        *("model: base\n", "adapter: lora\n", "train: train.jsonl", "- path: eval.jsonl"),
        *("metric: a.py:score", "validation images", "Merged model equals trained model"),
        *("finesight serve merged", "vllm serve merged", "(apache-2.0)"),
        "sglang.launch_server --model-path merged",
    ):
        assert output in card
    assert "secret" not in card
    data.unlink()
    assert run.merge(tmp_path / "again").parity.origin == "generated images"


def test_harmful_generation_settings_are_dropped(run: MergeableRun, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(TINY_MODEL_FOLDER, base)
    (base / "sha256.json").unlink()
    settings = json.loads((base / "generation_config.json").read_text())
    settings |= {"repetition_penalty": 1.05, "top_p": 0.001, "do_sample": True, "eos_token_id": 7}
    (base / "generation_config.json").write_text(json.dumps(settings))
    proved = run.merge(tmp_path / "merged", base)
    assert proved.dropped_sampling == {"repetition_penalty": 1.05, "top_p": 0.001}
    written = json.loads((proved.folder / "generation_config.json").read_text())
    assert (written["repetition_penalty"], written["top_k"]) == (1.0, 1)
    assert "top_p" not in written
    ends = load_inference_model(str(proved.folder), "cpu").renderer.end_ids
    assert written["eos_token_id"] == [*ends, 7]
    assert "repetition_penalty" in (proved.folder / "README.md").read_text()


def test_fp16_overflow_is_rejected(run: MergeableRun, tmp_path: Path) -> None:
    file = run.folder / "adapter" / ADAPTER_WEIGHTS_FILE
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith("o_proj.lora_B.weight"))
    tensors[name] = torch.full_like(tensors[name], 1e7)
    save_file(tensors, file)
    message = r"o_proj.weight reaches \d.*\n.*the largest of torch.float16"
    with pytest.raises(UserError, match=message):
        run.merge(tmp_path / "merged", precision="fp16")
    assert not list(tmp_path.glob("*merged*"))


@pytest.mark.parametrize(
    ("file", "changes", "message"), CASES["test_folder_with_other_settings_is_rejected"]
)
def test_folder_with_other_settings_is_rejected(
    run_template: MergeableRun,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    changes: dict[str, Any],
    message: str,
) -> None:
    def damage(folder: Path, *arguments: object) -> None:
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))

    monkeypatch.setattr(verified_merge, "complete_hf_folder", damage)
    with pytest.raises(UserError, match=message):
        run_template.merge(tmp_path / "merged")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("precision", ["auto", "bf16"])
def test_low_memory_uses_the_weight_dtype(run_template, tmp_path, monkeypatch, precision):
    monkeypatch.setattr(verified_merge, "available_memory", lambda: 1e9)
    parity = run_template.merge(tmp_path / "merged", precision=precision).parity
    assert (parity.compute_precision, parity.rounding_change) == ("bf16", None)
    assert parity.merge_change <= 0.1
    assert parity.reload_difference <= 1e-6


def merge_adapter(adapter: Path, out: Path, precision: Precision = "auto") -> VerifiedMerge:
    """Merge an adapter with its base model, and check the measurements."""
    source = resolve_model_source(str(adapter))
    proved = merge_and_verify(
        str(adapter), source, out, precision=precision, num_samples=2, device="cpu"
    )
    parity = proved.parity
    assert parity.adapter_change > 1e-3
    assert parity.merge_change < 1e-4
    assert parity.reload_difference < 1e-5
    assert parity.num_equal + len(parity.divergences) == 2
    return proved


@pytest.mark.parametrize("precision", ["auto", "bf16"])
@pytest.mark.parametrize("family", get_args(TinyFamily))
def test_every_family_is_merged_and_verified(family, precision, tmp_path):
    base = ModelFolder(create_tiny_model(tmp_path / "base", family))
    adapter = save_random_adapter(base, tmp_path / "adapter", TUNE | {"lora": SMALL_LORA})
    proved = merge_adapter(adapter, tmp_path / "out", precision)
    assert (proved.parity.rounding_change is None) is (precision == "auto")
    config = json.loads((proved.folder / "config.json").read_text())
    component = FAMILIES[family]
    if component.hf_class:
        assert config["architectures"] == [component.hf_class]
    card = (proved.folder / "README.md").read_text()
    assert ("vllm serve out" in card) is ("serving" in component.exports)


def test_adapter_on_four_bit_model(tmp_path: Path) -> None:
    """Compared with the bits as they are, and written as what they stand for."""
    source = ModelFolder(create_tiny_model(tmp_path / "source"))
    base, _ = write_quantized_model(source, tmp_path, GptqConfig())
    tune = {"language": "lora", "lora": SMALL_LORA}
    proved = merge_adapter(save_random_adapter(base, tmp_path / "adapter", tune), tmp_path / "out")
    assert proved.dequantized_layers == proved.merged_layers == 14
    assert "14 layers were dequantized from 4 bits" in (proved.folder / "README.md").read_text()
