"""What is kept of a run while it trains: files in the run directory, numbers for a handler.

Rank 0 has a `RunKeeper`; all other ranks, and a training without a run, have a `Keeper`.
Files are written by a thread, in order: what a checkpoint builds on is there before it.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import time
import uuid
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

import gan_lib
from gan_lib.base.errors import describe
from gan_lib.data.batches import Batches
from gan_lib.parameters import TrainingParameters
from gan_lib.quality.features import EfficientNetLite0
from gan_lib.results.checkpoints import Checkpoints, Position
from gan_lib.results.files import PARAMETERS, REGROUP, STOP, epoch_path
from gan_lib.results.pictures import image_grid, png_bytes
from gan_lib.results.quality import best_epoch, keep_quality, of_network, read_quality
from gan_lib.results.run import open_run
from gan_lib.results.writing import OwnWriter, ResultsHandler, tensorboard_events
from gan_lib.training.background import BackgroundWriter
from gan_lib.training.networks import Training
from gan_lib.training.resuming import record_lines, take_up

# How often the records of a long epoch are written while it goes on, for those who watch.
SECONDS_BETWEEN_WRITES = 2.0
# How often the run directory is told that the run is alive.
SECONDS_BETWEEN_SIGNS = 15.0


class Keeper:
    """Keeps no files, and hands numbers to a handler, if there is one.

    Args:
        results: gets parameters.json, and the records of each epoch.

    Attributes:
        asked_now: whether somebody wants the training to stop at once.
    """

    def __init__(self, results: ResultsHandler | None = None) -> None:
        self.results = results
        self.asked_now = False

    def take_up(self, start_over: bool) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
        """Where the run goes on, see `gan_lib.training.resuming.take_up`."""
        return {}, [], []

    def measured(self) -> list[dict[str, Any]]:
        """How good the run was after earlier epochs."""
        return []

    def keep_parameters(self, info: dict[str, Any]) -> None:
        """What the run was told, and what it runs on."""
        self._submit(PARAMETERS, json.dumps(info, indent=2))

    def keep_status(self, state: str) -> None:
        """What the run is doing."""

    def keep_records(self, epoch: int, records: list[dict[str, Any]]) -> None:
        """The records so far of an epoch that goes on, now and then."""

    def keep_epoch(
        self,
        training: Training,
        records: list[dict[str, Any]],
        last: bool,
        quality: dict[str, Any] | None = None,
    ) -> None:
        """All that the epoch leaves that has just ended: of the last one, everything there is.

        `quality` is how good it is, if that was measured.
        """
        self._submit(epoch_path("records", training.epoch), record_lines(records))

    def keep_part(self, records: list[dict[str, Any]], state: dict[str, Any]) -> None:
        """What an epoch leaves that is stopped before its end; resume does the rest of it."""

    def asked(self) -> str:
        """What somebody asked for: "epoch", "now" or "regroup"; empty if nothing."""
        return ""

    def close(self, state: str = "", reason: str = "", note: str = "") -> None:
        """Wait until all is written.

        Args:
            state: what the run then is. What was asked for is fulfilled with it, and no longer
                asked for; but a job that only regroups leaves the request of a person.
            reason: why it ended by itself before its last epoch.
            note: what else is to be told of it.

        Raises:
            OSError: what a file could not be written for.
        """

    def fail(self, error: BaseException) -> None:
        """Write what can still be written, and why the run ended."""

    def _submit(self, path: str, text: str) -> None:
        if self.results is not None:
            self.results.submit_result(path, text)


class RunKeeper(Keeper):
    """Keeps a run as it goes on; there is one, on rank 0.

    Args:
        run: URL of the run directory.
        results: as in `Keeper`.
        parameters: say what is kept, and when.
        attempt: names this attempt of a supervised job: once status.json names another one,
            nothing more is written. Empty for a training that nobody supervises.
    """

    def __init__(
        self,
        run: str,
        results: ResultsHandler | None,
        parameters: TrainingParameters,
        attempt: str = "",
    ) -> None:
        super().__init__(results)
        self.parameters = parameters
        self._attempt = attempt
        self._written_at = self._signed_at = time.monotonic()
        self._state = ""
        self._restarts = open_run(run).status().restarts if attempt else ()
        if attempt:
            self._writer = OwnWriter(run, attempt)
        else:
            self._writer = OwnWriter.claim(run, uuid.uuid4().hex)
        self._writer.remove(REGROUP)  # it was asked of an earlier attempt
        self._checkpoints = Checkpoints(self._writer)
        self._background = BackgroundWriter(idle=self._look)

    def take_up(self, start_over: bool) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
        return take_up(self._writer, self._checkpoints, start_over)

    def measured(self) -> list[dict[str, Any]]:
        return of_network(read_quality(self._writer), EfficientNetLite0.name)

    def keep_status(self, state: str) -> None:
        self._background.submit(self._set_status, state)

    def keep_records(self, epoch: int, records: list[dict[str, Any]]) -> None:
        now = time.monotonic()
        if now - self._written_at >= SECONDS_BETWEEN_WRITES:
            self._written_at = now
            self._write(epoch_path("records", epoch), record_lines(records))

    def keep_epoch(
        self,
        training: Training,
        records: list[dict[str, Any]],
        last: bool,
        quality: dict[str, Any] | None = None,
    ) -> None:
        super().keep_epoch(training, records, last)
        p, epoch, submit = training.parameters, training.epoch, self._background.submit
        # Before the checkpoint: what is best stays, whatever is thinned out.
        measured = [] if quality is None else [quality]
        if measured:
            submit(keep_quality, self._writer, measured)
        # An epoch shorter than `record_every` may have no record.
        if records or measured:
            submit(self._write_tensorboard, epoch, [*records, *measured])
        if last or epoch % p.sample_every == 0 or epoch == 1:
            submit(self._write_picture, epoch, image_grid(training.draw()))
        if last or epoch % p.checkpoint_every == 0:
            submit(self._write_checkpoint, Position(epoch), _copied(training.state()))

    def keep_part(self, records: list[dict[str, Any]], state: dict[str, Any]) -> None:
        position = Position(state["epoch"], within=True)
        self._write(epoch_path("records", position.epochs + 1), record_lines(records))
        self._background.submit(self._write_checkpoint, position, _copied(state))

    def asked(self) -> str:
        self._background.check()
        regroup = self._attempt and self._writer.exists(REGROUP)
        return self._writer.request() or ("regroup" if regroup else "")

    def close(self, state: str = "", reason: str = "", note: str = "") -> None:
        # A worker is also asked to leave when its cluster ends: then nobody waits for others.
        if state and not (state == "waiting" and self._left_alone()):
            told = {"reason": reason, "note": note}
            told = {name: sentence for name, sentence in told.items() if sentence}
            self._background.submit(self._set_status, state, **told)
            for request in (REGROUP,) if state == "waiting" else (REGROUP, STOP):
                self._background.submit(self._writer.remove, request)
        self._background.close()

    def _left_alone(self) -> bool:
        """Whether the job that watched over this has parted from it."""
        return open_run(self._writer.url).status().state == "interrupted"

    def fail(self, error: BaseException) -> None:
        failed = isinstance(error, Exception)  # and not Ctrl-C, say
        # A full disk, say, must not hide that.
        with contextlib.suppress(Exception):
            # That a supervised attempt failed is its supervisor's to say.
            if not self._attempt:
                self._state = "failed" if failed else "interrupted"
                told = {"error": describe(error)} if failed else {}
                self._background.submit(self._set_status, self._state, **told)
        with contextlib.suppress(Exception):
            self.close()

    def _submit(self, path: str, text: str) -> None:
        super()._submit(path, text)
        self._write(path, text)

    def _write(self, path: str, text: str) -> None:
        self._background.submit(self._writer.submit_result, path, text)

    def _write_picture(self, epoch: int, picture: np.ndarray) -> None:
        self._writer.submit_result(epoch_path("samples", epoch), png_bytes(picture))

    def _write_checkpoint(self, position: Position, state: dict[str, Any]) -> None:
        self._checkpoints.write(position, state)
        p, whole = (
            self.parameters,
            [x.epochs for x in self._checkpoints.positions() if not x.within],
        )
        best = best_epoch(read_quality(self._writer), whole)
        self._checkpoints.thin_out(p.keep_checkpoints, p.keep_every, best)

    def _write_tensorboard(self, epoch: int, records: list[dict[str, Any]]) -> None:
        # Optional on the workers of a cluster: the files of records say the same.
        with contextlib.suppress(ImportError):
            events = tensorboard_events(records)
            self._writer.submit_result(epoch_path("tensorboard", epoch), events)

    def _set_status(self, state: str, **details: Any) -> None:
        self._state, self._signed_at = state, time.monotonic()
        name = self._writer.owner
        self._writer.set_status(state, job=name, restarts=self._restarts, **details)

    def _look(self) -> None:
        # What cannot be read now can be read at the next look.
        with contextlib.suppress(OSError, ValueError):
            self.asked_now = self._writer.request() == "now"
            silent = time.monotonic() - self._signed_at
            if self._state == "training" and silent > SECONDS_BETWEEN_SIGNS:
                self._set_status("training")


def _copied(state: Any) -> Any:
    """The same content in memory of its own: training goes on while it is written."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)((key, _copied(value)) for key, value in state.items())
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


def describe_training(training: Training, batches: Batches, images_sha256: str) -> dict[str, Any]:
    """What a run was told, and what it runs on."""
    images = batches.images
    return {
        "parameters": training.parameters.to_dict(),
        "world_size": training.ranks.world_size,
        "device": str(training.device),
        "precision_taken": training.precision,
        "compiled": training.compiled,
        "warning": training.warning,
        "device_name": torch.cuda.get_device_name(training.device)
        if training.device.type == "cuda"
        else platform.processor() or platform.machine(),
        "backend": dist.get_backend() if training.ranks.distributed else None,
        "images": len(images),
        "classes": len(images.classes),
        "skipped": len(images.skipped),
        "images_sha256": images_sha256,
        "steps_per_epoch": batches.steps_per_epoch,
        "versions": {
            "gan_lib": gan_lib.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "dask")},
        },
    }
