#!/usr/bin/env bash
# Start one job over several hosts. Run the same command on every host; only NODE_RANK differs.
#
#   examples/two_hosts.sh [--dry-run] HEAD NODE_RANK [OPTION ...]
#
#   HEAD        address of the host with node rank 0, as all hosts reach it
#   NODE_RANK   0 on that host, 1 on the next one, ...
#   OPTION      options of serve.launch, the same on every host
#   --dry-run   print the command instead of running it
#
# Environment: NNODES (2), NPROC_PER_NODE (gpu: one rank per GPU), MASTER_PORT (29500), PYTHON.
#
#   host a$ examples/two_hosts.sh 10.0.0.1 0 --model /models/llama-3-8b --host 0.0.0.0 --api-key "$KEY"
#   host b$ examples/two_hosts.sh 10.0.0.1 1 --model /models/llama-3-8b --host 0.0.0.0 --api-key "$KEY"
#
# HTTP is served by rank 0, on the host with node rank 0. Stop the job there: SIGTERM or Ctrl-C to
# that torchrun drains the server, and the ranks on the other hosts end with it.
set -euo pipefail

usage() {
    echo "usage: $0 [--dry-run] HEAD NODE_RANK [OPTION ...]" >&2
    exit 2
}

dry_run=false
if [[ "${1:-}" == "--dry-run" ]]; then
    dry_run=true
    shift
fi
(($# >= 2)) || usage
head=$1
node_rank=$2
shift 2
[[ "$node_rank" =~ ^[0-9]+$ ]] || usage

command=(
    "${PYTHON:-python}" -m torch.distributed.run
    --nnodes "${NNODES:-2}"
    --node-rank "$node_rank"
    --nproc-per-node "${NPROC_PER_NODE:-gpu}"
    --master-addr "$head"
    --master-port "${MASTER_PORT:-29500}"
    -m serve.launch "$@"
)

if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# exec, so that a signal to this process reaches torchrun.
exec "${command[@]}"
