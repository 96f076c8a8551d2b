"""What rank 0 keeps of a run while it trains: files in the run directory, numbers for a handler.

Files are written by a thread, in order: training does not wait for a disk or a store, and what
a checkpoint builds on is there before it.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch

from gan_lib.base.errors import RunError, describe
from gan_lib.data.images import ImageSet
from gan_lib.parameters import TrainingParameters
from gan_lib.results.checkpoints import Checkpoints, Position
from gan_lib.results.files import PARAMETERS, REGROUP, STATUS, STOP, epoch_path
from gan_lib.results.pictures import image_grid, png_bytes
from gan_lib.results.run import open_run
from gan_lib.results.writing import ResultsHandler, RunWriter, create_run, tensorboard_events

# How often the records of a long epoch are written while it goes on, for those who watch.
SECONDS_BETWEEN_WRITES = 2.0
# How often the run directory is looked at for a request to stop at once ...
SECONDS_BETWEEN_LOOKS = 1.0
# ... and told that the run is alive.
SECONDS_BETWEEN_SIGNS = 15.0
# Seconds before a file that could not be written is tried again: a disk may be full for a moment.
PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
# Files that may wait to be written: checkpoints among them hold memory.
WAITING_FILES = 8
# What a resumed run may be told anew; all else decides what its weights become.
MAY_CHANGE = (
    "epochs", "record_every", "sample_every", "checkpoint_every", "keep_checkpoints", "keep_every"
)  # fmt: skip


class OwnWriter(RunWriter):
    """Writes into a run, and deletes there, for as long as the run is its own.

    A rank that was suspended and wakes up must touch nothing that others now train.

    Args:
        url: of the run directory.
        attempt: what status.json names as the job that has the run.
    """

    def __init__(self, url: str, attempt: str) -> None:
        super().__init__(url)
        self.attempt = attempt
        self._run = open_run(url)

    def write(
        self, path: str, data: bytes | Iterable[bytes | memoryview], durable: bool = True
    ) -> None:
        """As `Folder.write`. Raises RunError if the run is another job's."""
        self.check()
        super().write(path, data, durable)

    def remove(self, path: str) -> None:
        """As `Folder.remove`. Raises RunError if the run is another job's."""
        self.check()
        super().remove(path)

    def check(self) -> None:
        """Raise RunError if the run is another job's."""
        if self._run.status().job != self.attempt:
            raise RunError(f"another job goes on with {self.url}: this one ends here")


