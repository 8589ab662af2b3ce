cd {{ folder | quote }} || exit 1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={{ timeout }}
first=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
exec torchrun --nnodes="$SKYPILOT_NUM_NODES" --nproc-per-node="$SKYPILOT_NUM_GPUS_PER_NODE" --max-restarts={{ restarts }} --rdzv-backend=c10d --rdzv-endpoint="$first:{{ port }}" --rdzv-id={{ job.name }} {{ job.python_arguments }}
