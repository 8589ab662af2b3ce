"""SkyPilot task: fields, quoted commands, storage, and what is refused."""

import subprocess
from pathlib import Path

import pytest
import yaml
from launch_fixtures import NASTY, TRAIN, build_file, make_nasty_job, run_container_script

from finesight.errors import UserError
from finesight.launch.launch_job import LaunchJob
from finesight.launch.launcher_component import LAUNCHERS, LauncherComponent, LauncherOption

OPTIONS = {"image": "registry.example/finesight:1", "store": "data-1", "accelerator": "H100"}


def build(job: LaunchJob, **options: str) -> str:
    return build_file("skypilot", job, **OPTIONS | options)


def test_task_of_several_nodes() -> None:
    task = yaml.safe_load(build(make_nasty_job()))
    run = task.pop("run")
    assert task == {
        "name": "first",
        "num_nodes": 2,
        "resources": {
            "accelerators": "H100:8",
            "image_id": "docker:registry.example/finesight:1",
            "job_recovery": {"max_restarts_on_errors": 3},
        },
        "volumes": {"/finesight": "data-1"},
    }
    assert run.startswith("cd /finesight || exit 1\n")


@pytest.mark.parametrize(
    ("rank", "endpoint", "address"), [("0", "localhost", "10.0.0.1"), ("1", "10.0.0.1", "10.0.0.2")]
)
def test_nodes_find_the_first_one(rank: str, endpoint: str, address: str, tmp_path: Path) -> None:
    run = yaml.safe_load(build(make_nasty_job()))["run"]
    # SkyPilot appends commands, which run after the training.
    words = run_container_script(
        run + "\n[ $? -eq 0 ]",
        tmp_path,
        SKYPILOT_NODE_RANK=rank,
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
        SKYPILOT_NUM_NODES="2",
        SKYPILOT_NUM_GPUS_PER_NODE="8",
    )
    assert words[-6:] == TRAIN
    assert words[:-6] == [
        *("--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}:29400"),
        *("--rdzv-id=first", f"--local-addr={address}", "--nproc-per-node=8", "--max-restarts=3"),
    ]


def test_exit_code_of_the_training_is_that_of_the_run(tmp_path: Path) -> None:
    """Commands that SkyPilot appends read it, and wait for the upload of files first."""
    run = yaml.safe_load(build(make_nasty_job()))["run"]
    (tmp_path / "torchrun").write_text("#!/bin/sh\nexit 3\n")
    (tmp_path / "torchrun").chmod(0o755)
    shell = run.replace("/finesight", str(tmp_path)) + "\necho code $?"
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SKYPILOT_NODE_RANK": "0"}
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True)
    assert done.stdout == "code 3\n"


@pytest.mark.parametrize(
    "name", [NASTY, "sp ace: #x", "été \U0001f600", "a\nb", "%s {{ x }}", "- x"]
)
@pytest.mark.parametrize("store", ["data-1", "s3://b/{}"])
def test_names_are_quoted_for_yaml_and_shell(name: str, store: str, tmp_path: Path) -> None:
    if "\n" in name and store.startswith("s3"):
        return  # no folder of a bucket
    store = store.format(name)
    job = make_nasty_job("1", recipe=f"{name}/r.yaml", output=f"runs/{name}")
    task = yaml.safe_load(build(job, store=store))
    checked = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True)
    assert checked.returncode == 0, checked.stderr
    if store != "data-1":
        (tmp_path / name.rstrip("/")).mkdir(parents=True, exist_ok=True)
    words = run_container_script(
        task["run"],
        tmp_path,
        SKYPILOT_NODE_RANK="0",
        SKYPILOT_NODE_IPS="10.0.0.1",
        SKYPILOT_NUM_NODES="1",
        SKYPILOT_NUM_GPUS_PER_NODE="8",
    )
    recipe = f"{name}/r.yaml"
    assert words[-3] == (f"./{recipe}" if recipe.startswith("-") else recipe)


def test_bucket_subfolder_is_the_working_directory() -> None:
    """SkyPilot mounts whole buckets."""
    azure = "https://a.blob.core.windows.net/b"
    for store, bucket, folder in (
        ("s3://b", "s3://b", "/finesight"),
        ("oci://b@us-sanjose-1/c", "oci://b@us-sanjose-1", "/finesight/c"),
        ("gs://b/", "gs://b", "/finesight"),
        ("s3://b/c/d/", "s3://b", "/finesight/c/d"),
        ("s3://b/c d", "s3://b", "'/finesight/c d'"),
        ("cos://eu-de/b/c", "cos://eu-de/b", "/finesight/c"),
        (f"{azure}/c", azure, "/finesight/c"),
    ):
        task = yaml.safe_load(build(make_nasty_job("1"), store=store))
        mounted = {"source": bucket, "mode": "MOUNT_CACHED"}
        assert task["file_mounts"] == {"/finesight": mounted}
        assert "volumes" not in task
        assert task["run"].startswith(f"cd {folder} || exit 1\n")


def test_spot_instances_are_optional() -> None:
    for options, expected in (({}, None), ({"spot": "True"}, True)):
        task = yaml.safe_load(build(make_nasty_job("1"), **options))
        assert task["resources"].get("use_spot") is expected


def test_unsupported_jobs_are_rejected() -> None:
    for recipe, output in (
        ("/r.yaml", "x"),
        ("../r.yaml", "x"),
        ("r.yaml", "/x"),
        ("r.yaml", ".."),
    ):
        with pytest.raises(UserError, match="is outside"):
            build(make_nasty_job(recipe=recipe, output=output))
    with pytest.raises(UserError, match="1:4 nodes"):
        build(make_nasty_job("1:4"))
    with pytest.raises(UserError, match="2 nodes with a bucket") as caught:
        build(make_nasty_job("2"), store="s3://bucket")
    assert caught.value.where == "--store"


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("store", ("Claim", "a_b", "a-", "s3://", "ftp://bucket", "cos://region", "hf://a/b")),
        ("store", ("s3://k:secret@b/c", "s3://b/../c", "https://a.net/c/f?sig=secret")),
        ("store", ("s3://a b", "s3://${X}", "s3://b/c\nrun: x", "a\nb", "s3://b\n")),
        ("accelerator", ("", "H100\nrun: x", "H100:8", "H100,A100", "-x")),
        ("image", ("", "a b", "a\nb", "$(id)")),
    ],
)
def test_invalid_options_are_rejected(option: str, values: tuple[str, ...]) -> None:
    for value in values:
        with pytest.raises(UserError, match="invalid name") as caught:
            build(make_nasty_job("1"), **{option: value})
        assert caught.value.where == f"--{option}"
    missing = {name: value for name, value in OPTIONS.items() if name != option}
    with pytest.raises(UserError, match="is missing") as caught:
        build_file("skypilot", make_nasty_job("1"), **missing)
    assert caught.value.where == f"--{option}"


def test_other_launchers_cannot_change_its_flag() -> None:
    launcher = LauncherComponent(
        kind="launchers",
        name="batch",
        title="Batch",
        build=lambda job, options: "",
        file_suffix=".batch",
        command=("submit-batch",),
        options={"spot": LauncherOption(help="")},
    )
    problem = LAUNCHERS.find_problem("batch", launcher)
    assert problem is not None
    assert "--spot is a flag of skypilot" in problem
