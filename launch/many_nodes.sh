#!/usr/bin/env bash
# Train on many machines without Slurm. They need the same code, data and run directory (a shared disk).
# From one of them, through ssh, in this folder on each; the first one is where the ranks meet:
#   HOSTS="host1 host2" launch/many_nodes.sh RECIPE [key=value …]
# Or by hand, once on each:
#   NODES=2 NODE=0 MASTER_ADDR=host1 launch/many_nodes.sh RECIPE [key=value …]
# RANKS is the number of ranks per machine (default: one per GPU); MASTER_PORT a port that is free on the first (29500).
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"
MASTER_PORT="${MASTER_PORT:-29500}"
if [ -n "${HOSTS:-}" ]; then
    read -r -a hosts <<<"$HOSTS"
    here=$(printf '%q' "$PWD")
    arguments=$(printf '%q ' "$@") # quoted, because ssh passes one line to the shell of the other side
    pids=()
    trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT INT TERM HUP # Ctrl-C, and when one machine fails: all of them end
    for node in "${!hosts[@]}"; do
        settings="HOSTS= NODES=${#hosts[@]} NODE=$node MASTER_ADDR=${hosts[0]##*@} MASTER_PORT=$MASTER_PORT RANKS=${RANKS:-gpu}"
        # -tt: when ssh ends, the remote ranks end too. Variables of this shell are not passed on.
        ${SSH:-ssh -tt -o BatchMode=yes} "${hosts[$node]}" \
            "cd $here && env PATH=$(printf '%q' "$PATH") $settings $(printf '%q' "$0") $arguments" &
        pids+=($!)
    done
    code=0
    for _ in "${pids[@]}"; do wait -n || { code=$?; break; }; done
    exit "$code"
fi
: "${NODES:?how many machines}" "${NODE:?the number of this one, from 0}" "${MASTER_ADDR:?the address of machine 0}"
exec torchrun --nnodes "$NODES" --node_rank "$NODE" --nproc_per_node "${RANKS:-gpu}" \
    --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" -m bigtrain train "$@"
