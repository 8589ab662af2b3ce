"""Templates of job files, and the values that all of them receive."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finesight.launch.launch_job import LaunchJob

MAX_RESTARTS = 3
"""Maximum number of restarts by torchrun after a failed process."""

RENDEZVOUS_PORT = 29400
"""Port on the first node where nodes find each other; the default of torchrun."""

CHECKPOINT_TIMEOUT_S = 3600
"""Seconds that torchrun waits for its processes after a signal, while they save a checkpoint.

Its default is 30.
"""

MOUNT_PATH = "/finesight"
"""Path in a container where the storage with recipe, data and output is mounted."""


def render_template(template: Path, job: LaunchJob, **values: object) -> str:
    """Render a job file.

    The filters `quote` and `yaml` quote a value for a shell and for YAML; `block` writes a text of
    several lines for YAML. A template may include the others of its folder, and `node_network.j2`.
    """
    # The help of commands imports the launchers, and needs no templates.
    import yaml
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader([template.parent, Path(__file__).parent]),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    # An item of a list, since a document would have an end mark.
    environment.filters["yaml"] = lambda value: yaml.safe_dump(
        [value], default_flow_style=True, width=2**30
    )[1:-2]
    environment.filters["block"] = lambda value: yaml.safe_dump(
        value, default_style="|", allow_unicode=True
    )
    return environment.get_template(template.name).render(
        job=job,
        nodes=job.node_spec,
        timeout=CHECKPOINT_TIMEOUT_S,
        restarts=MAX_RESTARTS,
        port=RENDEZVOUS_PORT,
        mount=MOUNT_PATH,
        **values,
    )
