#!/usr/bin/env bash
# Train on the CPUs of this machine: RANKS processes (default 2), one thread each.
#   launch/cpu.sh RECIPE [key=value …]
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"
exec torchrun --standalone --nproc_per_node "${RANKS:-2}" -m bigtrain train "$@" engine.device=cpu
