#!/bin/bash
# Starts Slurm on this machine without systemd, with two nodes that are both this machine. For tests of deploy/slurm.sh.
# As root on Debian: apt-get install slurm-wlm munge
#
#   experiments/slurm_here.sh /tmp/slurm        # writes slurm.conf there, and node1 and node2 into /etc/hosts
#   export SLURM_CONF=/tmp/slurm/slurm.conf
#   srun --nodes=2 hostname
#   kill $(cat /tmp/slurm/*.pid)                # ends it
set -euo pipefail

folder=${1:?give a folder}
mkdir -p "$folder"/{state,spool/node1,spool/node2}
grep -q '\bnode1\b' /etc/hosts || echo '127.0.0.1 node1 node2' >>/etc/hosts

cat >"$folder/slurm.conf" <<END
ClusterName=here
SlurmctldHost=$(hostname -s)
SlurmUser=root
# No accounting, and nothing that needs cgroups.
AuthType=auth/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
ReturnToService=2
SlurmdTimeout=30
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool/%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
NodeName=node[1-2] NodeHostname=$(hostname -s) NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=$(nproc) RealMemory=4000
PartitionName=main Nodes=node[1-2] Default=YES PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node[1-2] PriorityTier=10 PreemptMode=OFF
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
END

install -d -o munge -g munge /run/munge
pgrep -x munged >/dev/null || su -s /bin/sh munge -c munged
export SLURM_CONF=$folder/slurm.conf
slurmctld
for node in node1 node2; do
  slurmd -N "$node"
done
sleep 3
sinfo
