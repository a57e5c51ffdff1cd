#!/bin/bash
# One labelling run on a SLURM cluster: Ray on all nodes of the job, mas preprocess on the first.
#
#   sbatch configs/cluster/slurm.sh 'cc12m/{00000..01242}.tar' cc12m-scenes
#   mas preprocess-status cc12m-scenes        # from the login node
#
# Submit it again when the time limit has cut it: finished shards are passed over. Needs Ray 2.49 or
# newer, a file system all nodes share, and the weights on it. Edit the #SBATCH lines and `source`.
# What was tested where: docs/cluster.md.
#SBATCH --job-name=label
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --gpus-per-node=2
#SBATCH --mem=64G
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@60
set -euo pipefail
INPUT=$1 OUTPUT=$2
PORT=$((10000 + SLURM_JOB_ID % 20000))     # jobs that share a node do not meet

source .venv/bin/activate
export MAS_WEIGHTS=${MAS_WEIGHTS:-$PWD/weights}   # filled beforehand by mas fetch-weights
export RAY_AUTH_MODE=token RAY_USAGE_STATS_ENABLED=0
RAY_AUTH_TOKEN=$(openssl rand -hex 32)     # of this job; nobody else can join or send code
export RAY_AUTH_TOKEN

HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
ADDRESS=$(srun --nodes=1 --ntasks=1 -w "$HEAD" hostname --ip-address | awk '{print $1}'):$PORT

srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" \
  ray symmetric-run --address "$ADDRESS" --min-nodes "$SLURM_NNODES" \
  --num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="$SLURM_GPUS_ON_NODE" -- \
  mas preprocess --config configs/preprocess/cc12m.yaml --address auto --gpus-per-worker 0.5 \
  --input "$INPUT" --output "$OUTPUT"
