#!/usr/bin/env bash
# Train on the CPUs of this machine: RANKS processes (default 2), one thread each.
#   launch/cpu.sh RECIPE [key=value …]
set -euo pipefail
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # more threads than cores make gloo crawl
exec torchrun --standalone --nproc_per_node "${RANKS:-2}" -m bigtrain train "$@"
