"""What a job is made of, and what is refused before anything is written."""

import subprocess
from pathlib import Path

import pytest
import yaml

from finesight.errors import UserError
from finesight.launch.launch_job import (
    ContainerImage,
    LaunchJob,
    NodeSpec,
    build_kubeflow_job,
)

MACHINES = NodeSpec(1, 1, 8)


def recipe(folder: Path, output: str = "runs/first") -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"model: some/model\ndata: {{train: a.jsonl}}\noutput_dir: {output}\n")
    return path


def test_node_counts() -> None:
    for nodes, expected in (("1", (1, 1)), ("4", (4, 4)), ("2:16", (2, 16))):
        machines = NodeSpec.parse(nodes, 8)
        assert (machines.min_nodes, machines.max_nodes) == expected
        assert machines.is_elastic == (expected[0] < expected[1])
    for nodes in ("", "0", "-1", "2:1", "1:", ":2", "1:2:3", "two", "1 ", "9" * 9):
        with pytest.raises(UserError, match="invalid number of nodes") as caught:
            NodeSpec.parse(nodes, 8)
        assert caught.value.where == "--nodes"


def test_job_name_is_derived_from_output(tmp_path: Path) -> None:
    for output, name in (
        ("runs/Qwen2-VL_2B", "qwen2-vl-2b"),
        ("runs/2024", "finesight"),
        ("'x'", "x"),
        ("'été 3'", "t-3"),
        ("a" * 100, "a" * 63),
        ("'7-b-'", "b"),
    ):
        assert LaunchJob.from_recipe(recipe(tmp_path, output), (), None, MACHINES).name == name
    assert LaunchJob.from_recipe(recipe(tmp_path), (), "mine", MACHINES).name == "mine"


def test_invalid_names_and_recipes_are_rejected(tmp_path: Path) -> None:
    for name in ("", "A", "a_b", "-a", "a-", "1a", "a b", "a" * 64, "a\n"):
        with pytest.raises(UserError, match="invalid name") as caught:
            LaunchJob.from_recipe(recipe(tmp_path), (), name, MACHINES)
        assert caught.value.where == "--name"
    with pytest.raises(UserError, match=r"train\.bach"):
        LaunchJob.from_recipe(recipe(tmp_path), ("train.bach=8",), None, MACHINES)


def test_recipe_path_starting_with_dash(tmp_path: Path) -> None:
    job = LaunchJob("x", Path("-r.yaml"), (), Path("run"), tmp_path, MACHINES)
    assert job.python_arguments == "-m finesight train ./-r.yaml --resume"


NASTY = 'it\'s $(touch stolen) `id` "x"'


def make_job(nodes="2", recipe=f"{NASTY}.yaml", output="runs/first"):
    overrides, machines = (f"data.system_prompt={NASTY}",), NodeSpec.parse(nodes, 8)
    return LaunchJob("first", Path(recipe), overrides, Path(output), Path(), machines)


def build_kubeflow(job: LaunchJob) -> str:
    return build_kubeflow_job(job, ContainerImage("registry.example/finesight:1", "claim"))


def run_shell(shell: str, folder: Path, **environment: str) -> list[str]:
    """Run shell code with a fake torchrun, and return the arguments of that."""
    torchrun = folder / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$SEEN"\n')
    torchrun.chmod(0o755)
    environment |= {"PATH": f"{folder}:/usr/bin:/bin", "SEEN": str(folder / "seen")}
    command = ["bash", "-c", shell.replace("/finesight", str(folder))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (folder / "stolen").exists()
    return (folder / "seen").read_text().split("\0")[:-1]


TRAIN = ["-m", "finesight", "train", f"{NASTY}.yaml", f"data.system_prompt={NASTY}", "--resume"]


def test_kubeflow_train_job(tmp_path: Path) -> None:
    found = yaml.safe_load(build_kubeflow(make_job()))
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = found["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["command"][:2] == ["bash", "-c"]
    assert run_shell(trainer["command"][2], tmp_path)[-6:] == TRAIN


def test_kubeflow_models_accept_the_job() -> None:
    """They leave out what they do not know, so nothing may be missing of what they give back."""
    reason = "kubeflow-trainer-api is not installed"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    for nodes in ("1", "2"):
        found = yaml.safe_load(build_kubeflow(make_job(nodes)))
        assert models.TrainerV1alpha1TrainJob.from_dict(found).to_dict() == found
    found["spec"]["trainer"]["images"] = "unknown"
    assert models.TrainerV1alpha1TrainJob.from_dict(found).to_dict() != found


def test_unsupported_jobs_are_rejected() -> None:
    for recipe, output in (
        ("/r.yaml", "x"),
        ("../r.yaml", "x"),
        ("r.yaml", "/x"),
        ("r.yaml", ".."),
    ):
        with pytest.raises(UserError, match="is outside"):
            build_kubeflow(make_job(recipe=recipe, output=output))
    with pytest.raises(UserError, match="1:4 nodes"):
        build_kubeflow(make_job("1:4"))


@pytest.mark.parametrize(
    ("image", "store", "where"),
    [
        *((None, "x", "--image"), ("a b", "x", "--image"), ("x", None, "--store")),
        *(("x", store, "--store") for store in ("", "s3://bucket/x", "Claim", "a_b", "a-")),
    ],
)
def test_image_and_store_are_required(image: str | None, store: str | None, where: str) -> None:
    with pytest.raises(UserError) as caught:
        ContainerImage.from_options(image, store)
    assert caught.value.where == where
