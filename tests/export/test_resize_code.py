"""Other programs see the images of the training, if they follow what an export tells them."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_fixtures import make_noise_image
from lora_fixtures import save_random_adapter
from PIL import Image
from tiny_model import TinyFamily, create_tiny_model

from finesight.export.deployment import GgufFiles, build_llama_server_command
from finesight.export.export_operations import export, merge
from finesight.export.model_card import collect_uploads
from finesight.export.resize_code import format_resize_code
from finesight.family_components import FAMILIES
from finesight.infer.model_loader import ModelSource, resolve_model_source
from finesight.model_folder import ModelFolder
from finesight.samples.image_file import CorruptImageError
from finesight.settings.config import ExactSize, ImageRule, LongestSide, PixelRange, TuneSettings
from finesight.settings.manifest import Manifest
from finesight.vision.image_processing import (
    compute_resized_size,
    load_image,
    load_patch_config,
    patchify,
    repeat_still_frames,
)

RULES: list[ImageRule] = [
    PixelRange(min_pixels=3136, max_pixels=50176),
    PixelRange(min_pixels=40000, max_pixels=40000),
    ExactSize(height=256, width=256),  # 252 for a factor of 28
    ExactSize(height=30, width=200),  # below the minimum of the published Qwen3.5 models
    LongestSide(longest_side=256),
    LongestSide(longest_side=70),  # half a multiple of 28
]
NUM_IMAGES = 40
SERVED = FAMILIES.list_exported("serving")


def run_code(code: str, image: Path) -> Image.Image:
    """The image that the code of an export writes."""
    target = image.with_name("resized.png")
    code = code.replace('"image.jpg"', repr(str(image)))
    exec(code.replace('"resized.png"', repr(str(target))), {})
    return Image.open(target)


def write_run(folder: Path, base: ModelFolder, rule: ImageRule) -> Path:
    tune = {"language": "lora", "lora": {"rank": 2}}
    save_random_adapter(base, folder / "adapter", tune)
    manifest = Manifest(
        family=base.family,
        base_model=str(base.path),
        base_fingerprint=base.fingerprint(),
        image_rule=rule,
        system_prompt=None,
        eos_token="<|im_end|>",
        tune=TuneSettings.model_validate(tune),
        versions={},
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


def read_python(card: str) -> str:
    return card.partition("```python\n")[2].partition("```")[0]


def check_processor(folder: Path, rule: ImageRule, code: str, tmp_path: Path) -> None:
    """Compare sizes and pixels of the processor of a folder with those of the training."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    merged = ModelFolder(folder)
    config = load_patch_config(merged)
    settings = merged.preprocessor_config
    mean, std = (np.array(settings[key])[:, None] for key in ("image_mean", "image_std"))
    rng = random.Random(7)
    path = tmp_path / "image.png"
    for number in range(NUM_IMAGES):
        width, height = (int(10 ** rng.uniform(1, 2.6)) for _ in range(2))
        make_noise_image(width, height, number).save(path)
        size = compute_resized_size((height, width), rule, config.resize_factor)
        given = run_code(code, path) if code else Image.open(path)
        seen = processor(images=[given], return_tensors="np")
        assert tuple(seen["image_grid_thw"][0]) == config.compute_grid(size), (width, height)
        patches = repeat_still_frames(patchify([load_image(path)], size, config), config.patch_dim)
        pixels = (patches.reshape(len(patches), 3, -1) / 255 - mean) / std
        np.testing.assert_allclose(
            seen["pixel_values"], pixels.reshape(len(patches), -1), atol=1e-6
        )


@pytest.mark.parametrize("family", SERVED)
def test_processor_of_merged_folder_sees_the_images_of_the_training(
    family: TinyFamily, tmp_path: Path
) -> None:
    base = ModelFolder(create_tiny_model(tmp_path / "base", family))
    for number, rule in enumerate(RULES):
        run = write_run(tmp_path / f"run{number}", base, rule)
        outcome = merge(run, tmp_path / f"merged{number}", num_samples=1)
        folder = outcome.value.folder
        code = read_python((folder / "README.md").read_text())
        assert bool(code) is not isinstance(rule, PixelRange)
        assert any("README.md" in line for line in outcome.lines) is bool(code)
        check_processor(folder, rule, code, tmp_path)
        commands = export(folder)
        assert commands.value.resize_code == code
        # The options of the engines equal the settings of the folder.
        preprocessor = json.loads((folder / "preprocessor_config.json").read_text())
        limits = {key: preprocessor[key] for key in ("min_pixels", "max_pixels")}
        assert json.dumps(limits) in commands.value.vllm
        assert json.dumps(limits) in commands.value.sglang
        if code:
            assert commands.lines[-len(code.splitlines()) :] == code.splitlines()


