#!/bin/bash
# One training on a SLURM cluster, one task a GPU; queues itself again until it is done.
#
#   sbatch configs/cluster/slurm-train.sh gpt --config configs/base/gpt.yaml --data.input tokens
#
# Two minutes before the time is up SLURM sends TERM; the tasks finish their step, save, and leave
# with status 143; the job is queued again and goes on with exactly the next sample. Any other
# failure ends it. Edit the #SBATCH lines and `source`. Needs a file system all nodes share.
# What was tested where: docs/cluster.md.
#SBATCH --job-name=train
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
export OMP_NUM_THREADS=1
TERMINATED=143     # 128 + SIGTERM: stopped, saved, resumable

status=0
srun --kill-on-bad-exit=1 python -m mas train "$1" \
  --trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE" \
  --trainer.strategy ddp --ckpt_path auto "${@:2}" || status=$?
if [ "$status" -eq "$TERMINATED" ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
