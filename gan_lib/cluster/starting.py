"""A Dask cluster: started on this machine for one's own use, or joined where it runs already."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dask
import torch
from dask.system import CPU_COUNT
from distributed import Client, Nanny, Security
from distributed.client import ensure_default_client
from distributed.deploy.cluster import Cluster

from gan_lib.base.errors import ClusterError, describe
from gan_lib.cluster.shipping import ship_package
from gan_lib.cluster.workers import OwnCluster, in_thread, require_some_workers, wait_for_workers

LOOPBACK = "127.0.0.1"
SECONDS_TO_CONNECT, SECONDS_TO_CLOSE = 5, 60
# Dask's parts look at their own event loops 50 times a second each: those of a scheduler and two
# nannies took 4 % of a core from the ranks beside them.
QUIET = {"distributed.admin.tick.interval": "500ms"}
# What has to end before a client is closed: the jobs that run on its cluster, say.
BEFORE_CLOSING: list[Callable[[Client], None]] = []


def start_cluster(n_workers: int | None = None, device: str = "auto") -> Client:
    """Start a Dask cluster of processes on this machine, for this client alone.

    Scheduler and workers listen on loopback and speak TLS, with certificates that only they and
    this process hold: whoever could send them work could do it as the user who started them.
    That covers what goes through Dask. The ranks of a training talk among themselves (gloo,
    NCCL) on loopback too, unencrypted, and Dask's dashboard shows itself to all on this machine.

    Args:
        n_workers: one rank will run on each; None takes one per GPU, or one per CPU core.
        device: "auto" uses the GPUs if there are any; "cpu" or "cuda" insist.

    Returns:
        A client; `close_cluster` ends the cluster with it.

    Raises:
        ClusterError: if "cuda" is wanted without a GPU, `n_workers` is below 1, or workers end
            before they have started.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker imports the script that starts it, and has come to this line of it. Without a
        # word: there are many of them, and the process that waits for them tells it once.
        sys.exit(1)
    require_some_workers(n_workers)
    _link_dashboard()
    n_gpus = torch.cuda.device_count() if device != "cpu" else 0
    if device == "cuda" and n_gpus == 0:
        raise ClusterError("device is 'cuda', but this machine shows no GPU: use 'auto' or 'cpu'")
    n_workers = n_workers or n_gpus or CPU_COUNT
    shown = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(n_gpus)))
    try:
        with dask.config.set(QUIET):
            cluster = OwnCluster(
                n_workers=n_workers,
                threads_per_worker=1,
                host=LOOPBACK,
                dashboard_address=f"{LOOPBACK}:0",
                security=Security.temporary(),
                # A rank holds its images in memory; Dask would pause it as if it were a leak.
                memory_limit=0,
                worker_class=_TrainingNanny,
                n_threads=max(1, CPU_COUNT // n_workers),
                gpus=shown.split(",")[:n_gpus],
            )
    except RuntimeError as error:
        raise ClusterError(
            f"the workers did not start ({error.__cause__ or error}): in a script, put this under "
            '`if __name__ == "__main__":`, because a worker begins by importing the script; '
            "anywhere else, see what they have printed"
        ) from None
    return Client(cluster)


def connect(
    address: str | os.PathLike[str] | Cluster,
    n_workers: int = 1,
    security: Security | None = None,
) -> Client:
    """Connect to a Dask scheduler that is already running, and has workers.

    Args:
        address: for example "tcp://10.0.0.1:8786", or "tls://..." for one that encrypts; the path
            of the file that `dask scheduler --scheduler-file PATH` wrote; or any Dask Cluster
            object (an SLURMCluster, SSHCluster, GatewayCluster, ...), which stays its owner's.
        n_workers: there must be at least so many; those that are starting are waited for.
        security: certificates, for "tls://"; None takes those of the Cluster object, or of Dask's
            configuration (`distributed.comm.tls`). They cover what goes through Dask; the ranks
            of a training talk among themselves (gloo, NCCL) unencrypted.

    Raises:
        ClusterError: if nothing answers there, certificates are missing or do not fit, or there
            are too few workers, or workers that cannot do what training needs; if the file is not
            there, or of something else; if the Cluster object is closed.
    """
    require_some_workers(n_workers)
    _link_dashboard()
    target = scheduler_at(address)
    shown = repr(target) if isinstance(target, str) else repr(target.scheduler_address)
    if target is not address and isinstance(target, str):
        shown += f", which is in {os.fspath(address)}"  # type: ignore[arg-type]  # a path
    try:
        # Dask waits for ever for what listens and is no scheduler, such as a dashboard: then
        # nobody should get that client by default, either.
        joining = in_thread(
            lambda: _Joining(
                target, timeout=SECONDS_TO_CONNECT, security=security, set_as_default=False
            )
        )
        client = joining.result(2 * SECONDS_TO_CONNECT)
    except TypeError as error:
        if "ssl_context" not in str(error):
            raise
        raise ClusterError(
            f"the scheduler at {shown} wants certificates, and there are none: give "
            "connect(address, security=distributed.Security(tls_ca_file=..., tls_client_cert=..., "
            "tls_client_key=...)), or set distributed.comm.tls in Dask's configuration"
        ) from None
    except (OSError, TimeoutError, ValueError, RuntimeError) as error:
        # Should it come after all, nobody holds it.
        joining.add_done_callback(lambda late: late.exception() or late.result().close())
        raise ClusterError(
            f"no Dask scheduler answers at {shown} ({describe(error)}): check the address that "
            "`dask scheduler` printed (tls:// where it encrypts), the certificates, and that this "
            "machine may reach it"
        ) from error
    try:
        wait_for_workers(client, n_workers)
        ship_package(client)
    except BaseException:
        client.close()
        raise
    ensure_default_client(client)
    return client


def scheduler_at(address: str | os.PathLike[str] | Cluster) -> str | Cluster:
    """What Dask's client takes: the address that a scheduler file holds, or what was given.

    Raises:
        ClusterError: if it is a file that is not there, or of something else; a Cluster object
            that is closed; or none of all these.
    """
    if isinstance(getattr(address, "scheduler_address", None), str):
        # Not every Cluster is one of distributed's: dask-gateway's are not.
        state = getattr(getattr(address, "status", ""), "name", "")
        if state in ("closing", "closed", "failed"):
            raise ClusterError(f"this {type(address).__name__} is {state}: start another one")
        if getattr(address, "asynchronous", False):
            raise ClusterError(
                f"this {type(address).__name__} is asynchronous: make it without asynchronous=True"
            )
        return address  # type: ignore[return-value]  # one like it will do
    if not isinstance(address, (str, os.PathLike)):
        raise ClusterError(
            f"connect was given a {type(address).__name__}: give the address of a scheduler, the "
            "path of a scheduler file, or a Cluster object"
        )
    name = os.fspath(address)
    if isinstance(address, str) and ("://" in name or not ("/" in name or name.endswith(".json"))):
        return name
    try:
        told = json.loads(Path(name).expanduser().read_text())["address"]
    except FileNotFoundError:
        raise ClusterError(
            f"there is no scheduler file {name}: `dask scheduler --scheduler-file {name}` writes "
            "it, where this machine and the workers see it"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{name} is no file of `dask scheduler --scheduler-file` ({describe(error)}): give "
            "its path, or the scheduler's address"
        ) from None
    return str(told)


def close_cluster(client: Client) -> None:
    """Close a client, and the cluster too if `start_cluster` made it."""
    for end in BEFORE_CLOSING:
        end(client)
    cluster = client.cluster
    client.close()
    if isinstance(cluster, OwnCluster):
        # What takes longer ends with this process.
        with contextlib.suppress(TimeoutError):
            cluster.close(timeout=SECONDS_TO_CLOSE)


def _link_dashboard() -> None:
    """Behind a JupyterHub, have links to dashboards go through its jupyter-server-proxy.

    A browser reaches nothing else of the machine on which the notebook runs.
    """
    name = "distributed.dashboard.link"
    server = os.environ.get("JUPYTERHUB_PUBLIC_URL") or os.environ.get("JUPYTERHUB_SERVICE_PREFIX")
    if server and dask.config.get(name) == "{scheme}://{host}:{port}/status":
        dask.config.set({name: f"{server.rstrip('/')}/proxy/{{host}}:{{port}}/status"})


class _Joining(Client):
    """A client that is closed at once if it cannot start.

    Dask closes it when its memory is collected. If that happens while another client starts,
    which may be at any moment, both wait for one lock, and so does every client after them.
    """

    def start(self, **named: Any) -> None:
        try:
            super().start(**named)  # type: ignore[no-untyped-call]  # it has no types
        except BaseException:
            self.close()
            raise


class _TrainingNanny(Nanny):
    """Starts a worker that trains well next to others, also one that comes or is replaced later.

    Args:
        n_threads: of torch, in the worker.
        gpus: of which each worker sees one; more workers than GPUs share them.
        name: the number of the worker, which the cluster gives.
    """

    def __init__(
        self, scheduler: str, *, n_threads: int, gpus: Sequence[str], name: int, **named: Any
    ) -> None:
        # Dask looks at what its tasks do 100 times a second, in the process that is to train: with
        # its event loop 3 % of a core, and half a per cent without.
        config = {**QUIET, "distributed.worker.profile.enabled": False}
        preload = [
            *dask.config.get("distributed.worker.preload"),
            # Ctrl-C in a terminal or a notebook reaches the workers too, and would end them.
            "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
        ]
        with dask.config.set(QUIET):
            super().__init__(scheduler, name=name, config=config, preload=preload, **named)
        environment = {
            # Ranks share the cores: torch would start a thread per core in each of them. Dask
            # tells MKL to start one, and torch does as MKL is told.
            "OMP_NUM_THREADS": str(n_threads),
            "MKL_NUM_THREADS": str(n_threads),
            # One thread of obstore waits for all requests; two also wake each other.
            "TOKIO_WORKER_THREADS": "1",
            # When a rank is lost, torch prints a page of C++ frames on each of the others.
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            # Its profiler calls it an error that there is no GPU.
            "KINETO_LOG_LEVEL": "6",
        }
        # What glibc and numpy read has to be there before the process is, which inherits it.
        self.pre_spawn_env.update(environment)
        self.env.update(environment)
        if gpus:
            # Not inherited, because this process may use another.
            self.env["CUDA_VISIBLE_DEVICES"] = gpus[name % len(gpus)]