@pytest.mark.parametrize("factor", [28, 32])
@pytest.mark.parametrize("rule", RULES)
def test_resized_images_equal_those_of_the_training(
    rule: ImageRule, factor: int, tmp_path: Path
) -> None:
    """Also rotated images and those with transparency, palettes or other color spaces."""
    images: list[tuple[Image.Image, dict[str, Any]]] = [
        (make_noise_image(90, 61), {}),
        (make_noise_image(61, 300), {}),
        (make_noise_image(50, 40).convert("L"), {}),
        (make_noise_image(50, 40).convert("LA"), {}),
        (make_noise_image(50, 40).convert("P"), {"transparency": 3}),
    ]
    translucent = make_noise_image(64, 48).convert("RGBA")
    translucent.putalpha(Image.linear_gradient("L").resize((64, 48)))
    exif = Image.Exif()
    exif[0x0112] = 6
    images += [(translucent, {}), (make_noise_image(80, 30), {"exif": exif})]
    for number, (image, options) in enumerate(images):
        path = tmp_path / f"{number}.png"
        image.save(path, **options)
        loaded = load_image(path)
        height, width = compute_resized_size((loaded.height, loaded.width), rule, factor)
        expected = loaded.resize((width, height), Image.Resampling.BICUBIC)
        resized = run_code(format_resize_code(rule, factor), path)
        assert resized.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(resized), np.asarray(expected))
    cmyk = tmp_path / "cmyk.tif"
    make_noise_image(50, 40).convert("CMYK").save(cmyk)
    unchanged = format_resize_code(PixelRange(min_pixels=1, max_pixels=10**6), 1)
    np.testing.assert_array_equal(
        np.asarray(run_code(unchanged, cmyk)), np.asarray(load_image(cmyk))
    )


@pytest.mark.parametrize("rule", [PixelRange(min_pixels=3136, max_pixels=204800), *RULES[1:]])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_llama_server_has_the_limits_in_tokens(
    rule: ImageRule, family: TinyFamily, tmp_path: Path
) -> None:
    """Sizes of the training are within the limits, except for a rule of one number of pixels."""
    folder = ModelFolder(create_tiny_model(tmp_path / "base", family))
    run = write_run(tmp_path / "run", folder, rule)
    files = GgufFiles(Path("model.gguf"), Path("mmproj.gguf"))
    source = resolve_model_source(str(run))
    server = build_llama_server_command(ModelSource(folder, None, source.manifest), files)
    config = load_patch_config(folder)
    assert server.resize_code == format_resize_code(rule, config.resize_factor)
    words = server.command.split()
    smallest, largest = (
        int(words[words.index(f"--image-{name}-tokens") + 1]) for name in ("min", "max")
    )
    assert 1 <= smallest <= largest
    if rule == RULES[1]:
        return
    rng = random.Random(3)
    for _ in range(100):
        size = rng.randint(10, 2000), rng.randint(10, 2000)
        try:
            resized = compute_resized_size(size, rule, config.resize_factor)
        except CorruptImageError:
            continue
        assert smallest <= config.count_tokens(config.compute_grid(resized)) <= largest


@pytest.mark.parametrize("rule", RULES)
def test_card_of_an_uploaded_adapter_states_the_image_size(rule, tmp_path) -> None:
    """The processor of the base has other limits than the run."""
    base = ModelFolder(create_tiny_model(tmp_path / "base", "qwen2_vl"))
    run = write_run(tmp_path / "run", base, rule)
    with collect_uploads(resolve_model_source(str(run)), str(run)) as files:
        card = files["README.md"].read_text()
        downloaded = tmp_path / "downloaded"
        downloaded.mkdir()
        for name, file in files.items():
            shutil.copy(file, downloaded / name)
    source = resolve_model_source(str(downloaded), str(base.path))
    assert source.adapter == downloaded
    assert source.manifest is not None
    assert source.manifest.image_rule == rule
    code = read_python(card)
    start, _, resize_code = code.partition("\n)\n")
    assert "AutoProcessor.from_pretrained" in start
    assert (format_resize_code(rule, 28) in resize_code) is not isinstance(rule, PixelRange)
    if isinstance(rule, PixelRange):
        assert f"min_pixels={rule.min_pixels}, max_pixels={rule.max_pixels}" in start
