# What a run's processes find in their environment, and why. Sourced by local.sh and node.sh, on every node, with the
# number of processes of the node as $1 and their GPUs (0: CPU processes) as $2. What is already set stays.

# The checkout that this file lies in is what runs, installed or not.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$here:$here/kernels${PYTHONPATH:+:$PYTHONPATH}"

# A killed process's last lines are in its log, not in a buffer that died with it.
export PYTHONUNBUFFERED=1

# Threads of one process: an equal share of the node's cores, those that SLURM gives or all. torchrun would set 1, which
# starves CPU processes. Beside a GPU, 8 are enough for what is left to the CPU, and more of them only wait.
cores="${SLURM_CPUS_ON_NODE:-$(nproc)}"
threads=$((cores / $1))
((threads >= 1)) || threads=1
((${2} == 0 || threads <= 8)) || threads=8
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$threads}"

if ((${2} > 0)); then
  # Kernels start in the order in which they were issued: Megatron's tensor-parallel and gradient exchanges count on it
  # to begin before the products that hide them.
  export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"
  # An error of the network says what it is, in the log of the process that had it; costs nothing while all is well.
  export NCCL_DEBUG="${NCCL_DEBUG:-WARN}"
  # A rank whose exchange failed or timed out raises instead of hanging: the others are then told who is gone.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING="${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}"
fi

# Not set here, because only the cluster's owner knows them: NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME (the network card
# to use where there are several), NCCL_IB_HCA. Export them before launch/slurm.sh; they reach every process.
