"""Slurm (slurm.schedmd.com, manual pages of sbatch, srun, scancel and scontrol).

Slurm signals a job before its time limit. The processes save a checkpoint, and the job is requeued,
as after preemption. It resumes with any number of nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from finesight.launch.job_template import render_template
from finesight.launch.launcher_component import LauncherComponent, LauncherOption

if TYPE_CHECKING:
    from finesight.launch.launch_job import LaunchJob

PREEMPTION_WARNING_S = 300
"""Seconds before the time limit at which Slurm signals the job, enough to save a checkpoint."""

_EXAMPLE = "NAME, as the cluster lists it"


def build(job: LaunchJob, options: Mapping[str, str]) -> str:
    """Build an sbatch script that starts one task per GPU. Its options are those of sbatch."""
    template = Path(__file__).with_name("slurm_job.sh")
    return render_template(template, job, options=options, warning=PREEMPTION_WARNING_S)


COMPONENT = LauncherComponent(
    kind="launchers",
    name="slurm",
    title="Slurm",
    build=build,
    file_suffix=".sbatch",
    command=("sbatch",),
    options={
        "partition": LauncherOption(help="partition. Default: of the cluster.", example=_EXAMPLE),
        "account": LauncherOption(
            help="account to charge. Default: of the cluster.", example=_EXAMPLE
        ),
        "time": LauncherOption(
            help="time limit as MINUTES or DAYS-HOURS:MINUTES:SECONDS, such as 1-12:00:00."
            " Default: of the partition.",
            example=_EXAMPLE,
        ),
    },
    supports_elastic_nodes=True,
    position=1,
)
