#!/bin/bash
# One training on all GPUs of one or several machines. On one machine:
#
#   bash configs/cluster/torchrun.sh gpt --config configs/base/gpt.yaml --data.input tokens
#
# On several: the same line on each, with NODES, the first machine's name, and its own number:
#
#   NODES=2 FIRST=node1 NODE=0 bash configs/cluster/torchrun.sh gpt --config …      # on node1
#   NODES=2 FIRST=node1 NODE=1 bash configs/cluster/torchrun.sh gpt --config …      # on the other
#
# Data and run folder lie where all machines see them. Given again, the line goes on from the last
# checkpoint; so do the restarts when a process dies. Stop it with Ctrl-C or SIGTERM: the processes
# have 30 s to finish their step and save. What was tested where: docs/cluster.md.
set -euo pipefail
NODES=${NODES:-1} NODE=${NODE:-0} FIRST=${FIRST:-127.0.0.1} PORT=${PORT:-29400}
GPUS=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}      # processes on this machine
RESTARTS=${RESTARTS:-3}                              # of all processes, after one has died
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec torchrun --nnodes "$NODES" --nproc-per-node "$GPUS" --node-rank "$NODE" \
  --master-addr "$FIRST" --master-port "$PORT" --max-restarts "$RESTARTS" \
  -m mas train "$1" --trainer.num_nodes "$NODES" --trainer.devices "$GPUS" \
  --trainer.strategy ddp --ckpt_path auto "${@:2}"
