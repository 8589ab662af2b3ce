#!/bin/bash
# Trains {{ job.name }}. After a stop or failure, it resumes from the newest checkpoint.
{% if nodes.max_nodes > 1 %}
# Start it on each node with the same MASTER_ADDR: the name or IPv4 address of one node.
# Clocks, folders and this file must be equal on all nodes.
set -u
: "${MASTER_ADDR:?must be the name of one node, equal on all nodes}"
{% endif %}
cd -- {{ job.working_dir | quote }} || exit 1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT={{ timeout }}
{% if nodes.max_nodes > 1 %}
# With a shared TCPStore, torchrun 2.13 fails or hangs if a node joins later or again.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
{% include "node_network.j2" %}
endpoint=$MASTER_ADDR local_address=$address
case $address,$MASTER_ADDR in
    ,* | 127.*,127.* | 127.*,localhost) local_address='' ;;
    127.*)
        echo "MASTER_ADDR: $MASTER_ADDR is $master on this node, which other nodes cannot reach." \
            "Set MASTER_ADDR to the IP address of this node." >&2
        exit 2
        ;;
esac
# The node of MASTER_ADDR hosts the rendezvous. torchrun compares only names.
[ -z "$local_address" ] || [ "$address" != "$master" ] || endpoint=localhost
{% endif %}
exec {{ job.python | quote }} -m finesight.launch.torchrun {% if nodes.max_nodes > 1 %}--nnodes={{ nodes.min_nodes }}:{{ nodes.max_nodes }} --rdzv-backend=c10d --rdzv-endpoint="$endpoint:${MASTER_PORT:-{{ port }}}" --rdzv-id={{ job.name }} ${local_address:+--local-addr="$local_address"}{% else %}--standalone{% endif %} \
    --nproc-per-node={{ nodes.gpus_per_node }} --max-restarts={{ restarts }} \
    {{ job.python_arguments }}
