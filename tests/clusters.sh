#!/bin/sh
# Installs what the tests of real clusters need beside the lock, on Debian, as root: Slurm, an SSH
# server, Dask Gateway, and what Dask starts workers through them with. None of it is started.
#   tests/clusters.sh && make test-all
set -eu
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
    echo "this needs root on Debian or Ubuntu: without it these tests are skipped" >&2
    exit 1
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -qq --no-install-recommends \
    slurm-wlm munge openssh-server openssh-client iproute2 nftables
cd "$(dirname "$0")/.."
"${PYTHON:-.venv/bin/python}" -m pip install --quiet --no-deps \
    dask-jobqueue==0.9.0 asyncssh==2.24.1 \
    dask-gateway==2026.3.0 dask-gateway-server==2026.3.0 colorlog==6.12.0 sqlalchemy==2.1.9 \
    jupyter-server-proxy==4.6.0 simpervisor==1.0.0