class Keeper:
    """Keeps a run as it goes on; there is one, on rank 0.

    Args:
        run: URL of the run directory, or None for none.
        results: also gets parameters.json and the records.
        parameters: say what is kept, and when.
        attempt: names this attempt of a supervised job: once status.json names another one,
            nothing more is written. Empty for a training that nobody supervises.
    """

    def __init__(
        self,
        run: str | None,
        results: ResultsHandler | None,
        parameters: TrainingParameters,
        attempt: str = "",
    ) -> None:
        self.writer: OwnWriter | None = None
        self.results = results
        self.parameters = parameters
        self.asked_now = False
        self._attempt = attempt
        self._written_at = self._signed_at = time.monotonic()
        self._state = ""
        if run is not None:
            self._restarts = open_run(run).status().restarts if attempt else ()
            name = attempt or uuid.uuid4().hex
            if not attempt:
                RunWriter(run).remove(STOP)  # it came too late for an earlier training
                RunWriter(run).set_status("waiting", job=name)
            self.writer = OwnWriter(run, name)
            self.writer.remove(REGROUP)  # it was asked of an earlier attempt
            self._checkpoints = Checkpoints(self.writer)
            self._background = BackgroundWriter(idle=self._look)

    def keep_parameters(self, info: dict[str, Any]) -> None:
        """What the run was told, and what it runs on."""
        text = json.dumps(info, indent=2)
        if self.writer is not None:
            self._background.submit(self.writer.submit_result, PARAMETERS, text)
        if self.results is not None:
            self.results.submit_result(PARAMETERS, text)

    def keep_status(self, state: str) -> None:
        """What the run is doing."""
        if self.writer is not None:
            self._background.submit(self._set_status, state)

    def keep_records(self, epoch: int, records: list[dict[str, Any]]) -> None:
        """The records so far of an epoch that goes on, now and then."""
        if self.writer is not None:
            now = time.monotonic()
            if now - self._written_at >= SECONDS_BETWEEN_WRITES:
                self._written_at = now
                path = epoch_path("records", epoch)
                self._background.submit(self.writer.submit_result, path, _lines(records))

    def keep_epoch(
        self,
        epoch: int,
        records: list[dict[str, Any]],
        draw: Callable[[], np.ndarray],
        state: Callable[[], dict[str, Any]],
        last: bool,
    ) -> None:
        """All that a finished epoch leaves.

        Args:
            epoch: which.
            records: of its iterations.
            draw: makes the pictures, uint8, N x H x W x C; called if they are due.
            state: makes the content of a checkpoint; called if one is due.
            last: a picture and a checkpoint are due in any case.
        """
        p = self.parameters
        if self.results is not None:
            self.results.submit_result(epoch_path("records", epoch), _lines(records))
        if self.writer is None:
            return
        write = self.writer.submit_result
        self._background.submit(write, epoch_path("records", epoch), _lines(records))
        # An epoch shorter than `record_every` may have no record.
        if records:
            self._background.submit(self._write_tensorboard, epoch, records)
        if last or epoch % p.sample_every == 0 or epoch == 1:
            picture = image_grid(draw())
            self._background.submit(lambda: write(epoch_path("samples", epoch), png_bytes(picture)))
        if last or epoch % p.checkpoint_every == 0:
            self._background.submit(self._write_checkpoint, Position(epoch), _copied(state()))

    def keep_part(self, epoch: int, records: list[dict[str, Any]], state: dict[str, Any]) -> None:
        """What an epoch leaves that is stopped before its end; resume does the rest of it."""
        if self.writer is not None:
            path = epoch_path("records", epoch)
            self._background.submit(self.writer.submit_result, path, _lines(records))
            position = Position(epoch - 1, within=True)
            self._background.submit(self._write_checkpoint, position, _copied(state))

    def asked(self) -> str:
        """What somebody asked for: "epoch", "now" or "regroup"; empty if nothing."""
        if self.writer is None:
            return ""
        self._background.check()
        regroup = self._attempt and self.writer.exists(REGROUP)
        return self.writer.request() or ("regroup" if regroup else "")

    def close(self, state: str = "") -> None:
        """Wait until all is written.

        Args:
            state: what the run then is. What was asked for is fulfilled with it, and no longer
                asked for; but a job that only regroups leaves the request of a person.

        Raises:
            OSError: what a file could not be written for.
        """
        if self.writer is None:
            return
        if state:
            self._background.submit(self._set_status, state)
            for request in (REGROUP,) if state == "waiting" else (REGROUP, STOP):
                self._background.submit(self.writer.remove, request)
        self._background.close()

    def fail(self, error: BaseException) -> None:
        """Write what can still be written, and why the run ended."""
        failed = isinstance(error, Exception)  # and not Ctrl-C, say
        # A full disk, say, must not hide that.
        with contextlib.suppress(Exception):
            # That a supervised attempt failed is its supervisor's to say.
            if self.writer is not None and not self._attempt:
                self._state = "failed" if failed else "interrupted"
                told = {"error": describe(error)} if failed else {}
                self._background.submit(self._set_status, self._state, **told)
        with contextlib.suppress(Exception):
            self.close()

    def take_up(self, start_over: bool) -> tuple[dict[str, Any], list[dict[str, Any]], list[str]]:
        """The newest whole checkpoint, from which the run goes on; what came later is deleted.

        So is what a killed rank has half written.

        Args:
            start_over: begin anew where every checkpoint is damaged.

        Returns:
            The checkpoint's content (empty if there is none), the records of the epoch that
            it is inside of, and what was wrong with newer checkpoints.

        Raises:
            RunError: if every checkpoint is damaged, or another job goes on with the run.
        """
        writer = self.writer
        assert writer is not None
        position, state, damaged = self._checkpoints.newest()
        if position is None:
            if damaged and not start_over:
                raise RunError(
                    f"all checkpoints in {writer.url} are damaged, the newest: {damaged[0]}. "
                    "Launch a new run"
                )
            position = Position(0)
        writer.check()
        # All that ranks write, but not `stop`: somebody may be asking for it just now. A rank of
        # an earlier attempt that still lives then fails to put its file in place, as it should.
        writer.remove_unfinished(PARAMETERS, STATUS, "*/*")
        run = open_run(writer.url)
        records: list[dict[str, Any]] = []
        if position.within and position.epochs + 1 in run.epochs("records"):
            known = run.records([position.epochs + 1]).to_dict("records")
            records = [record for record in known if record["iteration"] <= state["iteration"]]
        # An iteration is recorded once: what follows the checkpoint is trained again.
        for kind in ("records", "samples"):
            for epoch in run.epochs(kind):
                if records and kind == "records" and epoch == position.epochs + 1:
                    writer.submit_result(epoch_path(kind, epoch), _lines(records))
                elif epoch > position.epochs:
                    writer.remove(epoch_path(kind, epoch))
                    writer.remove(tensorboard_path(epoch))
        for later in self._checkpoints.positions():
            if later > position:
                self._checkpoints.remove(later)
        return state, records, damaged

    def _write_checkpoint(self, position: Position, state: dict[str, Any]) -> None:
        self._checkpoints.write(position, state)
        self._checkpoints.thin_out(self.parameters.keep_checkpoints, self.parameters.keep_every)

    def _write_tensorboard(self, epoch: int, records: list[dict[str, Any]]) -> None:
        # Optional on the workers of a cluster: records.jsonl says the same.
        with contextlib.suppress(ImportError):
            assert self.writer is not None
            self.writer.submit_result(tensorboard_path(epoch), tensorboard_events(records))

    def _set_status(self, state: str, **details: Any) -> None:
        assert self.writer is not None
        self._state, self._signed_at = state, time.monotonic()
        self.writer.set_status(state, job=self.writer.attempt, restarts=self._restarts, **details)

    def _look(self) -> None:
        assert self.writer is not None
        # What cannot be read now can be read at the next look.
        with contextlib.suppress(OSError, ValueError):
            self.asked_now = self.writer.request() == "now"
            silent = time.monotonic() - self._signed_at
            if self._state == "training" and silent > SECONDS_BETWEEN_SIGNS:
                self._set_status("training")


