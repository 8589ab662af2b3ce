#!/bin/bash
# Trains {{ job.name }}. After a stop or failure, it resumes from the newest checkpoint.
{% if nodes.max_nodes > 1 %}
# Start it on each node with the same MASTER_ADDR: the name of one node.
# Clocks, folders and this file must be equal on all nodes.
set -u
: "${MASTER_ADDR:?must be the name of one node, equal on all nodes}"
{% endif %}
{% if nodes.is_elastic %}
# With a shared TCPStore, torchrun 2.13 hangs if a node joins later.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
{% endif %}
cd -- {{ job.working_dir | quote }} || exit 1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={{ timeout }}
exec {{ job.python | quote }} -m torch.distributed.run {% if nodes.max_nodes > 1 %}--nnodes={{ nodes.min_nodes }}:{{ nodes.max_nodes }} --rdzv-backend=c10d --rdzv-endpoint="$MASTER_ADDR:${MASTER_PORT:-{{ port }}}" --rdzv-id={{ job.name }}{% else %}--standalone{% endif %} \
    --nproc-per-node={{ nodes.gpus_per_node }} --max-restarts={{ restarts }} \
    {{ job.python_arguments }}
