"""YAML for SkyPilot and for Kubeflow Trainer.

The fields are those of SkyPilot's tasks (docs.skypilot.co, "SkyPilot YAML") and of TrainJob
(github.com/kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from finesight.errors import UserError
from finesight.launch.job import PORT, RESTARTS, Job, one_word
from finesight.launch.scripts import LAST_CHECKPOINT

STORE = "/finesight"
"""Where machines have what lasts: recipe, data and output."""


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
    if one_word(accelerator, "--accelerator") is None:
        raise UserError(
            "is missing",
            where="--accelerator",
            expected="a GPU as `sky show-gpus` names it",
            remedy="for example --accelerator H100",
        )
    run = (
        f"cd {STORE} || exit 1\n"
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
            "file_mounts": {STORE: {"source": image.store, "mode": "MOUNT_CACHED"}},
            "run": run,
        }
    )


def kubeflow(job: Job, image: Image) -> str:
    """A TrainJob for Kubeflow's runtime torch-distributed, which tells torchrun by its environment
    how many machines there are and where they meet; the store is a claim for a volume."""
    nodes = job.machines.fixed("Kubeflow")
    job.inside(image.store)
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
