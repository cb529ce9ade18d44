# shellcheck shell=bash
# Sourced by every launcher before the ranks start. A variable that is set already keeps its value.

# More threads than cores make ranks wait for each other; torchrun would set 1 too, with a warning.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# CUDA memory grows in place instead of in blocks of fixed size: less fragmentation, so fewer out-of-memory errors near the limit.
export PYTORCH_ALLOC_CONF="${PYTORCH_ALLOC_CONF:-expandable_segments:True}"
# NCCL prints warnings and errors only.
export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
# The Flight Recorder keeps the last collectives of every rank; the watchdog writes them when it ends a hang.
export TORCH_FR_BUFFER_SIZE="${TORCH_FR_BUFFER_SIZE:-2000}"
export TORCH_NCCL_DUMP_ON_TIMEOUT="${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}"
# A collective that fails ends its process instead of leaving it to wait for ever.
export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
# torchrun: pass signals of Slurm and of the user on to the ranks, and leave them time to save.
export TORCHELASTIC_SIGNALS_TO_HANDLE="${TORCHELASTIC_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1}"
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-120}"