class BackgroundWriter:
    """Carries out what writes files, in order, in a thread.

    What fails is tried again, with growing pauses. Once something has failed for good, nothing
    that comes after it is done, and whoever submits, checks or closes gets its error.

    Args:
        idle: called every second or so in between.
    """

    def __init__(self, idle: Callable[[], None]) -> None:
        self._idle = idle
        self._error: BaseException | None = None
        self._waiting: queue.Queue[Callable[[], None] | None] = queue.Queue(WAITING_FILES)
        self._thread = threading.Thread(target=self._run, name="keeping", daemon=True)
        self._thread.start()

    def submit(self, function: Callable[..., None], *arguments: Any, **named: Any) -> None:
        """Have it done after all that was submitted before; waits if that is too much."""
        self.check()
        self._waiting.put(lambda: function(*arguments, **named))

    def check(self) -> None:
        """Raise the error of what failed for good."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait until everything is done."""
        self._waiting.put(None)
        self._thread.join()
        self.check()

    def _run(self) -> None:
        looked_at = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                work = self._waiting.get(timeout=SECONDS_BETWEEN_LOOKS)
                if work is None:
                    return
                if self._error is None:
                    self._do(work)
            if self._error is None and time.monotonic() - looked_at >= SECONDS_BETWEEN_LOOKS:
                looked_at = time.monotonic()
                try:
                    self._idle()
                except Exception as error:
                    self._error = error

    def _do(self, work: Callable[[], None]) -> None:
        for pause in (*PAUSES, None):
            try:
                work()
                return
            except OSError as error:
                if pause is None:
                    self._error = error
                    return
                time.sleep(pause)
            except Exception as error:
                self._error = error
                return


def claim_run(
    run: str,
    parameters: TrainingParameters,
    images: ImageSet,
    resume: bool,
    new_images: bool,
    attempt: str,
) -> None:
    """Make sure that `run` is new, or one that `launch` has reserved, or one to resume.

    Args:
        run: URL of the run directory.
        parameters: what is to be trained.
        images: on what.
        resume: whether it goes on.
        new_images: on these, whatever it was trained on before.
        attempt: of the job that has reserved it; empty if none has.

    Raises:
        RunError: if it is taken, or `resume` finds no run, or one of other parameters, or (but
            for `new_images`) one of other images.
    """
    if not resume:
        reserved = bool(attempt) and RunWriter(run).exists(PARAMETERS)
        if not reserved or open_run(run).status().job != attempt:
            create_run(run, parameters)
        return
    existing = open_run(run)
    refuse_differences(run, existing.parameters, parameters)
    if not new_images:
        refuse_other_images(run, images)


def refuse_differences(run: str, old: TrainingParameters, new: TrainingParameters) -> None:
    """Raise RunError, naming each parameter that a resumed run may not be told anew.

    It may not be told to end before the place that it has reached, either.
    """
    was, now = old.to_dict(), new.to_dict()
    differences = [
        f"{name} was {was[name]!r} and is {now[name]!r}"
        for name in was
        if was[name] != now[name] and name not in (*MAY_CHANGE, "device")
    ]
    if differences:
        raise RunError(
            f"{run} cannot be resumed with other parameters: {'; '.join(differences)}. "
            f"Only {', '.join(MAY_CHANGE)} may change"
        )
    reached = open_run(run).positions()[-1:]
    if reached > [Position(new.epochs)]:
        raise RunError(
            f"epochs is {new.epochs}, and the newest checkpoint of {run} is {reached[0]}: "
            "epochs counts from the start of the run, so give a larger number"
        )


def refuse_other_images(run: str, images: ImageSet) -> None:
    """Raise RunError if a run was trained on other images than those with which it is to go on."""
    info = open_run(run).info()
    then = info.get("images_sha256", "")
    # Of a torch Dataset nothing but the number is known before its images are read.
    known = isinstance(images.pixels, np.ndarray)
    if then and (then != images.checksum() if known else info["images"] != len(images)):
        raise RunError(
            f"{run} was trained on {info['images']:,} images, and the {len(images):,} that are now "
            f"in {images.source or 'its source'} are not the same: bring the old ones back, or "
            "go on with these by new_images=True"
        )


def tensorboard_path(epoch: int) -> str:
    """Path of an epoch's events below the run directory; TensorBoard reads them by name."""
    return f"tensorboard/events.out.tfevents.epoch_{epoch:04d}"


def _copied(state: Any) -> Any:
    """The same content in memory of its own: training goes on while it is written."""
    if isinstance(state, torch.Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, dict):
        return type(state)((key, _copied(value)) for key, value in state.items())
    if isinstance(state, list):
        return [_copied(value) for value in state]
    return state


def _lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)
