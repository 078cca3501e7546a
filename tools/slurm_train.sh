#!/usr/bin/env bash
# A training as a Slurm job, which goes on in a new job when its time is up:
#
#   sbatch --nodes=2 --gpus-per-node=8 --time=24:00:00 tools/slurm_train.sh \
#     --config-file configs/smca_single_scale_r50_50ep.py train.output_dir=output/smca
#
# Three minutes before the time limit, Slurm sends SIGUSR1. The training ends its step, saves and
# exits with 138 (128 + SIGUSR1), after which this script puts the job back into the queue. What
# Slurm preempts it requeues itself (SIGTERM; the training saves, and exits with 143). scancel ends
# the job for good. A GPU has five cores: for the training process and its four data loaders.
#
#SBATCH --job-name=smca
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-gpu=5
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append

set -u

host=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# The same port in all nodes' processes, and not another job's.
port=$((20000 + SLURM_JOB_ID % 20000))

tasks=${SLURM_GPUS_ON_NODE:-1}

# A process for each GPU, which learns its place from these variables. If one of them fails, srun
# ends the others.
launch="export RANK=\$SLURM_PROCID LOCAL_RANK=\$SLURM_LOCALID
  export WORLD_SIZE=$((SLURM_NNODES * tasks)) LOCAL_WORLD_SIZE=$tasks
  export MASTER_ADDR=$host MASTER_PORT=$port
  exec python train_net.py --resume \"\$@\""

srun --ntasks-per-node="$tasks" --overcommit --cpu-bind=none --kill-on-bad-exit=1 \
  bash -c "$launch" train_net.py "$@"
code=$?
if [ "$code" -eq 138 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
