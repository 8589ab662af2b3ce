"""Shell scripts: for torchrun on each machine, and for Slurm.

The options are those of torchrun (docs.pytorch.org, "torchrun (Elastic Launch)") and of sbatch,
srun, scancel and scontrol (slurm.schedmd.com, their manual pages).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from finesight.launch.job import PORT, RESTARTS, Job, one_word

WARNING = 300
"""Seconds before the end at which Slurm says that it comes: for a step and its checkpoint."""

LAST_CHECKPOINT = 3600
"""Seconds that torchrun leaves its processes to write a checkpoint; of itself it leaves them 30."""


def torchrun(job: Job) -> str:
    """A script to be run on every machine; with several, MASTER_ADDR names one of them."""
    machines = job.machines
    lines = [
        "#!/bin/bash",
        f"# Trains {job.name}; stopped or failed, it goes on from its newest checkpoint.",
    ]
    meeting = "--standalone"
    if machines.most > 1:
        lines += [
            "# Start it on each machine, with the same MASTER_ADDR: the name of one of them.",
            "# Their clocks, folders and this file have to be the same.",
            "set -u",
            ': "${MASTER_ADDR:?has to name one of the machines, the same one on all of them}"',
        ]
        meeting = (
            f"--nnodes={machines.least}:{machines.most} --rdzv-backend=c10d"
            f' --rdzv-endpoint="$MASTER_ADDR:${{MASTER_PORT:-{PORT}}}" --rdzv-id={job.name}'
        )
    if machines.elastic:
        lines += [
            "# With its store shared, torchrun 2.13 waits in vain where a machine comes later.",
            "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        ]
    lines += [
        f"cd -- {shlex.quote(str(job.folder))} || exit 1",
        f"export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={LAST_CHECKPOINT}",
        f"exec {shlex.quote(job.python)} -m torch.distributed.run {meeting} \\",
        f"    --nproc-per-node={machines.gpus} --max-restarts={RESTARTS} \\",
        f"    {job.arguments}",
    ]
    return "\n".join(lines) + "\n"


@dataclass(frozen=True, slots=True)
class Queue:
    """Where and how long Slurm runs a job; what is left out is as the cluster has it."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None

    def directives(self) -> list[str]:
        """Raises UserError for a value that no directive can hold."""
        given = {"partition": self.partition, "account": self.account, "time": self.time}
        found = {name: one_word(value, f"--{name}") for name, value in given.items()}
        return [f"--{name}={value}" for name, value in found.items() if value is not None]


_TASK = """\
trap : TERM USR1
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
"$@"
code=$?
# Stopped with a checkpoint: nothing has failed, for which srun would kill the others.
[ "$code" -eq 75 ] && exit 0
exit "$code"
"""
"""What srun starts for each GPU. The shell outlives signals, which its child gets as well."""

_SLURM = """\
set -u
cd -- {folder} || exit 1

# Slurm warns this script of the end, and it the processes, by scancel: srun makes SIGKILL of some
# signals that it gets itself.
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
    # However it ended: from the newest checkpoint it goes on.
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
fi
[ "$code" -eq 0 ] || exit "$code"
exit 75
"""


def slurm(job: Job, queue: Queue) -> str:
    """A script for sbatch: a task for each GPU, put back into the queue when time is over or the
    machines are taken away, and gone on with by as many machines as there are then."""
    machines = job.machines
    nodes = f"{machines.least}-{machines.most}" if machines.elastic else str(machines.least)
    directives = [
        f"--job-name={job.name}",
        f"--output={job.name}-%j.log",
        "--open-mode=append",
        f"--nodes={nodes}",
        f"--ntasks-per-node={machines.gpus}",
        f"--gpus-per-node={machines.gpus}",
        "--requeue",
        f"--signal=B:USR1@{WARNING}",
        *queue.directives(),
    ]
    body = _SLURM.format(
        folder=shlex.quote(str(job.folder)),
        gpus=machines.gpus,
        task=shlex.quote(_TASK),
        python=shlex.quote(job.python),
        arguments=job.arguments,
        result=job.result,
    )
    heads = [f"#SBATCH {directive}" for directive in directives]
    return "\n".join(["#!/bin/bash", *heads, body])
