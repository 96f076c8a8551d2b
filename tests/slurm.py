"""Slurm on this machine: a controller and two nodes of one core each, by Debian's slurm-wlm."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

# No accounting, no limits by cgroups, and ports of its own: nothing of the machine is touched.
CONFIGURATION = """
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
SlurmdParameters=config_overrides
SlurmctldPort=17000
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SlurmdTimeout=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17001-17002] CPUs=1 RealMemory=16000
PartitionName=all Nodes=n[1-2] Default=YES State=UP
"""


class Slurm:
    """Its daemons, each a process of this one; `sbatch` and `scancel` find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "state").mkdir(parents=True)
        told = CONFIGURATION.format(folder=folder, host=socket.gethostname())
        (folder / "slurm.conf").write_text(told)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        files = {"key-file": key} | {
            f"{name}-file": folder / f"munge.{name}" for name in ("pid", "log", "seed")
        }
        self._start(
            "munged",
            "--foreground",
            "--force",
            f"--socket={folder}/munge.sock",
            *(f"--{name}={path}" for name, path in files.items()),
        )
        while not (folder / "munge.sock").exists():
            time.sleep(0.1)
        self._start("slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start(node)

    def start(self, node: str) -> None:
        """Have a node join, the first time or again."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def lose(self, node: str) -> None:
        """Kill all that runs on a node, as if its power had failed."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("SLURMD_NODENAME") == node:
                    # First what would tell the controller how its job has ended.
                    for one in (*process.parents(), process):
                        if one.name() == "slurmstepd" or one is process:
                            one.kill()

    def _start(self, *command: str, name: str = "") -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self.daemons[name or command[0]] = subprocess.Popen(
                command,
                env={**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")},
                stdout=log,
                stderr=log,
            )

    def close(self) -> None:
        """End all jobs, and then the daemons."""
        subprocess.run(["scancel", "--user=root"], check=False)
        deadline = time.monotonic() + 40
        while (
            subprocess.run(["squeue", "-h"], capture_output=True).stdout
            and time.monotonic() < deadline
        ):
            time.sleep(0.5)
        for process in reversed(self.daemons.values()):
            process.send_signal(signal.SIGTERM)
        for process in self.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[Slurm]:
    """Slurm as long as the context lasts; skips the test where it is not installed."""
    if os.getuid() != 0 or not all(map(shutil.which, ("munged", "slurmctld", "slurmd", "sbatch"))):
        pytest.skip("needs Slurm, and root to start it: tests/clusters.sh installs it on Debian")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        one = Slurm(folder)
        try:
            yield one
        finally:
            one.close()
