"""Tasks for SkyPilot and TrainJobs for Kubeflow: the fields that these engines know, and sound
shell in them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from finesight.errors import UserError
from finesight.launch.launch_job import (
    ContainerImage,
    LaunchJob,
    NodeSpec,
    build_kubeflow_job,
    build_skypilot_task,
)

IMAGE = ContainerImage("registry.example/finesight:1", "s3://bucket/folder")
CLAIM = ContainerImage("registry.example/finesight:1", "claim")
NASTY = 'it\'s $(touch stolen) `id` "x"'

Shape = dict[str, Any]
"""Keys and what they hold: a type, a shape, or a list of one; a key with ? may be missing."""

SKYPILOT: Shape = {
    "name": str,
    "num_nodes": int,
    "resources": {
        "accelerators": str,
        "image_id": str,
        "job_recovery": {"max_restarts_on_errors": int},
    },
    "file_mounts": {"/finesight": {"source": str, "mode": str}},
    "run": str,
}
"""Of https://docs.skypilot.co/en/latest/reference/yaml-spec.html, the fields that are used."""

POD: Shape = {
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
    "containers": [{"name": str, "volumeMounts": [{"name": str, "mountPath": str}]}],
}

TRAIN_JOB: Shape = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "runtimeRef": {"name": str},
        "trainer": {
            "image": str,
            "command": [str],
            "env": [{"name": str, "value": str}],
            "numNodes": int,
            "numProcPerNode": int,
            "resourcesPerNode": {"limits": {"nvidia.com/gpu": int}},
        },
        "runtimePatches": [
            {
                "manager": str,
                "trainingRuntimeSpec": {
                    "template": {
                        "spec": {
                            "replicatedJobs": [
                                {
                                    "name": str,
                                    "template": {"spec": {"template": {"spec": POD}}},
                                }
                            ]
                        }
                    }
                },
            }
        ],
    },
}
"""Of trainjob_types.go (v1alpha1) in github.com/kubeflow/trainer, the fields that are used."""


def assert_shaped(content: object, shape: object, location: str = "") -> None:
    if isinstance(shape, dict):
        assert isinstance(content, dict), location
        assert content.keys() == shape.keys(), location
        for key, inner in shape.items():
            assert_shaped(content[key], inner, f"{location}.{key}")
    elif isinstance(shape, list):
        assert isinstance(content, list), location
        for item in content:
            assert_shaped(item, shape[0], f"{location}[]")
    else:
        assert type(content) is shape, location


def job(nodes: str = "2", recipe: str = f"{NASTY}.yaml", output: str = "runs/first") -> LaunchJob:
    machines = NodeSpec.parse(nodes, 8)
    return LaunchJob(
        "first", Path(recipe), (f"data.system_prompt={NASTY}",), Path(output), Path(), machines
    )


