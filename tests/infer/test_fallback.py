"""Families without native code answer as transformers does by itself."""

from __future__ import annotations

import json
from pathlib import Path

import borrowed
import pytest
import torch
from PIL import Image

from finesight.cli.app import run
from finesight.errors import Interrupted, UserError
from finesight.infer.load import Answerer, load_answerer
from finesight.infer.predict import predict
from finesight.infer.request import Options, Sampling
from finesight.infer.service import Service


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return borrowed.llava(tmp_path_factory.mktemp("models") / "llava")


@pytest.fixture(scope="module")
def answerer(folder: Path) -> Answerer:
    return load_answerer(str(folder), "cpu")


@torch.no_grad()
def reference(folder: Path, question: str, pictures: list[Path], most: int) -> list[int]:
    """What transformers generates by itself, without anything of finesight."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    text = f"<|im_start|>user\n{'<|image_pad|>' * len(pictures)}{question}<|im_end|>\n"
    inputs = processor(
        text=text + "<|im_start|>assistant\n",
        images=[Image.open(path) for path in pictures] or None,
        return_tensors="pt",
    )
    ids = model.generate(**inputs, max_new_tokens=most, do_sample=False)
    return ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_answers_are_those_of_transformers(
    answerer: Answerer, folder: Path, tmp_path: Path, pictures: int
) -> None:
    asked = borrowed.sample(tmp_path, ("Which colour?", ""), pictures=pictures)
    (found,) = predict(answerer.model, answerer.renderer, [asked], max_new_tokens=20, batch=4)
    paths = [tmp_path / f"{n}.png" for n in range(pictures)]
    ids = reference(folder, "Which colour?", paths, 20)
    assert found.raw == answerer.renderer.tokenizer.decode(ids, skip_special=False)
    assert found.tokens == len(ids)


def test_answers_depend_on_the_picture_and_not_on_their_company(
    answerer: Answerer, tmp_path: Path
) -> None:
    samples = [
        borrowed.sample(tmp_path, ("Which colour?", ""), name="a"),
        borrowed.sample(tmp_path, ("Which?", "red"), pictures=2, name="b"),
        borrowed.sample(tmp_path, ("Hello", ""), pictures=0, name="c"),
    ]
    together = predict(answerer.model, answerer.renderer, samples, max_new_tokens=9, batch=4)
    alone = [
        predict(answerer.model, answerer.renderer, [one], max_new_tokens=9, batch=1)[0]
        for one in samples
    ]
    assert together == alone
    assert len({one.raw for one in together}) == 3


def test_answering_can_be_stopped_between_two_tokens(answerer: Answerer, tmp_path: Path) -> None:
    told: list[int] = []

    def stop(ended: int) -> None:
        told.append(ended)
        if len(told) == 3:
            raise Interrupted("enough")

    asked = borrowed.sample(tmp_path, ("Which colour?", ""))
    with pytest.raises(Interrupted):
        predict(answerer.model, answerer.renderer, [asked], max_new_tokens=9, batch=1, advance=stop)
    assert told == [0, 0, 0]


def test_the_command_answers(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / borrowed.picture(tmp_path, 0)
    command = ["predict", str(folder), str(picture), "--prompt", "Which colour?", "--device", "cpu"]
    assert run([*command, "--max-new-tokens", "3"]) == 0
    assert "[cut off after 3 tokens]" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["predict", "train"])
def test_a_model_with_code_of_its_own_is_refused_and_its_code_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    folder = tmp_path / "chatty"
    folder.mkdir()
    auto = {"AutoConfig": "chatty.Config", "AutoModelForImageTextToText": "chatty.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "chatty", "auto_map": auto}))
    (folder / "chatty.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')")
    picture = str(tmp_path / borrowed.picture(tmp_path, 0))
    arguments = [str(folder), picture, "--prompt", "What?"]
    if command == "train":
        turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "b"}]
        (tmp_path / "data.jsonl").write_text(json.dumps({"id": "s", "messages": turns}))
        recipe = {"model": str(folder), "output": str(tmp_path / "out")}
        recipe["data"] = {"train": str(tmp_path / "data.jsonl")}
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        arguments = [str(tmp_path / "recipe.yaml")]
    assert run([command, *arguments]) == 2
    said = capsys.readouterr().err
    assert "a model of the family chatty, which transformers" in said
    assert "chatty.Model" in said
    assert "one of qwen2_vl, qwen2_5_vl" in said
    assert "code that comes with a model is never run" in said
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "out").exists()


def test_the_service_answers_one_after_the_other_as_predict_does(
    answerer: Answerer, tmp_path: Path
) -> None:
    samples = [
        borrowed.sample(tmp_path, ("Which colour?", ""), name="a"),
        borrowed.sample(tmp_path, ("Hello", ""), pictures=0, name="b"),
    ]
    wanted = predict(answerer.model, answerer.renderer, samples, max_new_tokens=9, batch=1)
    service = Service(answerer)
    try:
        asked = [service.ask(sample, Options(max_new_tokens=9)) for sample in samples]
        texts = ["".join(delta.text for delta in answering) for answering in asked]
        assert [answering.prediction() for answering in asked] == wanted
        assert texts == [one.answer for one in wanted]
        assert service.longest == 512
        drawn = service.ask(
            samples[1], Options(max_new_tokens=9, sampling=Sampling(temperature=0.5))
        )
        with pytest.raises(UserError, match="temperature, of a model that transformers computes"):
            list(drawn)
        again = service.ask(samples[1], Options(max_new_tokens=9))
        assert "".join(delta.text for delta in again) == texts[1]
    finally:
        service.close()
