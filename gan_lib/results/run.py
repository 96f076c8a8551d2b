"""Reading a run directory, while the run goes on or a year later; it asks no cluster."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from gan_lib.base.checks import require_range
from gan_lib.base.errors import RunError, describe
from gan_lib.base.storage import Folder
from gan_lib.data.image_set import ImageSet
from gan_lib.data.images import prepare_images
from gan_lib.gan.drawing import generate_images
from gan_lib.gan.models import Generator, generator_of
from gan_lib.parameters import TrainingParameters
from gan_lib.results import files
from gan_lib.results.checkpoints import Checkpoints, Position
from gan_lib.results.files import PARAMETERS, QUALITY, STATUS, STOP, epoch_path, epochs_of
from gan_lib.results.pictures import read_png
from gan_lib.results.quality import best_epoch, of_network, read_quality
from gan_lib.results.reading import RunStatus, read_info, read_record, read_status
from gan_lib.sources import manifest
from gan_lib.sources.source import resolve_source

if TYPE_CHECKING:
    from distributed import Client

    from gan_lib.jobs.job import Job
    from gan_lib.quality.features import FeatureNetwork


def open_run(url: str = "latest") -> Run:
    """Open a run to read it, while it goes on or a year later.

    Args:
        url: its directory, as a path or an address; "latest" is the newest under `runs/`.

    Raises:
        RunError: if no run lives there, or there is none yet.
    """
    if url != "latest":
        return Run(url)
    found = list(Path(files.RUNS).glob(f"*/{PARAMETERS}"))
    if not found:
        raise RunError(f"there is no run in {files.RUNS} yet: train one first (notebook 04)")
    return Run(str(max(found, key=lambda path: path.stat().st_mtime).parent))


class Run:
    """A run directory, read only.

    Anybody may have written it: what is missing or not as it should be is a RunError, and what
    this version of gan_lib does not know is passed over.

    Attributes:
        url: where it lives.
        parameters: what it was told.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._folder = Folder(url)
        told = self.info()["parameters"]
        self.parameters = TrainingParameters(**{n: told[n] for n in TrainingParameters.names()})

    def __repr__(self) -> str:
        return f"<Run {self.url}: {self.status().state}, {len(self.epochs('records'))} epochs>"

    def info(self) -> dict[str, Any]:
        """All of parameters.json: parameters, versions, world size, device, images.

        Raises:
            RunError: if there is none, or it is damaged.
        """
        try:
            data = self._folder.read(PARAMETERS)
        except FileNotFoundError:
            raise RunError(f"no run lives at {self.url}: it holds no {PARAMETERS}") from None
        with self._understanding(PARAMETERS):
            return read_info(data)

    def status(self) -> RunStatus:
        """What the run was last heard to do."""
        try:
            data = self._folder.read(STATUS)
        except FileNotFoundError:
            return RunStatus()
        with self._understanding(STATUS):
            return read_status(data)

    def epochs(self, kind: str) -> list[int]:
        """The epochs that have a file of this kind: "records", "samples" or "checkpoints"."""
        return epochs_of(kind, self._folder.names(kind))

    def records(self, epochs: Sequence[int] | None = None) -> pd.DataFrame:
        """One row per recorded iteration: iteration, epoch, every loss, images/s.

        Args:
            epochs: only these; None means all.
        """
        return pd.DataFrame(self.plain_records(epochs))

    def plain_records(self, epochs: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The same as `records`, as they were written."""
        chosen = self.epochs("records") if epochs is None else epochs
        lines: list[dict[str, Any]] = []
        for epoch, data in zip(chosen, self._read("records", chosen), strict=True):
            with self._understanding(epoch_path("records", epoch)):
                lines += [read_record(line) for line in data.decode().splitlines()]
        return lines

    def samples(self, epochs: Sequence[int | str] | None = None) -> dict[int, np.ndarray]:
        """Epoch -> its picture, the same latent vectors in a grid: uint8, H x W x C.

        Args:
            epochs: only these; "best" is the best one that was measured. None means all.
        """
        asked = self.epochs("samples") if epochs is None else epochs
        chosen = [self.best_epoch() if epoch == "best" else int(epoch) for epoch in asked]
        pictures = {}
        for epoch, data in zip(chosen, self._read("samples", chosen), strict=True):
            with self._understanding(epoch_path("samples", epoch)):
                pictures[epoch] = read_png(data)
        return pictures

    def images(self, source: str = "") -> ImageSet:
        """The images that the run was trained on, prepared as they were then.

        Args:
            source: the run's own source, said again. It is needed where somebody else may have
                written the run: its words decide what this process then reads.

        Raises:
            As `prepare_images`, and RunError if `source` is needed, or is another.
        """
        p = self.parameters
        trusted = self._trusted_source(source)
        return prepare_images(trusted, p.image_size, p.channels, p.crop, p.max_images)

    def _trusted_source(self, said: str) -> str:
        told = self.parameters.source
        if said and resolve_source(said) != resolve_source(told):
            raise RunError(f"{self.url} was trained on {told!r}, and source is {said!r}")
        if said or told in manifest.sources() or self._folder.is_mine(PARAMETERS):
            return told
        raise RunError(
            f"{self.url} may be somebody else's, and says that it was trained on {told!r}: if "
            f"that is what is to be read here, say it again by source={told!r}"
        )

    def positions(self) -> list[Position]:
        """Where in the run its checkpoints were taken, oldest first."""
        return Checkpoints(self._folder).positions()

    def checkpoints(self) -> dict[int, str]:
        """Epoch -> URL of its checkpoint."""
        return {e: f"{self.url}/{epoch_path('checkpoints', e)}" for e in self.epochs("checkpoints")}

    def checkpoint(self, epoch: int | str = "latest") -> dict[str, Any]:
        """The content of a checkpoint, on the CPU.

        Args:
            epoch: a number; "latest"; or "best", see `best_epoch`.

        Raises:
            RunError: if there is none of that epoch, or the file is damaged.
        """
        if epoch == "best":
            epoch = self.best_epoch()
        checkpoints = Checkpoints(self._folder)
        if epoch == "latest":
            position, state, damaged = checkpoints.newest()
            if position is None:
                why = damaged[0] if damaged else "wait for its first"
                raise RunError(f"{self.url} has no checkpoint yet that is whole: {why}")
            for sentence in damaged:
                warnings.warn(sentence, stacklevel=2)
            return state
        kept = self.epochs("checkpoints")
        if epoch not in kept:
            raise RunError(f"{self.url} has no checkpoint of epoch {epoch}: it keeps {_join(kept)}")
        return checkpoints.read(Position(int(epoch)))

    def generator(self, epoch: int | str = "latest") -> Generator:
        """The generator as it was after an epoch, in eval mode on the CPU.

        It is the moving average, where the run kept one (`ema_images`).
        """
        return self.generator_in(self.checkpoint(epoch))

    def generator_in(self, state: dict[str, Any]) -> Generator:
        """The generator that a checkpoint of this run holds, as `generator` returns it."""
        with self._understanding("checkpoints"):
            generator = generator_of(self.parameters, state.get("classes"))
            generator.load_state_dict(state.get("average", state["generator"]))
        return generator.eval()

    def generate(
        self, n: int, epoch: int | str = "latest", seed: int = 0, of: str | None = None
    ) -> np.ndarray:
        """Make `n` new images: uint8, n x H x W x C; `of` a class, see `generate_images`."""
        return generate_images(self.generator(epoch), n, seed, of)

    def measure(
        self,
        epochs: Sequence[int | str] | None = None,
        n: int | None = None,
        network: FeatureNetwork | None = None,
        images: ImageSet | None = None,
        source: str = "",
        progress: bool = True,
    ) -> list[dict[str, Any]]:
        """Measure how far generated images are from real ones, and keep it in quality.jsonl.

        Args:
            epochs: of checkpoints; None measures all that are kept.
            n: images to generate for each; None takes `quality_images`. It is at most half as
                many as there are real ones.
            network: any callable from uint8 images, N x 3 x H x W, to features, N x d; None
                takes EfficientNet-lite0.
            images: the real images, if the run was trained on those that it was given.
            source: as in `images`.
            progress: show progress bars.

        Returns:
            The new lines, see `quality`.

        Raises:
            RunError: if there is no such checkpoint; as `images`.
            ParameterError: if there are too few real images.
        """
        from gan_lib.results.measuring import measure_run

        # First what takes no time.
        if n is not None:
            require_range("images", n, 8, None)
        chosen = None if epochs is None else [self.checkpoint(epoch)["epoch"] for epoch in epochs]
        images = self.images(source) if images is None else images
        return measure_run(self, images, chosen, n, network, progress)

    def quality(self, network: str = "") -> list[dict[str, Any]]:
        """What was measured, by epoch, during the training or by `measure`.

        Each line has "epoch", "iteration" and "images_seen"; the scores "kid", "kid_spread",
        "fd", "precision" and "recall" (see `gan_lib.quality.scores`); for each but the spread
        what as many real images get, such as "kid_floor"; "images" that were generated; and
        "network". Lines of other networks cannot be compared.

        Args:
            network: only its lines; by default those of EfficientNet-lite0, if there are any.
        """
        with self._understanding(QUALITY):
            return of_network(read_quality(self._folder), network)

    def best_epoch(self) -> int:
        """The epoch with the least KID of those that were measured and have a checkpoint.

        Raises:
            RunError: if there is none.
        """
        found = best_epoch(self.quality(), self.epochs("checkpoints"))
        if found is None:
            raise RunError(
                f"no epoch of {self.url} that has a checkpoint was measured: call measure() on the "
                "run, or train with quality_every"
            )
        return found

    def stop(self, now: bool = False) -> None:
        """Ask the training to end, with a picture and a checkpoint; it can be resumed.

        Args:
            now: within seconds, inside an epoch; if not, after the current epoch.
        """
        if self.status().state in ("waiting", "training"):
            self._folder.write(STOP, b"now" if now else b"epoch")

    def resume(
        self,
        client: Client,
        n_workers: int | None = None,
        source: str = "",
        new_images: bool = False,
        **changes: Any,
    ) -> Job:
        """Go on from the newest checkpoint, on any cluster, with any number of workers.

        Args:
            client: of the cluster.
            n_workers: use only this many; None uses all.
            source: as in `images`.
            new_images: go on also if the images are not those that the run was trained on.
            **changes: parameters that may change, such as `epochs`.

        Raises:
            RunError: if `source` is needed, or the run has parameters of another gan_lib.
            As `gan_lib.jobs.launching.launch`.
        """
        # Reading a run needs no cluster.
        from gan_lib.jobs.launching import launch

        unknown = self.info()["parameters"].keys() - TrainingParameters.names()
        if unknown:
            raise RunError(
                f"{self.url} has parameters that this gan_lib does not know "
                f"({', '.join(sorted(unknown))}): resume it with the version that made it"
            )
        parameters = self.parameters.replace(source=self._trusted_source(source), **changes)
        return launch(client, parameters, self.url, n_workers, resume=True, new_images=new_images)

    def watch(self) -> None:
        """Show the progress until the run ends, from its files alone, whoever started it."""
        from gan_lib.results.watching import watch_from_outside

        watch_from_outside(self)

    @contextlib.contextmanager
    def _understanding(self, path: str) -> Iterator[None]:
        """Whatever is wrong with the content of a file becomes one sentence."""
        try:
            yield
        except Exception as error:
            said = describe(error).splitlines()[0]
            raise RunError(f"{self.url}/{path} is damaged: {said}") from None

    def _read(self, kind: str, epochs: Sequence[int]) -> list[bytes]:
        paths = [epoch_path(kind, epoch) for epoch in epochs]
        try:
            return self._folder.read_all(paths)
        except FileNotFoundError as error:
            epoch = epochs[paths.index(error.filename)]
            raise RunError(
                f"{self.url} has no {kind} of epoch {epoch}: it has {_join(self.epochs(kind))}"
            ) from None


def _join(epochs: Sequence[int]) -> str:
    if len(epochs) > 8:
        return f"{len(epochs)} epochs from {epochs[0]} to {epochs[-1]}"
    return "epochs " + ", ".join(map(str, epochs)) if epochs else "none"
