#!/bin/bash
# Trains on eight nodes with eight GPUs each. Submit it from the folder of this repository, which all nodes must see:
#
#   sbatch deploy/slurm.sh --config=configs/folder.py --config.data.source_dir=/shared/pictures \
#       --config.batch_size=4096 --workdir=/shared/runs/pictures
#
# All arguments go to main.py. The batch size must divide by the number of GPUs, here 64; see docs/scaling.md. An option
# of sbatch before the file's name replaces a line below, such as
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

# All processes end together. One that no longer answers is killed 120 seconds after the others have ended.
srun --wait=120 "$PYTHON" main.py "$@"
status=$?

# 180 seconds before the time limit Slurm sends SIGUSR1 to all processes, and SIGTERM if it preempts the job. They save
# the same step and end with 128 + the number of the signal. Then the job waits in the queue again, and continues. After
# a node has failed Slurm itself requeues it. scancel ends this script, too, so it goes no further than srun.
starts=$((${SLURM_RESTART_COUNT:-0} + 1))
again=no
case $status in
  # Not if the signal came at once: then --time is shorter than --signal says.
  138 | 143) if [ $SECONDS -ge 10 ]; then again=yes; fi ;;
  # A process was killed (137), or could not be reached (75). For lack of memory this would happen in every start.
  75 | 137) if [ $starts -le 3 ]; then again=yes; fi ;;
esac
if [ $again = yes ]; then
  echo "Requeueing job $SLURM_JOB_ID after status $status. Starts so far: $starts"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
