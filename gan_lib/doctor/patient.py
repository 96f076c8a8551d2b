"""What is examined: a profile, and the machines on which it is to run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dask.system import CPU_COUNT

from gan_lib.base.addresses import absolute, prepared_cache
from gan_lib.base.errors import ClusterError
from gan_lib.cluster.workers import ask
from gan_lib.parameters import TrainingParameters
from gan_lib.results.files import RUNS
from gan_lib.sources import manifest

if TYPE_CHECKING:
    from distributed import Client

_T = TypeVar("_T")
# Of a process that has imported torch and Dask, before it trains; without a GPU.
BYTES_OF_RANK = 450 * 10**6


class NoClusterError(ClusterError):
    """A check needs the cluster, which does not answer; that has been said before."""


class Patient:
    """A profile with the cluster that it is to run on.

    Attributes:
        parameters: of the training.
        n_workers: that it wants; 0 means all.
        address: of a cluster that runs; empty starts one on this machine.
        run: where its run is to live; empty has it below `runs/`.
        client: of the cluster; None before `open`, and if that has failed.
    """

    def __init__(self, values: Mapping[str, Any], client: Client | None = None) -> None:
        known = TrainingParameters.names()
        self.parameters = TrainingParameters(**{k: v for k, v in values.items() if k in known})
        self.n_workers: int = values.get("n_workers", 0)
        self.address: str = values.get("address", "")
        self.run: str = values.get("run", "")
        self.client = client

    def open(self) -> None:
        """Start the cluster, or join it.

        Raises:
            ClusterError: if there is none, or its workers lack something.
        """
        # Not at the top: they import torch, and whether that can be done is to be found out.
        from gan_lib.cluster.shipping import ship_package
        from gan_lib.cluster.starting import connect, start_cluster

        if self.client is None and self.address:
            self.client = connect(self.address, self.n_workers or 1)
        elif self.client is None:
            self.client = start_cluster(self.n_workers or None, self.parameters.device)
            ship_package(self.client)

    def close(self) -> None:
        """Part from the cluster; end it if it was started for this."""
        from gan_lib.cluster.starting import close_cluster

        if self.client is not None:
            # Whatever was wrong with it has been said.
            with contextlib.suppress(Exception):
                close_cluster(self.client)

    def opened(self) -> Client:
        """The client, once the cluster answers.

        Raises:
            NoClusterError: if it does not.
        """
        if self.client is None:
            raise NoClusterError("there is no cluster to ask")
        return self.client

    def on_workers(self, function: Callable[..., _T], *arguments: Any) -> dict[str, _T]:
        """What a function returns on each worker."""
        client = self.opened()
        return ask(client, lambda: client.run(function, *arguments))

    def where_it_trains(self, function: Callable[..., _T], *arguments: Any) -> dict[str, _T]:
        """What a function returns on this machine, or on each worker of a cluster that runs."""
        if not self.address:
            return {"this machine": function(*arguments)}
        found = self.on_workers(function, *arguments)
        return {f"the worker {worker}": answer for worker, answer in found.items()}

    @property
    def ranks_here(self) -> int:
        """How many workers this machine will have."""
        import torch

        n_gpus = torch.cuda.device_count() if self.parameters.device != "cpu" else 0
        return 0 if self.address else self.n_workers or n_gpus or CPU_COUNT

    def gradients(self) -> list[int]:
        """How many numbers the ranks exchange in each step: of the two networks."""
        import torch

        from gan_lib.gan.models import count_parameters, discriminator_of, generator_of

        with torch.device("meta"):  # without their memory
            networks = generator_of(self.parameters), discriminator_of(self.parameters)
        return [count_parameters(network) for network in networks]

    def _bytes_of_run(self) -> int:
        """What its checkpoints will take: weights, two moments of Adam for each, and a mean."""
        p = self.parameters
        kept = p.keep_checkpoints or -(-p.epochs // p.checkpoint_every)
        return (kept + 2) * 4 * 4 * sum(self.gradients())

    def _bytes_of_images(self) -> int:
        """What the prepared images will take, as far as their number is known."""
        p = self.parameters
        known = manifest.sources().get(p.source, {}).get("images", 0)
        return (p.max_images or known) * p.image_size**2 * p.channels

    @property
    def place(self) -> str:
        """Where the run is to live, or the folder of all runs."""
        return absolute(self.run or RUNS)

    @property
    def has_files(self) -> bool:
        """Whether the images are files, which have to be prepared."""
        return "package" not in manifest.sources().get(self.parameters.source, {})

    def written(self) -> dict[str, int]:
        """The places that are written -> bytes that they need."""
        cache = {prepared_cache(): self._bytes_of_images()} if self.has_files else {}
        return {self.place: self._bytes_of_run(), **cache}
