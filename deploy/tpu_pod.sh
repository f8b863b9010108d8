#!/bin/bash
# Trains on a TPU slice of several hosts, such as a v5litepod-64. All hosts run the same command, and the processes find
# each other. Give the name of the slice, its zone, a shared folder, and then what main.py is to get:
#
#   deploy/tpu_pod.sh my-slice us-west4-a 10.0.0.2:/share --config=configs/fashion.py --workdir=/shared/runs/fashion
#
# The shared folder is one that NFS exports, such as a Filestore instance; each host mounts it as /shared. This
# repository must lie in its folder googlenet_jax. The same command again continues the run. To save and stop:
#
#   gcloud compute tpus tpu-vm ssh my-slice --zone=us-west4-a --worker=0 --command='pkill -USR1 -f main.py'
set -euo pipefail

if [ $# -lt 4 ]; then
  echo "usage: $0 NAME ZONE SERVER:/FOLDER --config=FILE --workdir=/shared/FOLDER ..." >&2
  exit 2
fi
name=$1 zone=$2 share=$3
shift 3
PYTHON=${PYTHON:-python3.11} # the package of the hosts' Ubuntu

on_host() { # which host, or all; command
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

on_host all "mountpoint -q /shared || {
  sudo apt-get update -qq && sudo apt-get install -y -qq nfs-common $PYTHON $PYTHON-venv &&
  sudo mkdir -p /shared && sudo mount -t nfs '$share' /shared; }"
# One host installs for all of them.
on_host 0 "cd /shared/googlenet_jax && { test -x .venv/bin/python ||
  { $PYTHON -m venv .venv && .venv/bin/pip install --constraint constraints.txt --editable '.[tpu]'; }; }"
on_host all "cd /shared/googlenet_jax && .venv/bin/python main.py ${*@Q}"
