#!/usr/bin/env bash
# One node of launch/job.sbatch: becomes its torchrun. name=value words, then -- CONFIG.toml section.key=value ...
set -euo pipefail

while [[ "$1" != -- ]]; do
  case "${1%%=*}" in
    nodes | processes | gpus | rendezvous | id | logs | start | torchrun | container) declare "$1" ;;
    *) echo "node.sh: '$1' is unknown; submit with launch/slurm.sh" >&2 && exit 2 ;;
  esac
  shift
done
shift
for name in nodes processes gpus; do
  [[ "${!name}" =~ ^[0-9]{1,9}$ ]] && continue
  echo "node.sh: $name='${!name}' is no number; submit with launch/slurm.sh" >&2
  exit 2
done

host=$((SLURM_NODEID == 0))
port="${rendezvous##*:}"
node="${SLURMD_NODENAME:-$(hostname -s)}"

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh" "$processes" "$gpus"

if ((host)) && (exec 3<>"/dev/tcp/${rendezvous%:*}/$port") 2>/dev/null; then
  echo "node.sh: port $port of $node is in use, where the processes were to meet; the job's next start takes another" >&2
  exit 1
fi

# A signal to the step reaches every process of it. torchrun would die of SIGUSR1, and 30 s after SIGTERM kill whoever
# still saves: it ignores both, and goes when its processes have gone. What is ignored here stays ignored after exec, so
# also in the processes until atlas-train notes both signals, which it does before it imports anything.
trap '' TERM USR1

inside=()
if [[ "$container" == apptainer:* ]]; then
  inside=(apptainer exec --bind "$PWD,$here,$logs" --pwd "$PWD" "${container#*:}")
  ((gpus == 0)) || inside=(apptainer exec --nv "${inside[@]:2}")
fi
mkdir -p "$logs/$start/$node"
exec >>"$logs/node-$node.log" 2>&1
echo "node $node, start ${start#start-}: $(date -Is)"
exec ${inside[@]+"${inside[@]}"} "$torchrun" --nnodes "$nodes" --nproc-per-node "$processes" \
  --rdzv-backend c10d --rdzv-endpoint "$rendezvous" --rdzv-id "$id" --rdzv-conf "is_host=$host" \
  --max-restarts 0 --signals-to-handle SIGINT,SIGHUP,SIGQUIT --log-dir "$logs/$start/$node" --tee 3 \
  -m atlas_megatron.train "$@"
