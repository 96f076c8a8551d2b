"""Checkpoints: written with a checksum, verified when read, thinned out as a run goes on.

Beside each lies its checksum, as `sha256sum` writes it: epoch_0107.pt.sha256.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any

import torch

from gan_lib.base.errors import RunError
from gan_lib.base.storage import Folder
from gan_lib.results.files import epoch_path, epochs_of


class DamagedCheckpointError(RunError):
    """A checkpoint is not what was written."""


@dataclass(frozen=True, order=True)
class Position:
    """Where in a run a checkpoint was taken; they sort in the order of the training.

    Attributes:
        epochs: that were complete.
        within: whether some of the next epoch was done too.
    """

    epochs: int
    within: bool = False

    @property
    def path(self) -> str:
        """Of the file, below the run directory."""
        return (
            epoch_path("within", self.epochs + 1)
            if self.within
            else epoch_path("checkpoints", self.epochs)
        )

    def __str__(self) -> str:
        return f"inside epoch {self.epochs + 1}" if self.within else f"of epoch {self.epochs}"


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: the run directory.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def positions(self) -> list[Position]:
        """Those that there are, oldest first."""
        names = self._folder.names("checkpoints")
        within = [Position(epoch - 1, within=True) for epoch in epochs_of("within", names)]
        return sorted([*map(Position, epochs_of("checkpoints", names)), *within])

    def write(self, position: Position, state: dict[str, Any]) -> None:
        """Put a checkpoint in place."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getbuffer()
        line = f"{hashlib.sha256(data).hexdigest()}  {position.path.rpartition('/')[2]}\n"
        # While the new file lies beside the old one's checksum it counts as damaged, and the
        # checkpoint before it is good: so the old checksum goes first.
        self._folder.remove(f"{position.path}.sha256")
        self._folder.write(position.path, [data])
        self._folder.write(f"{position.path}.sha256", line.encode())

    def read(self, position: Position) -> dict[str, Any]:
        """The content of a checkpoint, on the CPU.

        Raises:
            DamagedCheckpointError: if it is not what was written.
            FileNotFoundError: if there is none.
        """
        data = self._folder.read(position.path)
        try:
            told = self._folder.read(f"{position.path}.sha256").decode(errors="replace").split()
        except FileNotFoundError:
            told = []  # its writer was interrupted between the two files
        found = hashlib.sha256(data).hexdigest()
        same = told[:1] in ([], [found])
        why = "" if same else "its checksum is another than when it was written"
        try:
            state = {} if why else torch.load(io.BytesIO(data), "cpu", weights_only=True)
        # torch.load has no exception of its own for a damaged file.
        except Exception as error:
            why = type(error).__name__
        if why:
            raise DamagedCheckpointError(
                f"the checkpoint {position} in {self._folder.url} is damaged ({why}): open another "
                "one by its epoch, or go on from the one before (resume does so by itself)"
            )
        return state

    def newest(self) -> tuple[Position | None, dict[str, Any], list[str]]:
        """The newest checkpoint that is whole.

        Returns:
            Where it was taken (None if there is none), its content, and what was wrong
            with those that are newer.
        """
        damaged: list[str] = []
        for position in reversed(self.positions()):
            try:
                return position, self.read(position), damaged
            except DamagedCheckpointError as error:
                damaged.append(str(error))
        return None, {}, damaged

    def remove(self, position: Position) -> None:
        """Delete a checkpoint, if it is there."""
        self._folder.remove(position.path)
        self._folder.remove(f"{position.path}.sha256")

    def thin_out(self, keep: int, keep_every: int, best: int | None = None) -> None:
        """Delete old checkpoints.

        Args:
            keep: the last so many stay; 0 keeps all.
            keep_every: so do those of epochs that this divides; 0 divides none.
            best: so does that of this epoch.
        """
        there = self.positions()
        newest = there[-1]
        whole = [position for position in there if not position.within]
        recent = whole[-keep:] if keep else whole
        for position in there:
            divides = keep_every and position.epochs % keep_every == 0
            chosen = not position.within and (divides or position.epochs == best)
            # One from inside an epoch is good for nothing once the epoch is complete.
            if position != newest and position not in recent and not chosen:
                self.remove(position)
