"""SkyPilot task for a managed job, which SkyPilot restarts after preemption and failures.

The format is documented in github.com/skypilot-org/skypilot, docs/source: `reference/yaml-spec.rst`
(fields), `running-jobs/distributed-jobs.rst` (variables of nodes), `examples/managed-jobs.rst`
(`job_recovery`, `use_spot`) and `reference/storage.rst` and `volumes.rst` (mounts). SkyPilot 0.14.1
parses the tasks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.errors import UserError
from finesight.launch.job_template import MOUNT_PATH, render_template
from finesight.launch.launcher_component import IMAGE_OPTION, LauncherComponent, LauncherOption
from finesight.launch.name_format import NameFormat

if TYPE_CHECKING:
    from finesight.launch.launch_job import LaunchJob

_BUCKET_PATTERN = (
    r"(?!.*/\.\.(?:/|$))"
    r"((?:s3|gs|r2|nebius|cw|vastdata)://[^/\s$@?#]+|oci://[^/\s$@?#]+(?:@[a-z0-9-]+)?"
    r"|(?:cos|https)://[^/\s$@?#]+/[^/\s$@?#]+)"
    r"(?:/+([^?\n]*))?"
)
"""URL of a bucket, then an optional folder, without user, password and signature.

https is an Azure container, cos an IBM bucket with its region, which oci may have, too.
"""

_VOLUME_PATTERN = "[a-z0-9]([-a-z0-9.]{0,61}[a-z0-9])?"

STORE = NameFormat(
    f"{_VOLUME_PATTERN}|{_BUCKET_PATTERN}",
    "a volume of lowercase letters, digits, - and ., or the URL of a bucket: s3://, gs://, r2://,"
    " cos://, oci://, nebius://, cw://, vastdata://, or https:// for an Azure container",
)

ACCELERATOR = NameFormat(
    "[A-Za-z0-9][A-Za-z0-9_.-]*", "a GPU name of `sky gpus list`, without a count"
)


def build(job: LaunchJob, options: Mapping[str, str]) -> str:
    """Build the YAML of a task.

    Raises UserError for a recipe or output folder outside of the storage, and for several nodes
    with a bucket.
    """
    store = options["store"]
    job.require_mounted(store)
    bucket = re.fullmatch(_BUCKET_PATTERN, store)
    folder = MOUNT_PATH
    if bucket is not None:
        nodes = job.node_spec
        if nodes.max_nodes > 1:
            # Ranks write the shards of a checkpoint to one folder, and read the files of others.
            raise UserError(
                f"{nodes.max_nodes} nodes with a bucket",
                where="--store",
                expected="a volume: nodes see the files of each other in a bucket too late",
                remedy="name a volume of `sky volumes ls`, or use --nodes 1",
            )
        # SkyPilot mounts whole buckets.
        store = bucket[1]
        folder = f"{MOUNT_PATH}/{bucket[2] or ''}".rstrip("/")
    return render_template(
        Path(__file__).with_name("skypilot_job.j2"),
        job,
        image=options["image"],
        accelerator=options["accelerator"],
        is_spot="spot" in options,
        store=store,
        is_bucket=bucket is not None,
        folder=folder,
    )


COMPONENT = LauncherComponent(
    kind="launchers",
    name="skypilot",
    title="SkyPilot",
    build=build,
    file_suffix=".sky.yaml",
    command=("sky", "jobs", "launch", "--yes"),
    options={
        "image": IMAGE_OPTION,
        "store": LauncherOption(
            help="volume, or URL of a bucket or a folder in it, with recipe, data and output,"
            f" mounted at {MOUNT_PATH}. Required.",
            format=STORE,
            example="s3://bucket/folder, or training-data, as in `sky volumes ls`",
            is_required=True,
        ),
        "accelerator": LauncherOption(
            help="GPU, such as H100. Required.",
            format=ACCELERATOR,
            example="H100",
            is_required=True,
        ),
        "spot": LauncherOption(
            help="use spot instances, which are cheaper and may be preempted.", is_flag=True
        ),
    },
    position=3,
)
