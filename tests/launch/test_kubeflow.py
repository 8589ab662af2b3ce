"""TrainJob of Kubeflow: fields, quoted commands, and what is refused."""

from pathlib import Path

import pytest
import yaml
from launch_fixtures import TRAIN, build_file, make_nasty_job, run_container_script

from finesight.errors import UserError
from finesight.launch.launch_job import LaunchJob


def build(job: LaunchJob, image: str = "registry.example/finesight:1", store: str = "claim") -> str:
    return build_file("kubeflow", job, image=image, store=store)


def test_train_job(tmp_path: Path) -> None:
    found = yaml.safe_load(build(make_nasty_job()))
    assert (found["apiVersion"], found["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    trainer = found["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 8)
    assert trainer["image"] == "registry.example/finesight:1"
    assert trainer["command"][:2] == ["bash", "-c"]
    assert run_container_script(trainer["command"][2], tmp_path)[-6:] == TRAIN


def test_models_accept_the_job() -> None:
    """They leave out what they do not know, so nothing may be missing of what they give back."""
    reason = "kubeflow-trainer-api is not installed"
    models = pytest.importorskip("kubeflow_trainer_api.models", reason=reason)
    for nodes in ("1", "2"):
        found = yaml.safe_load(build(make_nasty_job(nodes)))
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
            build(make_nasty_job(recipe=recipe, output=output))
    with pytest.raises(UserError, match="1:4 nodes") as caught:
        build(make_nasty_job("1:4"))
    assert str(caught.value.remedy) == "--nodes 4, or --on torchrun or slurm"


@pytest.mark.parametrize(
    ("options", "where"),
    [
        *(({"store": "x"}, "--image"), ({"image": "a b", "store": "x"}, "--image")),
        ({"image": "x"}, "--store"),
        *(
            ({"image": "x", "store": store}, "--store")
            for store in ("", "s3://bucket/x", "Claim", "a_b", "a-")
        ),
    ],
)
def test_image_and_store_are_required(options: dict[str, str], where: str) -> None:
    with pytest.raises(UserError) as caught:
        build_file("kubeflow", make_nasty_job(), **options)
    assert caught.value.where == where
