"""Writing a run directory: a place taken for it, and its files put there, each whole."""

from __future__ import annotations

import io
import json
import time
import uuid
from collections.abc import Iterable
from typing import Any, Protocol

from gan_lib.base.errors import RunError
from gan_lib.base.storage import Folder
from gan_lib.parameters import TrainingParameters
from gan_lib.results import files
from gan_lib.results.files import LOSSES, PARAMETERS, SCORES, STATUS, STOP
from gan_lib.results.run import Run


class ResultsHandler(Protocol):
    """Takes files of a run by their path below the run directory."""

    def submit_result(self, path: str, data: str | bytes) -> None: ...


class RunWriter(Folder):
    """Writes files of one run directory, each whole or not at all."""

    def submit_result(self, path: str, data: str | bytes) -> None:
        """Put a file in place, replacing an older one of that name."""
        self.write(path, data.encode() if isinstance(data, str) else data)

    def request(self) -> str:
        """What somebody asks for with the file `stop`: "epoch" or "now"; empty without one."""
        try:
            return self.read(STOP).decode().strip() or "epoch"
        except FileNotFoundError:
            return ""

    def set_status(self, state: str, **details: Any) -> None:
        """Say what the run is doing; see `RunStatus` for the states that there are."""
        self.submit_result(STATUS, json.dumps({"state": state, "time": time.time(), **details}))


class OwnWriter(RunWriter):
    """Writes into a run, and deletes there, for as long as the run is its own.

    A rank that was suspended and wakes up must touch nothing that others now train: then
    everything here raises RunError.

    Args:
        url: of the run directory.
        owner: what status.json names as the job that has the run, or how that begins.
    """

    def __init__(self, url: str, owner: str) -> None:
        super().__init__(url)
        self.owner = owner
        self._run = Run(url)

    @classmethod
    def claim(cls, url: str, owner: str) -> OwnWriter:
        """One that makes the run its own, whoever had it before."""
        RunWriter(url).set_status("waiting", job=owner)
        writer = cls(url, owner)
        writer.remove(STOP)  # it came too late for the one before
        return writer

    def owns(self) -> bool:
        """Whether no other job goes on with the run by now."""
        return self._run.status().job.startswith(self.owner)

    def check(self) -> None:
        """Raise RunError if the run is another job's."""
        if not self.owns():
            raise RunError(f"another job goes on with {self.url}: this one ends here")

    def write(
        self, path: str, data: bytes | Iterable[bytes | memoryview], durable: bool = True
    ) -> None:
        self.check()
        super().write(path, data, durable)

    def remove(self, path: str) -> None:
        self.check()
        super().remove(path)


def new_run_url() -> str:
    """A place under `runs/` that no run has taken yet."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    return f"{files.RUNS}/run-{stamp}-{uuid.uuid4().hex[:4]}"


def create_run(url: str, parameters: TrainingParameters) -> None:
    """Reserve a run directory: nothing that an earlier run left there is touched.

    Of several processes that want the same place at once, one gets it.

    Raises:
        RunError: if a run already lives there, or the place cannot be written.
    """
    writer = RunWriter(url)
    try:
        with writer.alone(PARAMETERS):
            refuse_taken(url)
            writer.set_status("waiting")
            told = {"parameters": parameters.to_dict()}
            writer.submit_result(PARAMETERS, json.dumps(told, indent=2))
    except FileExistsError:
        raise _taken(url) from None
    except OSError as error:
        raise RunError(f"the run directory {url} cannot be written: {error}") from error


def refuse_taken(url: str) -> None:
    """Raise RunError if a run lives there, unless it ended before it had made anything."""
    if not RunWriter(url).exists(PARAMETERS):
        return
    run = Run(url)
    made = run.epochs("records") or run.epochs("checkpoints")
    if made or run.status().state in ("waiting", "training"):
        raise _taken(url)


def _taken(url: str) -> RunError:
    return RunError(
        f"{url} already holds a run: choose another place, or go on with it by resume=True (in a "
        f"shell: python -m gan_lib resume {url})"
    )


def tensorboard_events(records: list[dict[str, Any]]) -> bytes:
    """Records as one TensorBoard event file; losses and scores become scalars by iteration.

    Raises:
        ImportError: if tensorboard is not installed.
    """
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    buffer = io.BytesIO()
    writer = RecordWriter(buffer)
    header = Event(wall_time=records[0]["time"], file_version="brain.Event:2")
    writer.write(header.SerializeToString())
    for record in records:
        told = [name for name in (*LOSSES, *SCORES) if name in record]
        values = [Summary.Value(tag=name, simple_value=record[name]) for name in told]
        event = Event(
            wall_time=record["time"], step=record["iteration"], summary=Summary(value=values)
        )
        writer.write(event.SerializeToString())
    return buffer.getvalue()
