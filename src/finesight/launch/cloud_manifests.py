"""Build the job files of SkyPilot (task YAML) and Kubeflow Trainer (TrainJob).

The fields are those of SkyPilot tasks (docs.skypilot.co, "SkyPilot YAML") and of TrainJob
(github.com/kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from finesight.errors import UserError
from finesight.launch.launch_job import MAX_RESTARTS, RENDEZVOUS_PORT, LaunchJob, validate_name
from finesight.launch.launch_scripts import CHECKPOINT_TIMEOUT_S

MOUNT_PATH = "/finesight"
"""Path in the container where the storage with recipe, data and output is mounted."""

_BUCKET_PATTERN = re.compile(
    "((?:s3|gs|r2|oci|nebius|cw|vastdata)://[^/]+|(?:cos|https)://[^/]+/[^/]+)(?:/+(.*))?"
)
"""URLs of storage that SkyPilot mounts: bucket, then an optional folder.

https is an Azure container, cos an IBM bucket with its region.
"""

_GPU_NAME_PATTERN = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]*")

_CLAIM_NAME_PATTERN = re.compile("[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""Format of a PersistentVolumeClaim name: RFC 1123 subdomain."""


@dataclass(frozen=True, slots=True)
class ContainerImage:
    """Container image with finesight, and the storage mounted at MOUNT_PATH in it."""

    name: str
    store: str

    @classmethod
    def from_options(cls, name: str | None, store: str | None) -> ContainerImage:
        """Build from the options `--image` and `--store`.

        Raises UserError if one of them is missing or invalid.
        """
        for option, value, example in (
            ("--image", name, "--image registry.example/finesight:1"),
            ("--store", store, "--store s3://bucket/folder, or the name of a claim for kubeflow"),
        ):
            if value is None:
                raise UserError(
                    "is missing",
                    where=option,
                    expected="an image with finesight, and a store that outlives the nodes",
                    remedy=f"for example {example}",
                )
            validate_name(value, option)
        assert name is not None
        assert store is not None
        return cls(name, store)


def build_skypilot_task(job: LaunchJob, image: ContainerImage, accelerator: str | None) -> str:
    """Build the YAML of a SkyPilot task, for `sky jobs launch`.

    SkyPilot restarts the task after preemption.

    Args:
        job: Training job with a fixed number of nodes.
        image: Container image, and a bucket URL as storage.
        accelerator: GPU type such as H100; None is an error.

    Raises UserError for invalid options, and for a recipe or output folder outside of the storage.
    """
    node_spec, num_nodes = job.node_spec, job.node_spec.require_fixed("SkyPilot")
    job.require_inside_store(image.store)
    bucket, folder = _split_bucket(image.store)
    if accelerator is None or not _GPU_NAME_PATTERN.fullmatch(accelerator):
        raise UserError(
            "is missing" if accelerator is None else f"{accelerator!r} is not a GPU name",
            where="--accelerator",
            expected="a GPU name of `sky show-gpus`, without a count",
            remedy="for example --accelerator H100 --gpus-per-node 8",
        )
    run = (
        f"cd {shlex.quote(f'{MOUNT_PATH}/{folder}'.rstrip('/'))} || exit 1\n"
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={CHECKPOINT_TIMEOUT_S}\n"
        'first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
        'exec torchrun --nnodes="$SKYPILOT_NUM_NODES"'
        f' --nproc-per-node="$SKYPILOT_NUM_GPUS_PER_NODE" --max-restarts={MAX_RESTARTS}'
        f' --rdzv-backend=c10d --rdzv-endpoint="$first:{RENDEZVOUS_PORT}" --rdzv-id={job.name}'
        f" {job.python_arguments}\n"
    )
    return _dump_yaml(
        {
            "name": job.name,
            "num_nodes": num_nodes,
            "resources": {
                "accelerators": f"{accelerator}:{node_spec.gpus_per_node}",
                "image_id": f"docker:{image.name}",
                "job_recovery": {"max_restarts_on_errors": MAX_RESTARTS},
            },
            "file_mounts": {MOUNT_PATH: {"source": bucket, "mode": "MOUNT_CACHED"}},
            "run": run,
        }
    )


def _split_bucket(store: str) -> tuple[str, str]:
    """Split a storage URL into bucket and folder, since SkyPilot mounts whole buckets."""
    match = _BUCKET_PATTERN.fullmatch(store)
    if match is None:
        raise UserError(
            f"{store!r} is not a bucket",
            where="--store",
            expected="an address that SkyPilot supports: s3://, gs://, r2://, cos://, oci://,"
            " nebius://, cw://, vastdata://, or https:// for an Azure container",
            remedy="for example --store s3://bucket/folder",
        )
    return match[1], match[2] or ""


def build_kubeflow_job(job: LaunchJob, image: ContainerImage) -> str:
    """Build the YAML of a Kubeflow TrainJob for the runtime torch-distributed.

    The runtime passes the number of nodes and the rendezvous endpoint to torchrun in environment
    variables. `image.store` is the name of a PersistentVolumeClaim.

    Raises UserError for invalid options, and for a recipe or output folder outside of the storage.
    """
    num_nodes = job.node_spec.require_fixed("Kubeflow")
    job.require_inside_store(image.store)
    if not _CLAIM_NAME_PATTERN.fullmatch(image.store):
        raise UserError(
            f"{image.store!r} is not the name of a claim",
            where="--store",
            expected="a PersistentVolumeClaim of lowercase letters, digits, - and .",
            remedy="for example --store training-data, as in `kubectl get pvc`",
        )
    command = (
        f"cd {MOUNT_PATH} && exec torchrun --max-restarts={MAX_RESTARTS} {job.python_arguments}"
    )
    pod = {
        "volumes": [{"name": "store", "persistentVolumeClaim": {"claimName": image.store}}],
        "containers": [
            {"name": "node", "volumeMounts": [{"name": "store", "mountPath": MOUNT_PATH}]},
        ],
    }
    node = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    gpus = {"nvidia.com/gpu": job.node_spec.gpus_per_node}
    return _dump_yaml(
        {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": {"name": job.name},
            "spec": {
                "runtimeRef": {"name": "torch-distributed"},
                "trainer": {
                    "image": image.name,
                    "command": ["bash", "-c", command],
                    "env": [
                        {
                            "name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
                            "value": str(CHECKPOINT_TIMEOUT_S),
                        }
                    ],
                    "numNodes": num_nodes,
                    "numProcPerNode": job.node_spec.gpus_per_node,
                    "resourcesPerNode": {"limits": gpus},
                },
                "runtimePatches": [
                    {
                        "manager": "finesight/launch",
                        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}},
                    }
                ],
            },
        }
    )


class _BlockTextDumper(yaml.SafeDumper):
    """YAML dumper that writes multi-line text as literal blocks (`|`)."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_BlockTextDumper.add_representer(str, _represent_text)


def _dump_yaml(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_BlockTextDumper, sort_keys=False, width=100)
