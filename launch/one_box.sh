#!/usr/bin/env bash
# Train on every GPU of this machine, one rank each.
#   launch/one_box.sh RECIPE [key=value …]
set -euo pipefail
# shellcheck source=launch/env.sh
. "$(dirname "$0")/env.sh"
exec torchrun --standalone --nproc_per_node gpu -m bigtrain train "$@"
