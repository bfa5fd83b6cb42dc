#!/usr/bin/env bash
# Installs the etcd server on Debian or Ubuntu for the tests of the etcd store and for `deadpool bench control`; needs
# root. Starts nothing: the tests bring up clusters of their own.
set -euo pipefail
if command -v etcd >/dev/null; then
    exit 0
fi
command -v apt-get >/dev/null || { echo "deadpool: no apt-get here: install etcd 3.4 or newer by hand" >&2; exit 1; }
export DEBIAN_FRONTEND=noninteractive
# Debian starts what it installs; a server for all of the machine is not wanted.
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
trap 'rm -f /usr/sbin/policy-rc.d' EXIT
apt-get update -q && apt-get install -y -q --no-install-recommends etcd-server
