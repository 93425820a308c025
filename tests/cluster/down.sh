#!/usr/bin/env bash
# Stop what up.sh started, and forget it: jobs are cancelled, the configuration and the folder's contents removed.
set -euo pipefail
fail() { echo "down.sh: $*" >&2; exit 1; }
[ $# = 1 ] && [ -d "$1/state" ] || fail "give the folder that up.sh was given"
dir=$(cd "$1" && pwd)

timeout 10 scancel --full --user=root >/dev/null 2>&1 || true
for daemon in slurmd slurmctld; do
  pid=$(cat "$dir/$daemon.pid" 2>/dev/null || true)
  if [ -z "$pid" ]; then continue; fi
  kill "$pid" 2>/dev/null || true
  for _ in $(seq 100); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
done
if [ -e "$dir/munged" ]; then
  kill "$(cat /run/munge/munged.pid)" 2>/dev/null || true
fi
if grep -qF "# written by tests/cluster/up.sh" /etc/slurm/slurm.conf 2>/dev/null; then
  rm /etc/slurm/slurm.conf
fi
rm -rf "$dir/state" "$dir/spool" "$dir/munged" "$dir"/slurm*.log "$dir"/slurm*.pid
