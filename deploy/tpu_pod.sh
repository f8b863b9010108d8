#!/bin/bash
# Trains on a TPU slice of several hosts, such as a v5litepod-64. Every host runs the same command, and JAX's processes
# find each other. The arguments are the name of the slice, its zone, a shared folder, and what main.py is to get:
#
#   deploy/tpu_pod.sh my-slice us-west4-a 10.0.0.2:/share --config=configs/fashion.py --workdir=/shared/runs/fashion
#
# The shared folder is one that NFS exports, such as a Filestore instance. Each host mounts it as /shared. The program is
# installed in /shared/googlenet_jax, where this repository must lie. The same command again continues the run.
set -euo pipefail

if [ $# -lt 4 ]; then
  echo "usage: $0 NAME ZONE SERVER:/FOLDER --config=FILE --workdir=/shared/FOLDER ..." >&2
  exit 2
fi
name=$1 zone=$2 share=$3
shift 3

on_host() { # which host, or all; command
  gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" --command="$2"
}

on_host all "mountpoint -q /shared || {
  sudo apt-get install -y -qq nfs-common && sudo mkdir -p /shared && sudo mount -t nfs '$share' /shared; }"
# One host installs for all of them.
on_host 0 "cd /shared/googlenet_jax && { test -x .venv/bin/python ||
  { python3.11 -m venv .venv && .venv/bin/pip install --constraint constraints.txt --editable '.[tpu]'; }; }"
on_host all "cd /shared/googlenet_jax && .venv/bin/python main.py ${*@Q}"
