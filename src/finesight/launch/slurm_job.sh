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

srun --kill-on-bad-exit=1 bash -c {task} task \
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
