"""Makes this very gan_lib importable on a cluster where it is not installed.

Dask loads a function by importing its module. So the package travels first, as
an archive of its own source: to the scheduler, to all workers, and to those
that join later.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pkgutil
import tempfile
import zipfile
from typing import Any

from distributed import Client

import gan_lib
from gan_lib.base.errors import ClusterError, WorkerLostError, describe
from gan_lib.cluster.workers import ask
from gan_lib.sources.manifest import manifest_text

# What preparing and training import, beside Dask and what Python brings itself.
_NEEDED = ("torch", "numpy", "PIL", "simplejpeg", "fsspec", "s3fs", "obstore", "pandas", "tqdm")


def package_checksum() -> str:
    """SHA-256 of the package's own source and manifest as this process imported them."""
    return _IMPORTED


def package_state() -> tuple[str, list[str]]:
    """The checksum, and what this process would need to prepare and train, and could not import."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return package_checksum(), missing


def _files() -> dict[str, bytes]:
    """The package's own source and manifest: path below its folder -> content."""
    paths = ["__init__.py"]
    for module in pkgutil.walk_packages(gan_lib.__path__, "gan_lib."):
        path = module.name.removeprefix("gan_lib.").replace(".", "/")
        paths.append(f"{path}/__init__.py" if module.ispkg else f"{path}.py")
    # Not by opening them: the package itself may be inside such an archive.
    files = {path: pkgutil.get_data("gan_lib", path) or b"" for path in sorted(paths)}
    return {**files, "data_manifest.json": manifest_text().encode()}


def _checksum() -> str:
    return hashlib.sha256(b"".join(_files().values())).hexdigest()


# The files may change while the process lives, and what it runs does not.
_IMPORTED = _checksum()


def ship_package(client: Client, workers: list[str] | None = None) -> None:
    """Make this very gan_lib importable on the scheduler and on all workers, now and later.

    Where there is another version of it, nothing is changed: somebody else may be using it.

    Args:
        client: of the cluster.
        workers: that have to have it now; None means all.

    Raises:
        ClusterError: if one of them or the scheduler has another version, or a worker has no
            torch, say.
        WorkerLostError: if a worker does not answer.
    """
    states = _states(client, workers)
    if None in states.values():
        _upload(client)
        states = _states(client, workers)
    for place, missing in states.items():
        if missing is None or missing:
            raise ClusterError(
                f"{place} cannot import {', '.join(missing or ['gan_lib'])}: install what "
                "requirements.lock names where the workers run, and start them again"
            )


def _upload(client: Client) -> None:
    with tempfile.TemporaryDirectory() as folder:
        archive = os.path.join(folder, f"gan_lib_{package_checksum()[:8]}.zip")
        with zipfile.ZipFile(archive, "w") as file:
            for path, content in _files().items():
                file.writestr(f"gan_lib/{path}", content)
        ask(client, lambda: client.upload_file(archive))


def _states(client: Client, workers: list[str] | None) -> dict[str, list[str] | None]:
    """What the scheduler and each worker lack; None where gan_lib is missing, too."""

    def question() -> dict[str, Any]:
        # Where gan_lib is missing, the function itself cannot be loaded: the error is the answer.
        answers = client.run(package_state, workers=workers, on_error="return")
        found = {f"the worker {worker}": answer for worker, answer in answers.items()}
        try:
            found["the scheduler"] = (client.run_on_scheduler(package_checksum), [])
        except Exception as error:
            found["the scheduler"] = error
        return found

    states: dict[str, list[str] | None] = {}
    for place, answer in ask(client, question, workers or ()).items():
        if isinstance(answer, OSError):
            raise WorkerLostError(f"{place} does not answer: {describe(answer)}")
        if not isinstance(answer, Exception) and answer[0] == _IMPORTED:
            states[place] = answer[1]
        elif _checksum() != _IMPORTED:
            raise ClusterError(
                "the files of gan_lib have changed since this process imported them, and workers "
                "would run another version: restart the kernel, or the script, and its cluster"
            )
        # Dask brings an error of a worker's imports as text.
        elif "No module named 'gan_lib'" in str(answer):
            states[place] = None
        else:
            raise ClusterError(
                f"{place} has another version of gan_lib, which others may be using: install this "
                "one there, or start scheduler and workers again"
            )
    return states
