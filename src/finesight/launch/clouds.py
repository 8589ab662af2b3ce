"""YAML for SkyPilot and for Kubeflow Trainer.

The fields are those of SkyPilot's tasks (docs.skypilot.co, "SkyPilot YAML") and of TrainJob
(github.com/kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go).
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Any

import yaml

from finesight.errors import UserError
from finesight.launch.job import PORT, RESTARTS, Job, one_word
from finesight.launch.scripts import LAST_CHECKPOINT

STORE = "/finesight"
"""Where machines have what lasts: recipe, data and output."""

_BUCKET = re.compile(
    "((?:s3|gs|r2|oci|nebius|cw|vastdata)://[^/]+|(?:cos|https)://[^/]+/[^/]+)(?:/+(.*))?"
)
"""What SkyPilot mounts, and a folder in it: https is Azure's, cos IBM's with a region first."""

_GPU = re.compile("[A-Za-z0-9][A-Za-z0-9_.-]*")

_CLAIM = re.compile("[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
"""RFC 1123's subdomain, as Kubernetes has it for names."""


@dataclass(frozen=True, slots=True)
class Image:
    """A container image in which finesight is installed, and what is mounted into it at STORE."""

    name: str
    store: str

    @classmethod
    def of(cls, name: str | None, store: str | None) -> Image:
        """Raises UserError where one of them is missing, or no name."""
        for option, value, example in (
            ("--image", name, "--image registry.example/finesight:1"),
            ("--store", store, "--store s3://bucket/folder, or a claim's name for kubeflow"),
        ):
            if value is None:
                raise UserError(
                    "is missing",
                    where=option,
                    expected="an image with finesight, and a store that outlives the machines",
                    remedy=f"for example {example}",
                )
            one_word(value, option)
        assert name is not None
        assert store is not None
        return cls(name, store)


def skypilot(job: Job, image: Image, accelerator: str | None) -> str:
    """A task for `sky jobs launch`, which starts it anew where its machines are taken away."""
    machines, nodes = job.machines, job.machines.fixed("SkyPilot")
    job.inside(image.store)
    bucket, folder = _bucket(image.store)
    if accelerator is None or not _GPU.fullmatch(accelerator):
        raise UserError(
            "is missing" if accelerator is None else f"{accelerator!r} is no GPU's name",
            where="--accelerator",
            expected="a GPU as `sky show-gpus` names it, without a number",
            remedy="for example --accelerator H100 --gpus 8",
        )
    run = (
        f"cd {shlex.quote(f'{STORE}/{folder}'.rstrip('/'))} || exit 1\n"
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={LAST_CHECKPOINT}\n"
        'first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)\n'
        'exec torchrun --nnodes="$SKYPILOT_NUM_NODES"'
        f' --nproc-per-node="$SKYPILOT_NUM_GPUS_PER_NODE" --max-restarts={RESTARTS}'
        f' --rdzv-backend=c10d --rdzv-endpoint="$first:{PORT}" --rdzv-id={job.name}'
        f" {job.arguments}\n"
    )
    return _dumped(
        {
            "name": job.name,
            "num_nodes": nodes,
            "resources": {
                "accelerators": f"{accelerator}:{machines.gpus}",
                "image_id": f"docker:{image.name}",
                "job_recovery": {"max_restarts_on_errors": RESTARTS},
            },
            "file_mounts": {STORE: {"source": bucket, "mode": "MOUNT_CACHED"}},
            "run": run,
        }
    )


def _bucket(store: str) -> tuple[str, str]:
    """The bucket of a store, and the folder in it. SkyPilot mounts whole buckets only."""
    found = _BUCKET.fullmatch(store)
    if found is None:
        raise UserError(
            f"{store!r} is no bucket",
            where="--store",
            expected="an address as SkyPilot knows it: s3://, gs://, r2://, cos://, oci://,"
            " nebius://, cw://, vastdata://, or https:// for a container of Azure",
            remedy="for example --store s3://bucket/folder",
        )
    return found[1], found[2] or ""


def kubeflow(job: Job, image: Image) -> str:
    """A TrainJob for Kubeflow's runtime torch-distributed, which tells torchrun by its environment
    how many machines there are and where they meet; the store is a claim for a volume."""
    nodes = job.machines.fixed("Kubeflow")
    job.inside(image.store)
    if not _CLAIM.fullmatch(image.store):
        raise UserError(
            f"{image.store!r} is no name of a claim",
            where="--store",
            expected="a PersistentVolumeClaim in small letters, digits, - and .",
            remedy="for example --store training-data, as `kubectl get pvc` lists it",
        )
    command = f"cd {STORE} && exec torchrun --max-restarts={RESTARTS} {job.arguments}"
    pod = {
        "volumes": [{"name": "store", "persistentVolumeClaim": {"claimName": image.store}}],
        "containers": [
            {"name": "node", "volumeMounts": [{"name": "store", "mountPath": STORE}]},
        ],
    }
    node = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    gpus = {"nvidia.com/gpu": job.machines.gpus}
    return _dumped(
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
                        {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(LAST_CHECKPOINT)}
                    ],
                    "numNodes": nodes,
                    "numProcPerNode": job.machines.gpus,
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


class _InBlocks(yaml.SafeDumper):
    """Writes text of several lines as such."""


def _written(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_InBlocks.add_representer(str, _written)


def _dumped(content: dict[str, Any]) -> str:
    return yaml.dump(content, Dumper=_InBlocks, sort_keys=False, width=100)
