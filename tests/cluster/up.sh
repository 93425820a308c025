#!/usr/bin/env bash
# A real Slurm of one node, for tests. Run as root on a machine that has none (a container will do):
#     apt-get install -y slurm-wlm munge && tests/cluster/up.sh /tmp/slurm
# Logs, state and pid files go into the folder; /etc/slurm/slurm.conf is written, and refused to be overwritten if it is another's.
# NODE_CPUS and NODE_MEMORY (MB) say how much of the machine the node offers; the default is all of it.
set -euo pipefail
conf=/etc/slurm/slurm.conf
mark="# written by tests/cluster/up.sh"
fail() { echo "up.sh: $*" >&2; exit 1; }

[ $# = 1 ] || fail "give the folder for logs and state, for example: up.sh /tmp/slurm"
[ "$(id -u)" = 0 ] || fail "Slurm's daemons start as root: run this as root, in a container if need be"
for tool in slurmctld slurmd munged sinfo; do
  command -v "$tool" >/dev/null || fail "$tool is not here: apt-get install -y slurm-wlm munge"
done
[ ! -s "$conf" ] || grep -qF "$mark" "$conf" || fail "$conf is there and not ours: this machine has a Slurm of its own"
timeout 5 sinfo --noheader >/dev/null 2>&1 && fail "a Slurm answers already: tests/cluster/down.sh FOLDER stops ours"

mkdir -p "$1"
dir=$(cd "$1" && pwd)
mkdir -p "$dir/state" "$dir/spool" "$(dirname "$conf")"
host=$(hostname -s)
cpus=${NODE_CPUS:-$(OMP_NUM_THREADS= nproc)}
memory=${NODE_MEMORY:-$(awk '/^MemTotal/ {print int($2 / 1024)}' /proc/meminfo)}

# Jobs are followed by their parent process and memory is not enforced, so that no control groups are needed.
cat >"$conf" <<EOC
$mark
ClusterName=adm-repro
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=sched_interval=2,batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
NodeName=$host NodeAddr=127.0.0.1 CPUs=$cpus RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$host Default=YES MaxTime=INFINITE State=UP
EOC

install -d -o munge -g munge -m 755 /run/munge
if [ ! -s /etc/munge/munge.key ]; then
  (umask 077 && head -c 1024 /dev/urandom >/etc/munge/munge.key)
  chown munge: /etc/munge/munge.key
fi
if ! munge -n >/dev/null 2>&1; then
  runuser -u munge -- munged
  echo started >"$dir/munged"
fi
slurmctld -i
slurmd
for _ in $(seq 30); do
  [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ] && exec sinfo
  sleep 1
done
fail "the node did not come up within 30 seconds: look into $dir/slurmctld.log and $dir/slurmd.log"
