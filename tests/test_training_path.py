"""A training step, and an image on its way to the loss, pass through few source files."""

from pathlib import Path

import pytest
from tiny_task import make_task, write_recipe
from training_path_files import count_path_files

# Lower the bounds as files are merged; raise one only for a file that is split by concept.
MAX_STEP_FILES = 18
MAX_IMAGE_FILES = 28


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_passes_through_few_files(tmp_path: Path, precision: str) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", make_task(tmp_path / "task"), epochs=1)
    files = count_path_files(recipe, [f"train.precision={precision}"])
    assert {"train/step.py", "train/master_weight_optimizer.py"} < {*files["step"]}
    assert {"samples/corpus.py", "model/vision_encoder.py"} < {*files["image to loss"]}
    assert "train/objectives/objective.py" in files["image to loss"]
    assert "train/master_weight_optimizer.py" not in files["image to loss"]
    assert len(files["step"]) <= MAX_STEP_FILES, files["step"]
    assert len(files["image to loss"]) <= MAX_IMAGE_FILES, files["image to loss"]
