#!/usr/bin/env bash
# Six runs as one Slurm array, two of them at a time, each on one GPU.
#   ./sweep_array.sh --dry-run                # prints the six commands
#   ./sweep_array.sh slurm.partition=gpu      # submits them; the arguments are further settings
# Afterwards: bigtrain status, and bigtrain compare 'digits-cnn-*' --html sweep.html
set -euo pipefail
bigtrain sweep digits-cnn optim.lr=1e-3,3e-3 seed=0..2 \
    slurm.gpus_per_node=1 slurm.time=30 slurm.array=0%2 --slurm "$@"
