"""Mistakes that the person at the keyboard can mend.

Each is one sentence that names the cause, the value and the cure. A notebook
shows that sentence alone, and `python -m gan_lib` prints it and exits with 2:
a traceback into the library would say less, not more.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something that was asked for cannot be done; the message says what to change."""

    def _render_traceback_(self) -> list[str]:
        # IPython asks an exception for this before it formats a traceback.
        return [f"{type(self).__name__}: {self}"]


class ParameterError(UserError):
    """A parameter has an unknown name, the wrong type or an impossible value."""


class SourceError(UserError):
    """The images that were asked for are not there, or none of them can be used."""


class RunError(UserError):
    """A run directory is missing, already taken, damaged, or of other parameters."""


class ClusterError(UserError):
    """No Dask scheduler answers, or its workers cannot do what the run needs."""


class WorkerLostError(ClusterError):
    """A worker that was counted on was killed, hangs, or cannot be reached."""


class TooFewWorkersError(ClusterError):
    """A cluster has fewer workers than a job needs, or others use them."""


class WorkerRetiredError(WorkerLostError):
    """A worker that was counted on was asked to leave: its time was up, or its place is wanted."""


class DivergenceError(UserError):
    """Training has run away: a loss is no longer a finite number."""


class ReplicaError(UserError):
    """The networks of two ranks, which should be equal, are not."""


class NotebookError(UserError):
    """A cell of a notebook failed; the executed notebook is kept."""


def describe(error: BaseException) -> str:
    """What to keep of an error: the sentence for the user, or type and message of any other."""
    message = str(error).strip()
    if isinstance(error, UserError):
        return message
    return f"{type(error).__name__}: {message}".removesuffix(": ")
