{# Starts the training process of one task. Its shell ignores signals, which Slurm also sends to that process. #}
{% set task %}
trap : TERM USR1
export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
{% if nodes.max_nodes > 1 %}
{% include "node_network.j2" %}
{% endif %}
"$@"
code=$?
# 75: stopped after a checkpoint. With another exit code, srun would kill the other tasks.
[ "$code" -eq 75 ] && exit 0
exit "$code"
{% endset %}
#!/bin/bash
#SBATCH --job-name={{ job.name }}
#SBATCH --output={{ job.name }}-%j.log
#SBATCH --open-mode=append
#SBATCH --nodes={{ nodes.min_nodes }}{% if nodes.is_elastic %}-{{ nodes.max_nodes }}{% endif %}

#SBATCH --ntasks-per-node={{ nodes.gpus_per_node }}
#SBATCH --gpus-per-node={{ nodes.gpus_per_node }}
#SBATCH --requeue
#SBATCH --signal=B:USR1@{{ warning }}
{% for name, value in options.items() %}
#SBATCH --{{ name }}={{ value }}
{% endfor %}
set -u
cd -- {{ job.working_dir | quote }} || exit 1

# Slurm signals this script before the time limit. The script forwards the signal with scancel,
# because srun answers some signals with SIGKILL.
warned='' heard=''
warn() {
    warned=1 heard=1
    scancel --signal=USR1 "$SLURM_JOB_ID"
}
trap warn USR1

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export MASTER_ADDR MASTER_PORT LOCAL_WORLD_SIZE={{ nodes.gpus_per_node }}

srun --kill-on-bad-exit=1 bash -c {{ task | quote }} task \
    {{ job.python | quote }} {{ job.python_arguments }} &
step=$!

# A signal that is trapped ends `wait` before the step has ended.
while :; do
    heard=''
    wait "$step"
    code=$?
    [ -n "$heard" ] || break
done
[ "$code" -eq 0 ] && [ -e {{ job.result_file }} ] && exit 0
if [ -n "$warned" ]; then
    # The requeued job resumes from the newest checkpoint.
    scontrol requeue "$SLURM_JOB_ID"
    exit 75
fi
[ "$code" -eq 0 ] || exit "$code"
exit 75
