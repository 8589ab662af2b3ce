"""torchrun: a shell script to start on each node (docs.pytorch.org, "torchrun (Elastic Launch)").

With several nodes, the user sets MASTER_ADDR to the name or IPv4 address of one node.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.launch.job_template import render_template
from finesight.launch.launcher_component import LauncherComponent

if TYPE_CHECKING:
    from finesight.launch.launch_job import LaunchJob


def build(job: LaunchJob, options: Mapping[str, str]) -> str:
    """Build a shell script that starts torchrun."""
    return render_template(Path(__file__).with_name("torchrun_job.sh"), job)


COMPONENT = LauncherComponent(
    kind="launchers",
    name="torchrun",
    title="torchrun",
    build=build,
    file_suffix=".sh",
    command=("bash",),
    has_queue=False,
    supports_elastic_nodes=True,
    position=0,
)
