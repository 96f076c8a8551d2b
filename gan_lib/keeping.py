"""What rank 0 keeps of a run while it trains: files in the run directory, numbers for a handler."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gan_lib.errors import RunError
from gan_lib.parameters import TrainingParameters
from gan_lib.results import (
    PARAMETERS,
    STOP,
    ResultsHandler,
    RunWriter,
    create_run,
    epoch_path,
    image_grid,
    open_run,
    png_bytes,
    tensorboard_events,
)

# How often the records of a long epoch are written while it goes on, for those who watch.
SECONDS_BETWEEN_WRITES = 2.0


class Keeper:
    """Keeps a run as it goes on; there is one, on rank 0.

    Args:
        run: URL of the run directory, or None for none.
        results: also gets parameters.json and the records.
        parameters: say what is kept, and when.
    """

    def __init__(
        self,
        run: str | None,
        results: ResultsHandler | None,
        parameters: TrainingParameters,
    ) -> None:
        self.writer = RunWriter(run) if run is not None else None
        self.results = results
        self.parameters = parameters
        self._written_at = time.monotonic()
        self._checkpoints = open_run(run).epochs("checkpoints") if run is not None else []

    def keep_parameters(self, info: dict[str, Any]) -> None:
        """What the run was told, and what it runs on."""
        text = json.dumps(info, indent=2)
        for target in (self.writer, self.results):
            if target is not None:
                target.submit_result(PARAMETERS, text)

    def keep_status(self, state: str, **details: Any) -> None:
        """What the run is doing."""
        if self.writer is not None:
            self.writer.set_status(state, **details)

    def keep_records(self, epoch: int, records: list[dict[str, Any]]) -> None:
        """The records so far of an epoch that goes on, now and then."""
        if self.writer is not None:
            now = time.monotonic()
            if now - self._written_at >= SECONDS_BETWEEN_WRITES:
                self._written_at = now
                self.writer.submit_result(epoch_path("records", epoch), _lines(records))

    def keep_epoch(
        self,
        epoch: int,
        records: list[dict[str, Any]],
        draw: Callable[[], np.ndarray],
        state: Callable[[], dict[str, Any]],
    ) -> bool:
        """All that a finished epoch leaves; True if somebody asked to stop.

        Args:
            epoch: which.
            records: of its iterations.
            draw: makes the pictures, uint8, N x H x W x C; called if they are due.
            state: makes the content of a checkpoint; called if one is due.
        """
        p = self.parameters
        if self.results is not None:
            self.results.submit_result(epoch_path("records", epoch), _lines(records))
        if self.writer is None:
            return False
        self.writer.submit_result(epoch_path("records", epoch), _lines(records))
        # An epoch shorter than `record_every` may have no record.
        if records:
            self._keep_tensorboard(epoch, records)
        stop = self.writer.exists(STOP)
        last = stop or epoch == p.epochs
        if last or epoch % p.sample_every == 0 or epoch == 1:
            self.writer.submit_result(epoch_path("samples", epoch), png_bytes(image_grid(draw())))
        if last or epoch % p.checkpoint_every == 0:
            buffer = io.BytesIO()
            torch.save(state(), buffer)
            self.writer.submit_result(epoch_path("checkpoints", epoch), buffer.getvalue())
            self._forget_checkpoints(epoch)
        if stop:
            self.writer.remove(STOP)
        return stop

    def _keep_tensorboard(self, epoch: int, records: list[dict[str, Any]]) -> None:
        assert self.writer is not None
        # Optional on the workers of a cluster: records.jsonl says the same.
        with contextlib.suppress(ImportError):
            # TensorBoard reads the event files of a folder in the order of their names.
            path = f"tensorboard/events.out.tfevents.epoch_{epoch:04d}"
            self.writer.submit_result(path, tensorboard_events(records))

    def _forget_checkpoints(self, epoch: int) -> None:
        assert self.writer is not None
        self._checkpoints = [e for e in self._checkpoints if e != epoch] + [epoch]
        keep = self.parameters.keep_checkpoints
        while keep and len(self._checkpoints) > keep:
            self.writer.remove(epoch_path("checkpoints", self._checkpoints.pop(0)))


def claim_run(run: str, parameters: TrainingParameters, resume: bool) -> None:
    """Make sure that `run` is new, or one that `launch` has reserved, or one to resume.

    Raises:
        RunError: if it is taken, or `resume` finds no run or one of other parameters.
    """
    if not RunWriter(run).exists(PARAMETERS):
        if resume:
            raise RunError(f"no run lives at {run}: start it without resume")
        create_run(run, parameters)
        return
    existing = open_run(run)
    if not resume:
        if existing.epochs("records") or existing.parameters != parameters:
            create_run(run, parameters)  # which refuses
        return
    may_change = ("epochs", "record_every", "sample_every", "checkpoint_every", "keep_checkpoints")
    old, new = existing.parameters.to_dict(), parameters.to_dict()
    differences = [
        f"{name} was {old[name]!r} and is {new[name]!r}"
        for name in old
        if old[name] != new[name] and name not in (*may_change, "device")
    ]
    if differences:
        raise RunError(
            f"{run} cannot be resumed with other parameters: {'; '.join(differences)}. "
            f"Only {', '.join(may_change)} may change"
        )


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
