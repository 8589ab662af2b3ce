"""Kubeflow TrainJob (github.com/kubeflow/trainer, pkg/apis/trainer/v1alpha1/trainjob_types.go).

The runtime `torch-distributed` passes the number of nodes and the rendezvous endpoint to torchrun
in environment variables.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.launch.job_template import MAX_RESTARTS, MOUNT_PATH, render_template
from finesight.launch.launcher_component import IMAGE_OPTION, LauncherComponent, LauncherOption
from finesight.launch.name_format import NameFormat

if TYPE_CHECKING:
    from finesight.launch.launch_job import LaunchJob

CLAIM_NAME = NameFormat(
    "[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?",
    "a PersistentVolumeClaim, which outlives the nodes, of lowercase letters, digits, - and .",
)
"""RFC 1123 subdomain."""


def build(job: LaunchJob, options: Mapping[str, str]) -> str:
    """Build the YAML of a TrainJob.

    Raises UserError for a recipe or output folder outside of the storage.
    """
    job.require_mounted(options["store"])
    command = (
        f"cd {MOUNT_PATH} && exec torchrun --max-restarts={MAX_RESTARTS} {job.python_arguments}"
    )
    template = Path(__file__).with_name("kubeflow_job.j2")
    return render_template(
        template, job, image=options["image"], store=options["store"], command=command
    )


COMPONENT = LauncherComponent(
    kind="launchers",
    name="kubeflow",
    title="Kubeflow",
    build=build,
    file_suffix=".trainjob.yaml",
    command=("kubectl", "create", "--filename"),
    options={
        "image": IMAGE_OPTION,
        "store": LauncherOption(
            help="PersistentVolumeClaim with recipe, data and output, mounted at"
            f" {MOUNT_PATH}. Required.",
            format=CLAIM_NAME,
            example="training-data, as in `kubectl get pvc`",
            is_required=True,
        ),
    },
    position=2,
)
