"""Build the job files of torchrun (shell script) and Slurm (sbatch script).

Options are those of torchrun (docs.pytorch.org, "torchrun (Elastic Launch)") and of sbatch, srun,
scancel and scontrol (slurm.schedmd.com, manual pages).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from finesight.launch.launch_job import MAX_RESTARTS, RENDEZVOUS_PORT, LaunchJob, validate_name

PREEMPTION_WARNING_S = 300
"""Seconds before the time limit at which Slurm signals the job, enough to save a checkpoint."""

CHECKPOINT_TIMEOUT_S = 3600
"""Seconds that torchrun waits for its processes after a signal, while they save a checkpoint.

Its default is 30.
"""


def build_torchrun_script(job: LaunchJob) -> str:
    """Build a shell script that starts torchrun, to run on each node of a job.

    With several nodes, the user sets MASTER_ADDR to the name of one node.
    """
    node_spec = job.node_spec
    lines = [
        "#!/bin/bash",
        f"# Trains {job.name}. After a stop or failure, it resumes from the newest checkpoint.",
    ]
    rendezvous = "--standalone"
    if node_spec.max_nodes > 1:
        lines += [
            "# Start it on each node with the same MASTER_ADDR: the name of one node.",
            "# Clocks, folders and this file must be equal on all nodes.",
            "set -u",
            ': "${MASTER_ADDR:?must be the name of one node, equal on all nodes}"',
        ]
        rendezvous = (
            f"--nnodes={node_spec.min_nodes}:{node_spec.max_nodes} --rdzv-backend=c10d"
            f' --rdzv-endpoint="$MASTER_ADDR:${{MASTER_PORT:-{RENDEZVOUS_PORT}}}"'
            f" --rdzv-id={job.name}"
        )
    if node_spec.is_elastic:
        lines += [
            "# With a shared TCPStore, torchrun 2.13 hangs if a node joins later.",
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ]
    lines += [
        f"cd -- {shlex.quote(str(job.working_dir))} || exit 1",
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={CHECKPOINT_TIMEOUT_S}",
        f"exec {shlex.quote(job.python)} -m torch.distributed.run {rendezvous} \\",
        f"    --nproc-per-node={node_spec.gpus_per_node} --max-restarts={MAX_RESTARTS} \\",
        f"    {job.python_arguments}",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class SlurmOptions:
    """Partition, account and time limit of a Slurm job.

    None is the default of the cluster.
    """

    partition: str | None = None
    account: str | None = None
    time_limit: str | None = None

    def format_directives(self) -> list[str]:
        """Return the sbatch options of the set values. Raises UserError for an invalid value."""
        values = {"partition": self.partition, "account": self.account, "time": self.time_limit}
        validated = {name: validate_name(value, f"--{name}") for name, value in values.items()}
        return [f"--{name}={value}" for name, value in validated.items() if value is not None]


_TASK_SCRIPT = """\
trap : TERM USR1
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
"$@"
code=$?
# 75: stopped after a checkpoint. With another exit code, srun would kill the other tasks.
[ "$code" -eq 75 ] && exit 0
exit "$code"
"""
"""Script that starts the training process of one Slurm task.

Its shell ignores signals, which Slurm also sends to the training process.
"""

_SLURM_TEMPLATE = """\
set -u
cd -- {folder} || exit 1

# Slurm signals this script before the time limit. The script forwards the signal with scancel,
# because srun answers some signals with SIGKILL.
warned='' heard=''
warn() {{
    warned=1 heard=1
    scancel --signal=USR1 "$SLURM_JOB_ID"
}}
trap warn USR1

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE={gpus}

srun --kill-on-bad-exit=1 bash -c {task} task \\
    {python} {arguments} &
step=$!

# A signal that is trapped ends `wait` before the step has ended.
while :; do
    heard=''
    wait "$step"
    code=$?
    [ -n "$heard" ] || break
done
[ "$code" -eq 0 ] && [ -e {result} ] && exit 0
if [ -n "$warned" ]; then
    # The requeued job resumes from the newest checkpoint.
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
fi
[ "$code" -eq 0 ] || exit "$code"
exit 75
"""


def build_slurm_script(job: LaunchJob, options: SlurmOptions) -> str:
    """Build an sbatch script that starts one task per GPU.

    Slurm signals the job PREEMPTION_WARNING_S before its time limit; the processes save a
    checkpoint, and the job is requeued, as after preemption. It resumes with any number of nodes.
    """
    node_spec = job.node_spec
    nodes = (
        f"{node_spec.min_nodes}-{node_spec.max_nodes}"
        if node_spec.is_elastic
        else str(node_spec.min_nodes)
    )
    directives = [
        f"--job-name={job.name}",
        f"--output={job.name}-%j.log",
        "--open-mode=append",
        f"--nodes={nodes}",
        f"--ntasks-per-node={node_spec.gpus_per_node}",
        f"--gpus-per-node={node_spec.gpus_per_node}",
        "--requeue",
        f"--signal=B:USR1@{PREEMPTION_WARNING_S}",
        *options.format_directives(),
    ]
    body = _SLURM_TEMPLATE.format(
        folder=shlex.quote(str(job.working_dir)),
        gpus=node_spec.gpus_per_node,
        task=shlex.quote(_TASK_SCRIPT),
        python=shlex.quote(job.python),
        arguments=job.python_arguments,
        result=job.result_file,
    )
    header_lines = [f"#SBATCH {directive}" for directive in directives]
    return "\n".join(["#!/bin/bash", *header_lines, body])
