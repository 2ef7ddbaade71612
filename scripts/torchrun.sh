#!/bin/bash
# A recipe on several nodes without a scheduler: run this on each of them, with the same words.
#
#     NODES=2 FIRST_NODE=10.0.0.1 scripts/torchrun.sh resnet50_novograd_32k --runs /shared/runs
#
# NODES       how many there are
# FIRST_NODE  name or address of one of them, which all the others can reach
# DEVICES     processes on each (all GPUs), PORT (29500) and JOB, a name that tells two runs at a time apart
#
# Started again after a failure, it goes on from the last checkpoint. docs/many_nodes.md says more.
set -eu
exec torchrun \
    --nnodes="${NODES:?how many nodes}" \
    --nproc-per-node="${DEVICES:-gpu}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="${FIRST_NODE:?name or address of one node}:${PORT:-29500}" \
    --rdzv-id="${JOB:-lbzoo}" \
    --max-restarts=0 \
    -m lbzoo fit "$@" --resume auto
