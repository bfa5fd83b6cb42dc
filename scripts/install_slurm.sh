#!/usr/bin/env bash
# Installs Slurm (slurmctld, slurmd, the commands) and munge on Debian or Ubuntu for tests/cluster; needs root. Starts
# nothing: the tests bring up clusters of their own.
set -euo pipefail
if command -v slurmctld slurmd sbatch munged >/dev/null; then
    exit 0
fi
command -v apt-get >/dev/null || { echo "deadpool: no apt-get here: install slurmctld, slurmd and munge by hand" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
# Debian starts what it installs; a cluster without a configuration is of no use.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
trap 'rm -f /usr/sbin/policy-rc.d' EXIT
apt-get update -q && apt-get install -y -q --no-install-recommends slurmctld slurmd slurm-client munge