def valid_shell(shell: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=shell, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def words(shell: str, folder: Path, **environment: str) -> list[str]:
    """What torchrun is called with by these lines."""
    valid_shell(shell)
    torchrun = folder / "torchrun"
    torchrun.write_text('#!/bin/sh\nprintf "%s\\0" "$@" > "$SEEN"\n')
    torchrun.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", shell.replace("/finesight", str(folder))],
        env={"PATH": f"{folder}:/usr/bin:/bin", "SEEN": str(folder / "seen"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "stolen").exists()
    return (folder / "seen").read_text().split("\0")[:-1]


TRAIN = ["-m", "finesight", "train", f"{NASTY}.yaml", f"data.system_prompt={NASTY}", "--resume"]


def test_skypilot_task(tmp_path: Path) -> None:
    task = yaml.safe_load(build_skypilot_task(job(), IMAGE, "H100"))
    assert_shaped(task, SKYPILOT)
    assert task["resources"]["accelerators"] == "H100:8"
    assert task["resources"]["image_id"] == "docker:registry.example/finesight:1"
    assert task["num_nodes"] == 2
    result = {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
    }
    (tmp_path / "folder").mkdir()
    found = words(task["run"], tmp_path, **result)
    assert found[-6:] == TRAIN
    assert {"--nnodes=2", "--nproc-per-node=8", "--rdzv-endpoint=10.0.0.1:29400"} <= {*found}


def test_kubeflow_train_job(tmp_path: Path) -> None:
    found = yaml.safe_load(build_kubeflow_job(job(), CLAIM))
    assert_shaped(found, TRAIN_JOB)
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = found["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["command"][:2] == ["bash", "-c"]
    assert words(trainer["command"][2], tmp_path)[-6:] == TRAIN


def test_bucket_subfolder_is_the_working_directory(tmp_path: Path) -> None:
    """SkyPilot mounts whole buckets and refuses a folder of one."""
    for store, bucket, folder in (
        ("s3://b", "s3://b", "/finesight"),
        ("gs://b/", "gs://b", "/finesight"),
        ("s3://b/c/d/", "s3://b", "/finesight/c/d"),
        ("cos://eu-de/b/c", "cos://eu-de/b", "/finesight/c"),
        (
            "https://a.blob.core.windows.net/b/c",
            "https://a.blob.core.windows.net/b",
            "/finesight/c",
        ),
    ):
        task = yaml.safe_load(build_skypilot_task(job(), ContainerImage("image", store), "H100"))
        assert task["file_mounts"]["/finesight"]["source"] == bucket
        assert task["run"].startswith(f"cd {folder} || exit 1\n")


def test_skypilot_parses_the_task(tmp_path: Path) -> None:
    sky = pytest.importorskip("sky", reason="skypilot is not installed")
    file = tmp_path / "task.yaml"
    for store in ("s3://bucket/folder", "gs://bucket", "cos://eu-de/bucket/folder"):
        file.write_text(build_skypilot_task(job(), ContainerImage("image", store), "H100"))
        task = sky.Task.from_yaml(str(file))
        assert task.num_nodes == 2
        (resources,) = task.resources
        assert resources.accelerators == {"H100": 8}
        # SkyPilot reads it later, when it requests the bucket.
        mounted = task.storage_mounts["/finesight"]
        assert mounted._validate_source(mounted.source, mounted.mode, False) == (
            mounted.source,
            False,
        )


def test_kubeflow_models_accept_the_job() -> None:
    """They leave out what they do not know, so nothing may be missing of what they give back."""
    reason = "kubeflow-trainer-api is not installed"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    for nodes in ("1", "2"):
        found = yaml.safe_load(build_kubeflow_job(job(nodes), ContainerImage("image", "claim")))
        assert models.TrainerV1alpha1TrainJob.from_dict(found).to_dict() == found
    found["spec"]["trainer"]["images"] = "unknown"
    assert models.TrainerV1alpha1TrainJob.from_dict(found).to_dict() != found


@pytest.mark.parametrize(
    ("recipe", "output"), [("/r.yaml", "x"), ("../r.yaml", "x"), ("r.yaml", "/x"), ("r.yaml", "..")]
)
def test_paths_outside_the_store_are_rejected(recipe: str, output: str) -> None:
    for made in (
        lambda j: build_skypilot_task(j, IMAGE, "H100"),
        lambda j: build_kubeflow_job(j, CLAIM),
    ):
        with pytest.raises(UserError, match="is outside"):
            made(job(recipe=recipe, output=output))


def test_elastic_node_counts_are_rejected() -> None:
    for made in (
        lambda j: build_skypilot_task(j, IMAGE, "H100"),
        lambda j: build_kubeflow_job(j, CLAIM),
    ):
        with pytest.raises(UserError, match="1:4 nodes"):
            made(job("1:4"))


@pytest.mark.parametrize(
    ("image", "store", "where"),
    [(None, "x", "--image"), ("x", None, "--store"), ("a b", "x", "--image"), ("x", "", "--store")],
)
def test_image_and_store_are_required(image: str | None, store: str | None, where: str) -> None:
    with pytest.raises(UserError) as caught:
        ContainerImage.from_options(image, store)
    assert caught.value.where == where


@pytest.mark.parametrize("store", ["claim", "s3://", "ftp://bucket", "cos://region", "hf://a/b"])
def test_skypilot_needs_a_bucket(store: str) -> None:
    with pytest.raises(UserError, match="is not a bucket") as caught:
        build_skypilot_task(job(), ContainerImage("image", store), "H100")
    assert caught.value.where == "--store"


@pytest.mark.parametrize("store", ["s3://bucket/folder", "Claim", "a_b", "a-"])
def test_kubeflow_needs_a_volume_claim(store: str) -> None:
    with pytest.raises(UserError, match="is not the name of a claim") as caught:
        build_kubeflow_job(job(), ContainerImage("image", store))
    assert caught.value.where == "--store"


@pytest.mark.parametrize("accelerator", [None, "H100\nrun: x", "", "H100:8", "H100,A100"])
def test_accelerator_is_required(accelerator: str | None) -> None:
    with pytest.raises(UserError) as caught:
        build_skypilot_task(job(), IMAGE, accelerator)
    assert caught.value.where == "--accelerator"
