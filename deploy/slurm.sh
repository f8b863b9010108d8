#!/bin/bash
# Trains on eight nodes with eight GPUs each. Submit it from the folder of this repository, which all nodes must see:
#
#   sbatch deploy/slurm.sh --config=configs/fashion.py --workdir=/shared/runs/fashion
#
# All arguments go to main.py. An option of sbatch before the file's name replaces a line below, such as
# `sbatch --nodes=2 --gpus-per-node=4 deploy/slurm.sh ...`. The output is in googlenet-JOB.out.

#SBATCH --job-name=googlenet
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=googlenet-%j.out

PYTHON=${PYTHON:-.venv/bin/python}
# srun does not take this from sbatch: without it, a process has one core to read and decode images.
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

srun "$PYTHON" main.py "$@"
status=$?

# 180 seconds before the time limit, Slurm sends SIGUSR1 to all processes. They save the same step and end with status
# 138, which is 128 + SIGUSR1. Then the job waits in the queue again, and continues. Slurm itself requeues it after a
# node has failed.
if [ $status -eq 138 ]; then
  echo "Requeueing job $SLURM_JOB_ID, which has started $((${SLURM_RESTART_COUNT:-0} + 1)) times."
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
